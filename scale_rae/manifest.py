"""The content of manifests and of text in PNGs: the settings that drew an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scale_rae.files import sha256
from scale_rae.jsonio import Fields, dump_json
from scale_rae.options import LARGEST_SEED, Sampling, SamplingOptions, from_record, options_of, to_record
from scale_rae.version import __version__

# The sampler's options in the order that manifests have them: `steps` last.
SAMPLER_FIELDS = tuple(sorted((o.name for o in options_of(SamplingOptions)), key=lambda name: name == "steps"))
_ALWAYS_THERE = ("guidance_level", "solver", "steps")  # in manifests of every version


def drawing_manifest(
    mode: Mapping[str, Any],
    prompt: str,
    recorded: Mapping[str, Any],
    opened: Mapping[str, Any],
    sampling: Sampling,
    image_seeds: Sequence[int],
    batch_size: int,
    prompts_in_batch: int,
    output_text: str,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """One message's manifest, without the paths that writing adds. `opened` is `OpenedModel.record`'s."""
    options = to_record(sampling.options)
    gpu = {"noise_gpu": noise_gpu(opened["device"])} if "noise" in options else {}
    return {
        **mode,
        "prompt": prompt,
        **recorded,
        **opened,
        "seed": sampling.seeds[0] if len(sampling.seeds) == 1 else list(sampling.seeds),
        "image_seeds": list(image_seeds),
        **{name: options[name] for name in SAMPLER_FIELDS if name in options},
        **gpu,
        "max_new_tokens": sampling.max_new_tokens,
        "batch_size": batch_size,
        "prompts_in_batch": prompts_in_batch,
        "output_text": output_text,
        "seconds": dict(seconds),
    }


def noise_gpu(device: str) -> str:
    """The name of the GPU that draws noise "cuda" for a model on `device`; imports torch."""
    import torch

    from scale_rae.noise import gpu_name

    return gpu_name(torch.device(device))


def recorded_sampling(manifest: Fields) -> Sampling:
    """How the images of a manifest were drawn.

    Raises:
        manifest.error: naming a field that is missing or is not what it should be.
    """
    seeds = manifest.get("image_seeds", list)
    if not all(_is_seed(s) for s in seeds):
        raise manifest.fail("image_seeds", "must be whole numbers")
    for name in _ALWAYS_THERE:
        manifest.get(name, object)
    try:
        options = from_record(SamplingOptions, manifest.raw)
    except ValueError as e:
        raise manifest.error(f"{manifest.where}: {e}") from e
    return Sampling(
        num_images=len(seeds),
        seed=_recorded_seed(manifest),
        options=options,
        max_new_tokens=manifest.get("max_new_tokens", int),
        batch_size=manifest.get("batch_size", int, None),
        image_seeds=tuple(seeds),
    )


def _recorded_seed(manifest: Fields) -> int | tuple[int, ...]:
    seed: int | list[int] = manifest.get("seed", (int, list))
    if isinstance(seed, int):
        return seed
    if not seed or not all(_is_seed(s) for s in seed):
        raise manifest.fail("seed", "must be a whole number, or several")
    return tuple(seed)


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_SEED


def input_latents(paths: Sequence[Path]) -> dict[str, Any]:
    """A manifest's fields on the latents that were shown to the model."""
    return {"input_latents": [str(path) for path in paths], "input_latents_sha256": [sha256(path) for path in paths]}


def png_text(manifest: Mapping[str, Any], seed: int | None = None) -> dict[str, str]:
    """A PNG's text chunks: the settings in its manifest, and its noise seed."""
    keys = (
        "mode",
        "action",
        "prompt",
        "seed",
        "model_path",
        *SAMPLER_FIELDS,
        "max_new_tokens",
        "dtype",
        "quantize",
        "lora",
    )
    fields = {key: manifest.get(key) for key in keys}
    return text_chunks(fields | {"image_seed": seed})


def text_chunks(fields: Mapping[str, Any]) -> dict[str, str]:
    """A PNG's text chunks: this package's version, then `fields`, as JSON unless they are text; None is left out."""
    text = {"Software": f"scale_rae {__version__}"}
    for key, value in fields.items():
        if value is not None:
            text[key] = value if isinstance(value, str) else dump_json(value)
    return text
