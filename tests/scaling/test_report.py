from __future__ import annotations

import base64
import io
import itertools
import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scale_rae.cli import main
from scale_rae.ranking import METRICS
from scale_rae.scaling.plots import expected_best, histogram, round_ticks
from scale_rae.scaling.reader import FATES, read_experiment
from scale_rae.scaling.report import drawn_by
from scale_rae.scaling.select import choose
from tests.helpers.made_experiment import make_adaptive, write_experiment, write_prompt
from tests.scaling.test_select import digest, names

EVIL = "a red circle <script>alert(1)</script> \"quoted\" & 'more' </section> <img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """Tags with their attributes, and the texts of h2."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self._in_heading = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "h2":
            self.headings.append("")
            self._in_heading = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "h2":
            self._in_heading = False

    def handle_data(self, data: str) -> None:
        if self._in_heading:
            self.headings[-1] += data

    def all(self, tag: str, name: str = "", value: str = "") -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and (not name or value in (a.get(name) or "").split())]


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    made = write_experiment(tmp_path / "2_scale", 5, texts=(EVIL,))
    (made / "00004" / "samples" / "00003.png").unlink()
    (made / "00003" / "metadata.jsonl").unlink()
    (made / "00003" / "error.json").write_text(json.dumps({"error": "<b>NaN</b> latent"}))
    return made


def data_of(text: str) -> Any:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert match
    return json.loads(match[1])


def test_the_page(experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digest(experiment)
    target = tmp_path / "new" / "page.html"
    assert main(["report", str(experiment), "-o", str(target)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{target}\n"
    assert err.splitlines() == [
        "incomplete 00003: failed: <b>NaN</b> latent",
        "incomplete 00004: samples lacks 00003.png",
    ]
    assert digest(experiment) == before
    assert names(target.parent) == ["page.html"]
    text = target.read_text(encoding="utf-8")
    page = Page(text)

    # in one file: no address but data, no script or style from elsewhere
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert "@import" not in text
    assert "url(" not in text

    # every image, best first, those kept marked
    selections = choose(read_experiment(experiment), "combined", None, 0.5)
    figures = page.all("figure", "class", "image")
    assert [int(f["data-i"] or "") for f in figures] == [i for s in selections for i in s.ranking.order]
    kept = [int(f["data-i"] or "") for f in page.all("figure", "class", "kept")]
    assert kept == [i for s in selections for i in s.kept]
    images = page.all("img")
    assert len(images) == 24
    for image in images:
        with Image.open(io.BytesIO(base64.b64decode((image["src"] or "").split(",")[1]))) as opened:
            opened.load()
            assert opened.size == (64, 64)

    # what the script switches between
    data = data_of(text)
    for name in METRICS:
        by_metric = choose(read_experiment(experiment), name, None, 0.5)
        assert [p["order"][name] for p in data["prompts"]] == [s.ranking.order for s in by_metric]
    assert data["prompts"][0]["answers"] == selections[0].answers()
    assert [o["value"] for o in page.all("option")][: len(METRICS)] == list(METRICS)
    assert len(page.all("div", "class", "curves")) == len(METRICS)
    assert len(page.all("path", "class", "point")) == 24
    assert len(page.all("path", "class", "kept")) == 12
    assert len(page.all("section", "class", "incomplete")) == 2


def test_prompts_are_text(experiment: Path, tmp_path: Path) -> None:
    assert main(["report", str(experiment)]) == 0
    text = (tmp_path / "2_scale_report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.headings[0] == "00000" + EVIL
    assert "<script>alert" not in text
    assert not [a for a in page.all("img") if a["src"] == "x"]
    assert len(page.all("script")) == 2
    assert "<b>NaN" not in text
    assert len(page.all("section")) == 5


def test_no_path_of_this_machine_is_on_the_page(tmp_path: Path) -> None:
    """It is made to be passed on."""
    folder = write_experiment(tmp_path / "e", 2, reward=False)
    (folder / "00001" / "metadata.jsonl").unlink()
    (folder / "00002" / "samples").mkdir(parents=True)
    (folder / "00002" / "error.json").write_text(json.dumps({"error": "it failed"}))
    assert main(["report", str(folder)]) == 0
    text = (tmp_path / "e_report.html").read_text()
    assert text.count("Incomplete: ") == 2
    assert str(tmp_path) not in text


def test_replies_and_data_cannot_break_out(tmp_path: Path) -> None:
    rng = random.Random(0)
    folder = tmp_path / "e" / "00000"
    value = write_prompt(folder, 0, "a", ["yes"], [1.0], rng, n_samples=1)
    value["text_responses"]["0"]["reply"] = "</table><script>alert(1)</script>"
    value["image_seeds"] = ["</td><script>"]
    (folder / "metadata.jsonl").write_text(json.dumps(value))
    assert main(["report", str(tmp_path / "e")]) == 0
    assert len(Page((tmp_path / "e_report.html").read_text()).all("script")) == 2


def test_thumbnails_of_large_images_are_small(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path / "e", 1, 2, 1)
    for path in (folder / "00000" / "samples").iterdir():
        Image.effect_noise((512, 400), 60).convert("RGBA").save(path)
    assert main(["report", str(folder), "--thumbnail", "100"]) == 0
    images = Page((tmp_path / "e_report.html").read_text()).all("img")
    assert [(i["width"], i["height"]) for i in images] == [("100", "78")] * 2
    assert all((i["src"] or "").startswith("data:image/jpeg;base64,") for i in images)


def test_without_rewards(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path / "e", 2, reward=False)
    assert main(["report", str(folder)]) == 0
    text = (tmp_path / "e_report.html").read_text()
    assert "combined: yes first; 0.2 z(yes_conf_score) + 0.8 z(prompt_conf_score)" in text
    assert "the experiment has no reward: combined goes by confidence alone" in text
    assert "cannot be ranked by image_reward: 00000/metadata.jsonl: all_ir_scores is null" in text
    assert "Reward against confidence" not in text
    assert '<dt class="plain">reward' not in text  # no empty rows
    assert main(["report", str(folder), "--metric", "image_reward"]) == 1


def test_the_page_says_how_the_images_were_drawn(experiment: Path, tmp_path: Path) -> None:
    settings = {"model_path": "/home/<me>/models/mine/", "seed": 0, "guidance_level": 3.0, "solver": "ab2", "steps": 20}
    assert drawn_by(settings) == "model mine, seed 0, guidance 3.0, solver ab2, steps 20"
    assert drawn_by({}) == ""
    (experiment / "experiment.json").write_text(json.dumps({"settings": settings, "prompts": {"count": 5}}))
    main(["report", str(experiment), "--output", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    assert '<p class="soft" id="how">model mine, seed 0, guidance 3.0, solver ab2, steps 20</p>' in text
    numbers = re.findall(r"<small>image (\d+)</small>", text)
    assert sorted(numbers) == sorted(re.findall(r'<figure class="image[^>]*data-i="(\d+)"', text))


def test_rewards_alone(tmp_path: Path) -> None:
    write_prompt(tmp_path / "e" / "00000", 0, "a", ["yes"] * 3, [1.0, 3, 2], random.Random(0), text_responses=None)
    assert main(["report", str(tmp_path / "e"), "--keep", "1"]) == 0
    page = Page((tmp_path / "e_report.html").read_text())
    assert next(o["value"] for o in page.all("option")) == "image_reward"
    assert [f["data-i"] for f in page.all("figure", "class", "image")] == ["1", "2", "0"]


@pytest.mark.parametrize(("command", "name"), [("report", "x.html"), ("sheet", "x.png")])
def test_nothing_goes_into_the_experiment(
    experiment: Path, tmp_path: Path, command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digest(experiment)
    assert main([command, str(experiment), "-o", str(experiment / "00000" / name)]) == 1
    assert "is inside the experiment, which is only read" in capsys.readouterr().err
    assert main([command, str(experiment), "-o", str(tmp_path)]) == 1
    assert "is a folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([command, str(experiment), "-o", str(tmp_path / "file" / name)]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert digest(experiment) == before


@pytest.fixture
def adaptive(tmp_path: Path) -> Path:
    folder = write_experiment(tmp_path / "adaptive_scale", 4)
    make_adaptive(folder)
    return folder


def test_an_adaptive_search_is_shown(adaptive: Path, tmp_path: Path) -> None:
    assert main(["report", str(adaptive)]) == 0
    text = (tmp_path / "adaptive_scale_report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert [len(page.all("li", "class", fate)) for fate in ("dropped", "accepted", "rejected")] == [
        32,
        *(sum(p.searched.count(fate) for p in read_experiment(adaptive).prompts if p.searched) for fate in FATES[:2]),
    ]
    assert len(page.all("img")) == 4 * (8 + 8 + 4)  # images, the same as candidates, and pictures that were kept
    assert text.count("<span>dropped at t = 0.84: the model says no</span>") == 32
    assert "&lt;i&gt;no&lt;/i&gt;" in text
    assert "<i>no" not in text
    assert "<b>239</b><span>evaluations per prompt, 954 in all</span>" in text
    assert "<b>64</b><span>candidates begun: " in text
    filled = [p for p in read_experiment(adaptive).prompts if p.searched and p.searched.filled_up]
    assert len(filled) == 1
    assert "<b>1</b><span>prompt filled up" in text
    assert [p["filled"] for p in data_of(text)["prompts"]].count(True) == len(filled)
    assert len(page.all("div", "class", "curves")) == 0
    assert len(page.all("path", "class", "column")) >= 1
    assert main(["sheet", str(adaptive)]) == 0


def test_a_selection_of_an_adaptive_search_is_one_too(adaptive: Path, tmp_path: Path) -> None:
    assert main(["select", str(adaptive)]) == 0
    selected = tmp_path / "adaptive_scale_combined_verified"
    for before, after in zip(read_experiment(adaptive).prompts, read_experiment(selected).prompts, strict=True):
        assert before.searched is not None
        assert after.searched is not None
        kept = after.metadata["original_indices"]
        images = [c.image for c in after.searched.candidates]
        assert images == [kept.index(c.image) if c.image in kept else None for c in before.searched.candidates]
    assert main(["report", str(selected)]) == 0


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("candidates", None, "candidates is not a list"),
        ("candidates", [3], "candidates[0] is not an object"),
        ("candidates", [{"candidate": 2}], "candidates[0].candidate is 2, not 0"),
        ("candidates", [{"candidate": 0, "image": 99}], "candidates[0].image is 99, not one of 8 images"),
        ("candidates", [{"candidate": 0, "fate": "lost"}], "candidates[0].fate is 'lost', not one of accepted, "),
        ("evaluations", -1, "evaluations is -1, not a number from 0 up"),
        ("n_accepted", 1000, "n_accepted is 1000, not a number of candidates"),
        ("filled_up", "x", "filled_up is not a list"),
    ],
)
def test_a_damaged_record_of_a_search_is_an_incomplete_prompt(
    adaptive: Path, field: str, value: Any, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = adaptive / "00001" / "metadata.jsonl"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    assert main(["report", str(adaptive)]) == 0
    assert f"incomplete 00001: metadata.jsonl: {expected}" in capsys.readouterr().err


def test_a_damaged_picture_of_a_dropped_candidate(adaptive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (adaptive / "00000" / "dropped" / "00003.png").write_bytes(b"x")
    assert main(["report", str(adaptive)]) == 0
    assert "incomplete 00000: dropped/00003.png is damaged" in capsys.readouterr().err


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=50))
def test_a_histogram_counts_every_value(values: list[float]) -> None:
    counts = re.findall(r"<title>.*?: (\d+)</title>", histogram(values, "x", "y"))
    assert sum(map(int, counts)) == len(values)
    assert len(counts) <= 25


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=7), st.randoms(), st.data())
def test_expected_best_is_the_mean_over_all_subsets(
    values: list[float], rng: random.Random, data: st.DataObject
) -> None:
    order = list(range(len(values)))
    rng.shuffle(order)
    n = data.draw(st.integers(1, len(values)))
    best = [values[min(subset, key=order.index)] for subset in itertools.combinations(range(len(values)), n)]
    assert expected_best(values, order, n) == pytest.approx(sum(best) / len(best), abs=1e-9)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_of_an_axis_are_few_and_within_it(low: float, length: float) -> None:
    ticks = round_ticks(low, low + length)
    assert 1 <= len(ticks) <= 7
    assert all(low - 0.01 * length <= t <= low + 1.01 * length for t in ticks)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from scale_rae.cli import main\n"
        "for c in ('select', 'report', 'sheet'): main([c, '--help'])\n"
        "assert not {'torch', 'jinja2', 'PIL', 'numpy'} & sys.modules.keys(), sys.modules.keys()"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
