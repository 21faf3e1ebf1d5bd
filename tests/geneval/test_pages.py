"""The page of wrong pictures in headless Chromium, and verdicts in an experiment's report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scale_rae.geneval.evaluation import Evaluation, evaluate, judged_here, open_folder
from scale_rae.geneval.judges import JudgeChoice, ShapesJudge, identity_of
from scale_rae.geneval.page import render
from scale_rae.geneval.policies import policies
from scale_rae.geneval.summary import summarise
from scale_rae.scaling.report import write_report
from tests.helpers.browser import PHONE, chromium, needs_chromium
from tests.helpers.made_experiment import write_experiment

CHOICE = JudgeChoice("shapes")


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    folder = write_experiment(
        tmp_path_factory.mktemp("page") / "made",
        5,
        2,
        2,
        texts=('a photo of a red circle <script>alert("x")</script>',),
    )
    (folder / "00004" / "samples" / "00000.png").write_bytes(b"\x89PNG")
    judge = ShapesJudge()
    return evaluate(
        open_folder(folder, CHOICE), CHOICE, identity_of(CHOICE), lambda b: enumerate(judged_here(judge, b)), 8
    )


@pytest.fixture(scope="module")
def html(evaluation: Evaluation) -> str:
    rows, _ = policies(evaluation.folder.prompts, evaluation.by_name)
    return render(evaluation, summarise(evaluation.results), rows)


def test_every_wrong_picture_is_there_with_its_reason_and_objects(evaluation: Evaluation, html: str) -> None:
    wrong = [r for r in evaluation.results if not r.correct]
    assert 3 < len(wrong) < 19
    assert html.count("<figure data-tag") == len(wrong)
    assert html.count("<rect ") == sum(len(evaluation.judged[r.filename].marks) for r in wrong)
    assert html.count('<img class="over" src="data:image/png') == sum(
        bool(evaluation.judged[r.filename].marks) for r in wrong
    )
    for result in wrong:
        assert f"<small>{result.filename} · colors</small>" in html
    assert "00004/samples/00000.png</b> not an image" in html
    assert "<script>alert(" not in html
    some = render(evaluation, summarise(evaluation.results), [], most=2)
    assert some.count("<figure data-tag") == 2
    assert f"<b>{len(wrong)}</b><span>pictures are wrong, 2 of them shown" in some


@needs_chromium
def test_filters_by_kind_reason_and_words(evaluation: Evaluation, html: str, tmp_path: Path) -> None:
    sync_api: Any = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    path = tmp_path / "page.html"
    path.write_text(html, encoding="utf-8")
    wrong = [r for r in evaluation.results if not r.correct]
    with chromium(sync_api) as browser:
        page = browser.new_page(viewport=PHONE)
        page.set_default_timeout(30_000)
        errors: list[str] = []
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        kinds = {kind for r in wrong for kind in r.reasons}
        assert len(kinds) > 1
        for kind in kinds:
            page.locator("#kind").select_option(kind)
            expected = sum(kind in r.reasons for r in wrong)
            assert page.locator("figure:not(.hidden)").count() == expected
            assert page.locator("#shown").inner_text() == f"{expected} of {len(wrong)} shown"
        page.locator("#kind").select_option("")
        page.locator("#words").fill("ALERT(")
        assert page.locator("figure:not(.hidden)").count() == sum("alert" in r.prompt for r in wrong)
        page.locator("#boxes").uncheck()
        assert page.locator("svg.over").first.is_hidden()
    assert errors == []


def test_the_report_has_a_column_of_verdicts(evaluation: Evaluation, tmp_path: Path) -> None:
    folder = evaluation.folder.folder
    path, experiment = write_report(folder, tmp_path / "report.html", None, None, 0.5, 64)
    page = path.read_text()
    names = {p.name for p in experiment.prompts}
    shown = [r for r in evaluation.results if r.filename[:5] in names]
    assert len(shown) == 16  # the prompt with the damaged picture is incomplete
    assert page.count('<dd class="right" title="">right</dd>') == sum(r.correct for r in shown)
    assert page.count('<dd class="wrong"') == sum(not r.correct for r in shown)
    share = 100 * sum(r.correct for r in shown) / len(shown)
    assert f"<b>{share:.0f} %</b><span>right by it: all images drawn" in page
