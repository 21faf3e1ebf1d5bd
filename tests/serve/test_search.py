"""best_of "auto": candidates are searched stage by stage, between other requests, with t2i's bytes."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from scale_rae import acceptance, adaptive
from scale_rae.errors import ConfigError
from scale_rae.options import SamplingOptions, SearchOptions
from scale_rae.pipeline import ScaleRAE
from scale_rae.prompt import Turn
from scale_rae.rewards import Reward
from scale_rae.scores import Asked
from scale_rae.serve.engine import Engine
from scale_rae.serve.jobs import Job, Result
from scale_rae.serve.schedule import BatchSizes, Schedule, Stage, Task
from scale_rae.serve.settings import Limits
from tests.serve.conftest import CIRCLE, HANGS, Running, Serve, alone, picture, serving
from tests.serve.test_limits import IMAGES, get, post

TWO_THINGS = "Can you generate a photo of a blue cross and a pink square?"
AUTO = {"best_of": "auto"}


def found_in_python(model: ScaleRAE, reward: Reward | None, keep: int, steps: int, seed: int) -> adaptive.Search:
    """What the package's own search finds, everything one at a time."""
    sampling = SamplingOptions(steps=steps)
    search = SearchOptions(max_candidates=16)
    searcher = adaptive.Searcher(model, reward, keep, search, sampling, adaptive.Batching(1, 1))
    (reply,) = model.reply([TWO_THINGS])
    seed_of = Job([], None, sampling, seed, print, 0.0).seed_of
    search_of = adaptive.Search(Asked(TWO_THINGS, TWO_THINGS, reply), seed_of)
    while not searcher.is_over(search_of):
        searcher.next_round([search_of])
    return search_of


@pytest.fixture
def nothing_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """No candidate is dropped, and none accepted."""

    def reject(earlier: Any, wave: Any, *rest: Any) -> None:
        for candidate in wave:
            candidate.fate, candidate.reason = acceptance.REJECTED, "none will do"

    monkeypatch.setattr(acceptance, "drop", lambda *candidates: None)
    monkeypatch.setattr(acceptance, "accept", reject)


@pytest.mark.parametrize("reward", ["answer", "siglip"])
def test_images_are_those_of_the_packages_search_and_of_t2i(
    running: Running, shapes: ScaleRAE, siglip: Reward, reward: str
) -> None:
    drawn, evaluated = running.metric("scale_rae_images_total"), running.metric("scale_rae_evaluations_total")
    dropped = running.metric("scale_rae_candidates_total", fate="dropped")
    answer: Any = running.client().images.generate(
        prompt=TWO_THINGS, n=2, extra_body={"seed": 7, "steps": 8, "reward": reward, **AUTO}
    )
    found = found_in_python(shapes, siglip if reward == "siglip" else None, 2, 8, 7)
    kept = [
        found.candidates[number]
        for number in acceptance.kept(
            found.candidates, acceptance.Rules(2, reward=siglip.name if reward == "siglip" else None)
        )
    ]
    finals = [candidate.final for candidate in kept]
    assert [d.seed for d in answer.data] == [candidate.seed for candidate in kept]
    assert [d.accepted for d in answer.data] == [candidate.fate == acceptance.ACCEPTED for candidate in kept]
    assert [d.reward for d in answer.data] == [reward] * 2
    assert [d.answer for d in answer.data] == [f.judgement["answer"] for f in finals if f]
    scores = [f.reward if reward == "siglip" else f.judgement["score"] for f in finals if f]
    assert [d.score for d in answer.data] == pytest.approx(scores)
    begun, cut = len(found.candidates), sum(c.fate == acceptance.DROPPED for c in found.candidates)
    assert answer.search == {
        "candidates": begun,
        "dropped": cut,
        "accepted": sum(candidate.fate == acceptance.ACCEPTED for candidate in kept),
        "evaluations": pytest.approx(found.evaluations),
    }
    assert running.metric("scale_rae_images_total") - drawn == begun - cut
    assert running.metric("scale_rae_candidates_total", fate="dropped") - dropped == cut
    assert running.metric("scale_rae_evaluations_total") - evaluated == (begun - cut) * 8 + cut * 3
    for image in answer.data:
        assert np.array_equal(picture(image.b64_json), alone(shapes, TWO_THINGS, image.seed, steps=8))


def test_at_the_limit_the_best_that_were_drawn_make_up_the_number(serve: Serve, nothing_will_do: None) -> None:
    with serve(limits=Limits(drawings=3)) as running:
        status, answer, _ = post(running.url + IMAGES, {"prompt": CIRCLE, "n": 2, "steps": 4, **AUTO})
        assert status == 200
        assert answer["search"] | {"evaluations": 0} == {
            "candidates": 3,
            "dropped": 0,
            "accepted": 0,
            "evaluations": 0,
        }
        assert [image["accepted"] for image in answer["data"]] == [False, False]
        assert running.metric("scale_rae_images_total") == 3
        document = json.loads(get(running.url + "/openapi.json")[1])["components"]["schemas"]
        number, auto, null = document["ImageRequest"]["properties"]["best_of"]["anyOf"]
        assert number == {"type": "integer", "minimum": 1, "maximum": 3}
        assert auto == {"type": "string", "const": "auto"}
        assert null == {"type": "null"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"best_of": "many"}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 2.5}, "best_of"),
        ({"best_of": 65}, "best_of"),
        ({"best_of": ["auto"]}, "best_of"),
        (AUTO | {"n": 17}, "n"),
        (AUTO | {"reward": "pickscore"}, "reward"),
        (AUTO | {"prompt": "word " * 30_000}, "prompt"),
    ],
    ids=str,
)
def test_a_violation_names_the_field(running: Running, body: dict[str, Any], field: str) -> None:
    status, answer, _ = post(running.url + IMAGES, {"prompt": "a", **body})
    assert (status, answer["error"]["param"]) == (400, field)
    assert "--" not in answer["error"]["message"]
    if field == "best_of":
        assert answer["error"]["message"] == 'best_of: must be an integer from 1 to 64, or "auto"'


@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps_are_searched_too(running: Running, steps: int) -> None:
    status, answer, _ = post(running.url + IMAGES, {"prompt": CIRCLE, "steps": steps, "solver": "ab2", **AUTO})
    assert (status, len(answer["data"])) == (200, 1)
    assert (answer["search"]["dropped"] == 0) or steps == 2


def test_a_prompt_too_long_to_ask_about_is_refused_before_it_is_drawn(
    running: Running, shapes: ScaleRAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = shapes.reply([CIRCLE])  # the bundled model draws no prompt of this length
    monkeypatch.setattr(ScaleRAE, "converse", lambda *conversations: replies)
    drawn = running.metric("scale_rae_evaluations_total")
    room = shapes.config.max_length - shapes.config.tokens
    fits = next(n for n in range(room, 0, -1) if len(shapes.tokenizer.chat(CIRCLE + " circle" * n)) < room - 2)
    prompt = CIRCLE + " circle" * fits
    status, answer, _ = post(running.url + IMAGES, {"prompt": prompt, "steps": 4, **AUTO})
    assert (status, answer["error"]["param"]) == (400, "prompt")
    assert "too long" in answer["error"]["message"]
    assert "circle" not in answer["error"]["message"]
    assert running.metric("scale_rae_evaluations_total") == drawn


@pytest.mark.parametrize(("body", "field"), [(AUTO, "best_of"), ({"best_of": 2, "reward": "answer"}, "reward")])
def test_a_checkpoint_that_cannot_read_its_latents(
    running: Running, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any], field: str
) -> None:
    def cannot() -> None:
        raise ConfigError("/home/me/weights/config.json: draws latents of a VAE")

    monkeypatch.setattr(running.engine.model, "check_reads", cannot)
    status, answer, _ = post(running.url + IMAGES, {"prompt": "a", **body})
    assert (status, answer["error"]["param"]) == (400, field)
    assert answer["error"]["message"] == (
        f"{field}: this model cannot look at what it draws; give a number and a reward model"
    )


# Other requests ------------------------------------------------------------------------------------------------------


def recorded(
    model: ScaleRAE, monkeypatch: pytest.MonkeyPatch, first: Callable[[], object] = lambda: None
) -> list[tuple[str, int]]:
    """What is drawn from now on: ("advance" or "sample", images). `first` is called in the first advance."""
    events: list[tuple[str, int]] = []
    advance, sample = model.advance, model.sample

    def advancing(trajectories: Any, *rest: Any) -> Any:
        events.append(("advance", len(trajectories)))
        if len(events) == 1:
            first()
        return advance(trajectories, *rest)

    def sampling(conditions: Any, *rest: Any) -> Any:
        events.append(("sample", len(conditions)))
        return sample(conditions, *rest)

    monkeypatch.setattr(model, "advance", advancing)
    monkeypatch.setattr(model, "sample", sampling)
    return events


@pytest.mark.parametrize("address", ["one", "two"])
def test_a_plain_request_comes_in_between_the_stages_of_a_search(
    shapes: ScaleRAE, nothing_will_do: None, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    clients = iter(["127.0.0.1", "127.0.0.2" if address == "two" else "127.0.0.1"])
    monkeypatch.setattr("scale_rae.serve.routes.images.client_name", lambda request: next(clients))
    with serving(shapes, limits=Limits(drawings=6)) as running, ThreadPoolExecutor(2) as pool:
        begun = threading.Event()

        def wait_for_the_other() -> None:
            begun.set()
            running.wait_for(lambda: running.engine.jobs == 2)

        events = recorded(shapes, monkeypatch, wait_for_the_other)
        search = pool.submit(post, running.url + IMAGES, {"prompt": CIRCLE, "steps": 4, **AUTO})
        assert begun.wait(HANGS)
        plain = pool.submit(post, running.url + IMAGES, {"prompt": CIRCLE, "steps": 4, "n": 2})
        status, answer, _ = plain.result()
        assert (status, len(answer["data"])) == (200, 2)
        assert "search" not in answer
        status, answer, _ = search.result()
        assert (status, answer["search"]["candidates"]) == (200, 6)
    names = [name for name, _ in events]
    assert names.count("advance") == 10  # two for each of the six candidates, of which two are begun together
    assert names.index("sample") <= 3


def a_job(engine: Engine, inbox: list[Any], seed: int, keep: int, client: str = "") -> Job:
    options = SamplingOptions(steps=4)
    searcher = engine.searcher(keep, 4, "answer", options)
    asked = [Turn("user", CIRCLE)]
    return Job(
        asked, None, options, seed, inbox.append, time.monotonic() + 600,
        count=keep, searcher=searcher, reward="answer", subject=CIRCLE, client=client,
    )  # fmt: skip


def results(inbox: list[Any], count: int) -> list[Any]:
    end = time.monotonic() + HANGS
    while len(ended := [event for event in inbox if not isinstance(event, str)]) < count:
        assert time.monotonic() < end
        time.sleep(0.01)
    return ended


def test_candidates_of_several_searches_are_drawn_together_with_the_bytes_of_each_alone(
    shapes: ScaleRAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(shapes) as running, ThreadPoolExecutor(4) as pool:
        events = recorded(shapes, monkeypatch, lambda: running.wait_for(lambda: running.engine.jobs == 4))
        bodies = [{"prompt": TWO_THINGS, "steps": 4, "seed": seed, **AUTO} for seed in range(4)]
        answers = list(pool.map(lambda body: post(running.url + IMAGES, body), bodies))
    assert max(count for _, count in events) > 1
    monkeypatch.undo()
    for status, answer, _ in answers:
        assert status == 200
        (image,) = answer["data"]
        assert np.array_equal(picture(image["b64_json"]), alone(shapes, TWO_THINGS, image["seed"], steps=4))


def test_on_a_gpu_batches_are_padded_to_a_size_that_code_is_compiled_for(
    shapes: ScaleRAE, nothing_will_do: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "_on_cpu", False)
    engine = Engine(lambda: (shapes, {}), batch_size=8)
    engine.start()
    try:
        assert engine.loaded.wait(HANGS)
        assert engine.error is None
        events = recorded(shapes, monkeypatch)
        looked: list[int] = []
        read = adaptive.Searcher.read

        def reading(searcher: Any, some: Any, t: Any) -> Any:
            looked.append(len(some))
            return read(searcher, some, t)

        monkeypatch.setattr(adaptive.Searcher, "read", reading)
        inbox: list[Any] = []
        engine.submit(*(a_job(engine, inbox, seed, 2) for seed in (1, 2)))  # waves of 3 and of 1
        ended = results(inbox, 2)
    finally:
        engine.close()
    assert all(isinstance(result, Result) and len(result.images) == 2 for result in ended)
    assert {count for _, count in events} == set(looked) == {8, 2}
    assert [result.search["candidates"] for result in ended] == [4, 4]


def test_one_search_that_fails_does_not_take_another_along(shapes: ScaleRAE, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = shapes.advance

    def fails_for_13(trajectories: Any, *rest: Any) -> Any:
        if 13 in [t.seed for t in trajectories]:
            raise RuntimeError("unlucky")
        return advance(trajectories, *rest)

    monkeypatch.setattr(shapes, "advance", fails_for_13)
    engine = Engine(lambda: (shapes, {}))
    engine.start()
    try:
        assert engine.loaded.wait(HANGS)
        good: list[Any] = []
        bad: list[Any] = []
        engine.submit(a_job(engine, good, 12, 2), a_job(engine, bad, 13, 2))
        assert isinstance(results(good, 1)[0], Result)
        assert isinstance(results(bad, 1)[0], RuntimeError)
        assert engine.idle
    finally:
        engine.close()


def test_a_clients_own_images_and_searches_take_turns() -> None:
    schedule, sizes = Schedule(), BatchSizes(1, threads=1)

    def task(searches: bool) -> Task:
        job = Job([], None, SamplingOptions(steps=2), 0, print, 0.0, client="one")
        added = Task(job, stream=None)
        schedule.tasks[job] = added
        return added

    search, plain = task(True), [task(False) for _ in range(4)]
    candidate: Any = adaptive.Drawn(None, acceptance.Candidate(0, 0), None)
    schedule.add_stage(search, adaptive.Stage([candidate], stop=1))
    for one in plain:
        schedule.add_images(one)
    taken = []
    for _ in range(8):
        stage, (tile,) = schedule.next(sizes)
        taken.append(stage)
        if tile.task is search:
            going_on = adaptive.Stage([candidate], t=0.8) if stage is Stage.ADVANCE else adaptive.Stage([candidate], 2)
            schedule.add_stage(search, going_on)
    assert taken == [
        Stage.ADVANCE,
        Stage.LOOK,
        Stage.DRAW,
        Stage.ADVANCE,
        Stage.DRAW,
        Stage.LOOK,
        Stage.DRAW,
        Stage.ADVANCE,
    ]


# Its end -------------------------------------------------------------------------------------------------------------


def test_a_search_ends_when_its_client_leaves(
    serve: Serve, nothing_will_do: None, shapes: ScaleRAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as running:
        body = json.dumps({"prompt": CIRCLE, "steps": 60, "n": 2, **AUTO})
        connection = socket.create_connection(("127.0.0.1", running.port))
        left = threading.Event()

        def leave() -> None:
            connection.close()
            running.wait_idle()
            left.set()

        events = recorded(shapes, monkeypatch)
        read = adaptive.Searcher.read

        def leaves_at_the_first_look(searcher: Any, some: Any, t: Any) -> Any:
            leave()
            return read(searcher, some, t)

        monkeypatch.setattr(adaptive.Searcher, "read", leaves_at_the_first_look)
        head = f"POST {IMAGES} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        running.wait_for(lambda: running.metric("scale_rae_requests_total", route=IMAGES, status="499") == 1)
        assert left.wait(HANGS)
        monkeypatch.undo()
        assert post(running.url + IMAGES, {"prompt": CIRCLE, "steps": 2})[0] == 200
        assert running.metric("scale_rae_images_total") == 1
        assert sum(count for _, count in events) == 3  # of up to 32: the first wave of the search, and one image


def test_the_time_limit_ends_a_search(serve: Serve, nothing_will_do: None) -> None:
    with serve(limits=Limits(deadline=1.0)) as running:
        status, answer, _ = post(running.url + IMAGES, {"prompt": CIRCLE, "n": 8, "steps": 250, **AUTO})
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
        running.wait_idle()
        assert running.metric("scale_rae_candidates_total", fate="rejected") == 0


def test_a_server_that_shuts_down_finishes_a_search_that_has_begun(
    shapes: ScaleRAE, nothing_will_do: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(shapes, limits=Limits(drawings=2)) as running, ThreadPoolExecutor(1) as pool:

        def stop() -> None:
            running.server.stop()
            running.wait_for(lambda: running.engine.draining)

        recorded(shapes, monkeypatch, stop)
        status, answer, _ = pool.submit(post, running.url + IMAGES, {"prompt": CIRCLE, "steps": 4, **AUTO}).result()
        assert (status, answer["search"]["candidates"]) == (200, 2)
        running.thread.join(HANGS)
        assert not running.thread.is_alive()
