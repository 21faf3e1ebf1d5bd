from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import scale_rae
from scale_rae import networks, provenance
from scale_rae.cli import runs
from scale_rae.cli.options import OutputOptions
from scale_rae.hub import Source
from scale_rae.noise import image_seed
from scale_rae.options import ModelChoice
from scale_rae.outputs import Sample
from scale_rae.pipeline import ScaleRAE
from scale_rae.prompt import QUESTION
from tests.cli.conftest import DRAW, Cli, left, only_manifest, with_defaults
from tests.helpers.made_checkpoints import GOLDENS

RED_CIRCLE = "Can you generate a photo of a red circle?"
TALK = "Show me five cats"  # this checkpoint answers it in words


def pixels(path: str | Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path))


# --- one prompt --------------------------------------------------------------------------------------------------


def test_draws_the_official_picture(t2i: Cli, out: Path) -> None:
    result = t2i("--prompt", DRAW, "--steps", 49, "--save-latent")
    assert result.code == 0
    assert result.err == ""
    golden = np.load(GOLDENS / "siglip.npz")
    manifest = only_manifest(out)
    (image,), latent = manifest["output_images"], manifest["latent_path"]
    assert np.abs(pixels(image).astype(int) - golden["decode.image"].astype(int)).max() <= 1
    value = torch.load(latent, weights_only=True)
    assert value.dtype == torch.float32
    assert list(value.shape) == [256, 768]
    np.testing.assert_allclose(value[::32], golden["t2i.latent"], atol=2e-5 * np.abs(golden["t2i.latent"]).max())
    assert value.untyped_storage().nbytes() == value.numel() * 4
    assert manifest["output_text"] == str(golden["t2i.text"])
    # the text reply, then the paths
    assert result.out == f"{manifest['output_text'].strip()}\n{image}\n{latent}\n"


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--solver", "heun"], {"solver": "heun"}),
        (["--guidance-level", 3], {"guidance": 3}),
        (
            ["--guidance-level", 3, "--guidance-interval", 0.5, 1],
            {"guidance": 3, "guidance_interval": (0.5, 1)},
        ),
        (["--steps", 5], {"steps": 5}),
        (["--seed", 1], {"seed": 1}),
    ],
    ids=str,
)
def test_options_of_sampling_reach_the_sampler(
    cli: Cli, out: Path, flags: list[object], options: dict[str, Any]
) -> None:
    """Each makes the latent that the Python interface makes of it, which is not that of the defaults."""
    result = cli(
        *("t2i", "--model-path", "shapes", "--prompt", RED_CIRCLE, "--save-latent", "--skip-decoder"),
        *("--output-dir", out, *with_defaults(flags, {"--steps": 4})),
    )
    assert result.code == 0, result.err
    model = scale_rae.load("shapes", device="cpu")
    expected, plain = (
        model.generate(RED_CIRCLE, decode=False, **{"steps": 4, **some}).images[0].latent for some in (options, {})
    )
    latent = torch.load(only_manifest(out)["latent_path"], weights_only=True)
    torch.testing.assert_close(latent, expected, atol=1e-5, rtol=0)
    assert (expected - plain).abs().max() > 0.05


def test_files_are_named_as_in_the_guide(t2i: Cli, out: Path) -> None:
    t2i("--prompt", DRAW, "--save-latent")
    (name,) = (n for n in left(out) if n.endswith(".png"))
    assert re.fullmatch(r"sample_\d{8}-\d{6}\.png", name)
    stem = name.removesuffix(".png")
    assert left(out) == sorted([name, f"{stem}_latent.pt", f"{stem}_manifest.json"])


def test_manifest_says_all(t2i: Cli, out: Path, checkpoints: dict[str, Path]) -> None:
    t2i("--prompt", DRAW, "--seed", 7, "--guidance-level", 1.5, "--guidance-interval", 0.1, 0.9, "--solver", "heun")
    manifest = only_manifest(out)
    model = checkpoints["siglip"]
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    expected = {
        "mode": "t2i",
        "prompt": DRAW,
        "model_path": str(model),
        "seed": 7,
        "image_seeds": [7],
        "guidance_level": 1.5,
        "guidance_interval": [0.1, 0.9],
        "solver": "heun",
        "steps": 4,
        "max_new_tokens": 512,
        "dtype": "float32",
        "device": "cpu",
        "latent_path": None,
    }
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["model"]["files"]["model.safetensors"] == digest
    assert "config.json" in manifest["decoder"]["files"]
    assert manifest["encoder"]["name"].endswith(
        json.loads((model / "config.json").read_text())["mm_vision_tower_aux_list"][0]
    )
    assert set(manifest["seconds"]) == {"load", "reply", "sampling", "decoding", "writing"}
    assert all(seconds >= 0 for seconds in manifest["seconds"].values())
    assert manifest["versions"]["scale_rae"] == scale_rae.__version__
    others = {"numpy", "pillow", "safetensors", "tokenizers"}
    assert set(manifest["versions"]) == {"scale_rae", "torch", "transformers", "python", *others}


def test_hashing_does_not_hold_up_the_drawing(t2i: Cli, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = threading.Event()
    record, generate = provenance.file_record, ScaleRAE.generate

    def slow_record(source: Source) -> dict[str, Any]:
        assert drawn.wait(240), "the drawing waits for the hashes"
        return record(source)

    def noticed(self: ScaleRAE, *args: Any, **options: Any) -> Any:
        try:
            return generate(self, *args, **options)
        finally:
            drawn.set()

    monkeypatch.setattr(provenance, "file_record", slow_record)
    monkeypatch.setattr(ScaleRAE, "generate", noticed)
    assert t2i("--prompt", DRAW).code == 0
    assert "model.safetensors" in only_manifest(out)["model"]["files"]


def test_png_says_how_it_was_drawn(t2i: Cli, out: Path) -> None:
    prompt = "Show me 猫, a naïve façade"
    t2i("--prompt", prompt, "--num-images", 2, "--seed", 5)
    for j, path in enumerate(only_manifest(out)["output_images"]):
        text = Image.open(path).text
        assert text["prompt"] == prompt
        assert text["seed"] == "5"
        assert text["image_seed"] == str(image_seed(5, 0, j))
        assert text["solver"] == "euler"
        assert text["steps"] == "4"
        assert text["guidance_level"] == "1.0"


def test_several_images(t2i: Cli, out: Path) -> None:
    result = t2i("--prompt", DRAW, "--num-images", 3, "--batch-size", 2, "--save-latent")
    manifest = only_manifest(out)
    assert [Path(p).name[-7:] for p in manifest["output_images"]] == ["_00.png", "_01.png", "_02.png"]
    assert [Path(p).name[-13:] for p in manifest["latent_paths"]] == [f"_0{i}_latent.pt" for i in range(3)]
    assert manifest["image_seeds"] == [image_seed(42, 0, j) for j in range(3)]
    assert all(path in result.out for path in (*manifest["output_images"], *manifest["latent_paths"]))
    first, second, _ = (pixels(p) for p in manifest["output_images"])
    assert not np.array_equal(first, second)


def test_no_file_is_overwritten(t2i: Cli, out: Path, frozen_time: str) -> None:
    out.mkdir()
    (out / f"sample_{frozen_time}.png").write_text("mine")
    for _ in range(3):
        assert t2i("--prompt", DRAW).code == 0
    stems = [f"sample_{frozen_time}-{n}" for n in (2, 3, 4)]
    names = [stem + end for stem in stems for end in (".png", "_manifest.json")]
    assert left(out) == sorted([f"sample_{frozen_time}.png", *names])
    assert (out / f"sample_{frozen_time}.png").read_text() == "mine"


def test_json_prints_the_manifest_and_nothing_else(t2i: Cli, out: Path) -> None:
    result = t2i("--prompt", DRAW, "--json")
    assert result.err == ""
    assert result.manifests == [only_manifest(out)]


def test_underscores_are_hyphens(cli: Cli, checkpoints: dict[str, Path], out: Path) -> None:
    options = ["--model_path", checkpoints["siglip"], "--output_dir", out, "--guidance_level=1.0", "--save_latent"]
    result = cli("t2i", "--prompt", "--a_prompt_like_an_option", *options, "--solver", "dpmpp_2m", "--steps", 2)
    assert result.code == 0, result.err
    assert only_manifest(out)["solver"] == "dpmpp_2m"
    assert only_manifest(out)["prompt"] == "--a_prompt_like_an_option"
    assert only_manifest(out)["latent_path"]


def test_a_reply_without_an_image(t2i: Cli, out: Path) -> None:
    result = t2i("--prompt", TALK)
    assert result.code == 1
    assert "answered without drawing; ask for a picture" in result.error
    manifest = only_manifest(out)
    assert manifest["output_images"] == []
    assert result.out.strip() == manifest["output_text"].strip() != ""


def test_a_reply_cut_off_before_its_image(t2i: Cli, out: Path) -> None:
    result = t2i("--prompt", DRAW, "--max-new-tokens", 2)
    assert result.code == 1
    assert "cut off by --max-new-tokens 2" in result.error
    assert only_manifest(out)["image_seeds"] == []


def test_skip_decoder_needs_no_decoder(cli: Cli, checkpoints: dict[str, Path], tmp_path: Path, out: Path) -> None:
    shutil.copytree(checkpoints["siglip"], tmp_path / "alone" / "model")
    options = ["--model-path", tmp_path / "alone" / "model", "--output-dir", out, "--steps", 4]
    result = cli("t2i", "--prompt", DRAW, "--skip-decoder", *options)
    assert result.code == 0, result.err
    manifest = only_manifest(out)
    assert manifest["decoder"] is None
    assert manifest["output_images"] == []
    assert torch.load(manifest["latent_path"], weights_only=True).shape == (256, 768)
    assert manifest["latent_path"] in result.out


# --- drawing again -----------------------------------------------------------------------------------------------


def test_from_manifest_draws_the_same(t2i: Cli, cli: Cli, out: Path, tmp_path: Path) -> None:
    options = [
        "--num-images",
        3,
        "--seed",
        9,
        "--guidance-level",
        1.7,
        "--guidance-interval",
        0.2,
        1,
        "--batch-size",
        2,
    ]
    assert t2i("--prompt", DRAW, "--solver", "dpmpp_2m", *options).code == 0
    first = only_manifest(out)
    (path,) = out.glob("*_manifest.json")
    result = cli("t2i", "--from-manifest", path, "--output-dir", tmp_path / "again", "--json")
    assert result.code == 0
    assert result.err == ""
    (again,) = result.manifests
    for a, b in zip(first["output_images"], again["output_images"], strict=True):
        assert a != b
        assert pixels(a).tobytes() == pixels(b).tobytes()
    new = {"output_images", "seconds", "from_manifest"}
    assert {k: v for k, v in again.items() if k not in new} == {k: v for k, v in first.items() if k not in new}


def test_from_manifest_of_one_prompt_of_a_file(t2i: Cli, cli: Cli, out: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Show me a cat", "index": 3, "tag": "x"}\n')
    assert t2i("--prompts", tmp_path / "prompts.jsonl", "--num-images", 2).code == 0
    first = only_manifest(out)
    (path,) = out.glob("*_manifest.json")
    (again,) = cli("t2i", "--from-manifest", path, "--output-dir", tmp_path / "again", "--json").manifests
    for a, b in zip(first["output_images"], again["output_images"], strict=True):
        assert pixels(a).tobytes() == pixels(b).tobytes()
    assert again["prompt_index"] == 3
    assert again["prompt_record"] == {"tag": "x"}


def test_from_manifest_refuses_other_files(cli: Cli, checkpoints: dict[str, Path], out: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints["siglip"].parent, tmp_path / "c")
    model = tmp_path / "c" / "model"
    cli("t2i", "--prompt", DRAW, "--model-path", model, "--output-dir", out, "--steps", 2)
    (path,) = out.glob("*_manifest.json")
    config = model / "config.json"
    config.write_text(config.read_text() + "\n")
    again = ["t2i", "--from-manifest", path, "--output-dir", tmp_path / "again"]
    result = cli(*again)
    assert result.code == 1
    assert "model: config.json" in result.error
    assert "--force" in result.error
    assert left(tmp_path / "again") == []
    result = cli(*again, "--force")
    assert result.code == 0
    assert "warning" in result.err
    # the files may have moved: what counts is what is in them
    moved = cli(*again, "--model-path", checkpoints["siglip"])
    assert moved.code == 0, moved.err


def test_manifests_that_cannot_be_drawn(cli: Cli, t2i: Cli, out: Path, tmp_path: Path) -> None:
    t2i("--prompt", DRAW)
    good = only_manifest(out)
    path = tmp_path / "m.json"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"mode": "img"}, "img"),
        ({"image_seeds": []}, "no image"),
        ({"image_seeds": ["x"]}, "image_seeds"),
        ({"steps": "many"}, "steps is 'many'"),
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": " "}, "prompt is empty"),
        ({"guidance_level": -1}, "guidance level -1"),
        ({"guidance_level": 10**400}, "digits"),
        ({"guidance_interval": [0.5]}, "guidance_interval"),
        ({"guidance_interval": [0.5, True]}, "guidance_interval"),
        ({"guidance_interval": [0, 10**400]}, "digits"),
        ({"device": "toaster"}, "device 'toaster'"),
        ({"solver": "magic"}, "magic"),
        ({"dtype": "int4"}, "int4"),
        ({"model": None}, "model is missing"),
    ]
    for change, complaint in cases:
        path.write_text(json.dumps(good | change))
        result = cli("t2i", "--from-manifest", path, "--output-dir", tmp_path / "again")
        assert result.code == 1
        assert result.error.startswith(f"{path}: ") or complaint == "prompt is empty"
        assert complaint in result.error
    for content, complaint in (
        (b"[]", "must hold a JSON object, not list"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
    ):
        path.write_bytes(content)
        result = cli("t2i", "--from-manifest", path, "--output-dir", tmp_path / "again")
        assert result.code == 1
        assert complaint in result.error
    assert "no such manifest" in cli("t2i", "--from-manifest", tmp_path / "none").error
    assert left(tmp_path / "again") == []


def test_differences_of_revisions() -> None:
    hub, folder = {"name": "a/b", "revision": "1"}, {"name": "/b", "files": {"x": "1"}}
    assert provenance.differences({"model": hub}, {"model": hub | {"name": "c/d"}}) == []
    assert provenance.differences({"model": hub}, {"model": hub | {"revision": "2"}}) == [
        "model: revision 2 here, 1 then"
    ]
    assert provenance.differences({"model": hub}, {"model": folder}) == ["model: folder /b here, hub revision 1 then"]
    assert provenance.differences({"decoder": None}, {"decoder": folder}) == []
    assert provenance.differences({"model": folder}, {"model": {"name": "/c", "files": {"y": "1"}}}) == [
        "model: y in /c"
    ]


# --- prompt files ------------------------------------------------------------------------------------------------


def test_prompt_file(t2i: Cli, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Any) -> None:
    loads = []
    load = networks.load
    monkeypatch.setattr(networks, "load", lambda *a, **k: loads.append(a) or load(*a, **k))
    batches = []
    generate = ScaleRAE.generate
    monkeypatch.setattr(ScaleRAE, "generate", lambda s, p, **k: batches.append(len(p)) or generate(s, p, **k))
    prompts = [f"Show me {n} cats" for n in ("one", "two", "three", "four", "six")]
    (tmp_path / "p.txt").write_text("\n\n".join([*prompts, "# Show me a cat"]))
    result = t2i("--prompts", tmp_path / "p.txt", "--num-images", 2, "--batch-size", 6, "--json", "--save-latent")
    assert result.code == 0
    assert len(loads) == 1
    assert batches == [3, 3]
    manifests = result.manifests
    assert [m["prompt"] for m in manifests] == [*prompts, "# Show me a cat"]
    assert [m["prompt_index"] for m in manifests] == list(range(6))
    assert [m["prompt_line"] for m in manifests] == [1, 3, 5, 7, 9, 11]
    assert [m["image_seeds"] for m in manifests] == [[image_seed(42, i, j) for j in (0, 1)] for i in range(6)]
    assert len(left(out)) == 6 * 5
    on_disk = [json.loads(p.read_text()) for p in sorted(out.glob("*_manifest.json"))]
    assert on_disk == manifests  # names sort as the prompts do
    # what is drawn in a batch is what is drawn alone
    alone = models["siglip"].generate(prompts[3], image_seeds=[manifests[3]["image_seeds"]], steps=4, decode=False)
    for drawn, path in zip(alone.images, manifests[3]["latent_paths"], strict=True):
        torch.testing.assert_close(torch.load(path, weights_only=True), drawn.latent, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("at_once", [True, False])
def test_runs_are_printed_in_order_when_they_are_on_disk(
    out: Path, at_once: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, files are written while the next are drawn; also those of before an error are printed."""
    go = threading.Event()
    original = runs.save_run

    def save_run(folder: Path, manifest: dict[str, Any], *rest: Any) -> dict[str, Any]:
        if not at_once:
            assert go.wait(240)
        return original(folder, manifest, *rest)

    monkeypatch.setattr(runs, "save_run", save_run)

    def run() -> None:
        with runs.RunWriter(OutputOptions(out), at_once) as writer:
            for i in range(5):
                writer.save({"output_text": f"{i}"}, [Sample(Image.new("RGB", (8, 8)))] * 3, f"-{i}")
            assert len(capsys.readouterr().out.splitlines()) == (20 if at_once else 0)
            go.set()
            writer.save({"output_text": "5"}, [], "-5")
            raise RuntimeError("drawing failed")

    with pytest.raises(RuntimeError, match="drawing failed"):
        run()
    assert len(list(out.glob("*.png"))) == 15
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) == 1] == list(
        "5" if at_once else "012345"
    )


def test_records_keep_what_they_say(t2i: Cli, tmp_path: Path) -> None:
    records = [{"index": 7, "prompt": "Show me a cat", "tag": "single_object"}, {"prompt": "Show me a dog"}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(r) for r in records))
    first, second = t2i("--prompts", tmp_path / "p.jsonl", "--json").manifests
    assert first["image_seeds"] == [image_seed(42, 7, 0)]
    assert first["prompt_record"] == {"tag": "single_object"}
    assert second["image_seeds"] == [image_seed(42, 1, 0)]


@pytest.mark.usefixtures("no_loading")
def test_bad_prompt_file_before_loading(t2i: Cli, tmp_path: Path, out: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"fine\n\xff\xfe\nfine\n<image-placeholder>\n")
    result = t2i("--prompts", tmp_path / "p.txt")
    assert result.code == 1
    assert "line 2: not valid UTF-8" in result.error
    assert "line 4: the prompt is empty" in result.error
    assert "no such prompt file" in t2i("--prompts", tmp_path / "none.txt").error
    assert left(out) == []


def test_prompts_too_long_are_named_before_drawing(t2i: Cli, tmp_path: Path, out: Path) -> None:
    (tmp_path / "p.txt").write_text("fine\n" + "a" * 5000 + "\nfine\n" + "b" * 6000)
    result = t2i("--prompts", tmp_path / "p.txt")
    assert result.code == 1
    assert "p.txt: line 2: " in result.error
    assert "p.txt: line 4: " in result.error
    assert left(out) == []


def test_prompts_that_draw_nothing_do_not_stop_the_others(t2i: Cli, tmp_path: Path, out: Path) -> None:
    (tmp_path / "p.txt").write_text(f"{TALK}\nShow me a cat on the mat\n")
    result = t2i("--prompts", tmp_path / "p.txt")
    assert [bool(json.loads(p.read_text())["output_images"]) for p in sorted(out.glob("*.json"))] == [False, True]
    assert result.code == 1
    *numbered, error = result.err.splitlines()
    assert numbered == [f"1/2 {TALK}", "2/2 Show me a cat on the mat"]
    assert "answered 1 of 2 prompts without drawing" in error


# --- questions about the drawing ---------------------------------------------------------------------------------


def test_post_qa_prompt(t2i: Cli, models: dict[str, ScaleRAE], out: Path) -> None:
    result = t2i("--prompt", DRAW, "--post-qa-prompt", "Is it {prompt}", "--num-images", 2, "--save-latent")
    assert result.code == 0
    manifest = only_manifest(out)
    assert manifest["post_qa"]["mode"] == "latent"
    latents = [torch.load(p, weights_only=True) for p in manifest["latent_paths"]]
    answers = models["siglip"].answer(f"Is it {DRAW}", latents=latents, max_new_tokens=64)
    assert [a["answer"] for a in manifest["post_qa"]["answers"]] == [a.text for a in answers]
    assert {a["question"] for a in manifest["post_qa"]["answers"]} == {f"Is it {DRAW}"}
    assert result.out.count(f"Is it {DRAW}") == 2
    assert "post_qa" in manifest["seconds"]


def test_post_qa_template(t2i: Cli, out: Path, tmp_path: Path) -> None:
    template = Path(scale_rae.__file__).parents[1] / "assets" / "qa_prompt_template.txt"
    (manifest,) = t2i("--prompt", DRAW, "--post-qa-template-path", template, "--json").manifests
    assert manifest["post_qa"]["answers"][0]["question"] == QUESTION.replace("{prompt}?", DRAW)
    (manifest,) = t2i(
        *("--prompt", DRAW, "--post-qa-template-path", template, "--post-qa-prompt", "a cat", "--json")
    ).manifests
    assert manifest["post_qa"]["answers"][0]["question"] == QUESTION.replace("{prompt}", "a cat")
    (tmp_path / "t.txt").write_text("Right?\n")
    (manifest,) = t2i("--prompt", DRAW, "--post-qa-template-path", tmp_path / "t.txt", "--json").manifests
    assert manifest["post_qa"]["answers"][0]["question"] == f"Right? {DRAW}"


def test_post_qa_of_the_image(t2i: Cli, models: dict[str, ScaleRAE]) -> None:
    (manifest,) = t2i(
        *("--prompt", DRAW, "--post-qa-prompt", "What?", "--post-qa-mode", "image", "--max-new-tokens-qa", 5, "--json")
    ).manifests
    image = Image.open(manifest["output_images"][0])
    (answer,) = models["siglip"].answer("What?", images=image, max_new_tokens=5)
    assert manifest["post_qa"]["answers"] == [{"question": "What?", "answer": answer.text}]


def test_templates_are_one(tmp_path: Path) -> None:
    package = Path(scale_rae.__file__).parent
    texts = [
        p.read_text()
        for p in (package / "assets/qa_prompt_template.txt", package.parent / "assets/qa_prompt_template.txt")
    ]
    assert texts == [QUESTION + "\n"] * 2


# --- what bad input gets -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--guidance-level", "-1"], "guidance level -1"),
        (["--guidance-level", "nan"], "guidance level nan"),
        (["--guidance-level", "inf"], "guidance level inf"),
        (["--guidance-interval", "0.9", "0.1"], "guidance interval"),
        (["--guidance-interval", "0", "nan"], "guidance interval"),
        (["--steps", "0"], "steps 0"),
        (["--steps", "1"], "2 to 1000"),
        (["--num-images", "0"], "number of images 0"),
        (["--batch-size", "0"], "batch size 0"),
        (["--max-new-tokens", "0"], "max new tokens 0"),
        (["--max-new-tokens-qa", "0", "--post-qa-prompt", "x"], "max new tokens of an answer 0"),
        (["--seed", "-1"], "seed -1"),
        (["--seed", "9" * 30], "less than 2^63"),
        (["--device", "toaster"], "device 'toaster'"),
    ],
)
def test_values_out_of_range(t2i: Cli, out: Path, options: list[str], complaint: str) -> None:
    """Wrong usage, as values are that cannot be parsed."""
    result = t2i("--prompt", DRAW, *options)
    assert result.code == 2
    assert complaint in result.error
    assert result.out == ""
    assert left(out) == []


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", " \n"], "prompt is empty"),
        (["--prompt", "a\udcffb"], "not valid Unicode"),
        (["--post-qa-prompt", ""], "prompt is empty"),
        (["--post-qa-template-path", "/none"], "/none: no such question template"),
        (["--post-qa-template-path", "/dev"], "/dev: is a folder, not a question template"),
        (["--post-qa-template-path", "/dev/null"], "/dev/null: is not a regular file"),
        (["--post-qa-template-path", "EMPTY"], "EMPTY: the question template is empty"),
        (["--output-dir", "/dev/null"], "/dev/null: cannot be an output folder"),
        (["--output-dir", "/dev/null/x"], "/dev/null/x: cannot be an output folder"),
    ],
)
def test_values_that_cannot_be(
    t2i: Cli, out: Path, options: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out.parent)
    (out.parent / "EMPTY").write_text(" \n")
    result = t2i(*with_defaults(options, {"--prompt": DRAW}))
    assert result.code == 1
    assert complaint in result.error
    assert result.out == ""
    assert left(out) == []


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--prompt", "a", "--prompts", "b"],
        ["--prompt", "a", "--from-manifest", "b"],
        ["--from-manifest", "b", "--seed", "1"],
        ["--from-manifest", "b", "--num_images", "1"],
        ["--prompt", "a", "--force"],
        ["--prompt", "a", "--solver", "magic"],
        ["--prompt", "a", "--dtype", "int4"],
        ["--prompt", "a", "--seed", "many"],
        ["--prompt", "a", "--post-qa-mode", "ear"],
        ["--prompt", "a", "--post-qa-mode", "image", "--skip-decoder"],
        ["--prompt", "a", "--nonsense"],
        ["--prompt", "a", "stray"],
    ],
)
def test_wrong_usage(cli: Cli, options: list[str]) -> None:
    result = cli("t2i", *options)
    assert result.code == 2
    assert "Usage: scale-rae t2i" in result.err
    assert result.out == ""


def test_a_very_long_prompt(t2i: Cli, out: Path) -> None:
    result = t2i("--prompt", "cat " * 25_000)
    assert result.code == 1
    assert "tokens long" in result.error
    assert left(out) == []


def test_a_device_that_is_not_there(t2i: Cli) -> None:
    for device, code in (("cuda:99", 1), ("cuda:999", 2), ("toaster", 2), ("cuda:-1", 2)):
        result = t2i("--prompt", DRAW, "--device", device)
        assert result.code == code
        assert device in result.error
        assert "cpu" in result.error


def test_float8_where_it_cannot_be(t2i: Cli, out: Path) -> None:
    result = t2i("--prompt", DRAW, "--quantize", "fp8")
    assert result.code == 1
    assert result.error == "quantize fp8: needs a CUDA GPU with float8 (compute capability 8.9 or more), not cpu"
    assert not out.exists()


def test_quantised_pictures(cli: Cli, tmp_path: Path) -> None:
    """The manifest says how the model was quantised, and pictures are drawn again by it."""
    command = ["t2i", "--model-path", "shapes", "--prompt", "Can you generate a red circle?", "--steps", 3]
    cli(*command, "--quantize", "int8", "--output-dir", tmp_path / "one")
    cli(*command, "--output-dir", tmp_path / "plain")
    (file,) = (tmp_path / "one").glob("*.json")
    assert json.loads(file.read_text())["quantize"] == "int8"
    cli("t2i", "--from-manifest", file, "--output-dir", tmp_path / "two")
    one, two, plain = (
        np.array(Image.open(next((tmp_path / name).glob("*.png"))), np.float32) for name in ("one", "two", "plain")
    )
    assert (one == two).all()
    assert 0 < np.abs(one - plain).mean() < 5


def test_offloading_where_it_cannot_be(t2i: Cli, out: Path) -> None:
    """A CPU that is asked for is refused at once; one that is all there is, when torch has looked."""
    for device in (("--device", "cpu"), *([] if torch.cuda.is_available() else [()])):
        result = t2i("--prompt", DRAW, "--offload", "model", *device)
        assert result.code == 2
        assert "offload 'model': weights would move to the host's memory, but the device cpu" in result.error
    assert not out.exists()


def test_offload_reaches_the_model(cli: Cli, t2i: Cli, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Manifests record it, and take it over as long as no other device is given."""
    monkeypatch.setattr("scale_rae.options.check_offload", lambda *_: None)  # the CPU is the device
    monkeypatch.setattr("scale_rae.networks.check_offload", lambda *_: None)
    t2i("--prompt", DRAW, "--offload", "stream", "--steps", 2, "--output-dir", out)
    (file,) = out.glob("*.json")
    assert json.loads(file.read_text())["offload"] == "stream"
    for flags, recorded in (((), "stream"), (("--device", "cpu"), "none"), (("--offload", "model"), "model")):
        cli("t2i", "--from-manifest", file, *flags, "--output-dir", out / recorded)
        (again,) = (out / recorded).glob("*.json")
        assert json.loads(again.read_text()).get("offload", "none") == recorded


def test_compile_and_quantize_reach_the_model(cli: Cli, t2i: Cli, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--compile changes nothing that a manifest must say; --quantize does, and is taken over from it."""
    seen: list[tuple[str, str | None]] = []
    load = networks.load

    def seeing(choice: ModelChoice, *args: Any) -> networks.Networks:
        seen.append((choice.compile, choice.quantize))
        return load(replace(choice, compile="auto", quantize=None), *args)

    monkeypatch.setattr(networks, "load", seeing)
    t2i("--prompt", DRAW, "--compile", "off", "--steps", 2)
    (file,) = out.glob("*.json")
    manifest = json.loads(file.read_text())
    assert manifest["quantize"] is None
    file.write_text(json.dumps(manifest | {"quantize": "fp8"}))
    cli("t2i", "--from-manifest", file, "--compile", "on", "--output-dir", out)
    assert seen == [("off", None), ("on", "fp8")]


def test_no_such_model(cli: Cli, out: Path, tmp_path: Path) -> None:
    result = cli("t2i", "--prompt", DRAW, "--model-path", tmp_path / "none", "--output-dir", out)
    assert result.code == 1
    assert "none: no such model folder" in result.error
    result = cli("t2i", "--prompt", DRAW, "--model-path", tmp_path, "--output-dir", out)
    assert result.code == 1
    assert "config.json" in result.error


def test_a_decoder_for_another_encoder(t2i: Cli, checkpoints: dict[str, Path], out: Path) -> None:
    result = t2i("--prompt", DRAW, "--decoder-repo", checkpoints["webssl"].parent / "decoder")
    assert result.code == 1
    assert "another encoder" in result.error
    assert left(out) == []


def test_a_folder_that_cannot_be_written(t2i: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))  # root may write anywhere
    result = t2i("--prompt", DRAW, "--output-dir", tmp_path / "locked" / "deep" / "er")
    assert result.code == 1
    assert "not writable" in result.error
    assert left(tmp_path / "locked") == []


def test_disk_full(t2i: Cli, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    result = t2i("--prompt", DRAW, "--num-images", 4)
    assert result.code == 1
    assert str(out) in result.error
    assert "No space left on device" in result.error
    assert left(out) == []


def test_interrupted_while_drawing(t2i: Cli, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ScaleRAE, "generate", interrupt)
    result = t2i("--prompt", DRAW)
    assert result.code == 130
    assert result.err.count("\n") == 1
    assert left(out) == []


def test_an_unexpected_error_is_one_line(t2i: Cli, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(ScaleRAE, "generate", fail)
    result = t2i("--prompt", DRAW)
    assert result.code == 1
    assert "ZeroDivisionError: by" in result.error
    assert "--debug" in result.error
    result = t2i("--prompt", DRAW, "--debug")
    assert result.code == 1
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("error: unexpected ZeroDivisionError")


def test_debug_shows_where_a_known_error_is_from(t2i: Cli) -> None:
    result = t2i("--prompt", DRAW, "--steps", 0, "--debug")
    assert result.code == 2
    assert "Traceback" in result.err
    assert (
        result.err.splitlines()[-1]
        == "error: steps 0: the euler solver picks from the published 1000-time grid and takes 2 to 1000"
    )
