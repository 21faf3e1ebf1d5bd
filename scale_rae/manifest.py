"""What a manifest and a PNG record of an image: the settings that drew it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scale_rae.files import sha256
from scale_rae.jsonio import dump_json
from scale_rae.options import Sampling
from scale_rae.version import __version__


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
    return {
        **mode,
        "prompt": prompt,
        **recorded,
        **opened,
        "seed": sampling.seed,
        "image_seeds": list(image_seeds),
        "guidance_level": sampling.guidance_level,
        "guidance_interval": list(sampling.guidance_interval) if sampling.guidance_interval else None,
        "solver": sampling.solver,
        "steps": sampling.steps,
        "max_new_tokens": sampling.max_new_tokens,
        "batch_size": batch_size,
        "prompts_in_batch": prompts_in_batch,
        "output_text": output_text,
        "seconds": dict(seconds),
    }


def input_latents(paths: Sequence[Path]) -> dict[str, Any]:
    """A manifest's fields on the latents that were shown to the model."""
    return {"input_latents": [str(path) for path in paths], "input_latents_sha256": [sha256(path) for path in paths]}


def png_text(manifest: Mapping[str, Any], seed: int | None = None) -> dict[str, str]:
    """A PNG's text chunks: the settings in its manifest, and its noise seed."""
    keys = ("mode", "action", "prompt", "seed", "model_path", "guidance_level", "guidance_interval", "solver", "steps")
    fields = {key: manifest.get(key) for key in (*keys, "max_new_tokens", "dtype", "quantize")}
    return text_chunks(fields | {"image_seed": seed})


def text_chunks(fields: Mapping[str, Any]) -> dict[str, str]:
    """A PNG's text chunks: this package's version, then `fields`, as JSON unless they are text; None is left out."""
    text = {"Software": f"scale_rae {__version__}"}
    for key, value in fields.items():
        if value is not None:
            text[key] = value if isinstance(value, str) else dump_json(value)
    return text
