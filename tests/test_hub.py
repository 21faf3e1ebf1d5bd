"""Downloading checkpoints from a hub that answers, refuses, breaks off or is not there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _http

from scale_rae.cli import main
from scale_rae.errors import CheckpointError, HubError
from scale_rae.hub import find
from scale_rae.pipeline import ScaleRAE
from scale_rae.provenance import changed_files, file_hashes, file_record
from tests.helpers.fake_hub import FakeHub, Large, Repo, own_hub, point_at

MODEL, ENCODER, DECODER = "some-lab/drawer", "google/siglip2-base-patch14-224", "nyu-visionx/siglip2_decoder"
CONFIG = b'{"model_type": "x"}'
VAE = "diffusion_pytorch_model.safetensors"
PARTS = [  # a model with its encoder and decoder, and what training left behind
    *("config.json", "model.safetensors", "decoder/config.json", "decoder/model.pt"),
    *("eye/config.json", "eye/preprocessor_config.json", "eye/model.safetensors"),
    *("checkpoint-9/config.json", "checkpoint-9/model.safetensors"),
]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with own_hub(tmp_path / "cache", monkeypatch) as hub:
        yield hub


@pytest.fixture
def small(hub: FakeHub) -> FakeHub:
    """A hub with a repository that has every file but no real weights."""
    files: dict[str, bytes | Large] = {
        "config.json": CONFIG,
        "model.safetensors": bytes(range(256)) * 400,
        "vocab.json": b"{}",
        "README.md": b"x",
    }
    hub.repos[MODEL] = Repo({"main": files, "v1": {**files, "config.json": b'{"old": 1}'}})
    return hub


def test_the_commands_revision(hub: FakeHub, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = checkpoints["siglip"]
    hub.add(MODEL, folder)
    hub.add(ENCODER, folder.parent / ENCODER)
    hub.add(DECODER, folder.parent / "decoder")
    revisions = hub.repos[MODEL].revisions
    revisions["v1"] = revisions["main"]
    revisions["main"] = {**revisions["v1"], "config.json": CONFIG}  # another model by now
    argv = ["t2i", "--model-path", MODEL, "--prompt", "a cat", "--steps", "2", "--device", "cpu"]
    argv += ["--output-dir", str(tmp_path / "out")]
    assert main([*argv, "--revision", "v1"]) == 0
    (manifest,) = (json.loads(p.read_text()) for p in (tmp_path / "out").glob("*_manifest.json"))
    assert manifest["model"]["revision"] == hub.repos[MODEL].commit("v1")
    assert main(argv) == 1


def test_draws_with_everything_from_the_hub(hub: FakeHub, checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["siglip"]
    hub.add(MODEL, folder)
    hub.add(ENCODER, folder.parent / ENCODER)
    hub.add(DECODER, folder.parent / "decoder")
    hub.repos[MODEL].revisions["main"]["pytorch_model.bin"] = b"the same again"
    hub.repos[DECODER].revisions["main"]["optimizer.pt"] = b"nobody's business"

    model = ScaleRAE.from_pretrained(MODEL, device="cpu")
    drawn = model.generate("a cat", steps=2)
    local = ScaleRAE.from_pretrained(str(folder), device="cpu").generate("a cat", steps=2)

    assert torch.equal(drawn.images[0].latent, local.images[0].latent)
    assert drawn.images[0].image is not None
    assert drawn.images[0].image.tobytes() == local.images[0].image.tobytes()
    assert file_record(model.source) == {"name": MODEL, "revision": hub.repos[MODEL].commit("main")}
    assert model.encoder_source is not None
    assert model.encoder_source.name == ENCODER
    assert model.decoder_source is not None
    assert model.decoder_source.revision == hub.repos[DECODER].commit("main")
    assert {"pytorch_model.bin", "optimizer.pt"}.isdisjoint(hub.downloaded())
    assert len(set(hub.downloaded())) <= 8

    hub.requests.clear()
    ScaleRAE.from_pretrained(MODEL, device="cpu")
    assert hub.downloaded() == []  # all of it was in the cache


@pytest.mark.parametrize(
    ("names", "what", "expected"),
    [
        (["model.safetensors", "pytorch_model.bin", "config.json"], "model", ["config.json", "model.safetensors"]),
        (["pytorch_model.bin", "config.json", "tf_model.h5"], "encoder", ["config.json", "pytorch_model.bin"]),
        (
            ["model.safetensors.index.json", "model-00001-of-00001.safetensors", "pytorch_model.bin.index.json"],
            "model",
            ["model-00001-of-00001.safetensors", "model.safetensors.index.json"],
        ),
        (["config.json", "model.pt", "model.safetensors"], "decoder", ["config.json", "model.pt"]),
        (["config.json", VAE, "flux1-dev.safetensors"], "VAE", ["config.json", VAE]),
        (["transformer/config.json", "vae/config.json", f"vae/{VAE}"], "VAE", ["vae/config.json", f"vae/{VAE}"]),
        (PARTS, "model", [name for name in PARTS if not name.startswith("checkpoint-9")]),
    ],
)
def test_downloads_one_set_of_weights(hub: FakeHub, names: list[str], what: str, expected: list[str]) -> None:
    hub.repos[MODEL] = Repo({"main": dict.fromkeys(names, CONFIG)})
    source = find(MODEL, what)
    assert sorted(p.relative_to(source.folder).as_posix() for p in source.folder.rglob("*.*")) == sorted(expected)


def test_a_revision_is_a_branch_tag_or_commit(small: FakeHub) -> None:
    now, old = find(MODEL, "model"), find(MODEL, "model", revision="v1")
    assert (now.folder / "config.json").read_bytes() == CONFIG
    assert (old.folder / "config.json").read_bytes() == b'{"old": 1}'
    assert file_record(old) == {"name": MODEL, "revision": small.repos[MODEL].commit("v1")}
    assert find(MODEL, "model", revision=old.revision).folder == old.folder


def test_unknown_revision(small: FakeHub) -> None:
    with pytest.raises(HubError, match=rf"model {MODEL} at revision v9: .*no such revision"):
        find(MODEL, "model", revision="v9")


def test_an_adapter_in_the_place_of_a_model(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repos["me/lora"] = Repo({"main": {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}})
    problem = "me/lora: is a LoRA adapter, not a model"
    with pytest.raises(CheckpointError, match=f"^{problem}"):
        find("me/lora", "model")
    assert main(["inspect", "me/lora"]) == 1
    assert problem in capsys.readouterr().err


def test_one_cut_connection_is_taken_up_where_it_broke(small: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # what is short of a chunk is not kept
    small.cut["model.safetensors"] = 1
    source = find(MODEL, "model")
    content = small.repos[MODEL].revisions["main"]["model.safetensors"]
    assert (source.folder / "model.safetensors").read_bytes() == content
    ranges = [r.range for r in small.requests if r.method == "GET" and r.path.endswith("model.safetensors")]
    assert ranges == [None, f"bytes={len(content) // 2}-"]


def test_a_connection_that_keeps_breaking_off(small: FakeHub) -> None:
    small.cut["model.safetensors"] = 10**6
    with pytest.raises(HubError) as caught:
        find(MODEL, "model")
    assert "\n" not in str(caught.value)
    assert f"model {MODEL}: the download broke off" in str(caught.value)
    assert "run again" in str(caught.value)
    small.cut.clear()
    small.requests.clear()
    source = find(MODEL, "model")
    assert (source.folder / "model.safetensors").stat().st_size == 256 * 400
    # huggingface_hub keeps whole files of a broken run, and throws partial ones away.
    assert small.downloaded() == ["model.safetensors"]


def test_no_such_repository(hub: FakeHub) -> None:
    with pytest.raises(HubError, match=r"nobody/nothing: no such folder here, and the hub has no such repository"):
        find("nobody/nothing", "encoder")


def test_private_repository_needs_its_token(small: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    small.repos[MODEL].token = "hf_secret"
    with pytest.raises(HubError, match=r"HF_TOKEN"):
        find(MODEL, "model")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    find(MODEL, "model")
    assert {r.authorization for r in small.requests[-4:]} == {"Bearer hf_secret"}


def test_a_refused_token_is_named(small: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    small.status = 401
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match=r"401.*HF_TOKEN"):
        find(MODEL, "model")


def test_gated_repository(small: FakeHub) -> None:
    small.repos[MODEL].gated = True
    with pytest.raises(HubError, match=r"asks for permission; accept its terms there and set HF_TOKEN"):
        find(MODEL, "model")


@pytest.mark.parametrize("status", [403, 500, 503])
def test_hub_in_trouble(small: FakeHub, status: int) -> None:
    small.status = status
    with pytest.raises(HubError, match=rf"status {status}.*or shapes, the bundled model"):
        find(MODEL, "model")


def test_hub_in_trouble_does_not_matter_once_downloaded(small: FakeHub) -> None:
    first = find(MODEL, "model")
    small.status = 500
    assert find(MODEL, "model") == first


def test_repository_of_something_else(hub: FakeHub) -> None:
    hub.repos[MODEL] = Repo({"main": {"README.md": b"x"}})
    with pytest.raises(HubError, match=r"holds no model"):
        find(MODEL, "model")


@pytest.mark.parametrize("name", ["a/b--c", "a/b..c", "a/" + "b" * 100, "a/b.git"])
def test_names_no_hub_takes(hub: FakeHub, name: str) -> None:
    with pytest.raises((CheckpointError, HubError), match="no such"):
        find(name, "model")


def test_unreachable_hub_without_a_copy(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(HubError) as caught:
        find(MODEL, "model")
    assert "the hub cannot be reached" in str(caught.value)
    assert "or shapes, the bundled model" in str(caught.value)
    assert "local folder" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(HubError) as caught:
        find(ENCODER, "encoder")
    assert "shapes" not in str(caught.value)


def test_unreachable_hub_with_a_copy(small: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find(MODEL, "model")
    point_at("http://127.0.0.1:9", monkeypatch)
    assert find(MODEL, "model") == first
    assert find(MODEL, "model", revision=first.revision) == first


def test_unreachable_hub_with_half_a_copy(small: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = find(MODEL, "model").folder
    (folder / "model.safetensors").unlink()
    point_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(HubError, match=r"only part of it was downloaded.*cannot be reached"):
        find(MODEL, "model")


def test_offline_mode(small: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find(MODEL, "model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    small.requests.clear()
    assert find(MODEL, "model") == first
    with pytest.raises(HubError, match=r"not downloaded yet, and HF_HUB_OFFLINE forbids it"):
        find("some-lab/other", "model")
    assert small.requests == []


IN_THE_WAY = {
    "ALL_PROXY": "socks://user:secret@127.0.0.1:7890",
    "HTTPS_PROXY": "socks5://127.0.0.1:7890",
    "HTTP_PROXY": "nonsense",
    "HF_TOKEN": "hf_pässword",
    "HF_ENDPOINT": "nonsense://",
    "SSL_CERT_FILE": "/no/such/file",
}


@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
@pytest.mark.parametrize("variable", IN_THE_WAY)
def test_variables_that_keep_the_library_from_the_hub(
    small: FakeHub, monkeypatch: pytest.MonkeyPatch, variable: str, offline: bool
) -> None:
    """The cache is used; without a copy there, the message names the variable, and no password."""
    first = find(MODEL, "model")
    point_at(IN_THE_WAY[variable] if variable == "HF_ENDPOINT" else "https://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setenv(variable, IN_THE_WAY[variable])
    _http.close_session()
    assert find(MODEL, "model") == first
    with pytest.raises(HubError) as caught:
        find("some-lab/other", "model")
    text = str(caught.value)
    assert "secret" not in text
    assert "\n" not in text
    if offline:
        assert "HF_HUB_OFFLINE forbids it" in text
    else:
        assert "the hub cannot be reached (" in text
        assert variable in text


@pytest.mark.parametrize("variable", ["HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"])
@pytest.mark.parametrize("value", ["", "soon"])
def test_variables_that_the_library_cannot_be_imported_with(variable: str, value: str) -> None:
    code = "from scale_rae.hub import import_hub; import_hub(); import huggingface_hub.constants"
    environment = os.environ | {variable: value}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stderr.startswith(f"{variable} is {value!r}: ignored (invalid literal")


def test_hashes_are_of_the_files_that_are_loaded(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoints["siglip"], folder)
    before = file_hashes(find(str(folder), "model"))
    assert set(before) == {"config.json", "merges.txt", "model.safetensors", "tokenizer_config.json", "vocab.json"}
    for name in ("._config.json", "notes.txt", "training_args.bin", "pytorch_model.bin", "trainer_state.json"):
        (folder / name).write_text("x")
    assert file_hashes(find(str(folder), "model")) == before
    (folder / "added_tokens.json").write_text("{}")
    assert set(file_hashes(find(str(folder), "model"))) == {*before, "added_tokens.json"}


def test_records_of_earlier_versions() -> None:
    old = {"config.json": "1", "model.safetensors": "2", "notes.txt": "3", "pytorch_model.bin": "4"}
    assert changed_files(old, {"config.json": "1", "model.safetensors": "2"}, "model") == []
    assert changed_files(old, {"config.json": "1", "model.safetensors": "5"}, "model") == ["model.safetensors"]
    # Another format of weights than then, and a file that was not there then.
    assert changed_files(old, {"config.json": "1", "pytorch_model.bin": "4"}, "model") == ["model.safetensors"]
    assert changed_files(old, {**old, "vocab.json": "6"}, "model") == ["vocab.json"]


def test_folders_come_before_the_hub(small: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(find(MODEL, "model").folder, tmp_path / MODEL)
    small.requests.clear()
    monkeypatch.chdir(tmp_path)
    assert find(MODEL, "model").folder == Path(MODEL)
    assert small.requests == []


def test_finding_needs_no_torch() -> None:
    code = (
        "import sys, scale_rae.inspection, scale_rae.memory_plan; from scale_rae.hub import find; find('shapes', 'model'); "
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_environment_variables(tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_TOKEN, which the library reads when it is imported, so in a process of its own."""
    with FakeHub() as hub:
        hub.repos[MODEL] = Repo({"main": {"config.json": CONFIG, "model.safetensors": b"x"}}, token="hf_mine")
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_mine",
        }
        code = f"from scale_rae.hub import find; print(find({MODEL!r}, 'model').folder)"
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert Path(run.stdout.strip()).is_relative_to(tmp_path / "home")
        assert run.stderr == ""
        assert {r.authorization for r in hub.requests if MODEL in r.path} == {"Bearer hf_mine"}
