"""Latents and checkpoints made to run code, to fill the memory, to hang or to end the process: each is refused in a line."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scale_rae.checkpoint import TensorReader, load_latent
from scale_rae.errors import ScaleRAEError
from scale_rae.prompt import ChatTokenizer
from scale_rae.rewards import parts
from scale_rae.tokenizer_file import reading
from tests.test_checkpoint import load

pytestmark = pytest.mark.attack
ENCODER = "google/siglip2-base-patch14-224"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"
MOST_GROWTH = 200 << 20  # bytes of memory that a refusal may take at its height


@pytest.fixture
def copy(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """The siglip checkpoint, to be changed; returns the model's folder."""
    shutil.copytree(checkpoints["siglip"].parent, tmp_path / "copy")
    return tmp_path / "copy" / "model"


def refused(action: Callable[[], object], *said: str) -> str:
    """The error's text: one short line that says all of `said`; the memory did not grow."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ScaleRAEError) as caught:
        action()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_GROWTH
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1000
    assert [word for word in said if word not in text] == [], text
    return text


def archive(path: Path, content: bytes, storage: bytes = b"", compress: int = zipfile.ZIP_STORED) -> None:
    """A file as torch.save lays it out, with any pickle and one storage."""
    with zipfile.ZipFile(path, "w", compress) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/byteorder", b"little")
        file.writestr("archive/data/0", storage)


def pickled(shape: tuple[int, ...], stride: tuple[int, ...], count: int, offset: int = 0) -> bytes:
    """The pickle of a float32 tensor that says what it likes of itself."""

    def number(value: int) -> bytes:
        digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(digits)]) + digits

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + number(count)
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        + (storage + b"tQ" + number(offset) + numbers(shape) + numbers(stride))
        + b"\x89ccollections\nOrderedDict\n)RtR."
    )


def both(path: Path, *said: str) -> None:
    """A latent and a checkpoint's weights of the same bytes are refused alike."""
    refused(lambda: load_latent(path), str(path), *said)
    refused(lambda: TensorReader([path]), str(path), *said)


# --- files that torch.save might have written -------------------------------------------------------------------------


def test_a_tensor_by_hand_is_read(tmp_path: Path) -> None:
    """What the attacks below are made of."""
    archive(tmp_path / "x.pt", pickled((2, 3), (3, 1), 6), torch.arange(6.0).numpy().tobytes())
    assert torch.equal(load_latent(tmp_path / "x.pt"), torch.arange(6.0).view(2, 3))


def test_a_bytearray_of_gigabytes(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save(bytearray(8), file)
    with zipfile.ZipFile(file) as whole:
        content = whole.read(next(n for n in whole.namelist() if n.endswith("data.pkl")))
    assert b"bytearray" in content
    archive(file, b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x01\x85R.")
    both(file, "refused", "bytearray")
    archive(file, b"\x80\x05\x96" + struct.pack("<Q", 1 << 32) + b".")
    both(file, "damaged")


def test_deflated_records(tmp_path: Path) -> None:
    for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        archive(tmp_path / "x.pt", pickled((1 << 22,), (1,), 1 << 22), bytes(16 << 20), kind)
        assert (tmp_path / "x.pt").stat().st_size < 100_000
        both(tmp_path / "x.pt", "compressed")


@pytest.mark.parametrize(
    ("shape", "stride", "count", "offset"),
    [
        ((1 << 40,), (1,), 1 << 40, 0),
        ((4,), (1,), 1 << 40, 0),
        ((1 << 20, 1 << 20), (0, 0), 4, 0),
        ((1 << 20,), (1,), 4, 0),
        ((2,), (-1,), 4, 1),
        ((2,), (1,), 4, 3),
        ((2,), (1,), 4, -1),
        ((1 << 70,), (1 << 70,), 4, 0),
        ((2, 2), (1,), 4, 0),
        ((1,) * 1000, (1,) * 1000, 4, 0),
        ((3, 3), (1, 1), 4, 0),
    ],
)
def test_tensors_larger_than_the_file(
    tmp_path: Path, shape: tuple[int, ...], stride: tuple[int, ...], count: int, offset: int
) -> None:
    archive(tmp_path / "x.pt", pickled(shape, stride, count, offset), bytes(16))
    if (shape, count) == ((4,), 1 << 40):
        assert load_latent(tmp_path / "x.pt").shape == (4,)  # what counts is the record's size
        return
    both(tmp_path / "x.pt", "x.pt")


def test_one_storage_under_many_names(tmp_path: Path) -> None:
    """10,000 tensors that are each as large as the file."""
    storage = torch.zeros(1 << 16)
    torch.save({f"layer{i}": storage for i in range(10_000)}, tmp_path / "x.pt")
    refused(lambda: TensorReader([tmp_path / "x.pt"]), "its tensors are more than 4 times larger than the file")
    tied = {"a": storage, "b": storage}
    torch.save(tied, tmp_path / "x.pt")
    assert len(TensorReader([tmp_path / "x.pt"]).tensors) == 2


def test_records_over_one_another(tmp_path: Path) -> None:
    """A directory whose entries all stand for the same bytes."""
    archive(tmp_path / "x.pt", pickled((4,), (1,), 4), bytes(100_000))
    data = (tmp_path / "x.pt").read_bytes()
    start = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    last = data[data.rindex(b"PK\x01\x02") : end]
    copies = b"".join(last[:-1] + bytes([letter]) for letter in range(65, 90))
    tail = data[end : end + 8] + struct.pack("<HHLL", 28, 28, end - start + len(copies), start) + data[end + 20 :]
    (tmp_path / "x.pt").write_bytes(data[:end] + copies + tail)
    both(tmp_path / "x.pt", "does not lie in the file")


def test_a_directory_without_end(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for i in range(2000):
            file.writestr(f"archive/data/{i}", b"")
    (tmp_path / "x.pt").write_bytes(buffer.getvalue())
    refused(lambda: load_latent(tmp_path / "x.pt"), "directory is larger than 64 KiB")


@pytest.mark.parametrize("content", [b"(" * (2 << 20), b"]" * (2 << 20), b"N" * (2 << 20)])
def test_a_pickle_without_end(tmp_path: Path, content: bytes) -> None:
    archive(tmp_path / "x.pt", b"\x80\x02" + content)
    refused(lambda: load_latent(tmp_path / "x.pt"), "data.pkl is larger than 1 MiB")


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02r\xff\xff\xff\xff.",  # PUT of the empty stack
        b"\x80\x02Nr\xff\xff\xff\xff.",  # a memo of 4,000,000,000 places
        b"\x80\x02X\xff\xff\xff\xffx.",  # a text of 4 GB
        b"\x80\x02" + b"]q\x00" + b"h\x00h\x00\x86q\x00" * 10_000 + b".",  # 2 ** 10,000 values if they were counted
        b"\x80\x02}q\x00h\x00N s.",
        b"\x80\x02}(h\x00u.",
        b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
        b"\x80\x02}" + b"}" * 2 + b"Ns.",  # a dict as a key
        b"\x80\x02}("
        + b"".join(b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"N" for i in range(1, 9000))
        + b"u.",
        b"cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"c" + b"a" * 100_000 + b"\nb\n.",
        b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00x\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ctorch\nSize\nctorch\nSize\n\x85R.",
        b"\x80\x02ccollections\nOrderedDict\n(](" + b"]" * 1000 + b"etR.",
    ],
    ids=range(16),
)
def test_pickles_no_tensor_comes_from(tmp_path: Path, content: bytes) -> None:
    archive(tmp_path / "x.pt", content)
    both(tmp_path / "x.pt", "x.pt")


def test_code_in_both_formats(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    for zipped in (True, False):
        torch.save(Runs(), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        both(tmp_path / "x.pt", "refused", "mkdir")
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Runs()))
    both(tmp_path / "x.pt", "x.pt")
    assert not (tmp_path / "ran").exists()


def test_the_old_format_says_more_than_it_has(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(4)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "x.pt").read_bytes()
    for count in (1 << 40, -1, -(1 << 62), (1 << 63) - 1):
        (tmp_path / "x.pt").write_bytes(data[:-24] + struct.pack("<q", count) + data[-16:])
        both(tmp_path / "x.pt", "damaged")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.zeros(2, 3, device="meta"), "meta device"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "nested"),
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.randn(2, 3, dtype=torch.complex64).conj().imag, "negative or conjugate bit"),
        (lambda: torch.zeros(1).expand(1 << 30), "expanded"),
    ],
    ids=["meta", "nested", "sparse", "negative bit", "expanded"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_without_plain_values(
    tmp_path: Path, make: Callable[[], torch.Tensor], said: str, zipped: bool
) -> None:
    torch.save(make(), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    both(tmp_path / "x.pt", said)


def test_a_latent_of_gigabytes(tmp_path: Path) -> None:
    with (tmp_path / "x.pt").open("wb") as file:
        file.truncate(8 << 30)
    refused(lambda: load_latent(tmp_path / "x.pt"), "larger than 64 MiB")


# --- places that are no files -----------------------------------------------------------------------------------------


def test_devices_and_pipes_as_files(copy: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for special in (Path("/dev/zero"), tmp_path / "pipe"):
        refused(lambda place=special: load_latent(place), "not a regular file")
        for name in ("config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json"):
            whole = (copy / name).rename(copy / "aside")
            (copy / name).symlink_to(special)
            refused(lambda: load(copy), "not a regular file")
            (copy / name).unlink()
            whole.rename(copy / name)
        decoder = copy.parent / "decoder" / "model.pt"
        decoder.unlink()
        decoder.symlink_to(special)
        refused(lambda: load(copy).decoder, "decoder")


@pytest.mark.parametrize(
    "name",
    [
        *("model/config.json", "model/model.safetensors", "model/vocab.json", "model/merges.txt"),
        *("model/tokenizer_config.json", "decoder/config.json", "decoder/model.pt", "model/tokenizer.json"),
        *(f"{ENCODER}/config.json", f"{ENCODER}/preprocessor_config.json", f"{ENCODER}/model.safetensors"),
    ],
)
def test_git_lfs_pointers(copy: Path, name: str) -> None:
    (copy.parent / name).write_bytes(LFS)

    def use() -> None:
        model = load(copy)
        _ = model.encoder.model
        _ = model.decoder

    refused(use, name, "git-LFS pointer")


def test_a_git_lfs_pointer_as_latent(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(LFS)
    refused(lambda: load_latent(tmp_path / "x.pt"), "git-LFS pointer")


@pytest.mark.parametrize("name", ["~nosuch/x.pt", "a" * 300, "a\0b", "caf\udce9.pt"])
def test_names_no_file_has(name: str) -> None:
    refused(lambda: load_latent(Path(name)))


# --- safetensors ------------------------------------------------------------------------------------------------------


def raw_safetensors(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("kind", ["F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "I64", "U8", "BOOL", "C64"])
def test_numbers_that_are_no_weights(copy: Path, kind: str) -> None:
    bits = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I64": 64, "C64": 64}.get(kind, 8)
    raw_safetensors(
        copy / "model.safetensors",
        {"model.norm.weight": {"dtype": kind, "shape": [64], "data_offsets": [0, 8 * bits]}},
        bytes(8 * bits),
    )
    refused(lambda: load(copy))
    reader = TensorReader([copy / "model.safetensors"])
    refused(lambda: reader.check_floats(reader.tensors), "model.norm.weight", "floating-point")


def test_whole_weights_of_whole_numbers(copy: Path) -> None:
    from safetensors.torch import load_file

    weights = {name: tensor.to(torch.int8) for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors")
    refused(lambda: load(copy), "torch.int8", "floating-point")


def test_a_header_of_gigabytes(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((99 << 20).to_bytes(8, "little") + b"{")
    os.truncate(file, 100 << 20)
    refused(lambda: TensorReader([file]), "header is larger than 16 MiB")


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a": ' * 100_000,
        {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"__metadata__": {"a": {"b": 1}}},
        {"a": 3},
    ],
    ids=range(6),
)
def test_headers_that_say_nothing_true(tmp_path: Path, header: object) -> None:
    raw_safetensors(tmp_path / "model.safetensors", header)
    refused(lambda: TensorReader([tmp_path / "model.safetensors"]), "model.safetensors")


# --- tokenizers -------------------------------------------------------------------------------------------------------

MODEL = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "vocab": {"a": 0, "b": 1, "ab": 2},
    "merges": [["a", "b"]],
}
TEMPLATE = {"single": [{"SpecialToken": {"id": "q", "type_id": 0}}], "pair": [], "special_tokens": {}}
PANICS = {
    "a prefix longer than a token": {"model": MODEL | {"continuing_subword_prefix": "x" * 6}},
    "a charsmap that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////////////"}},
    "a template of no token": {"post_processor": {"type": "TemplateProcessing"} | TEMPLATE},
    "padding to a petabyte": {  # ends the process when a text is read
        "padding": {
            "strategy": {"Fixed": 10**15},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        }
    },
    "a number of 4,000 digits": {"model": MODEL | {"vocab": {"a": int("9" * 4000)}}},
    "a vocabulary beyond the largest": {"model": MODEL | {"vocab": {"a": 0, "b": 1, "ab": 1 << 32}}},
}


@pytest.mark.parametrize("changes", PANICS.values(), ids=PANICS)
def test_tokenizers_that_end_the_process(tmp_path: Path, changes: dict[str, Any]) -> None:
    names = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    whole = {"version": "1.0", "added_tokens": [], **dict.fromkeys(names), "model": MODEL} | changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))

    def read() -> None:
        with reading(tmp_path):
            parts.read_tokenizer(tmp_path, "clip").encode("ab")

    refused(read, str(tmp_path))
    refused(lambda: ChatTokenizer(tmp_path, image_markers=True), str(tmp_path))


def test_a_tokenizer_that_is_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"normalizer": ' + '{"type": "Sequence", "normalizers": [' * 50_000)
    refused(lambda: ChatTokenizer(tmp_path, image_markers=True), "nested too deeply")
    refused(lambda: parts.read_tokenizer(tmp_path, "bert"), str(tmp_path))


# --- sizes that a config claims ---------------------------------------------------------------------------------------


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 1024}, "num_hidden_layers is 1024, but the weights hold only"),
        ({"diffusion_model_depth": 1024}, "diffusion_model_depth is 1024, but the weights hold only"),
        # A rotary table of 64 GiB.
        ({"diffusion_model_hidden_size": 1 << 20, "diffusion_model_heads": 1}, "heads of at most 1024"),
        (
            {"vision_tower_aux_token_len_list": [1 << 14], "diffusion_model_hidden_size": 1 << 20},
            "heads of at most 1024",
        ),
        ({"hidden_size": 1 << 20, "num_attention_heads": 1, "num_key_value_heads": 1}, "heads of at most 1024"),
        ({"mm_projector_type": "mlp99x_gelu"}, "model.mm_projector"),
    ],
)
def test_models_too_large_for_their_weights(copy: Path, changes: dict[str, Any], said: str) -> None:
    change(copy / "config.json", **changes)
    refused(lambda: load(copy), "config.json" if "projector" not in said else "", said)


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder_num_hidden_layers": 10**5},
        {"image_size": 1 << 20, "patch_size": 1},
        {"decoder_hidden_size": 1 << 40, "decoder_num_attention_heads": 1},
        {"decoder_intermediate_size": 1 << 62},
        {"decoder_num_hidden_layers": 10**15},
    ],
)
def test_decoders_too_large_for_their_weights(copy: Path, changes: dict[str, Any]) -> None:
    change(copy.parent / "decoder" / "config.json", **changes)
    refused(lambda: load(copy).decoder, str(copy.parent / "decoder" / "config.json"), next(iter(changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**5},
        {"image_size": 1 << 20, "patch_size": 1},
        {"hidden_size": 1 << 40},
        {"intermediate_size": 1 << 62},
        {"num_attention_heads": 0},
        {"patch_size": 0},
        {"num_channels": 1 << 40},
    ],
)
def test_encoders_too_large_for_their_weights(copy: Path, changes: dict[str, Any]) -> None:
    path = copy.parent / ENCODER / "config.json"
    vision = json.loads(path.read_text())["vision_config"]
    change(path, vision_config=vision | changes)
    refused(lambda: load(copy).encoder.model, str(path), next(iter(changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"size": {"height": 1 << 20, "width": 1 << 20}},
        {"do_pad": True, "pad_size": {"height": 1 << 20, "width": 1 << 20}},
        {"size": {"height": 10**15, "width": 224}},
    ],
)
def test_preprocessors_of_gigantic_images(copy: Path, changes: dict[str, Any]) -> None:
    path = copy.parent / ENCODER / "preprocessor_config.json"
    change(path, **changes)
    refused(lambda: load(copy).encoder, str(path), "at most 2048")
