"""`scale-rae inspect`: what is read of a model before it is downloaded, what is found, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.made_up import config_json, decoder_json, encoder_json
from scale_rae.config import parse_config
from scale_rae.errors import CheckpointError, ConfigError, HubError
from scale_rae.hub import find
from scale_rae.inspection import inspect
from scale_rae.layout import TensorShapes, model_layout
from tests.cli.conftest import Cli, cli  # noqa: F401 - a fixture
from tests.helpers.fake_hub import FakeHub, Large, Repo, own_hub, point_at

MODEL, ENCODER, DECODER = "some-lab/drawer", "google/siglip2-so400m-patch14-224", "nyu-visionx/siglip2_decoder"
SMALL_ENCODER = "google/siglip2-base-patch14-224"
TOKENIZER: dict[str, bytes | Large] = {"vocab.json": b"{}", "merges.txt": b"", "tokenizer_config.json": b"{}"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with own_hub(tmp_path / "cache", monkeypatch) as hub:
        yield hub


def header_of(layout: TensorShapes, dtype: str = "BF16", width: int = 2) -> Large:
    """A safetensors file with these tensors, all zeros."""
    entries, end = {}, 0
    for name, shape in layout.items():
        start, end = end, end + prod(shape) * width
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    return Large(len(text).to_bytes(8, "little") + text, 8 + len(text) + end)


def sharded(layout: TensorShapes, shards: int) -> dict[str, bytes | Large]:
    """The tensors in shards, with an index."""
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    home = {name: names[i * shards // len(layout)] for i, name in enumerate(layout)}
    files: dict[str, bytes | Large] = {
        file: header_of({n: shape for n, shape in layout.items() if home[n] == file}) for file in names
    }
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": home}, indent=2).encode()
    return files


@pytest.fixture
def published(hub: FakeHub) -> FakeHub:
    """A hub with a model, an encoder and a decoder of the default model's sizes, as published; their values are not there."""
    config = config_json("1.5b") | {"mm_vision_tower_aux_list": [ENCODER]}
    layout = model_layout(parse_config(config, Path("config.json")))
    files = {"config.json": json.dumps(config).encode(), **TOKENIZER, **sharded(layout, 2), "README.md": b"hello"}
    hub.repos[MODEL] = Repo({"main": files}, card={"license": "mit"})
    vision: TensorShapes = {
        "vision_model.embeddings.weight": (1152, 3, 14, 14),
        "text_model.embeddings.weight": (300, 1152),
    }
    encoder: dict[str, bytes | Large] = {
        "config.json": json.dumps(encoder_json("1.5b")).encode(),
        "preprocessor_config.json": b"{}",
        "model.safetensors": header_of(vision, "F32", 4),
    }
    hub.repos[ENCODER] = Repo({"main": encoder}, card={"license": "apache-2.0"})
    decoder: dict[str, bytes | Large] = {
        "config.json": json.dumps(decoder_json("1.5b")).encode(),
        "model.pt": Large(b"PK", 1_662_000_000),
    }
    hub.repos[DECODER] = Repo({"main": decoder})
    return hub


def test_a_sharded_checkpoint_of_8_gb_is_judged_by_less_than_200_kb(published: FakeHub, tmp_path: Path) -> None:
    found = inspect(MODEL)
    files = published.repos[MODEL].revisions["main"]
    weights = sum(len(content) for name, content in files.items() if name.endswith(".safetensors"))
    assert weights > 7.9e9
    assert published.sent < 200_000
    assert 0 < found.read < published.sent
    assert found.problems == []
    assert {part.what: part.parameters for part in found.parts} == {
        "language model": 1_544_107_520,
        "diffusion transformer": 2_439_092_672,
        "projector": 4_131_840,
        "encoder": 677_376,  # the text tower is not used
        "decoder": 415_587_532,
    }
    assert {part.what: part.dtypes for part in found.parts}["encoder"] == ("float32",)
    model, encoder, decoder = found.files
    assert model.here == encoder.here == decoder.here == 0
    assert model.download == weights + sum(
        len(files[name]) for name in (*TOKENIZER, "config.json", "model.safetensors.index.json")
    )
    assert decoder.download > 1_662_000_000
    assert (model.licence, encoder.licence, decoder.licence) == ("mit", "apache-2.0", None)
    assert model.commit == published.repos[MODEL].commit("main")
    assert not (tmp_path / "cache").exists()
    assert [note for note in found.notes if "model.pt: a torch file" in note]


def test_nothing_large_is_asked_for(published: FakeHub) -> None:
    inspect(MODEL)
    ranges = [r for r in published.requests if r.method == "GET" and "/resolve/" in r.path]
    assert ranges
    assert all(r.range for r in ranges)
    assert not any(r.path.endswith("model.pt") for r in ranges)


def test_what_is_in_the_cache_counts_by_itself(hub: FakeHub, checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["siglip"]
    hub.add(MODEL, folder)
    hub.add(SMALL_ENCODER, folder.parent / SMALL_ENCODER)
    hub.add(DECODER, folder.parent / "decoder")
    before = inspect(MODEL)
    assert [(f.here, f.download > 0) for f in before.files] == [(0, True)] * 3
    find(MODEL, "model")
    find(DECODER, "decoder")
    hub.requests.clear()
    after = inspect(MODEL)
    assert [(f.here > 0, f.download > 0) for f in after.files] == [(True, False), (False, True), (True, False)]
    assert sum(f.here + f.download for f in after.files) == sum(f.download for f in before.files)
    assert not [r for r in hub.requests if MODEL in r.path and "/resolve/" in r.path]  # read from the cache
    assert before.problems == after.problems == []
    assert [part.record() for part in before.parts][:4] == [part.record() for part in after.parts][:4]


def test_offline_after_a_download(hub: FakeHub, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoints["siglip"]
    hub.add(MODEL, folder)
    find(MODEL, "model")
    point_at("http://127.0.0.1:9", monkeypatch)
    found = inspect(MODEL, decoder=str(folder.parent / "decoder"))
    assert found.files[0].commit == hub.repos[MODEL].commit("main")
    assert len(found.problems) == 1  # the encoder is on the hub alone
    assert found.problems[0].startswith(f"encoder {SMALL_ENCODER}: not downloaded yet, and the hub cannot be reached")
    with pytest.raises(HubError, match=r"^model some-lab/other: not downloaded yet, and the hub cannot be reached"):
        inspect("some-lab/other")


def test_a_hub_that_knows_no_ranges(hub: FakeHub, checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["siglip"]
    hub.add(MODEL, folder)
    hub.add(SMALL_ENCODER, folder.parent / SMALL_ENCODER)
    hub.add(DECODER, folder.parent / "decoder")
    hub.ranges = False
    assert inspect(MODEL).problems == []


@pytest.mark.parametrize("name", ["siglip", "webssl", "ddt", "wide"])
def test_all_parameters_of_a_folder_are_counted(name: str, checkpoints: dict[str, Path]) -> None:
    folder = checkpoints[name]
    found = inspect(str(folder))
    assert found.problems == []
    assert [f.download for f in found.files] == [0, 0, 0]
    tensors = load_file(folder / "model.safetensors")
    assert sum(part.parameters for part in found.parts[:3]) == sum(t.numel() for t in tensors.values())
    assert found.decoder is not None
    kind = next(part.detail for part in found.parts if part.what == "diffusion transformer").split(":")[0]
    assert kind == {"ddt": "DDT", "wide": "two-width DDT"}.get(name, "DiT")


@pytest.fixture
def copy(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A folder with a model, its encoder and its decoder beside it."""
    shutil.copytree(checkpoints["siglip"].parent, tmp_path / "copy")
    return tmp_path / "copy" / "model"


def test_torch_files_are_inspected_as_safetensors_are(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    before = inspect(str(copy))
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    found = inspect(str(copy))
    assert found.problems == []
    assert [part.record() for part in found.parts] == [part.record() for part in before.parts]


def test_torch_files_on_the_hub_are_not_checked(hub: FakeHub, copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    hub.add(MODEL, copy)
    hub.add(SMALL_ENCODER, copy.parent / SMALL_ENCODER)
    hub.add(DECODER, copy.parent / "decoder")
    found = inspect(MODEL)
    assert found.problems == []
    assert any(note.startswith(f"{MODEL}/pytorch_model.bin: a torch file") for note in found.notes)
    assert found.parts[0].parameters > 0
    assert found.parts[0].bytes == 0  # not known


def test_missing_misnamed_and_misshapen_tensors(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.wight"] = tensors.pop("model.norm.weight")
    tensors["model.latent_queries"] = tensors["model.latent_queries"][:-1].clone()
    tensors["diff_head.data_mean"] = torch.zeros(1)
    tensors["model.layers.0.input_layernorm.weight"] = tensors["model.layers.0.input_layernorm.weight"].int()
    save_file(tensors, copy / "model.safetensors")
    different, integers, stats = inspect(str(copy)).problems
    assert (
        "missing tensors: model.norm.weight; unexpected tensors: model.norm.wight; wrong shapes: model.latent_queries is"
        in different
    )
    assert integers.endswith("not int32: model.layers.0.input_layernorm.weight")
    assert "has only one of diff_head.data_mean and diff_head.data_std" in stats


def test_licence_of_a_folder(copy: Path) -> None:
    (copy / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0 # really\n---\n# Hello\nlicense: none\n")
    assert inspect(str(copy)).files[0].licence == "apache-2.0"
    (copy / "README.md").write_text("# Hello\nlicense: none\n")
    assert inspect(str(copy)).files[0].licence is None


@pytest.mark.parametrize("name", ["shapes", "shapes-4"])
def test_the_bundled_models_have_the_projects_licence(name: str) -> None:
    assert {files.licence for files in inspect(name).files} == {"mit"}
    assert (Path(__file__).parents[1] / "LICENSE").read_text().startswith("MIT License")


def test_parts_that_do_not_fit_are_problems(copy: Path) -> None:
    shutil.rmtree(copy.parent / "google")
    (copy.parent / "decoder" / "model.pt").unlink()
    (copy / "vocab.json").unlink()
    problems = inspect(str(copy), decoder=str(copy.parent / "decoder")).problems
    assert len(problems) == 3
    assert "no tokenizer (tokenizer.json, or vocab.json and merges.txt)" in problems[0]
    assert problems[1].startswith(f"encoder {SMALL_ENCODER}: ")
    assert problems[2].endswith("decoder: not a pixel decoder, which is config.json and model.pt")


def test_an_encoder_of_another_width(copy: Path) -> None:
    path = copy.parent / SMALL_ENCODER / "config.json"
    raw = json.loads(path.read_text())
    raw["vision_config"]["hidden_size"] *= 2
    path.write_text(json.dumps(raw))
    (problem,) = inspect(str(copy)).problems
    assert problem.startswith(f"{path}: hidden_size is")


def broken(hub: FakeHub, **changes: bytes | Large | None) -> None:
    """Changes files of the published model: `shard1`, `shard2`, `index` and `config`; None takes one away."""
    names = {"index": "model.safetensors.index.json", "config": "config.json"}
    names |= {f"shard{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    files = hub.repos[MODEL].revisions["main"]
    for what, content in changes.items():
        if content is None:
            del files[names[what]]
        else:
            files[names[what]] = content


def test_damage_is_named(published: FakeHub) -> None:
    files = dict(published.repos[MODEL].revisions["main"])
    shard, index = files["model-00002-of-00002.safetensors"], files["model.safetensors.index.json"]
    assert isinstance(shard, Large)
    assert isinstance(index, bytes)
    where = f"^{MODEL}/model-00002-of-00002.safetensors: "
    cases: list[tuple[dict[str, bytes | Large | None], str]] = [
        ({"shard2": Large(shard.head, shard.size - 2)}, f"{where}.*data_offsets is .* but there are only"),
        (
            {"shard2": Large(shard.head.replace(b'"shape":[2048]', b'"shape":[2049]'), shard.size)},
            f"{where}.*data_offsets is",
        ),
        ({"shard2": Large(b"\xff" * 8, shard.size)}, f"{where}.*its header says"),
        ({"shard2": None}, f"^{MODEL}: missing shards model-00002-of-00002.safetensors"),
        ({"index": b"{"}, f"^{MODEL}/model.safetensors.index.json: not valid JSON"),
        ({"index": b'{"weight_map": []}'}, f"^{MODEL}/model.safetensors.index.json: weight_map must map"),
        (
            {"index": index.replace(b'"model.norm.weight"', b'"model.norm.wight"')},
            "weight_map names tensors that .* model.norm.wight",
        ),
        (
            {"shard2": files["model-00001-of-00002.safetensors"]},
            f"{where}tensors that model-00001-of-00002.safetensors has too",
        ),
        ({"config": b'{"model_type": "llama"}'}, f"^{MODEL}/config.json: model_type is 'llama'"),
        ({"config": None}, f"^{MODEL}/config.json: no such file"),
    ]
    for changes, message in cases:
        published.repos[MODEL].revisions["main"] = dict(files)
        broken(published, **changes)
        with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
            inspect(MODEL)
        assert "\n" not in str(caught.value)


def test_the_hub_breaks_off(published: FakeHub) -> None:
    published.cut["model-00001-of-00002.safetensors"] = 10**6
    with pytest.raises(HubError, match=f"^model {MODEL}: model-00001-of-00002.safetensors: "):
        inspect(MODEL)


def test_a_hub_without_sizes(published: FakeHub) -> None:
    published.sizes = False
    with pytest.raises(HubError, match=f"^model {MODEL}: the hub does not say how large config.json is"):
        inspect(MODEL)


def test_a_licence_of_its_own(published: FakeHub) -> None:
    published.repos[MODEL].card = {"license": "other", "license_name": "research-only"}
    assert inspect(MODEL).files[0].licence == "research-only"


def test_no_such_model(hub: FakeHub) -> None:
    with pytest.raises(
        HubError, match=r"^model nobody/nothing: no such folder here, and the hub has no such repository"
    ):
        inspect("nobody/nothing")
    with pytest.raises(
        CheckpointError, match=r'^nothing: no such model folder, and not a hub id .* the bundled model is "shapes"'
    ):
        inspect("nothing")


def test_the_command(cli: Cli, copy: Path) -> None:  # noqa: F811
    result = cli("inspect", copy, "--json", "--device", "cpu", "--memory", "8G", "--memory", "1M")
    assert result.code == 0
    (found,) = result.manifests
    assert found["model"] == str(copy)
    assert [part["what"] for part in found["parts"]] == [
        "language model",
        "diffusion transformer",
        "projector",
        "encoder",
        "decoder",
    ]
    enough, little = found["memory"]
    assert (enough["memory"], enough["quantize"], enough["offload"]) == ("8G", None, "none")
    assert enough["peak_bytes"] < 8 << 30
    assert enough["seconds_alone"] > 0
    assert little["problem"].startswith("--memory 1M: this model needs at least 0.")
    assert [row["memory"] for row in found["memory_on_cuda"]] == ["8G", "1M"]


def test_what_is_raised_is_json_too(cli: Cli, copy: Path) -> None:  # noqa: F811
    (copy / "config.json").write_text("{")
    result = cli("inspect", copy, "--json", "--device", "cpu")
    assert result.code == 1
    assert result.manifests == [{"model": str(copy), "error": result.error}]


def test_the_command_in_words(cli: Cli, copy: Path) -> None:  # noqa: F811
    (copy / "merges.txt").unlink()
    result = cli("inspect", copy, "--device", "cpu")
    assert result.code == 1
    assert result.err == ""
    lines = result.out.splitlines()
    assert lines[0] == f"{copy}: Scale-RAE, licence not stated"
    assert [line for line in lines if line.startswith("problem: ")] == [
        f"problem: {copy}: no tokenizer (tokenizer.json, or vocab.json and merges.txt)"
    ]
    assert any(line.startswith("24G ") and line.endswith("none needed") for line in lines)
    assert cli("inspect", copy, "--memory", "8").error == "memory '8': must be a size like 8G or 6000M, or auto"
    assert cli("inspect", copy, "--device", "tpu").code == 2


def test_the_bundled_model(cli: Cli) -> None:  # noqa: F811
    result = cli("inspect", "shapes", "--json", "--device", "cpu")
    assert result.code == 0
    found = result.manifests[0]
    assert found["parameters"] == 15_514_432
    student = cli("inspect", "--model", "shapes-4", "--json", "--device", "cpu", "--memory", "8G").manifests[0]
    rates = [model["device"]["products_per_second"] for model in (found, student)]
    work = [model["memory"][0]["seconds_alone"] * rate for model, rate in zip((found, student), rates, strict=True)]
    assert work[1] < work[0] / 4  # 4 evaluations and not 49


def test_a_vae_beside_the_model(copy: Path) -> None:
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | {"generation_alignment_tower": "black-forest-labs/FLUX.1-dev"}))
    (copy.parent / "vae").mkdir()
    (copy.parent / "vae" / "config.json").write_text("{}")
    (copy.parent / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"12345")
    found = inspect(str(copy))
    assert found.problems == []
    assert found.files[2].here == 7
    assert found.notes == [f"{copy.parent / 'vae'}: a VAE, whose tensors are checked when it is loaded"]


def test_a_decoder_too_small_for_its_config(published: FakeHub) -> None:
    files = published.repos[DECODER].revisions["main"]
    files["model.pt"] = Large(b"PK", 100_000_000)
    (problem,) = inspect(MODEL).problems
    assert (
        problem == f"{DECODER}/model.pt: has 100,000,000 bytes, but the sizes in config.json take at least 831,175,064"
    )
