from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scale_rae.cli import main
from scale_rae.errors import InputError, OutputError
from scale_rae.scaling import replacing
from scale_rae.scaling.reader import read_experiment
from scale_rae.scaling.select import renumbered, select
from tests.helpers.made_experiment import write_experiment, write_prompt

ROOT = Path(__file__).parents[2]


def digest(folder: Path) -> dict[str, Any]:
    """Every file's content and time."""
    return {
        str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def metadata(folder: Path) -> dict[str, Any]:
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1
    value = json.loads(lines[0])
    assert isinstance(value, dict)
    return value


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    return write_experiment(tmp_path / "2_scale", 3)


def test_what_is_written(experiment: Path, tmp_path: Path) -> None:
    before = digest(experiment)
    _, selections, record = select(experiment, "combined")
    assert digest(experiment) == before
    assert names(tmp_path) == ["2_scale", "2_scale_combined_verified", "2_scale_ref"]
    for kind, images in (("combined_verified", [s.kept for s in selections]), ("ref", [s.ref for s in selections])):
        folder = tmp_path / f"2_scale_{kind}"
        assert names(folder) == ["00000", "00001", "00002", "selection.json"]
        for s, kept in zip(selections, images, strict=True):
            assert names(folder / s.prompt.name) == ["metadata.jsonl", "samples"]
            assert names(folder / s.prompt.name / "samples") == [f"{i:05}.png" for i in range(4)]
            old, new = s.prompt.metadata, metadata(folder / s.prompt.name)
            assert new["original_indices"] == kept
            assert new["all_ir_scores"] == [old["all_ir_scores"][i] for i in kept]
            assert new["text_responses"] == {str(n): old["text_responses"][str(i)] for n, i in enumerate(kept)}
            for name in (
                "tag",
                "include",
                "index",
                "prompt",
                "request",
                "output_text",
                "n_samples",
                "qa_mode",
                "reward",
            ):
                assert new[name] == old[name]
            for n, i in enumerate(kept):
                copy = folder / s.prompt.name / "samples" / f"{n:05}.png"
                assert copy.read_bytes() == s.prompt.images[i].read_bytes()
                assert not copy.samefile(s.prompt.images[i])  # no hard link: what is done to it would reach the source
    assert selections[0].ref == [0, 1, 2, 3]
    written = json.loads((tmp_path / "2_scale_combined_verified" / "selection.json").read_text())
    assert record.items() <= written.items()
    assert written["prompts"][1]["kept"] == selections[1].kept


def test_the_shares_of_yes_are_of_kept_first_and_all_images(tmp_path: Path) -> None:
    rng = random.Random(0)
    write_prompt(tmp_path / "e" / "00000", 0, "a", ["no", "yes", "yes", "no"], [0.0, 1, 2, 3], rng, n_samples=2)
    write_prompt(tmp_path / "e" / "00001", 1, "b", ["no", "no", "uncertain", "yes"], [0.0, 1, 2, 3], rng, n_samples=2)
    _, _, record = select(tmp_path / "e")
    assert record["yes_ratios"] == {
        "kept": {"yes": 3, "asked": 4, "share": 0.75},
        "ref": {"yes": 1, "asked": 4, "share": 0.25},
        "all": {"yes": 3, "asked": 8, "share": 0.375},
    }


def test_a_selection_is_an_experiment_itself(experiment: Path, tmp_path: Path) -> None:
    _, first, _ = select(experiment, "answer_conf", keep=5)
    _, again, _ = select(tmp_path / "2_scale_answer_conf_verified", "answer_conf", keep=2)
    assert [s.kept for s in again] == [[0, 1]] * 3
    kept = metadata(tmp_path / "2_scale_answer_conf_verified_answer_conf_verified" / "00000")["original_indices"]
    assert kept == first[0].kept[:2]


@pytest.mark.parametrize("keep", [1, 3, 8, 20])
def test_no_more_images_are_kept_than_there_are(experiment: Path, tmp_path: Path, keep: int) -> None:
    select(experiment, "loss", keep)
    assert len(names(tmp_path / "2_scale_loss_verified" / "00001" / "samples")) == min(keep, 8)
    assert len(names(tmp_path / "2_scale_ref" / "00001" / "samples")) == min(keep, 8)


@pytest.mark.parametrize(
    ("given", "folder"), [("loss", "loss"), ("prompt_loss", "prompt_loss"), ("Prompt-Loss", "prompt_loss")]
)
def test_the_folder_is_named_as_the_metric_was_given(
    experiment: Path, tmp_path: Path, given: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the official verify_results.py, whose `--metric loss` writes DIR_loss_verified."""
    assert main(["select", str(experiment), "--metric", given, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert names(tmp_path) == ["2_scale", f"2_scale_{folder}_verified", "2_scale_ref"]
    assert (record["metric"], record["verified"]) == ("prompt_loss", str(tmp_path / f"2_scale_{folder}_verified"))


def test_kept_images_are_renumbered_in_every_field() -> None:
    old = {
        "tag": "x",
        "image_seeds": [10, 11, 12],
        "all_ir_scores": [0.1, 0.2, 0.3],
        "top_ir_indices": [2, 1],
        "top_ir_scores": [0.3, 0.2],
        "text_responses": {"0": "a", "2": "c"},
    }
    new = renumbered(old, [2, 0])
    assert new == {
        "tag": "x",
        "image_seeds": [12, 10],
        "all_ir_scores": [0.3, 0.1],
        "top_ir_indices": [0],
        "top_ir_scores": [0.3],
        "text_responses": {"0": "c", "1": "a"},
        "original_indices": [2, 0],
    }
    assert renumbered(new, [1])["original_indices"] == [0]  # from a selection: still as they were drawn
    assert renumbered({"all_ir_scores": None}, [1]) == {"all_ir_scores": None, "original_indices": [1]}


def test_a_second_selection_replaces_the_first_whole(experiment: Path, tmp_path: Path) -> None:
    select(experiment, keep=8)
    shutil.rmtree(experiment / "00002")
    select(experiment, keep=2)
    assert names(tmp_path) == ["2_scale", "2_scale_combined_verified", "2_scale_ref"]
    for kind in ("combined_verified", "ref"):
        assert names(tmp_path / f"2_scale_{kind}") == ["00000", "00001", "selection.json"]
        assert len(names(tmp_path / f"2_scale_{kind}" / "00000" / "samples")) == 2


@pytest.mark.parametrize("which", ["2_scale_combined_verified", "2_scale_ref"])
@pytest.mark.parametrize("kind", ["file", "folder", "empty", "link", "json"])
def test_what_others_made_is_not_replaced(experiment: Path, tmp_path: Path, which: str, kind: str) -> None:
    target = tmp_path / which
    if kind == "file":
        target.write_text("mine")
    elif kind == "link":
        target.symlink_to(experiment)
    else:
        target.mkdir()
        if kind == "folder":
            (target / "00000").mkdir()
        if kind == "json":
            (target / "selection.json").write_text('{"tool": "another", "holds": {}}')
    before = digest(tmp_path)
    with pytest.raises(OutputError, match=f"{which}: is there and was not written by scale-rae select"):
        select(experiment)
    assert digest(tmp_path) == before
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("name", ["notes.txt", "00000/results.json", "00000/samples/00004.png"])
def test_what_others_put_in_is_not_lost(experiment: Path, tmp_path: Path, name: str) -> None:
    select(experiment)
    (tmp_path / "2_scale_ref" / name).write_text("mine")
    with pytest.raises(OutputError, match=f"{name}: was not written by scale-rae select"):
        select(experiment)
    assert (tmp_path / "2_scale_ref" / name).read_text() == "mine"


@pytest.mark.parametrize("broken", [(shutil, "copyfile"), (replacing, "exchange")], ids=["copy", "exchange"])
def test_a_failed_write_leaves_what_was_there(
    experiment: Path, tmp_path: Path, broken: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    select(experiment, keep=2)
    before = digest(tmp_path)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*broken, full)
    with pytest.raises(OutputError, match="No space left on device"):
        select(experiment, keep=3)
    assert digest(tmp_path) == before
    assert len(names(tmp_path)) == 3


class Killed(BaseException):
    """Stands for kill -9: from then on nothing is done any more, not even what would tidy up."""


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchanged", "renamed twice"])
def test_the_old_folder_or_the_new_is_there_whenever_it_is_killed(
    experiment: Path, tmp_path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exchanges and not replacing.exchange(tmp_path, tmp_path):
        pytest.skip("this file system cannot exchange two names")
    targets = [tmp_path / "2_scale_combined_verified", tmp_path / "2_scale_ref"]
    select(experiment, keep=2)
    sizes = {2, 3}
    for killed_after in range(1, 40):
        steps = 0

        def step(do: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **options: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps > killed_after:  # noqa: B023
                    raise Killed
                return do(*args, **options)

            return counted

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", step(Path.rename))
            patch.setattr(shutil, "rmtree", step(shutil.rmtree))
            patch.setattr(replacing, "exchange", step(replacing.exchange) if exchanges else lambda one, other: False)
            try:
                select(experiment, keep=3)
                finished = True
            except Killed:
                finished = False
        for target in targets:
            if exchanges:
                assert target.is_dir(), f"absent after a kill at step {killed_after}"
            found = read_experiment(target)  # puts the old folder back where the file system can do no better
            assert {len(p.images) for p in found.prompts} <= sizes
            assert len(found.prompts) == 3
        if finished:
            break
    assert finished
    assert killed_after > 4
    assert names(tmp_path) == ["2_scale", "2_scale_combined_verified", "2_scale_ref"]


def test_what_a_kill_left_is_mended(experiment: Path, tmp_path: Path) -> None:
    select(experiment)
    whole = digest(tmp_path / "2_scale_ref").keys()
    # killed between the two renames of a swap, and while another folder was built
    (tmp_path / "2_scale_ref").rename(tmp_path / ".2_scale_ref.scale-rae-old")
    (tmp_path / ".2_scale_ref.scale-rae-new" / "00000").mkdir(parents=True)
    (tmp_path / ".2_scale_combined_verified.scale-rae-old").mkdir()
    with pytest.raises(InputError):
        select(experiment, "nothing")
    select(experiment)
    assert names(tmp_path) == ["2_scale", "2_scale_combined_verified", "2_scale_ref"]
    assert digest(tmp_path / "2_scale_ref").keys() == whole


def test_two_at_once(experiment: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "verify_results.py"), "--sample-dir", str(experiment), "--keep"]
    running = [subprocess.Popen([*command, str(n)], stdout=subprocess.DEVNULL) for n in (1, 2, 3, 4)]
    assert [p.wait() for p in running] == [0, 0, 0, 0]
    assert names(tmp_path) == ["2_scale", "2_scale_combined_verified", "2_scale_ref"]


def damage_nothing_left(folder: Path) -> None:
    for name in ("metadata.jsonl", "samples/00000.png"):
        (folder / name).unlink()


def failed(folder: Path, error: str) -> None:
    (folder / "metadata.jsonl").unlink()
    (folder / "error.json").write_text(error)


BREAK: dict[str, tuple[Callable[[Path], Any], str]] = {
    "metadata": (lambda f: (f / "metadata.jsonl").unlink(), "has no metadata.jsonl"),
    "half": (lambda f: os.truncate(f / "metadata.jsonl", 100), "metadata.jsonl is not valid JSON"),
    "latin": (lambda f: (f / "metadata.jsonl").write_bytes(b'{"prompt": "\xe9"}'), "metadata.jsonl is not valid JSON"),
    "list": (lambda f: (f / "metadata.jsonl").write_text("[]"), "metadata.jsonl holds a list, not an object"),
    "nan": (
        lambda f: (f / "metadata.jsonl").write_text('{"prompt": NaN}'),
        "metadata.jsonl is not valid JSON (NaN is not JSON)",
    ),
    "deep": (
        lambda f: (f / "metadata.jsonl").write_text("[" * 10**6),
        "metadata.jsonl is not valid JSON (nested too deeply)",
    ),
    "prompt": (lambda f: (f / "metadata.jsonl").write_text("{}"), "metadata.jsonl has no prompt"),
    "png": (lambda f: (f / "samples" / "00003.png").unlink(), "samples lacks 00003.png"),
    "last": (lambda f: (f / "samples" / "00007.png").unlink(), "samples lacks 00007.png"),
    "cut": (lambda f: os.truncate(f / "samples" / "00002.png", 120), "samples/00002.png is damaged"),
    "empty": (lambda f: os.truncate(f / "samples" / "00002.png", 0), "samples/00002.png is damaged"),
    "more": (lambda f: shutil.copy(f / "samples/00000.png", f / "samples/00008.png"), "samples holds 9 images"),
    "samples": (lambda f: shutil.rmtree(f / "samples"), "has no samples folder"),
    "error": (lambda f: failed(f, '{"error": "out of\\nmemory"}'), "failed: out of memory"),
    "damaged error": (lambda f: failed(f, "{"), "failed (error.json)"),
}


def test_an_error_beside_a_result_is_left_over(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is killed right after it finished a prompt leaves the error of the run before."""
    (experiment / "00001" / "error.json").write_text('{"error": "out of memory"}')
    assert main(["select", "--sample-dir", str(experiment)]) == 0
    assert "skipped" not in "".join(capsys.readouterr())


def test_an_empty_experiment_json_is_as_none(experiment: Path) -> None:
    """A crash can leave it; the records say how many to keep."""
    (experiment / "experiment.json").write_bytes(b"")
    assert main(["select", "--sample-dir", str(experiment)]) == 0


@pytest.mark.parametrize("how", BREAK)
def test_incomplete_prompts_are_listed_and_skipped(
    experiment: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    BREAK[how][0](experiment / "00001")
    before = digest(experiment)
    assert main(["select", "--sample-dir", str(experiment)]) == 0
    out, err = capsys.readouterr()
    assert err.startswith(f"skipped 00001: {BREAK[how][1]}")
    assert err.count("\n") == 1
    assert "skipped 1 incomplete prompt" in out
    assert digest(experiment) == before
    assert names(tmp_path / "2_scale_ref") == ["00000", "00002", "selection.json"]
    written = json.loads((tmp_path / "2_scale_ref" / "selection.json").read_text())
    assert [p["folder"] for p in written["incomplete"]] == ["00001"]


def test_a_missing_png_is_noticed_without_seeds(experiment: Path) -> None:
    value = metadata(experiment / "00000")
    del value["image_seeds"]
    (experiment / "00000" / "metadata.jsonl").write_text(json.dumps(value))
    (experiment / "00000" / "samples" / "00007.png").unlink()
    assert [p.reason for p in read_experiment(experiment).incomplete] == ["samples lacks 00007.png"]


def test_a_folder_of_the_official_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(2):
        folder = tmp_path / "2_scale" / f"{index:05}"
        value = write_prompt(
            folder, index, "a cake", ["yes", "no", "yes", "no"], [0.4, 0.3, 0.2, 0.1], random.Random(index)
        )
        responses = {i: value["text_responses"][i] for i in ("0", "1")}
        old = {"prompt": "a cake", "all_ir_scores": value["all_ir_scores"], "top_ir_indices": [0, 1]}
        (folder / "metadata.jsonl").write_text(json.dumps(old | {"text_responses": responses}))
    sample_dir = str(tmp_path / "2_scale")
    for metric in ("combined", "answer_conf", "loss", "image_reward"):
        assert main(["select", "--sample-dir", sample_dir, "--metric", metric]) == 0
        out = capsys.readouterr().out
        assert "kept 2 of 4 images, best first: 0, 1; the model says yes to 1 of the kept" in out.replace(
            "1, 0;", "0, 1;"
        )
        assert "and to 1 of the 2 it was asked about\n" in out
    assert main(["select", "--sample-dir", sample_dir, "--metric", "answer_conf", "--keep", "3"]) == 1
    assert capsys.readouterr().err == (
        f'error: {sample_dir}/00000/metadata.jsonl: text_responses["2"] is missing; '
        "--metric answer_conf needs it of at least 3 images (2 have it)\n"
    )
    assert main(["report", sample_dir]) == 0
    assert main(["sheet", sample_dir]) == 0


def test_what_is_printed(experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, selections, record = select(experiment)
    assert main(["select", "--sample_dir", f"{experiment}/", "--metric", "combined"]) == 0
    lines = capsys.readouterr().out.splitlines()
    kept = ", ".join(map(str, selections[0].kept))
    begins = f"00000 {selections[0].prompt.text}: kept {len(selections[0].kept)} of 8 images, best first: {kept}; "
    assert lines[0].startswith(f"{begins}the model says yes to ")
    assert lines[0].endswith(" of all 8")
    ratio = record["yes_ratios"]
    for line, part, begins in (
        (lines[-2], "kept", "best images kept: "),
        (lines[-1], "ref", "first images drawn, to compare: "),
    ):
        assert line.startswith(begins)
        assert f"the model says yes to {ratio[part]['yes']} of 12 ({ratio[part]['share']:.3f}); " in line
    assert main(["select", str(experiment), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == record


def test_the_rewards_weight(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = {}
    formulas = {
        "0": "yes first; 0 z(reward) + 0.2 z(yes_conf_score) + 0.8 z(prompt_conf_score)",
        "0.5": "yes first; 0.5 z(reward) + 0.1 z(yes_conf_score) + 0.4 z(prompt_conf_score)",
        "1": "yes first; 1 z(reward) + 0 z(yes_conf_score) + 0 z(prompt_conf_score)",
    }
    for weight in ("0", "0.5", "1"):
        assert main(["select", str(experiment), "--reward-weight", weight, "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["reward_weight"] == float(weight)
        assert record["formula"] == formulas[weight]
        assert record == select(experiment, reward_weight=float(weight))[2]
        records[weight] = [prompt["kept"] for prompt in record["prompts"]]
    assert records["0"] != records["1"]


def test_the_first_formula(experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """combined-v1: what `combined` was; the folder's name says so."""
    assert main(["select", str(experiment), "--metric", "combined-v1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["metric"] == "combined_v1"
    assert record["formula"] == "yes first; 0.5 z(reward) + 0.5 z(yes_conf_score)"
    assert names(tmp_path) == ["2_scale", "2_scale_combined_v1_verified", "2_scale_ref"]


def test_only_some_prompts_have_rewards(tmp_path: Path) -> None:
    for index, rewards in ((0, [1.0, 2.0]), (1, None)):
        write_prompt(tmp_path / "e" / f"{index:05}", index, "a", ["yes", "no"], rewards, random.Random(0), n_samples=1)
    _, _, record = select(tmp_path / "e")
    assert record["formula"] == (
        "yes first; 0.5 z(reward) + 0.1 z(yes_conf_score) + 0.4 z(prompt_conf_score) "
        "(prompts without rewards: yes first; 0.2 z(yes_conf_score) + 0.8 z(prompt_conf_score))"
    )


def test_no_reward_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_experiment(tmp_path / "e", 2, reward=False)
    assert main(["select", str(folder)]) == 0
    assert "note: the experiment has no reward; chosen by confidence alone" in capsys.readouterr().out
    (written,) = tmp_path.glob("e_combined_verified/selection.json")
    assert json.loads(written.read_text())["formula"] == "yes first; 0.2 z(yes_conf_score) + 0.8 z(prompt_conf_score)"
    assert main(["select", str(folder), "--metric", "image_reward"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {folder}/00000/metadata.jsonl: all_ir_scores is null")
    assert err.endswith("which `scale-rae score DIR --reward NAME` adds to an experiment\n")
    assert err.count("\n") == 1
    assert not (tmp_path / "e_image_reward_verified").exists()


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--metric", "best"],
        ["--keep", "0"],
        ["--reward-weight", "1.5"],
        ["--keep", "two"],
        ["x", "--sample-dir", "y"],
    ],
)
def test_wrong_usage(experiment: Path, args: list[str]) -> None:
    folder = [] if not args or "x" in args else ["--sample-dir", str(experiment)]
    assert main(["select", *folder, *args]) == 2


def test_no_experiment(experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for folder, message in {
        tmp_path / "none": "no such folder",
        tmp_path / "file": "is not a folder",
        tmp_path / "empty": "not an experiment, since it has no folders 00000",
        tmp_path: f"did you mean {experiment}?",
    }.items():
        for command in ("select", "report", "sheet"):
            assert main([command, str(folder)]) == 1
            err = capsys.readouterr().err
            assert message in err
            assert err.count("\n") == 1
    (experiment / "experiment.json").write_text('{"settings": {"n_samples": "four"}}')
    assert main(["select", str(experiment)]) == 1
    assert "experiment.json: settings.n_samples is 'four'" in capsys.readouterr().err
    (experiment / "experiment.json").write_text("{")
    assert main(["select", str(experiment)]) == 1
    assert "experiment.json: is not valid JSON" in capsys.readouterr().err
    (experiment / "experiment.json").unlink()
    for folder in experiment.iterdir():
        damage_nothing_left(folder)
    assert main(["select", str(experiment)]) == 1
    assert "no prompt is complete; 00000 has no metadata.jsonl, and 2 more" in capsys.readouterr().err


def test_the_guides_own_command_loads_no_torch(experiment: Path, tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['verify_results.py', '--sample-dir', {str(experiment)!r}, '--metric', 'combined']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as e: assert e.code == 0, e.code\n"
        "assert not {'torch', 'transformers', 'jinja2'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "2_scale_combined_verified").is_dir()


def test_a_prompt_in_any_script(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path / "e", 2, texts=("緑の丸 – grün\n\x1b[31m", "half \ud800"[:4]))
    value = metadata(folder / "00001")
    (folder / "00001" / "metadata.jsonl").write_text(json.dumps(value | {"prompt": "half \ud800"}))
    assert main(["select", str(folder)]) == 0
    assert metadata(tmp_path / "e_ref" / "00000")["prompt"] == "緑の丸 – grün\n\x1b[31m"
    assert metadata(tmp_path / "e_ref" / "00001")["prompt"] == "half \ud800"
    assert main(["report", str(folder)]) == 0
    assert main(["sheet", str(folder)]) == 0


def test_prompts_without_a_folder_are_counted(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = json.loads((experiment / "experiment.json").read_text())
    (experiment / "experiment.json").write_text(json.dumps(recorded | {"prompts": {"count": 5}}))
    assert main(["select", str(experiment)]) == 0
    assert "note: 2 prompts of the experiment not begun" in capsys.readouterr().out
    assert main(["report", str(experiment)]) == 0
    assert "2 not begun" in (tmp_path / "2_scale_report.html").read_text()
