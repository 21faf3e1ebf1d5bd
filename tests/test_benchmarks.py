"""The benchmarks run; what they measure is for a person to read."""

from __future__ import annotations

import argparse
import base64
import functools
import io
import json
import multiprocessing
import random
import re
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import serve, study_analysis, study_drawing, study_search, study_tables
from benchmarks.bench import Bench, write_between_marks
from scale_rae.acceptance import Thresholds
from scale_rae.cli import main
from scale_rae.errors import InputError
from scale_rae.options import SearchOptions
from tests.helpers.forked import fork_workers

ROOT = Path(__file__).parents[1]
Script = Callable[..., str]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Runs a benchmark's file as a program, in this process, which has torch; returns what it printed."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT)

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / "benchmarks" / name), run_name="__main__")
        except SystemExit as exit:
            if exit.code:
                pytest.fail(f"{name} ended with {exit.code}: {capsys.readouterr()}")
        return capsys.readouterr().out

    return run


def test_benchmarks_find_a_package_that_is_not_installed(tmp_path: Path) -> None:
    code = """
        import runpy, sys
        sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
        for script in sys.argv[1:]:
            path = list(sys.path)
            runpy.run_path(script)
            import scale_rae.config
            sys.path[:] = path
            for name in [name for name in sys.modules if name.split(".")[0] in ("scale_rae", "benchmarks", "recipes")]:
                del sys.modules[name]
    """
    files = (ROOT / "benchmarks").glob("*.py")
    commands = sorted(str(file) for file in files if "__main__" in file.read_text())
    assert len(commands) > 5
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), *commands], check=True, cwd=tmp_path)


def test_benchmarks_need_neither_tests_nor_private_names_of_the_package() -> None:
    private = re.compile(
        r"\bscale_rae[\w.]*\._|import _(?!_)|\b(?:model|language|dit|fast|worker|engine|tokenizer)\._[a-z]"
    )
    for file in (ROOT / "benchmarks").glob("*.py"):
        text = file.read_text()
        assert not re.search(r"^\s*(?:from|import) tests\b", text, re.MULTILINE), file
        assert not private.search(text), file


def test_cpu_benchmark(script: Script, tmp_path: Path) -> None:
    shown = script("cpu.py", "--repeat", 1, "--steps", 2, "--guidance", 3, "--json", tmp_path / "cpu.json")
    figures = json.loads((tmp_path / "cpu.json").read_text())
    assert all(value > 0 for value in figures.values() if isinstance(value, float))
    assert all(name in shown for name in figures)


def test_geneval_benchmark(script: Script, tmp_path: Path) -> None:
    file = tmp_path / "geneval.json"
    script("geneval.py", "--tiny", "--device", "cpu", "--batch", 2, "--repeat", 1, "--json", file)
    figures = {row["name"]: row["value"] for row in json.loads(file.read_text())["figures"]}
    assert figures["files to verdicts, float32"] > 0
    assert figures["objects over 0.3 per picture"] > 0


def test_two_devices(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiments run in this process, and in forks of it, which have torch."""

    def run(command: list[str], *, env: dict[str, str], **_: object) -> None:
        assert command[:3] == [sys.executable, "-m", "scale_rae"]
        with pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            assert main(command[3:]) == 0

    monkeypatch.setattr(subprocess, "run", run)
    fork_workers(monkeypatch)
    command = ["--devices", "cpu,cpu", "--tiny", "--prompts", 3, "--steps", 2, "--out", tmp_path / "out"]
    shown = script("two_gpus.py", *command, "--json", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["one"]["images"] == figures["several"]["images"] == 24
    assert figures["files"]["files"] == 3 * 9
    assert figures["throughput_ratio"] > 0
    assert "27 files of prompts: the same bytes" in shown


def test_load_finds_pictures_of_another_seed() -> None:
    chance = np.random.default_rng(0)
    references = list(chance.integers(50, 200, (3, 8, 8, 3), dtype=np.uint8))

    def row(case: int, picture: Any, digest: str) -> tuple[Any, ...]:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        return case, 0.1, 0.0, 0.1, 200, digest, base64.b64encode(file.getvalue()).decode()

    rounded = references[1] + chance.integers(0, 4, references[1].shape, dtype=np.uint8)
    rows = [row(0, references[0], "a"), row(1, rounded, "b"), (1, 0.1, 0.0, 0.1, 200, "b", None)]
    rows.append((2, 0.1, 0.0, 0.1, 429, None, None))  # refused: counted elsewhere
    assert serve.compare(rows, references, exact=True) == (2, 3)
    assert serve.compare(rows, references, exact=False) == (0, 3)
    another = [*rows, row(2, references[0], "c")]
    assert serve.compare(another, references, exact=False)[0] == 1
    fifth = references[1] + (references[0].astype(int) - references[1]) / 5  # of the way to another
    assert serve.compare([*rows, row(1, fifth.astype(np.uint8), "d")], references, exact=False)[0] == 1


def test_load_on_a_server(script: Script, tmp_path: Path) -> None:
    command = ["--full-size", "tiny", "--device", "cpu", "--clients", 6, "--seconds", 1, "--cases", 8, "--steps", 12]
    script("serve.py", *command, "--lone", 2, "--json", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["statuses"] == {"200": figures["requests"]}
    assert figures["requests"] >= 6  # one of each client, however slow the machine is
    assert figures["wrong"] == figures["lost_or_refused"] == 0
    assert figures["farthest_pixel"] == 0  # to the byte, on the CPU


def line(index: int, correct: str, answers: str, confidences: list[float], tag: str = "colors") -> dict[str, Any]:
    """A prompt's line of results.jsonl."""
    none = [0.0] * len(correct)
    names = "yes_logit no_conf_score no_logit response_conf_score prompt_loss prompt_conf_score image_conf_score"
    columns = dict.fromkeys(names.split(), none) | {"answer": answers, "yes_conf_score": confidences}
    return {
        "index": index,
        "tag": tag,
        "prompt": f"prompt {index}",
        "correct": correct,
        "rewards": {"siglip": none},
        "latent": columns,
        "image": columns | {"answer": "n" * len(correct)},
        "seconds": {"reply": 1.0, "drawing": 10.0, "judging": 4.0, "total": 13.0, "encoding": 0.5},
    }


def results(path: Path, lines: list[dict[str, Any]], rounds: int = 2) -> Path:
    settings = {"n_samples": 2, "scaling_rounds": rounds, "guidance_level": 3.0, "solver": "ab2", "steps": 20}
    study: dict[str, Any] = {"settings": settings | {"dtype": "float32", "seed": 42}, "device": "cpu", "workers": 2}
    study["model"] = {"name": "/somewhere/trained", "files": {}}
    path.write_text("".join(json.dumps(x) + "\n" for x in ({"study": study}, *lines)))
    return path


def test_scaling_study_counts_what_is_kept(tmp_path: Path) -> None:
    lines = [
        line(0, "0011", "nnyy", [0.0, 0.0, 1.0, 2.0]),  # both right ones found
        line(1, "0111", "yyyn", [3.0, 2.0, 1.0, 0.0]),  # one wrong one is believed
        {"index": 2, "tag": "position", "prompt": "prompt 2", "failed": "no image"},
    ]
    path = results(tmp_path / "results.jsonl", lines)
    figures = study_analysis.analyse(path)
    one, two = figures["rounds"]["2x1"], figures["rounds"]["2x2"]
    assert one["drawn"]["value"] == pytest.approx((0 + 0.5 + 0) / 3)
    assert two["drawn"]["value"] == pytest.approx((0.5 + 0.75 + 0) / 3)
    combined = two["chosen"]["combined, siglip"]
    assert combined["kept"]["value"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert combined["first"]["value"] == pytest.approx((1 + 0 + 0) / 3)
    assert combined["errors_removed"]["value"] == pytest.approx(1 - (0.5 + 1) / (0.5 + 0.25 + 1))
    assert combined["kinds"] == {"colors": 0.75, "position": 0.0}
    assert one["chosen"]["combined, siglip"]["errors_removed"]["value"] == pytest.approx(0)
    assert two["chosen"][study_analysis.JUDGE]["kept"]["value"] == pytest.approx(2 / 3)
    # Where every answer is no, and all else is equal, the first are kept.
    assert two["chosen"]["answer_logits, image mode"]["kept"]["value"] == pytest.approx((0 + 0.5) / 3)
    assert figures["failed"] == 1
    assert figures["answers"]["latent"]["overall"] == {"right": 5, "yes_to_right": 4, "wrong": 3, "yes_to_wrong": 1}
    assert figures["prompts_by_correct"] == {"none": 1, "up to half": 1, "most": 1, "all": 0}
    assert figures["seconds"] == {"reply": 0.5, "drawing": 5.0, "judging": 2.0, "total": 6.5, "encoding": 0.5}
    assert figures["study"]["model"]["name"] == "trained"
    text = study_tables.markdown(figures)
    assert "| latent mode | 3.50 | 6.50 |" in text
    assert "| image mode | 3.75 | 7.00 |" in text
    page = tmp_path / "page.md"
    page.write_text("# Before\n<!-- study: begin (so) -->\nNot measured yet.\n<!-- study: end -->\nAfter\n")
    for _ in range(2):
        write_between_marks(page, "study", study_tables.summary(figures, "![x](plot.png)"))
    text = page.read_text()
    assert text.startswith("# Before\n<!-- study: begin (so) -->\n3 held-out prompts")
    assert text.endswith("\n![x](plot.png)\n<!-- study: end -->\nAfter\n")
    assert "| combined, siglip | 0.167 | 0.500 (0.14) |" in text
    assert "measured yet" not in text
    study_tables.plot(figures, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_scaling_study_s_intervals(tmp_path: Path) -> None:
    rng = random.Random(0)
    lines = []
    for i in range(200):
        correct = "".join(rng.choice("01") for _ in range(4))
        lines.append(line(i, correct, correct.translate(str.maketrans("01", "ny")), [float(c) for c in correct]))
    figures = study_analysis.analyse(results(tmp_path / "results.jsonl", lines))["rounds"]["2x2"]
    drawn = figures["drawn"]
    spread = 1.96 * 0.25 / 200**0.5  # four coins a prompt have a standard deviation of a quarter
    assert drawn["high"] - drawn["low"] == pytest.approx(2 * spread, rel=0.1)
    combined, judge = figures["chosen"]["combined, siglip"], figures["chosen"][study_analysis.JUDGE]
    assert combined["kept"] == judge["kept"]  # for it says yes to the right ones
    assert combined["errors_removed"]["low"] < combined["errors_removed"]["value"] < combined["errors_removed"]["high"]


def test_scaling_study_ranks_as_select_does(tmp_path: Path) -> None:
    from scale_rae.ranking import METRICS
    from scale_rae.scaling.reader import read_experiment
    from scale_rae.scaling.select import choose
    from tests.helpers.made_experiment import write_experiment

    experiment = read_experiment(write_experiment(tmp_path / "experiment"))
    for metric in METRICS:
        for selection in choose(experiment, metric, None, 0.5):
            metadata = selection.prompt.metadata
            count = len(selection.prompt.images)
            entries = [metadata["text_responses"][str(i)] for i in range(count)]
            made = {
                "index": 0,
                "prompt": "",
                "rewards": {"r": metadata["all_ir_scores"]},
                "latent": study_drawing.columns(entries),
            }
            choice = study_analysis.Choice(metric, "latent", "r" if metric in study_analysis.NEED_REWARD else None)
            assert study_analysis.order(made, choice, count) == selection.ranking.order


def test_scaling_study_draws_and_goes_on(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork = multiprocessing.get_context("fork")  # which has imported torch
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)

    def run(*more: object) -> str:
        command = ["--out", tmp_path / "out", "--steps", 2, "--n-samples", 1, "--rounds", 2, "--device", "cpu"]
        return script("scaling_study.py", *command, "--judges", 1, *more)

    file = tmp_path / "out" / "results.jsonl"
    assert "4 images drawn" in run("--prompts", 2, "--only", "draw")
    first = file.read_text()
    file.write_text(first + '{"index": 2, "tag"')  # as if stopped while it wrote
    shown = run("--prompts", 3)
    assert "2 images drawn" in shown
    assert "| combined, siglip |" in shown
    assert file.read_text().startswith(first)
    _, *lines = [json.loads(x) for x in file.read_text().splitlines()]
    assert [x["index"] for x in lines] == [0, 1, 2]
    assert all(x["seconds"]["total"] > x["seconds"]["reply"] > 0 for x in lines)

    argv = ["scale", "t2i", "--model-path", "shapes", "--metadata-file", str(tmp_path / "out" / "prompts.jsonl")]
    argv += ["--output-dir", str(tmp_path / "image"), "--post-qa-mode", "image", "--reward", "siglip", "--steps", "2"]
    argv += ["--solver", "ab2", "--guidance-level", "3", "--n-samples", "1", "--limit", "1", "--device", "cpu"]
    assert main(argv) == 0
    (record,) = (tmp_path / "image").glob("*/*/00000/metadata.jsonl")
    found = json.loads(record.read_text())
    assert lines[0]["rewards"]["siglip"] == pytest.approx(found["all_ir_scores"], rel=1e-4)
    for name, values in lines[0]["image"].items():
        expected = [found["text_responses"][str(i)][name] for i in range(2)]
        if name == "answer":
            assert list(values) == [answer[0] for answer in expected]
        else:
            assert values == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_training_benchmark_in_miniature(script: Script, tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    script("train.py", "--size", "tiny", "--device", "cpu", "--batch", 2, "--repeat", 1, "--json", file)
    result = json.loads(file.read_text())
    assert result["errors"] == {}
    steps = [row for row in result["figures"] if row["unit"] == "s/step"]
    assert len(steps) == 5
    assert all(row["share"] > 0 for row in steps)


def test_gpu_benchmark_without_a_gpu(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(pytest.fail.Exception, match="error: torch finds no CUDA devices here; "):
        script("gpu.py")


def test_gpu_benchmark_in_miniature(script: Script, tmp_path: Path) -> None:
    """Every stage runs on tiny networks on the CPU, so that mistakes show before GPU time is paid for."""
    file = tmp_path / "gpu.json"
    shown = script("gpu.py", "--tiny", "--device", "cpu", "--repeat", 0, "--json", file)
    result = json.loads(file.read_text())
    assert result["errors"] == {}
    assert result["skipped"] == []
    stages = {row["stage"] for row in result["figures"]}
    assert stages >= {"ceilings", "checks", "dit", "t2i", "tokens", "scaling", "decode", "official", "ladder", "load"}
    assert all(row["value"] > 0 for row in result["figures"] if row["stage"] != "checks")
    sampled = [row for row in result["figures"] if row["name"] == "tiny, batch 8"]
    assert [row["share_sustained"] > 0 for row in sampled] == [True]
    assert "s in all" in shown
    table = script("gpu.py", "--markdown", file)
    assert all(row["name"] in table for row in result["figures"])
    assert f"| {sampled[0]['share_sustained']:.1%} |" in table
    assert not re.search("target|commit", table)  # these are for whoever changes the code
    page = tmp_path / "page.md"
    before = (ROOT / "docs" / "figures" / "gpu.md").read_text()
    page.write_text(before)
    for _ in range(2):
        script("gpu.py", "--markdown", file, "--into", page)
        assert page.read_text().count(table.strip()) == 1
    begin, end = (before.index(f"<!-- figures: {mark}") for mark in ("begin", "end"))
    assert page.read_text().startswith(before[:begin])  # what stands around the tables stays
    assert page.read_text().endswith(before[end:])


def test_gpu_benchmark_reports_what_fails(tmp_path: Path) -> None:
    """A stage that fails does not stop the others; stages that the time budget leaves out are listed."""
    import torch

    bench = Bench(torch.device("cpu"), torch.bfloat16, 1, 1e9, tmp_path / "b.json", True)
    with bench.stage("one"):
        bench.add("one", "before", 1.0, "s")
        raise RuntimeError("no luck")
    with bench.stage("two"):
        bench.add("two", "after", float("nan"), "s")
    bench.budget = 0
    assert bench.over("three")
    bench.write()
    result = json.loads((tmp_path / "b.json").read_text())
    assert "no luck" in result["errors"]["one"]
    assert [row["name"] for row in result["figures"]] == ["before", "after"]
    assert result["skipped"] == ["three"]


def test_text_between_marks_is_replaced_and_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- figures: begin (x) -->\nold\n<!-- figures: end -->\nb\n")
    write_between_marks(page, "figures", "new\n")
    assert page.read_text() == "a\n<!-- figures: begin (x) -->\nnew\n<!-- figures: end -->\nb\n"
    with pytest.raises(InputError, match=r"page\.md.*study: begin"):
        write_between_marks(page, "study", "new\n")


def recorded(
    path: Path,
    correct: str,
    early: str,
    final: str,
    rewards: list[float],
    prompt_confidences: list[float] | None = None,
) -> Path:
    """Records of one prompt: answers at evaluation 2 of 4 and at the end; rewards are the same at both."""
    stage = {"reward": rewards, "yes_conf_score": [1.0] * len(correct)}
    stage["prompt_conf_score"] = prompt_confidences or rewards
    stages = {"2": stage | {"answer": early}, "4": stage | {"answer": final}}
    study = {"model_path": "shapes", "reward": "siglip", "guidance": 1.0, "seed": 7, "steps": 4, "solver": "ab2"}
    study |= {"held_out": "only", "candidates": len(correct), "dtype": None, "out": "/somewhere"}
    line = {"tag": "colors", "correct": correct, "times": [1.0, 0.84, 0.6, 0.3], "stages": stages}
    path.write_text(json.dumps({"study": study}) + "\n" + json.dumps(line) + "\n")
    return path


def test_policies_are_replayed_from_records(tmp_path: Path) -> None:
    #       candidates 0 to 3: rejected, dropped, accepted, accepted; then 4: accepted
    path = recorded(tmp_path / "r.jsonl", "00111", "ynyyy", "nnyyy", [0.0, 0.0, 0.1, 0.2, 0.3])
    _, (prompt,) = study_search.read_records(path)
    policy = study_search.Adaptive(3, SearchOptions(check_at=(0.84,), max_candidates=5), Thresholds(-9, -9))
    found = study_search.searched(prompt, policy)
    assert [c.fate for c in found] == ["rejected", "dropped", "accepted", "accepted", "accepted"]
    assert [c.evaluations for c in found] == [4, 2, 4, 4, 4]
    outcome = study_search.replay(prompt, policy)
    assert outcome == study_search.Outcome(1.0, True, 18, 5, 4, 5, False)
    assert study_search.replay(prompt, study_search.BestOf("image_reward", 4, 2)).right == 1.0
    assert study_search.replay(prompt, study_search.BestOf("image_reward", 2, 1)).first is False
    assert study_search.replay(prompt, study_search.BestOf(None, 3, 1)).first is True
    more = study_search.Adaptive(4, SearchOptions(check_at=(0.84,), max_candidates=6), Thresholds(-9, -9))
    with pytest.raises(InputError, match="5 candidates per prompt, which are too few"):
        study_search.replay(prompt, more)
    with pytest.raises(InputError, match=r"no record of evaluation 3 \(t = 0\.55\)"):
        study_search.replay(prompt, study_search.Adaptive(1, SearchOptions(check_at=(0.55,))))


def test_a_replay_does_what_the_search_does(tmp_path: Path) -> None:
    """On two prompts, with few steps and candidates: the same fates at the same cost."""
    import torch

    import scale_rae
    from benchmarks import study_records
    from scale_rae.adaptive import Batching, Search, Searcher
    from scale_rae.noise import image_seed
    from scale_rae.options import PROMPT_PREFIX, SamplingOptions
    from scale_rae.rewards import load_reward
    from scale_rae.scores import Asked
    from scale_rae.wording import as_request

    names = {"out": tmp_path, "model_path": "shapes", "prompts": 2, "held_out": "only", "prompts_seed": 0, "seed": 42}
    names |= {"candidates": 4, "guidance": 1.0, "steps": 4, "solver": "ab2", "evaluations": [2], "reward": "siglip"}
    args = argparse.Namespace(**names, device="cpu", dtype=None, workers=1, seconds=1e9)
    threads = torch.get_num_threads()
    study_records.record(args, 0)
    torch.set_num_threads(threads)
    lines = (tmp_path / "part-0.jsonl").read_text()
    (tmp_path / "records.jsonl").write_text(json.dumps({"study": {"model_path": "shapes"}}) + "\n" + lines)
    _, prompts = study_search.read_records(tmp_path / "records.jsonl")
    texts = [json.loads(line)["prompt"] for line in lines.splitlines()]
    model = scale_rae.load("shapes", device="cpu")
    options = SearchOptions(check_at=(prompts[0].times[1],), max_candidates=4)
    sampling = SamplingOptions(solver="ab2", steps=4)
    reward = load_reward("siglip", model)
    searcher = Searcher(model, reward, 2, options, sampling, Batching(4, 4))
    requests = [as_request(text, PROMPT_PREFIX) for text in texts]
    asked = [Asked(*each) for each in zip(texts, requests, model.reply(requests), strict=True)]
    searches = [Search(a, functools.partial(image_seed, 42, i)) for i, a in enumerate(asked)]
    while going := [one for one in searches if not searcher.is_over(one)]:
        searcher.next_round(going)
    for prompt, found in zip(prompts, searches, strict=True):
        policy = study_search.Adaptive(2, options)
        replayed = study_search.searched(prompt, policy)
        assert [c.fate for c in replayed] == [c.fate for c in found.candidates]
        for here, there in zip(replayed, found.candidates, strict=True):
            assert here.evaluations + len(here.looks) * searcher.look_cost == pytest.approx(there.evaluations)


def test_search_study_s_tables_and_plot(script: Script, tmp_path: Path) -> None:
    marks, scores = "01" * 16, [float(i % 5) for i in range(32)]
    answers = "ny" * 16
    records = recorded(tmp_path / "g.jsonl", marks, answers, answers, scores)
    tune = recorded(tmp_path / "s.jsonl", marks, answers, answers, scores)
    page = tmp_path / "page.md"
    page.write_text("<!-- search: begin (so) -->\nold\n<!-- search: end -->\n")
    files = ["--json", tmp_path / "s.json", "--markdown", tmp_path / "s.md", "--plot", tmp_path / "s.png"]
    command = ["--records", records, "--tune", tune, "--seconds", 0.5, 0.25, *files, "--into", page]
    command += ["--measured-on", "one core"]
    shown = script("scaling_study.py", *command)
    figures = json.loads((tmp_path / "s.json").read_text())
    (study,) = figures["studies"]
    adaptive = study["families"]["adaptive"]["adaptive"]
    assert adaptive["right"]["value"] == 1.0
    cost = study["costs"]["look"]
    begun = adaptive["begun"]["value"]
    finished = adaptive["evaluations"]["value"] - cost * begun - 2 * begun
    assert adaptive["seconds"]["value"] == pytest.approx(
        0.5 * (2 * begun + finished) + 0.25 * (begun + finished / 2), abs=1e-6
    )
    assert "out" not in study["study"]
    assert 0 < cost < 2
    best = study["families"]["best of n, combined"]["best 4 of 8, combined"]
    assert best["evaluations"]["value"] == 32
    assert "| adaptive | 1.000 [1.000, 1.000] |" in shown
    assert "Seconds: 0.5 per evaluation and 0.25 per look or reading of an image, on one core." in shown
    assert len(figures["tuning"][0]["rows"]) >= 25
    assert "| `--search adaptive` | 1.000 | 1.000 |" in page.read_text()
    assert "old" not in page.read_text()
    assert (tmp_path / "s.png").stat().st_size > 10_000
    with pytest.raises(InputError, match="--seconds and --measured-on go together"):
        study_search.analyse([records], [], [(0.5, 0.25)])
