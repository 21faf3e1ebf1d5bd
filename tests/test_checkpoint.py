"""Every layout a checkpoint may come in gives the same model; memory stays near the weights' size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.made_tokenizer import write_tokenizer
from scale_rae.checkpoint import TensorReader
from scale_rae.config import parse_config
from scale_rae.dit import DiT
from scale_rae.encoder import Encoder
from scale_rae.errors import CheckpointError, InputError
from scale_rae.hub import find, weight_files
from scale_rae.language import LanguageModel
from scale_rae.pipeline import ScaleRAE
from tests.helpers.made_checkpoints import golden_case, made

DRAW = "Can you generate a photo of a cat on a windowsill?"
Weights = dict[str, Tensor]


@pytest.fixture
def copy(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """The siglip checkpoint, to be changed; returns the model's folder."""
    shutil.copytree(checkpoints["siglip"].parent, tmp_path / "copy")
    return tmp_path / "copy" / "model"


@pytest.fixture(scope="module")
def expected(models: dict[str, ScaleRAE]) -> tuple[list[int], Tensor]:
    return drawn(models["siglip"])


def drawn(model: ScaleRAE) -> tuple[list[int], Tensor]:
    result = model.generate(DRAW, steps=2, decode=False)
    return result.reply.ids, result.images[0].latent


def load(folder: Path, **options: Any) -> ScaleRAE:
    return ScaleRAE.from_pretrained(str(folder), device="cpu", **options)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def shard(folder: Path, count: int, suffix: str, index: bool = True) -> None:
    """Splits model.safetensors into shards."""
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for i in range(count):
        part = {name: weights[name] for name in sorted(weights)[i::count]}
        file = folder / f"{stem}-{i + 1:05}-of-{count:05}{suffix}"
        save_file(part, file) if suffix == ".safetensors" else torch.save(part, file)
        weight_map |= dict.fromkeys(part, file.name)
    if index:
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_bin(folder: Path, **options: Any) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda f: shard(f, 3, ".safetensors"),
        lambda f: shard(f, 3, ".safetensors", index=False),
        lambda f: shard(f, 2, ".bin"),
        lambda f: shard(f, 2, ".bin", index=False),
        as_bin,
        lambda f: as_bin(f, _use_new_zipfile_serialization=False),
        lambda f: (f / "pytorch_model.bin").write_bytes(b"never read when there are safetensors"),
        lambda f: (f / "training_args.bin").write_bytes(b"never read"),
        lambda f: (f / "model_ema.safetensors").write_bytes(b"never read"),
    ],
    ids=["shards", "shards no index", "bin shards", "bin shards no index", "bin", "old bin", "both", "args", "ema"],
)
def test_layouts_give_the_same_model(
    copy: Path, expected: tuple[list[int], Tensor], rewrite: Callable[[Path], object]
) -> None:
    rewrite(copy)
    ids, latent = drawn(load(copy))
    assert ids == expected[0]
    assert torch.equal(latent, expected[1])


def test_published_constants_are_ignored(copy: Path, expected: tuple[list[int], Tensor]) -> None:
    extras = [
        f"diff_head.model.{rope}.freqs_{part}"
        for rope in ("feat_rope", "enc_rope", "dec_rope")
        for part in ("cos", "sin")
    ]
    extras += ["model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    change_weights(copy, lambda w: w.update({name: torch.full((3, 2), torch.nan) for name in extras}))
    assert torch.equal(drawn(load(copy))[1], expected[1])


@pytest.mark.parametrize("stored", [True, False], ids=["lm_head stored", "lm_head absent"])
def test_tied_embeddings(copy: Path, stored: bool) -> None:
    change_config(copy, tie_word_embeddings=True)

    def tie(weights: Weights) -> None:
        weights["model.embed_tokens.weight"] = weights.pop("lm_head.weight")
        if stored:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    change_weights(copy, tie)
    model = load(copy)
    assert model.language.lm_head.weight is model.language.model.embed_tokens.weight
    shutil.copytree(copy, copy.parent / "untied")
    change_config(copy.parent / "untied", tie_word_embeddings=False)
    change_weights(
        copy.parent / "untied", lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    )
    tied, untied = (
        model.reply([DRAW], max_new_tokens=5)[0],
        load(copy.parent / "untied").reply([DRAW], max_new_tokens=5)[0],
    )
    assert tied.ids == untied.ids
    assert tied.logits == untied.logits


@pytest.mark.parametrize("shape", [(), (1,), (768,), (256, 1), (256, 768), (1, 768)])
def test_stored_statistics_scale_the_latent(
    copy: Path, expected: tuple[list[int], Tensor], shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(1)
    mean, std = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) + 0.5
    change_weights(copy, lambda w: w.update({"diff_head.data_mean": mean, "diff_head.data_std": std}))
    torch.testing.assert_close(drawn(load(copy))[1], expected[1] * std + mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "depth"), [("linear", 0), ("mlp1x_gelu", 1), ("mlp3x_gelu", 3)])
def test_projectors_have_the_depth_that_their_type_says(copy: Path, kind: str, depth: int) -> None:
    change_config(copy, mm_projector_type=kind)
    layers = [torch.from_numpy(made(f"layer{i}", [64, 768 if i == 0 else 64])) for i in range(max(depth, 1))]

    def replace(weights: Weights) -> None:
        for name in [n for n in weights if n.startswith("model.mm_projector")]:
            del weights[name]
        for i, layer in enumerate(layers):
            prefix = "model.mm_projector" + (f".{2 * i}" if depth else "")
            weights.update({f"{prefix}.weight": layer, f"{prefix}.bias": torch.full((64,), 0.1)})

    change_weights(copy, replace)
    projector = load(copy).language.model.mm_projector
    x = torch.randn(5, 768, generator=torch.Generator().manual_seed(2))
    y = x
    for i, layer in enumerate(layers):
        y = (torch.nn.functional.gelu(y) if i else y) @ layer.T + 0.1
    with torch.inference_mode():
        torch.testing.assert_close(projector(x), y)


def test_no_markers_around_images(copy: Path) -> None:
    change_config(copy, mm_use_im_start_end=False)
    model = load(copy)
    assert model.tokenizer.image() == [-200]
    chat = model.tokenizer.chat("What is it?", image=True)
    assert not {model.tokenizer.image_start, model.tokenizer.image_end} & set(chat)
    assert model.answer("What is it?", latents=torch.zeros(256, 768), max_new_tokens=2)[0].reply.ids


def test_checkpoint_without_null_embedding(copy: Path, expected: tuple[list[int], Tensor]) -> None:
    change_config(copy, diffusion_class_dropout_prob=0.0)
    change_weights(copy, lambda w: w.pop("diff_head.model.y_embedder.dropout_embedding"))
    model = load(copy)
    assert torch.equal(drawn(model)[1], expected[1])
    for guidance in (0.0, 0.5, 3.0):
        with pytest.raises(InputError, match=r"diffusion_class_dropout_prob 0.*no null embedding; only 1\.0"):
            model.generate(DRAW, guidance=guidance)


def test_parts_are_found_inside_before_beside(copy: Path) -> None:
    encoder = "google/siglip2-base-patch14-224"
    assert find(encoder, "encoder", copy).folder == copy.parent / encoder
    assert find("decoder", "decoder", copy).folder == copy.parent / "decoder"
    shutil.copytree(copy.parent / encoder, copy / encoder)
    assert find(encoder, "encoder", copy).folder == copy / encoder
    assert find(str(copy.parent / "decoder"), "decoder", copy).folder == copy.parent / "decoder"


def test_encoder_layouts(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = checkpoints["siglip"].parent / "google/siglip2-base-patch14-224"
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    features = []
    for rewrite in (None, as_bin, lambda f: shard(f, 2, ".safetensors"), vision_only):
        shutil.copytree(source, tmp_path / "encoder", dirs_exist_ok=True)
        if rewrite:
            rewrite(tmp_path / "encoder")
        features.append(Encoder(tmp_path / "encoder", 256, -1, torch.float32, torch.device("cpu")).encode(pixels))
        shutil.rmtree(tmp_path / "encoder")
    assert all(torch.equal(f, features[0]) for f in features)


def vision_only(folder: Path) -> None:
    """A siglip_vision_model, as made by cutting the text tower off."""
    change_weights(folder, lambda w: [w.pop(n) for n in list(w) if not n.startswith("vision_model.")])
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())["vision_config"]))


def test_progress_counts_bytes(copy: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    load(copy, progress=lambda *args: seen.append(args))
    assert {what for what, _, _ in seen} == {"model"}
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == seen[-1][2]


def test_dtypes_arrive_as_asked(copy: Path) -> None:
    model = load(copy, dtype="bfloat16")
    dtypes = {
        **{n: p.dtype for n, p in model.language.named_parameters()},
        **{"dit." + n: p.dtype for n, p in model.dit.named_parameters()},
    }
    float32 = {n for n, dtype in dtypes.items() if dtype == torch.float32}
    assert float32 == {n for n in dtypes if n.startswith("dit.") and (".t_embedder." in n or ".norm" in n)}
    assert {dtypes[n] for n in dtypes.keys() - float32} == {torch.bfloat16}
    assert not any(p.requires_grad for p in (*model.language.parameters(), *model.dit.parameters()))


def test_reader_reads_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scale_rae.checkpoint._CHUNK_BYTES", 100)
    tensors = {"a": torch.randn(37, 11), "b": torch.tensor(3.0), "c": torch.arange(5), "d": torch.zeros(0, 4)}
    tensors["e"] = torch.randn(3, 400)[:, ::2]  # not contiguous, in the pickle
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "new.pt")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for file in ("model.safetensors", "new.pt", "old.pt"):
        reader = TensorReader([tmp_path / file])
        for name, tensor in tensors.items():
            assert torch.equal(reader.read(name), tensor.float())


def test_weight_files_of_an_index(tmp_path: Path) -> None:
    for i in (1, 2):
        save_file({f"t{i}": torch.zeros(1)}, tmp_path / f"model-{i:05}-of-00002.safetensors")
    assert len(weight_files(tmp_path)) == 2
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing shards model-00001-of-00002\.safetensors;"):
        weight_files(tmp_path)


LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 1,
    "vocab_size": 30_000,
    "diffusion_model_hidden_size": 1536,
    "diffusion_model_heads": 24,
    "diffusion_model_depth": 4,
    "diffusion_model_z_channels": 1536,
}
MEASURE = """
import ctypes
import gc
import sys
from pathlib import Path
import torch
from scale_rae.pipeline import ScaleRAE

def kilobytes(field):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))

torch.set_num_threads(1)
ScaleRAE.from_pretrained(sys.argv[1], device="cpu", dtype=sys.argv[2])  # all that is imported late
for case in sys.argv[3:]:
    folder, _, quantize = case.partition("+")
    model = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the model before this one held goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # starts the high water mark anew
    before = kilobytes("VmRSS:")
    model = ScaleRAE.from_pretrained(folder, device="cpu", dtype=sys.argv[2], quantize=quantize or None)
    tensors = [t for part in (model.language, model.dit) for t in (*part.parameters(), *part.buffers())]
    size = sum({t.data_ptr(): t.nbytes for t in tensors}.values())
    print(1024 * (kilobytes("VmHWM:") - before), size)
"""


def write_large(folder: Path, dtype: torch.dtype, shards: int) -> None:
    """A checkpoint of a quarter of a billion parameters, 0.5 GB in bfloat16, as sparse files: quick to make, read like any."""
    config = golden_case("siglip")["model"]["config"] | LARGE
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    parsed = parse_config(config, folder)
    with torch.device("meta"):
        parts = {"": LanguageModel(parsed), "diff_head.model.": DiT(parsed.dit)}
    shapes = {prefix + n: p.shape for prefix, part in parts.items() for n, p in part.named_parameters()}
    for i in range(shards):
        end, header = 0, {}
        for name in sorted(shapes)[i::shards]:
            start, end = end, end + shapes[name].numel() * dtype.itemsize
            kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
            header[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        name = "model.safetensors" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc to measure")
def test_peak_memory_is_near_the_weights_size(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """At most 1.3 times the weights in the target dtype or quantised, or two chunks more, pages of mapped files counted in."""
    kinds = {"float32": (torch.float32, 1), "bfloat16": (torch.bfloat16, 1), "shards": (torch.bfloat16, 3)}
    for name, (dtype, shards) in kinds.items():
        write_large(tmp_path / name, dtype, shards)
    cases = {name: tmp_path / name for name in kinds} | {"int8": f"{tmp_path / 'bfloat16'}+int8"}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, checkpoints["siglip"], "bfloat16", *cases.values()],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    for name, line in zip(cases, run.stdout.splitlines(), strict=True):
        peak, size = map(int, line.split())
        print(f"{name}: {peak / size:.3f} times the weights")
        assert size > (0.25e9 if name == "int8" else 0.5e9)
        assert size < peak <= size + max(0.3 * size, 128 << 20), name
    for name in kinds:
        shutil.rmtree(tmp_path / name)


def test_drawing_imports_neither_transformers_nor_the_compiler() -> None:
    """Each takes more than a second, and a small drawing less."""
    code = (
        "import sys, scale_rae\n"
        "model = scale_rae.load('shapes', device='cpu')\n"
        "model.generate('Can you generate a photo of a red circle?', steps=2)\n"
        "print([m for m in ('transformers', 'huggingface_hub', 'torch._dynamo', 'sympy', 'scipy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
