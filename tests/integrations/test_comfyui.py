"""The ComfyUI nodes, against a stand-in for the part of ComfyUI that they use."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import tomllib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import scale_rae
from scale_rae import ScaleRAE, ScaleRAEError
from scale_rae.errors import InputError, OptionError
from scale_rae.options import ModelChoice, Sampling, SamplingOptions, SearchOptions
from scale_rae.outputs import latent_bytes
from tests.helpers.comfy_stand_in import NODES, Comfy, Interrupted, load_nodes, run

WORKFLOWS = sorted(path.stem for path in (NODES / "example_workflows").glob("*.json"))
PROMPT = "Can you generate a photo of a blue cross and a pink square?"
ABOUT = "a photo of a red circle"
QUICK = {"steps": 2, "solver": "ab2"}
LATENT = "latents/Scale-RAE_00001_latent.pt [output]"


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    made = Comfy(tmp_path_factory.mktemp("comfy"))
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in made.modules().items():
            patch.setitem(sys.modules, name, module)
        load_nodes("comfy_nodes")
        yield made
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "comfy_nodes":
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _as_at_first(comfy: Comfy) -> None:
    comfy.progress.clear()
    comfy.previews, comfy.interrupt_at, comfy.device = "none", None, "cpu"


@pytest.fixture(scope="module")
def package(comfy: Comfy) -> Any:
    return sys.modules["comfy_nodes"]


@pytest.fixture(scope="module")
def nodes(package: Any) -> dict[str, Any]:
    found = asyncio.run(asyncio.run(package.comfy_entrypoint()).get_node_list())
    return {node.define_schema().node_id: node for node in found}


@pytest.fixture(scope="module")
def model(nodes: dict[str, Any]) -> ScaleRAE:
    return nodes["ScaleRAELoadModel"].execute(**defaults(nodes["ScaleRAELoadModel"])).args[0]


def defaults(node: Any) -> dict[str, Any]:
    """The values of a node's widgets as it comes from the menu."""
    return {
        slot.id: slot.options.get("default", slot.options.get("options", [None])[:1])
        for slot in node.define_schema().inputs
        if "default" in slot.options
    }


def workflow(name: str, form: str = "") -> dict[str, Any]:
    return json.loads((NODES / "example_workflows" / form / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def example_files(comfy: Comfy, model: ScaleRAE) -> None:
    """The latent and the adapter that example workflows name."""
    (comfy.root / "output" / "latents").mkdir()
    latent = torch.zeros(model.config.tokens, model.config.channels)
    (comfy.root / "output" / LATENT.removesuffix(" [output]")).write_bytes(latent_bytes(latent))
    folder = comfy.root / "models" / "loras" / "my-lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1, "r": 1}))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    rows = {"A": torch.zeros(1, 256), "B": torch.zeros(256, 1)}
    save_file({f"{name}.lora_{part}.weight": rows[part] for part in "AB"}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_example_workflows_run(name: str, nodes: dict[str, Any], model: ScaleRAE, example_files: None) -> None:
    seen: list[str] = []

    def others(kind: str, inputs: dict[str, Any]) -> None:
        seen.append(kind)
        if kind in ("SaveImage", "PreviewImage"):
            images = inputs["images"]
            assert images.dtype == torch.float32
            assert images.shape[1:] == (128, 128, 3)
        else:
            assert kind == "PreviewAny"

    api = workflow(name, "api")
    for entry in api.values():
        if "steps" in entry["inputs"]:
            entry["inputs"] |= QUICK | {"num_images": 1, "candidates": 2, "keep": 1, "max_candidates": 1}
            entry["inputs"] |= {"check_at": "0.9", "steps": 4 if "check_at" in entry["inputs"] else 2}
            names = {slot.id for slot in nodes[entry["class_type"]].define_schema().inputs}
            entry["inputs"] = {name: value for name, value in entry["inputs"].items() if name in names}
    loading = {key for key, entry in api.items() if entry["class_type"] == "ScaleRAELoadModel"}
    if "lora" not in name:
        nodes = nodes | {"ScaleRAELoadModel": type("Loaded", (), {"execute": lambda **_: Returned(model)})}
    done = run(api, nodes, others)
    assert seen
    assert all(isinstance(done[key][0], ScaleRAE) for key in loading)
    if "lora" in name:
        (key,) = loading
        assert [(source.folder.name, weight) for source, weight in done[key][0].adapters] == [("my-lora", 1.0)]


class Returned:
    """What a node returned."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.mark.parametrize("name", WORKFLOWS)
def test_both_forms_of_a_workflow_are_one(name: str, nodes: dict[str, Any]) -> None:
    page, api = workflow(name), workflow(name, "api")
    links = {link[0]: [str(link[1]), link[2]] for link in page["links"]}
    assert {str(node["id"]) for node in page["nodes"]} == set(api)
    for node in page["nodes"]:
        entry = api[str(node["id"])]
        assert node["type"] == entry["class_type"]
        connected = {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        values = iter(node["widgets_values"])
        widgets = {}
        for slot in node["inputs"]:
            if "widget" in slot:
                widgets[slot["name"]] = next(values)
                if slot["name"] == "seed":
                    assert next(values) == "fixed"  # what is done with the seed after a run
        assert not list(values)
        assert connected | widgets == entry["inputs"]
        if (kind := nodes.get(node["type"])) is not None:
            schema = kind.define_schema()
            sockets = {slot.id: slot for slot in schema.inputs}
            assert [slot["type"] for slot in node["outputs"]] == [slot.type for slot in schema.outputs]
            assert {slot["name"]: slot["type"] for slot in node["inputs"]} == {s.id: s.type for s in schema.inputs}
            needed = {id for id, slot in sockets.items() if not slot.options.get("optional")}
            assert needed <= entry["inputs"].keys()
    assert (NODES / "example_workflows" / f"{name}.jpg").is_file()


def test_text_to_image_draws_what_generate_draws(nodes: dict[str, Any], model: ScaleRAE, comfy: Comfy) -> None:
    node = nodes["ScaleRAETextToImage"]
    comfy.previews = "auto"
    options = defaults(node) | QUICK | {"prompt": PROMPT, "num_images": 2, "batch_size": 1, "guidance_level": 3.0}
    images, latents, reply = node.execute(model=model, **options).args
    sampling = SamplingOptions(guidance=3.0, steps=2, solver="ab2")
    drawn = model.generate(PROMPT, num_images=2, batch_size=1, options=sampling)
    assert reply == drawn.text
    for image, latent, expected in zip(images, latents, drawn.images, strict=True):
        # As ComfyUI's Save Image makes pixels.
        assert np.array_equal((255.0 * image.numpy()).astype(np.uint8), np.asarray(expected.image))
        assert torch.equal(latent, expected.latent)
    assert [(value, total) for value, total, _ in comfy.progress] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [preview is not None for *_, preview in comfy.progress] == [True, False, True, False]
    kind, picture, size = comfy.progress[0][2]
    assert (kind, picture.size, size) == ("JPEG", (128, 128), 512)


def test_drawing_can_be_interrupted(nodes: dict[str, Any], model: ScaleRAE, comfy: Comfy) -> None:
    comfy.interrupt_at = 2
    options = {"prompt": PROMPT, "steps": 8, "solver": "ab2"}
    with pytest.raises(Interrupted):
        nodes["ScaleRAETextToImage"].execute(model=model, **(defaults(nodes["ScaleRAETextToImage"]) | options))
    assert comfy.progress[-1][:2] == (2, 8)
    comfy.progress.clear()
    comfy.interrupt_at = 0
    search = defaults(nodes["ScaleRAEDrawUntilAccepted"]) | options
    with pytest.raises(Interrupted):
        nodes["ScaleRAEDrawUntilAccepted"].execute(model=model, **search)


def test_reading_can_be_interrupted_between_batches(
    nodes: dict[str, Any], model: ScaleRAE, comfy: Comfy, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = nodes["ScaleRAEScore"].__module__
    monkeypatch.setattr(sys.modules[package], "READ_AT_ONCE", 1)
    monkeypatch.setattr(sys.modules[package], "CODE_AT_ONCE", 2)
    latents = torch.zeros(3, model.config.tokens, model.config.channels)
    (images,) = nodes["ScaleRAEDecode"].execute(model=model, latents=latents).args
    assert [move[:2] for move in comfy.progress] == [(2, 3), (3, 3)]
    assert len(images) == 3
    comfy.interrupt_at = 1
    for name, inputs, done in (("Score", {"latents": latents, "prompt": ABOUT}, 1), ("Encode", {"images": images}, 2)):
        comfy.progress.clear()
        with pytest.raises(Interrupted):
            nodes[f"ScaleRAE{name}"].execute(model=model, **inputs)
        assert [move[:2] for move in comfy.progress] == [(done, 3)]


def test_a_reply_without_a_picture_is_an_error(nodes: dict[str, Any], model: ScaleRAE) -> None:
    for name, prompt in (("TextToImage", "How are you?"), ("BestOfN", "an elephant"), ("DrawUntilAccepted", "a car")):
        node = nodes[f"ScaleRAE{name}"]
        with pytest.raises(
            InputError, match=r"without drawing: 'I only draw.*the bundled model draws one to four shapes"
        ):
            node.execute(model=model, **(defaults(node) | {"prompt": prompt}))


def test_errors_name_inputs_and_not_flags(
    nodes: dict[str, Any], model: ScaleRAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ScaleRAE, "generate", None)  # all are found before anything is drawn
    search, best, load = (nodes[f"ScaleRAE{name}"] for name in ("DrawUntilAccepted", "BestOfN", "LoadModel"))
    for node, given, message in (
        (search, {"check_at": "0.5 0.9"}, "^check at 0.5 0.9: must fall"),
        (search, {"keep": 9, "max_candidates": 4}, "^max candidates 4: must be at least"),
        (best, {"metric": "image_reward"}, "^metric image_reward: needs a reward; connect Load Scale-RAE Reward"),
    ):
        with pytest.raises(InputError, match=message):
            node.execute(model=model, **(defaults(node) | given))
    with pytest.raises(OptionError, match=r"; use offload none$"):
        load.execute(**(defaults(load) | {"offload": "model"}))


def test_latents_pass_through_files_and_are_read(nodes: dict[str, Any], model: ScaleRAE, comfy: Comfy) -> None:
    drawn = model.generate(PROMPT, num_images=2, steps=2, solver="ab2")
    latents = torch.stack([one.latent for one in drawn.images])
    (passed,) = nodes["ScaleRAESaveLatent"].execute(latents=latents, filename_prefix="some/name").args
    assert passed is latents
    files = sorted((comfy.root / "output" / "some").iterdir())
    assert [file.name for file in files] == ["name_00001_latent.pt", "name_00002_latent.pt"]
    assert files[0].read_bytes() == latent_bytes(latents[0])
    load = nodes["ScaleRAELoadLatent"]
    name = "some/name_00002_latent.pt [output]"
    assert name in load.define_schema().inputs[0].options["options"]
    (loaded,) = load.execute(latent=name).args
    assert torch.equal(loaded, latents[1:])
    before = load.fingerprint_inputs(latent=name)
    files[1].write_bytes(latent_bytes(latents[0]) + b" ")
    assert load.fingerprint_inputs(latent=name) != before
    (images,) = nodes["ScaleRAEDecode"].execute(model=model, latents=loaded).args
    assert np.array_equal((255.0 * images[0].numpy()).astype(np.uint8), np.asarray(drawn.images[1].image))
    (encoded,) = nodes["ScaleRAEEncode"].execute(model=model, images=images).args
    assert torch.equal(encoded[0], model.encode(drawn.images[1].image)[0])
    ask = {"question": "Describe this image.", "max_new_tokens": 20}
    (answers,) = nodes["ScaleRAEAsk"].execute(model=model, images=images, **ask).args
    assert answers == [model.answer("Describe this image.", latents=encoded[0], max_new_tokens=20)[0].text]
    with pytest.raises(InputError, match="either images or latents"):
        nodes["ScaleRAEAsk"].execute(model=model, **ask)


def test_scores_and_best_of_n_are_the_packages(nodes: dict[str, Any], model: ScaleRAE) -> None:
    best = nodes["ScaleRAEBestOfN"]
    options = defaults(best) | QUICK | {"prompt": ABOUT, "candidates": 3, "keep": 2}
    (reward,) = nodes["ScaleRAELoadReward"].execute(model=model, reward="auto").args
    _, latents, report = best.execute(model=model, reward=reward, **options).args
    drawn = model.generate(f"Can you generate {ABOUT}", num_images=3, steps=2, solver="ab2")
    seeds = [entry["seed"] for entry in json.loads(report)]
    assert sorted(seeds) == sorted(one.seed for one in drawn.images)
    order = [next(i for i, one in enumerate(drawn.images) if one.seed == seed) for seed in seeds]
    assert all(torch.equal(latent, drawn.images[i].latent) for latent, i in zip(latents, order[:2], strict=True))
    rewards = reward.score([one.image for one in drawn.images if one.image is not None], ABOUT)
    assert [entry["reward"] for entry in json.loads(report)] == [rewards[i] for i in order]
    answers, confidences, losses, scores = (
        nodes["ScaleRAEScore"].execute(model=model, latents=latents, prompt=ABOUT).args
    )
    expected = model.score(list(latents), ABOUT, request=f"Can you generate {ABOUT}")
    assert answers == [score.answer for score in expected]
    assert losses == [score.prompt_loss for score in expected]
    assert [json.loads(text)["score"] for text in scores] == confidences
    with pytest.raises(InputError, match="only 3 candidates"):
        best.execute(model=model, **(options | {"keep": 4}))


def test_draw_until_accepted_is_search(nodes: dict[str, Any], model: ScaleRAE, comfy: Comfy) -> None:
    node = nodes["ScaleRAEDrawUntilAccepted"]
    options = defaults(node) | {"prompt": ABOUT, "steps": 4, "solver": "ab2", "max_candidates": 2, "check_at": "0.9"}
    _, latents, report = node.execute(model=model, **options).args
    search = SearchOptions(check_at=(0.9,), max_candidates=2)
    sampling = SamplingOptions(steps=4, solver="ab2")
    found = scale_rae.search(model, ABOUT, reward=None, search=search, options=sampling)
    assert torch.equal(latents[0], found.images[0].latent)
    assert json.loads(report)["kept"][0]["seed"] == found.images[0].seed
    assert comfy.progress[-1][:2] == (len(found.candidates), 2)
    with pytest.raises(OptionError, match="there is no reward"):
        node.execute(model=model, **(options | {"accept_reward": "1.5"}))


def test_inputs_have_the_options_defaults(package: Any, nodes: dict[str, Any]) -> None:
    inputs = sys.modules["comfy_nodes.inputs"]
    for node, options in (
        ("ScaleRAELoadModel", ModelChoice()),
        ("ScaleRAETextToImage", Sampling()),
        ("ScaleRAEDrawUntilAccepted", SearchOptions()),
    ):
        assert inputs.options_from(options, defaults(nodes[node]) | {"device": None, "decoder": None}) == options
    for node in nodes.values():
        for slot in node.define_schema().inputs:
            text = slot.options.get("tooltip", "")
            assert text or slot.type.startswith(("SCALE_RAE", "IMAGE")), slot.id  # each widget has a tooltip
            assert "--" not in text
            assert "random" not in text  # what only a flag takes
            assert "Given twice" not in text
    given = {"guidance_interval": "0.1 0.9", "batch_size": 4, "accept_reward": "2"}
    sampling = inputs.options_from(Sampling(), given)
    assert (sampling.options.interval, sampling.batch_size) == ((0.1, 0.9), 4)
    assert inputs.options_from(SearchOptions(), {"check_at": "0.9, 0.7", "accept_reward": "2"}) == SearchOptions(
        check_at=(0.9, 0.7), accept_reward=2.0
    )
    assert inputs.options_from(ModelChoice(), {"memory": "8G", "quantize": "int8"}).memory == "8G"
    with pytest.raises(OptionError, match="guidance interval 'x': must be 2 numbers"):
        inputs.options_from(Sampling(), {"guidance_interval": "x"})


def test_models_are_found_in_comfyuis_folders(package: Any, nodes: dict[str, Any], comfy: Comfy) -> None:
    folders = sys.modules["comfy_nodes.folders"]
    root = comfy.root / "models" / "scale_rae"
    for name, kind in (("mine", "cambrian_qwen"), ("owner/other", "cambrian_qwen"), ("decoder", "vit_mae")):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text(json.dumps({"model_type": kind}))
    (root / "decoder" / "model.pt").touch()
    assert folders.models()[:4] == ["shapes", "shapes-4", "mine", "owner/other"]
    assert folders.decoders()[:2] == ["matching", "decoder"]
    assert folders.model("owner/other") == str(root / "owner" / "other")
    assert folders.model("shapes") == "shapes"
    assert folders.decoder("matching") is None
    assert folders.decoder("decoder") == str(root / "decoder")


def test_names_that_no_menu_has_are_refused(nodes: dict[str, Any], comfy: Comfy) -> None:
    (comfy.root / "secret.pt").touch()
    load = defaults(nodes["ScaleRAELoadModel"])
    with pytest.raises(InputError, match=r"latent '\.\./secret\.pt': not in ComfyUI's folders"):
        nodes["ScaleRAELoadLatent"].execute(latent="../secret.pt")
    for name, value in (("model", "../.."), ("decoder", "/"), ("memory", "lots"), ("device", "moon")):
        with pytest.raises(ScaleRAEError, match=name):
            nodes["ScaleRAELoadModel"].execute(**(load | {name: value}))
    with pytest.raises(InputError, match="adapter"):
        nodes["ScaleRAELora"].execute(adapter="..", weight=1.0)


def test_comfyuis_models_and_earlier_workflows_make_room_on_a_gpu(
    nodes: dict[str, Any], comfy: Comfy, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr("scale_rae.networks.load", lambda choice, **_: asked.append(choice.device))
    monkeypatch.setattr(ScaleRAE, "__init__", lambda *_: None)
    before, comfy.device = comfy.unloaded, "cuda:0"
    nodes["ScaleRAELoadModel"].execute(**defaults(nodes["ScaleRAELoadModel"]))
    nodes["ScaleRAELoadModel"].execute(**(defaults(nodes["ScaleRAELoadModel"]) | {"device": "cpu"}))
    assert asked == ["cuda:0", "cpu"]
    assert comfy.unloaded == before + 1
    assert comfy.released == [math.inf]
    monkeypatch.delattr(sys.modules["comfy"], "memory_management")  # as in ComfyUI 0.3.64
    nodes["ScaleRAELoadModel"].execute(**defaults(nodes["ScaleRAELoadModel"]))
    assert comfy.unloaded == before + 2


def test_the_registrys_file_has_the_packages_version_and_address() -> None:
    described, package = (
        tomllib.loads((folder / "pyproject.toml").read_text())["project"] for folder in (NODES, NODES.parents[1])
    )
    assert (described["name"], described["version"]) == ("scale-rae", scale_rae.__version__)
    assert described["urls"]["Repository"] == package["urls"]["Repository"]
    assert described["requires-python"] == package["requires-python"]
    # ComfyUI's manager installs what requirements.txt names, and reads no dependencies of pyproject.toml.
    assert (NODES / "requirements.txt").read_text().split() == described["dependencies"]
