"""Names and kinds of written files, several and random seeds, prompts on stdin, and defaults from environment and file."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import scale_rae
from scale_rae.cli import preview
from scale_rae.cli import t2i as t2i_module
from scale_rae.errors import OptionError
from scale_rae.options import ModelChoice, Sampling, seeds_of
from scale_rae.outputs import FileNames, Sample, save_run, slug
from tests.cli.conftest import Cli, left

RED = "Can you generate a photo of a red circle?"
EXAMPLES = Path(__file__).parents[2] / "example_prompts_shapes.jsonl"
QUICK = ("--model-path", "shapes", "--steps", 2)
DESCRIPTION = 0x010E  # EXIF's tag ImageDescription


@pytest.fixture
def asked(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[ModelChoice, Sampling]]:
    """The model and sampling that a command line of t2i asks for; nothing is loaded."""
    seen: list[tuple[ModelChoice, Sampling]] = []

    def prepare(choice: ModelChoice, sampling: Sampling, *_: object) -> None:
        seen.append((choice, sampling))
        raise SystemExit(0)

    monkeypatch.setattr(t2i_module, "prepare", prepare)

    def run(*argv: object) -> tuple[ModelChoice, Sampling]:
        result = cli("t2i", RED, *argv)
        assert result.code == 0, result.err
        return seen.pop()

    return run


# --- seeds -------------------------------------------------------------------------------------------------------


def test_texts_of_seeds() -> None:
    assert seeds_of("42") == 42
    assert seeds_of("1, 2,3") == (1, 2, 3)
    first, second = (seeds_of("random") for _ in range(2))
    assert isinstance(first, int)
    assert first != second  # in one of 2^32 runs they are equal
    assert 0 <= first < 2**32
    for text in ("", "1,", "a", "1.5", "9" * 50):
        with pytest.raises(ValueError, match="is not a whole number"):
            seeds_of(text)


def test_several_seeds_draw_the_image_of_each(cli: Cli, tmp_path: Path) -> None:
    """As the official guide writes them: --seed 42, 123, 456."""
    seeds = ("--seed", "42,", "123,", "456")
    several = cli("t2i", RED, *QUICK, *seeds, "--skip-decoder", "--json", "--output-dir", tmp_path).manifests[0]
    assert several["seed"] == several["image_seeds"] == [42, 123, 456]
    drawn = [torch.load(path, weights_only=True) for path in several["latent_paths"]]
    expected = scale_rae.load("shapes", device="cpu").generate(RED, steps=2, seed=123, decode=False).images[0].latent
    torch.testing.assert_close(drawn[1], expected, atol=1e-5, rtol=0)
    path = next(tmp_path.glob("*_manifest.json"))
    again = cli("t2i", "--from-manifest", path, "--skip-decoder", "--json", "--output-dir", tmp_path).manifests[0]
    assert again["seed"] == [42, 123, 456]
    assert torch.equal(torch.load(again["latent_paths"][2], weights_only=True), drawn[2])


def test_a_random_seed_is_printed(asked: Any, cli: Cli) -> None:
    _, sampling = asked("--seed", "random")
    assert sampling.seed < 2**32
    result = cli("t2i", RED, "--seed", "random,7")
    assert re.fullmatch(r"seed \d+,7\n", result.err)
    assert cli("t2i", RED, "--seed", "random", "-q").err == ""


# --- files -------------------------------------------------------------------------------------------------------


def test_a_named_file(cli: Cli, tmp_path: Path) -> None:
    """JPEG with the settings in its EXIF; not overwritten unasked; larger; quiet."""
    file = tmp_path / "new" / "a {b}.jpg"
    result = cli("t2i", RED, *QUICK, "-o", file, "--upscale", "--quiet")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1] == str(file)
    assert left(file.parent) == ["a {b}.jpg", "a {b}_manifest.json"]
    with Image.open(file) as image:
        assert image.format == "JPEG"
        assert image.size == (512, 512)
        assert json.loads(image.getexif()[DESCRIPTION])["prompt"] == RED
    manifest = file.with_name("a {b}_manifest.json")
    assert json.loads(manifest.read_text())["upscale"] == 4
    assert "exists already" in cli("t2i", RED, *QUICK, "-o", file).error
    again = cli("t2i", "--from-manifest", manifest, "-o", file, "--overwrite")
    assert again.code == 0, again.err
    with Image.open(file) as image:
        assert image.size == (512, 512)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["-o", "a.gif"], "'a.gif': a picture's name must end with one of .png"),
        (["-o", "a.png", "--output-dir", "x"], "leave out --output-dir"),
        (["-o", "a.png", "--filename-template", "x"], "leave out --filename-template"),
        (["-o", "a.png", "--skip-decoder"], "--output: needs the picture"),
        (["--upscale", "2", "--skip-decoder"], "--upscale: needs the picture"),
        (["--upscale", "17"], "--upscale 17"),
        (["--overwrite"], "goes with --output"),
        (["--preview", "--json"], "--preview: not with --json"),
        (["--preview"], "scale-rae[preview]"),
        (["--filename-template", "{sed}"], "the fields are {index}"),
        (["--filename-template", "{prompt.x}"], "the fields are {index}"),
        (["--filename-template", "{index:{seed}}"], "the fields are {index}"),
        (["--filename-template", "{prompt:05d}"], "the fields are {index}"),
        (["--filename-template", "a/{seed}"], "without folders"),
        (["--filename-template", "{"], "the fields are {index}"),
    ],
)
@pytest.mark.usefixtures("no_loading")
def test_what_no_file_can_be_named(
    cli: Cli, flags: list[str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = cli("t2i", RED, "--model-path", "shapes", *flags)
    assert problem in result.error
    assert left(tmp_path) == []


def test_names_by_a_template(tmp_path: Path) -> None:
    red = Image.new("RGB", (2, 2), "red")
    manifest = {"prompt": "Two “red” cats/dogs?", "prompt_index": 7, "seed": 42, "model_path": "a/b.c"}
    two = [Sample(red, torch.zeros(1, 2), seed=5), Sample(red, seed=6)]
    save_run(tmp_path / "1", manifest, two, "T", "-00007", FileNames("{index:05}-{prompt}-{seed}", ".webp"))
    stem = "00007-Two-red-cats-dogs"
    assert left(tmp_path / "1") == [
        f"{stem}-5.webp",
        f"{stem}-5_latent.pt",
        f"{stem}-5_manifest.json",
        f"{stem}-6.webp",
    ]
    with Image.open(tmp_path / "1" / f"{stem}-6.webp") as image:
        assert image.format == "WEBP"
    names = FileNames("{model}")
    for _ in range(2):
        save_run(tmp_path / "2", manifest, two, "T", "-00007", names)
    pictures = ["b-c-00007-2_00.png", "b-c-00007-2_01.png", "b-c-00007_00.png", "b-c-00007_01.png"]
    assert [name for name in left(tmp_path / "2") if name.endswith(".png")] == pictures
    assert slug("???") == "image"
    assert len(slug("猫" * 200).encode()) <= 160
    with pytest.raises(OptionError):
        FileNames("{prompt}", ".bmp").check()


def test_a_text_too_long_for_a_jpeg(tmp_path: Path) -> None:
    sample = Sample(Image.new("RGB", (2, 2)), text={"prompt": "猫" * 100_000})
    save_run(tmp_path, {}, [sample], "T", names=FileNames(suffix=".jpg"))
    with Image.open(tmp_path / "sample_T.jpg") as image:
        assert json.loads(image.getexif()[DESCRIPTION])["prompt"] == "猫" * 2999 + "…"


def test_a_preview_is_shown_on_a_terminal_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for textual-image; on a terminal only."""
    shown: list[Path] = []

    def show(path: Path, width: int, height: str) -> str:
        shown.append(path)
        return f"a picture {'W' * width}"

    monkeypatch.setitem(sys.modules, "textual_image.renderable", SimpleNamespace(Image=show))
    assert preview.show_picture(tmp_path) == "stdout is no terminal"
    assert shown == []
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert preview.show_picture(tmp_path) is None
    assert shown == [tmp_path]
    assert f"a picture {'W' * 40}" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "textual_image.renderable", SimpleNamespace(Image=lambda *_, **__: 1 // 0))
    assert "division" in str(preview.show_picture(tmp_path))


# --- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_loading")
def test_ways_to_give_a_prompt(cli: Cli) -> None:
    for argv in (["a", "--prompt", "b"], ["a", "--prompts", "x.txt"], ["a", "--from-manifest", "x"], ["a", "cat"], []):
        assert cli("t2i", *argv).code == 2


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        (b"a cat\n\na dog\n", ["a cat", "a dog"]),
        (b'{"prompt": "a cat", "index": 3}\n{"prompt": "a dog"}', ["a cat", "a dog"]),
    ],
)
def test_prompts_on_stdin(cli: Cli, text: bytes, prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(text)))
    found = t2i_module._of_file(Path("-"))
    assert [item.prompt for item in found] == prompts
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(b"a\n\xff")))
    assert cli("t2i", "--prompts", "-").error.startswith("standard input: line 2: not valid UTF-8")


# --- defaults ----------------------------------------------------------------------------------------------------


def test_defaults_from_variables_and_file(
    asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    """A flag counts before a variable, a variable before a command's table, that before the top of the file."""
    (tmp_path / "c.toml").write_text(
        'model-path = "shapes"\nguidance-scale = 5\nsteps = 3\nlora = ["a", "b:0.5"]\nmemory = "4G"\nmetric = "combined"\n'
        '[t2i]\nsteps = 4\nguidance-interval = [0.3, 0.9]\nsolver = "ab2"\n[img]\ndraw = true\n[evaluate.geneval]\nkeep = 3\n'
    )
    monkeypatch.setenv("SCALE_RAE_CONFIG", str(tmp_path / "c.toml"))
    monkeypatch.setenv("SCALE_RAE_SOLVER", "heun")
    monkeypatch.setenv("SCALE_RAE_SEED", "")
    choice, sampling = asked()
    assert choice == ModelChoice("shapes", lora=("a", "b:0.5"), memory="4G")
    options = sampling.options
    assert (options.guidance, options.steps, options.interval, options.solver) == (5.0, 4, (0.3, 0.9), "heun")
    choice, sampling = asked("--solver", "euler", "--num-inference-steps", 9, "--guidance-scale=2", "--lora", "c")
    assert (sampling.options.guidance, sampling.options.steps, sampling.options.solver) == (2.0, 9, "euler")
    assert choice.lora == ("c",)
    monkeypatch.setenv("SCALE_RAE_GUIDANCE_INTERVAL", "0 1")
    monkeypatch.setenv("SCALE_RAE_LORA", "d e")
    choice, sampling = asked()
    assert (choice.lora, sampling.options.interval) == (("d", "e"), (0.0, 1.0))
    # What stands there is a default: it does not clash with flags, as given options do.
    (tmp_path / "m.json").write_text('{"mode": "img"}')
    assert "is the manifest of scale-rae img" in cli("t2i", "--from-manifest", tmp_path / "m.json").error


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("stepz = 1", "c.toml: stepz is no option of any command; did you mean steps?"),
        ("[t2x]", "c.toml: [t2x] is no command; did you mean t2i?"),
        ("[t2i.steps]", "c.toml: [t2i.steps] is no command"),
        ("[t2i]\nmetric = 'x'", "c.toml: metric is no option of scale-rae t2i"),
        ("[t2i]\nsolver = 'rk4'", "c.toml: solver: 'rk4' is not one of euler"),
        ("steps = [1]", "c.toml: steps: takes one value"),
        ("steps = 'many'", "c.toml: steps: "),
        ("version = true", "c.toml: version is no option"),
        ("=", "c.toml: the configuration is not valid TOML"),
        ('"\\u001b[2J" = 1', r"c.toml: \x1b[2J is no option"),
    ],
)
@pytest.mark.usefixtures("no_loading")
def test_what_no_configuration_may_say(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCALE_RAE_CONFIG", "c.toml")
    monkeypatch.setenv("COLUMNS", "200")
    assert "cannot be read" in cli("t2i", RED).err
    (tmp_path / "c.toml").write_text(content)
    result = cli("t2i", RED)
    assert result.code == 2
    assert problem in result.err
    assert "\x1b" not in result.err


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[evaluate.genevl]", "c.toml: [evaluate.genevl] is no command; did you mean geneval?"),
        ("[evaluate]\nkeep = 3", "c.toml: evaluate.keep: put it into the table of one command, as [evaluate.geneval]"),
    ],
)
def test_tables_of_commands_in_groups(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, problem: str
) -> None:
    (tmp_path / "c.toml").write_text(content)
    monkeypatch.setenv("SCALE_RAE_CONFIG", str(tmp_path / "c.toml"))
    monkeypatch.setenv("COLUMNS", "300")
    result = cli("evaluate", "geneval", tmp_path)
    assert result.code == 2
    assert problem in result.err


def test_a_variable_with_a_bad_value(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALE_RAE_NUM_IMAGES", "x")
    assert "SCALE_RAE_NUM_IMAGES: " in cli("t2i", RED).err
    monkeypatch.setenv("SCALE_RAE_PORT", "x")
    assert "SCALE_RAE_PORT: " in cli("serve", "--model-path", "nope").err
    monkeypatch.setenv("SCALE_RAE_PORT", "tcp://10.0.0.1:80")  # as Kubernetes sets it
    assert cli("serve", "--host", "example.org").error.startswith("--host example.org lets other machines in")


@pytest.mark.parametrize(
    "argv",
    [
        ["t2i", "a"],
        ["img", "a.png", "a"],
        ["inspect"],
        ["train", "--data", "."],
        ["distill", "--prompts", "a.txt"],
        ["merge", "--out", "a", "--lora", "b"],
        ["reproduce", "--prompts", EXAMPLES, "--judge", "shapes"],
    ],
)
def test_every_command_takes_the_model_by_both_names(
    cli: Cli, argv: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("a")
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    for flag in ("--model", "--model-path"):
        assert cli(*argv, flag, "nope").error.startswith("nope: no such model folder"), flag
    monkeypatch.setenv("SCALE_RAE_MODEL_PATH", "none")
    assert cli(*argv).error.startswith("none: no such model folder")


@pytest.mark.parametrize(
    ("words", "expected"), [("t2", "t2i"), ("t2i --num-im", "--num-images"), ("t2i --solver h", "heun")]
)
def test_the_shell_completes_commands_flags_and_choices(
    cli: Cli, words: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_SCALE_RAE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"scale-rae {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    assert expected in cli().out.split()


def test_short_version(cli: Cli) -> None:
    assert cli("-V").out == f"scale-rae {scale_rae.__version__}\n"
