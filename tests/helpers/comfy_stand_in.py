"""A stand-in for the part of ComfyUI that its Scale-RAE nodes use, and a runner of workflows in API form.

Inputs, outputs and schemas take the arguments that ComfyUI's V3 node API has, and refuse others, as the real ones do.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

NODES = Path(__file__).parents[2] / "integrations" / "comfyui"
_ANY_INPUT = {"display_name", "optional", "tooltip", "lazy", "extra_dict"}
_WIDGET = {*_ANY_INPUT, "default", "socketless", "force_input"}
_WIDGETS = {
    "Int": ("INT", {*_WIDGET, "min", "max", "step", "control_after_generate", "display_mode"}),
    "Float": ("FLOAT", {*_WIDGET, "min", "max", "step", "round", "display_mode"}),
    "String": ("STRING", {*_WIDGET, "multiline", "placeholder", "dynamic_prompts"}),
    "Boolean": ("BOOLEAN", {*_WIDGET, "label_on", "label_off"}),
    "Combo": ("COMBO", {*_WIDGET, "options", "control_after_generate"}),
}


class Interrupted(Exception):
    """What ComfyUI raises in a node when the user interrupts the run."""


class Slot:
    """An input or output of a node: its `id`, `type` and other `options`."""

    def __init__(self, id: str | None, kind: str, allowed: set[str], options: dict[str, Any]) -> None:
        if wrong := options.keys() - allowed:
            raise TypeError(f"{kind} {id}: no argument {sorted(wrong)}")
        self.id, self.type, self.options = id, kind, options


class Schema:
    """The description of a node."""

    def __init__(
        self,
        node_id: str,
        display_name: str | None = None,
        category: str = "sd",
        inputs: list[Slot] | None = None,
        outputs: list[Slot] | None = None,
        description: str = "",
        is_output_node: bool = False,
    ) -> None:
        self.node_id, self.display_name, self.category, self.description = node_id, display_name, category, description
        self.inputs, self.outputs, self.is_output_node = inputs or [], outputs or [], is_output_node
        names = [slot.id for slot in self.inputs]
        assert len(names) == len(set(names)), f"{node_id}: two inputs have the same id"


class NodeOutput:
    """What a node returns: its outputs in order."""

    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui


class ComfyExtension(ABC):
    """What `comfy_entrypoint` returns."""

    @abstractmethod
    async def get_node_list(self) -> list[Any]:
        """The nodes."""


def slot_type(kind: str, allowed: set[str]) -> Any:
    """A type of the API: a class with Input and Output."""

    def make_input(id: str, **options: Any) -> Slot:
        return Slot(id, kind, allowed, options)

    def make_output(id: str | None = None, **options: Any) -> Slot:
        return Slot(id, kind, {"display_name", "tooltip", "is_output_list"}, options)

    return SimpleNamespace(Input=make_input, Output=make_output)


class Comfy:
    """A ComfyUI with its folders in `root`; `progress` has (value, total, preview) of each movement of a node's bar."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.progress: list[tuple[int, int, Any]] = []
        self.previews = "none"
        self.interrupt_at: int | None = None  # a value of the bar
        self.unloaded = 0
        # Bytes asked for, each time that results of earlier workflows were to be dropped.
        self.released: list[float] = []
        self.device = "cpu"
        self.folders = {"loras": [str(root / "models" / "loras")]}
        for name in ("models/loras", "models/scale_rae", "input", "output"):
            (root / name).mkdir(parents=True)

    def modules(self) -> dict[str, ModuleType]:
        """The modules that nodes import, by name."""
        io = module(
            "comfy_api.latest.io",
            **{name: slot_type(kind, allowed) for name, (kind, allowed) in _WIDGETS.items()},
            Image=slot_type("IMAGE", _ANY_INPUT),
            Custom=lambda name: slot_type(name, _ANY_INPUT),
            Schema=Schema,
            ComfyNode=type("ComfyNode", (), {}),
            NodeOutput=NodeOutput,
        )
        management = module(
            "comfy.model_management",
            throw_exception_if_processing_interrupted=self._stop,
            get_torch_device=lambda: self.device,
            unload_all_models=self._unload,
            soft_empty_cache=lambda: None,
        )
        memory = module("comfy.memory_management", extra_ram_release=lambda target: self.released.append(target))
        cli_args = module("comfy.cli_args", args=self)
        utils = module("comfy.utils", ProgressBar=lambda total: ProgressBar(self, total))
        return {
            "comfy_api": module("comfy_api"),
            "comfy_api.latest": module("comfy_api.latest", io=io, ComfyExtension=ComfyExtension),
            "comfy": module(
                "comfy", model_management=management, memory_management=memory, utils=utils, cli_args=cli_args
            ),
            "comfy.model_management": management,
            "comfy.utils": utils,
            "comfy.cli_args": cli_args,
            "folder_paths": module(
                "folder_paths",
                models_dir=str(self.root / "models"),
                add_model_folder_path=lambda name, path: self.folders.setdefault(name, []).append(path),
                get_folder_paths=lambda name: list(self.folders[name]),
                get_input_directory=lambda: str(self.root / "input"),
                get_output_directory=lambda: str(self.root / "output"),
                get_annotated_filepath=self._annotated,
                get_save_image_path=self._save_path,
            ),
        }

    @property
    def preview_method(self) -> SimpleNamespace:
        """ComfyUI's setting of previews."""
        return SimpleNamespace(value=self.previews)

    preview_size = 512

    def _stop(self) -> None:
        if self.interrupt_at is not None and self.progress and self.progress[-1][0] >= self.interrupt_at:
            raise Interrupted

    def _unload(self) -> None:
        self.unloaded += 1

    def _annotated(self, name: str) -> str:
        plain = name.removesuffix("[output]")
        return os.path.join(self.root / ("output" if plain != name else "input"), plain.rstrip())  # noqa: PTH118

    def _save_path(self, prefix: str, folder: str) -> tuple[str, str, int, str, str]:
        place = Path(folder) / prefix
        place.parent.mkdir(parents=True, exist_ok=True)
        return str(place.parent), place.name, 1 + len(list(place.parent.glob(f"{place.name}_*"))), "", prefix


class ProgressBar:
    """A node's progress bar."""

    def __init__(self, comfy: Comfy, total: int) -> None:
        self._comfy, self.total, self.current = comfy, total, 0

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        """Moves the bar."""
        self.total = total or self.total
        self.current = value
        self._comfy.progress.append((value, self.total, preview))


def module(name: str, **contents: Any) -> ModuleType:
    """A module with these contents."""
    made = ModuleType(name)
    vars(made).update(contents)
    return made


def load_nodes(name: str) -> ModuleType:
    """The nodes' package, imported by its path as ComfyUI does; `name` and what is below it go into sys.modules."""
    spec = importlib.util.spec_from_file_location(name, NODES / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    return package


def run(
    workflow: dict[str, Any], nodes: dict[str, Any], others: Callable[[str, dict[str, Any]], Any]
) -> dict[str, Any]:
    """The outputs of each node of a workflow in API form; `others` runs nodes that are ComfyUI's own."""
    done: dict[str, Any] = {}

    def outputs(key: str) -> Any:
        if key not in done:
            entry = workflow[key]
            inputs = {
                name: outputs(value[0])[value[1]] if isinstance(value, list) else value
                for name, value in entry["inputs"].items()
            }
            node = nodes.get(entry["class_type"])
            done[key] = others(entry["class_type"], inputs) if node is None else node.execute(**inputs).args
        return done[key]

    for key in workflow:
        outputs(key)
    return done
