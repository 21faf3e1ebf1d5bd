"""Models, decoders, adapters and latents in ComfyUI's folders: the entries of menus, and the folder or file of an entry.

An entry's function checks that the menu has it, since ComfyUI does not: a workflow may come from anyone, and names no other
files of this machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import folder_paths

from scale_rae.errors import InputError
from scale_rae.hub import BUNDLED, DECODER_WEIGHTS
from scale_rae.options import DEFAULT_MODEL, PUBLISHED_DECODERS

MODELS = "scale_rae"  # the folder below ComfyUI's models, and the key in extra_model_paths.yaml
PUBLISHED_MODELS = (
    DEFAULT_MODEL,
    "nyu-visionx/Scale-RAE-Qwen7B_DiT9.8B",
    "nyu-visionx/Scale-RAE-Qwen1.5B_DiT2.4B-WebSSL",
)
FIRST_MODEL = "shapes"  # of the menu
MATCHING = "matching"  # the decoder that belongs to the model
_OUTPUT = " [output]"  # ComfyUI's mark of a file that is in its output folder

folder_paths.add_model_folder_path(MODELS, str(Path(folder_paths.models_dir) / MODELS))


def models() -> list[str]:
    """The bundled models, the models in ComfyUI's folders, and the published ones, which are downloaded when first used."""
    here = _names(MODELS, _is_model)
    return list(dict.fromkeys([*BUNDLED, *here, *PUBLISHED_MODELS]))


def decoders() -> list[str]:
    """`MATCHING`, the decoders in ComfyUI's folders, and the published ones."""
    here = _names(MODELS, lambda folder: (folder / "config.json").is_file() and (folder / DECODER_WEIGHTS).is_file())
    return list(dict.fromkeys([MATCHING, *here, *PUBLISHED_DECODERS.values()]))


def adapters() -> list[str]:
    """The LoRA adapters, which are folders, among ComfyUI's loras and Scale-RAE's models."""
    found = [name for kind in ("loras", MODELS) for name in _names(kind, _is_adapter)]
    return list(dict.fromkeys(found))


def latents() -> list[str]:
    """The latent files in ComfyUI's input folder, and those in its output folder with ` [output]` behind the name."""
    written = _latents_below(folder_paths.get_output_directory())
    return [*_latents_below(folder_paths.get_input_directory()), *(name + _OUTPUT for name in written)]


def model(name: str) -> str:
    """The folder of an entry of `models`, or the name that `scale_rae.load` finds it by.

    Raises:
        InputError: for a name that the menu does not have; the functions below do so too.
    """
    return _folder(_listed(name, models(), "model"), MODELS)


def decoder(name: str) -> str | None:
    """The folder or hub id of an entry of `decoders`; None for `MATCHING`."""
    return None if name == MATCHING else _folder(_listed(name, decoders(), "decoder"), MODELS)


def adapter(name: str) -> str:
    """The folder of an entry of `adapters`."""
    return _folder(_listed(name, adapters(), "adapter"), "loras", MODELS)


def latent_file(name: str) -> Path:
    """The path of an entry of `latents`."""
    return Path(folder_paths.get_annotated_filepath(_listed(name, latents(), "latent")))


def new_latent_files(prefix: str, count: int) -> list[Path]:
    """The paths of latents to write, numbered from the first free number; ComfyUI allows none outside its output folder."""
    folder, name, number, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    return [Path(folder) / f"{name}_{number + i:05}_latent.pt" for i in range(count)]


def _listed(name: str, names: Sequence[str], what: str) -> str:
    if name not in names:
        raise InputError(f"{what} {name!r:.80}: not in ComfyUI's folders; there are: {', '.join(names) or 'none'}")
    return name


def _folder(name: str, *kinds: str) -> str:
    """The folder called `name` below ComfyUI's folders of these kinds; the name itself if there is none."""
    found = [Path(root) / name for kind in kinds for root in folder_paths.get_folder_paths(kind)]
    return next((str(folder) for folder in found if folder.is_dir()), name)


def _names(kind: str, fits: Callable[[Path], bool]) -> list[str]:
    """Folders that fit, up to two levels below the folders of a kind, by their path from there."""
    roots = [Path(path) for path in folder_paths.get_folder_paths(kind)]
    return [folder.relative_to(root).as_posix() for root in roots for folder in _folders(root) if fits(folder)]


def _folders(root: Path) -> Iterator[Path]:
    for pattern in ("*", "*/*"):  # NAME, or OWNER/NAME as on the hub
        yield from sorted(path for path in root.glob(pattern) if path.is_dir())


def _is_model(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "cambrian_qwen"


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _latents_below(root: str) -> list[str]:
    return [path.relative_to(root).as_posix() for path in sorted(Path(root).glob("**/*.pt"))]
