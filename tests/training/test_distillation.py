"""Distillation: the teacher's windows, what a student learns, that a run goes on to the bit, and how commands use a student."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.made_up import write_checkpoint
from scale_rae import flow
from scale_rae.acceptance import ACCEPTED, REJECTED
from scale_rae.adaptive import check_looks, with_looks
from scale_rae.cli import app
from scale_rae.config import load_config
from scale_rae.errors import CheckpointError, ConfigError, HubError, InputError, OptionError, TrainingError
from scale_rae.hub import find
from scale_rae.inspection import inspect
from scale_rae.noise import draw_noise
from scale_rae.options import SamplingOptions, SearchOptions
from scale_rae.pipeline import ScaleRAE
from scale_rae.prompt_search import search
from scale_rae.sampling import Trajectory, sampler_times
from scale_rae.serve.schema import ImageRequest
from scale_rae.student import Student
from scale_rae.training.distill_settings import DistillOptions
from scale_rae.training.distillation import follow, pseudo_huber, small_steps, windows
from scale_rae.training.exchange import exchanges
from scale_rae.training.run import Watcher, open_model
from scale_rae.training.students import conditions_of, distill, exchanged_conditions, prompts_of
from scale_rae.training.trainer import Progress
from tests.helpers.fake_hub import FakeHub, own_hub

STUDENT = "some-lab/student"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that draws whatever it is asked."""
    return write_checkpoint("tiny", tmp_path_factory.mktemp("teacher"), torch.device("cpu"))


@pytest.fixture(scope="module")
def usual(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> DistillOptions:
    folder = tmp_path_factory.mktemp("run")
    file = folder / "prompts.txt"
    file.write_text("a cat\na dog\n")
    return DistillOptions(
        model=str(teacher),
        prompts=file,
        out=folder / "out",
        cache_dir=folder / "cache",
        device="cpu",
        steps=2,
        guidance=3.0,
        teacher_steps=4,
        trajectories=6,
        rounds=2,
        rank=2,
        learning_rate=1e-2,
        lr_warmup_steps=1,
        max_train_steps=4,
        train_batch_size=4,
        save_steps=2,
        logging_steps=1,
    )


@pytest.fixture(scope="module")
def log(usual: DistillOptions) -> list[dict[str, Any]]:
    """The log of the usual distillation, of a LoRA."""
    return go(usual)


@pytest.fixture
def student(usual: DistillOptions, log: list[dict[str, Any]], tmp_path: Path) -> Path:
    """The usual student's folder, a copy."""
    folder = tmp_path / "student"
    folder.mkdir()
    for name in ("config.json", "adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(usual.out / name, folder / name)
    return folder


@pytest.fixture
def hub_student(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that has the usual student as STUDENT."""
    with own_hub(tmp_path / "cache", monkeypatch) as hub:
        hub.add(STUDENT, student)
        yield hub


def go(options: DistillOptions, watcher: Watcher | None = None) -> list[dict[str, Any]]:
    """The log of a distillation."""
    options.check()
    distill(options, find(options.model, "model"), prompts_of(options), watcher or Watcher())
    return [json.loads(line) for line in (options.out / "log.jsonl").read_text().splitlines()]


# --- the teacher's path ----------------------------------------------------------------------------------------------


def test_windows_and_their_small_steps_are_even_before_the_shift() -> None:
    times = windows(4, 3.0)
    assert times == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    small = [step for now, then in itertools.pairwise(times) for step in small_steps(now, then, 3, 3.0)]
    whole = list(itertools.pairwise(flow.exact_grid(12, 3.0).tolist()))
    assert torch.tensor(small) == pytest.approx(torch.tensor(whole), abs=1e-6)
    assert [small[0][0], small[-1][1]] == [1.0, 0.0]


def test_a_window_is_followed_in_second_order() -> None:
    """A velocity that is linear in t is followed exactly, which Euler's first step would not do."""
    x = torch.tensor([[2.0], [-1.0]])
    arrived = follow(lambda x, t: torch.full_like(x, 3 * t - 1), x, small_steps(0.9, 0.3, 4, 2.0))
    assert torch.allclose(arrived, x + 1.5 * (0.3**2 - 0.9**2) - (0.3 - 0.9), atol=1e-6)
    errors = [
        abs(float(follow(lambda x, t: x, torch.ones(1), small_steps(1.0, 0.5, n, 1.0))) - 2.718281828**-0.5)
        for n in (4, 8)
    ]
    assert errors[1] < errors[0] / 3.5


def test_the_loss_is_linear_in_large_errors() -> None:
    small, large = pseudo_huber(torch.tensor([[0.001, 0.002], [10.0, 1000.0]]).square()).tolist()
    assert small[1] / small[0] == pytest.approx(4, rel=1e-2)
    assert large[1] / large[0] == pytest.approx(100, rel=2e-2)


# --- a run -----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """An end without cleaning up, as kill -9 makes one."""


def test_a_run_that_was_ended_goes_on_to_the_bit(
    usual: DistillOptions, log: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert [(record["step"], record["round"]) for record in log] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    with pytest.raises(TrainingError, match="holds checkpoints of a training; go on with --resume"):
        go(usual)

    def kill(progress: Progress) -> None:
        if progress.step == 4:
            raise Killed

    # At the end of a round; within one, where the log's line of step 4 has steps from before and after the end.
    for save_steps, logging_steps in ((2, 1), (3, 2)):
        other = replace(usual, out=tmp_path / f"{save_steps}", save_steps=save_steps, logging_steps=logging_steps)
        with pytest.raises(Killed):
            go(other, Watcher(step=kill))
        with pytest.raises(TrainingError, match=r"made otherwise: guidance was 3.0; .* another --out$"):
            go(replace(other, resume=True, guidance=2.0))
        again = go(replace(other, resume=True))
        assert [record["step"] for record in again] == [*range(logging_steps, 5, logging_steps)]
        for record in again:
            steps = log[record["step"] - logging_steps : record["step"]]
            for key in ("loss", "gradient_norm"):
                assert record[key] == pytest.approx(sum(step[key] for step in steps) / logging_steps, abs=2e-6)
            by_window = [sum(errors) / logging_steps for errors in zip(*(s["by_window"] for s in steps), strict=True)]
            assert record["by_window"] == pytest.approx(by_window, abs=2e-6)
        for name in ("adapter_model.safetensors", "config.json"):
            assert (other.out / name).read_bytes() == (usual.out / name).read_bytes()
        modes = {file.name: file.stat().st_mode for file in other.out.glob("*.json") if file.is_file()}
        weights_mode = (other.out / "adapter_model.safetensors").stat().st_mode
        assert set(modes.values()) == {weights_mode}  # others may read the weights, too


@pytest.mark.parametrize("rate", [1e30, 1e39])
def test_what_is_not_finite_stops_and_leaves_no_checkpoint(usual: DistillOptions, tmp_path: Path, rate: float) -> None:
    """The second rate makes the weights infinite before a loss is: in the step that a checkpoint would keep."""
    options = replace(usual, out=tmp_path / "out", learning_rate=rate, lr_warmup_steps=0, save_steps=1, rounds=1)
    with pytest.raises(TrainingError, match=r"^step \d: .* not finite; begin again, in another --out, with a lower"):
        go(options)
    for file in options.out.glob("checkpoint-*/training_state.pt"):
        state = torch.load(file, weights_only=True)["state"]
        assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())


def test_the_student_comes_nearer_to_the_teacher(usual: DistillOptions, teacher: Path, tmp_path: Path) -> None:
    chosen = replace(
        usual,
        out=tmp_path / "full",
        full=True,
        optimizer="muon",
        learning_rate=1e-3,
        max_train_steps=30,
        trajectories=32,
        train_batch_size=32,
        teacher_steps=8,
        ema_decay=0.8,
        save_steps=100,
    )
    go(chosen)
    model, student = (ScaleRAE.from_pretrained(str(folder), device="cpu") for folder in (teacher, chosen.out))
    replies = model.reply(["Can you generate a cat", "Can you generate a dog"])
    conditions = [reply.condition for reply in replies for _ in range(4) if reply.condition is not None]

    def drawn(model: ScaleRAE, options: SamplingOptions | None = None) -> Tensor:
        return torch.stack(model.sample(conditions, range(100, 108), options))

    right = drawn(model, SamplingOptions(guidance=3.0, solver="ab2", steps=30))
    few = drawn(model, SamplingOptions(guidance=3.0, solver="ab2", steps=2))
    assert (drawn(student) - right).square().mean() < 0.5 * (few - right).square().mean()


# --- the student in use ----------------------------------------------------------------------------------------------


def test_a_student_takes_its_own_steps(student: Path) -> None:
    model = ScaleRAE.from_pretrained(str(student), device="cpu")
    own = model.config.student
    assert own is not None
    assert own.times == tuple(
        windows(2, flow.time_shift(model.config.channels, model.config.tokens, model.config.base_dim))
    )
    condition = torch.ones(model.config.tokens, model.config.dit.condition_width)
    x = draw_noise([7], model.config.channels, model.config.dit.side, torch.device("cpu"))()
    for now, then in own.windows:
        x = x + (then - now) * model.dit(x, torch.tensor([now]), condition[None])
    (latent,) = model.sample([condition], [7])
    assert torch.allclose(latent, model.sampler.latents(x)[0], atol=1e-5)
    assert torch.equal(model.sample([condition], [7], SamplingOptions(guidance=3.0, steps=2))[0], latent)
    half = model.advance([Trajectory(condition, 7)], 1, SamplingOptions())
    assert torch.equal(model.advance(half, 2, SamplingOptions())[0].latent, latent)
    for other in (SamplingOptions(steps=20), SamplingOptions(guidance=2.0), SamplingOptions(solver="ab2")):
        with pytest.raises(OptionError, match=r"this model is a student.*base model"):
            model.sample([condition], [7], other)
    with pytest.raises(OptionError, match="steps 49: this model is a student"):  # the default, but given
        model.generate("Can you generate a cat", steps=49)


def test_looks_are_on_the_students_way(student: Path) -> None:
    """The default look of a student of four steps is at the second."""
    config = load_config(student)
    with pytest.raises(OptionError, match="later than the last step but one"):
        check_looks(SearchOptions(check_at=(0.1,)), SamplingOptions(), config)
    four = replace(config, student=Student(tuple(windows(4, 2.83)), 4.0))
    times = sampler_times(four, SamplingOptions())
    assert flow.steps_until("euler", times, flow.usual_look(2.83)) == 2


@pytest.mark.parametrize(
    ("steps", "at"), [(1, ()), (2, (1.0,)), (3, (0.8498,)), (4, (0.84,)), (8, (0.84,))], ids="{}".format
)
def test_a_student_of_any_number_of_steps_can_be_searched_with(
    student: Path, steps: int, at: tuple[float, ...]
) -> None:
    """The default look is before the last step; with one step, there is none."""
    config = replace(load_config(student), student=Student(tuple(windows(steps, 2.83)), 4.0))
    config = replace(config, channels=96, tokens=64, base_dim=768)
    found = with_looks(SearchOptions(), SamplingOptions(), config)
    assert found.check_at == pytest.approx(at, abs=1e-3)
    found.check()
    check_looks(SearchOptions(), SamplingOptions(), config)


def test_a_student_of_one_step_draws_until_enough_are_accepted(student: Path) -> None:
    config = json.loads((student / "config.json").read_text())
    config["student"]["times"] = [1.0, 0.0]
    (student / "config.json").write_text(json.dumps(config))
    model = ScaleRAE.from_pretrained(find(str(student), "model"), device="cpu")
    found = search(model, "Can you generate a cat", reward=None, search=SearchOptions(max_candidates=3))
    assert {c.fate for c in found.candidates} <= {ACCEPTED, REJECTED}
    assert found.evaluations == len(found.candidates)
    with pytest.raises(OptionError, match=r"--check-at 0.9: a sampler of one step .* leave it out"):
        search(model, "Can you generate a cat", reward=None, search=SearchOptions(check_at=(0.9,)))


def test_commands_refuse_other_options(student: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    how = [
        "--model-path",
        str(student),
        "--device",
        "cpu",
        "--output-dir",
        str(tmp_path / "o"),
        "--prompt",
        "Can you generate a cat",
    ]
    for flags, said in ((["--steps", "49"], "steps 49"), (["--guidance-level", "1"], "guidance level 1")):
        assert app.run(["t2i", *how, *flags]) == 2
        assert f"error: {said}: this model is a student and takes only" in capsys.readouterr().err
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    assert app.run(["img", *how, "--image", str(picture), "--steps", "49"]) == 2
    assert "error: steps 49: this model is a student and takes only 2" in capsys.readouterr().err


def test_defaults_of_the_users_own_give_way_to_a_student(
    student: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A default never clashes: one of another model's steps would else forbid all students."""
    monkeypatch.setenv("SCALE_RAE_GUIDANCE_LEVEL", "2")
    monkeypatch.setenv("SCALE_RAE_STEPS", "20")
    how = ["--model-path", str(student), "--device", "cpu", "--prompt", "Can you generate a cat"]
    assert app.run(["t2i", *how, "--output-dir", str(tmp_path), "--quiet"]) == 0
    (file,) = tmp_path.glob("*_manifest.json")
    manifest = json.loads(file.read_text())
    assert (manifest["steps"], manifest["guidance_level"]) == (2, 3.0)
    assert app.run(["t2i", *how, "--steps", "20"]) == 2
    assert "error: steps 20: this model is a student" in capsys.readouterr().err


def test_a_manifest_of_another_model_is_not_drawn_by_a_student(
    student: Path, teacher: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its steps are chosen, even if they are the default ones."""
    how = ["--model-path", str(teacher), "--device", "cpu", "--prompt", "Can you generate a cat"]
    assert app.run(["t2i", *how, "--output-dir", str(tmp_path), "--quiet"]) == 0
    (file,) = tmp_path.glob("*_manifest.json")
    assert app.run(["t2i", "--from-manifest", str(file), "--model-path", str(student)]) == 2
    assert "guidance level 1: this model is a student" in capsys.readouterr().err


def test_an_experiment_refuses_other_options(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a cat"}\n')
    how = ["--metadata-file", str(file), "--output-dir", str(tmp_path / "o"), "--model-path", str(student)]
    assert app.run(["scale", "t2i", *how, "--steps", "49"]) == 2
    assert "steps 49: this model is a student and takes only 2" in capsys.readouterr().err


def test_an_experiment_with_a_student_on_the_hub_has_its_options(
    hub_student: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's own defaults give way to it, flags do not."""
    monkeypatch.setenv("SCALE_RAE_STEPS", "20")
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "Can you generate a cat"}\n')
    how = ["--metadata-file", str(file), "--output-dir", str(tmp_path / "o"), "--model-path", STUDENT]
    how += ["--device", "cpu", "--n-samples", "1", "--scaling-rounds", "1", "--reward", "none"]
    assert app.run(["scale", "t2i", *how, "--steps", "49"]) == 2
    assert "steps 49: this model is a student and takes only 2" in capsys.readouterr().err
    assert not any("safetensors" in name for name in hub_student.downloaded())
    assert app.run(["scale", "t2i", *how]) == 0
    record = tmp_path / "o" / "student" / "1_qa_prompt_template_scale_latent" / "experiment.json"
    settings = json.loads(record.read_text())["settings"]
    assert (settings["steps"], settings["guidance_level"]) == (2, 3.0)


def test_a_student_of_the_hub_is_found_without_the_hub(hub_student: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    online = find(STUDENT, "model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find(STUDENT, "model") == online
    assert online.student is not None
    (online.student / "adapter_model.safetensors").unlink()
    with pytest.raises(HubError, match=r"only part of it was downloaded \(.*adapter_model.safetensors: no such file\)"):
        find(STUDENT, "model")


def test_requests_take_the_students_options(student: Path) -> None:
    own = load_config(student).student
    assert own is not None
    assert ImageRequest.model_validate({"prompt": "a cat"}).options(10, own) == own.sampling(SamplingOptions())
    assert ImageRequest.model_validate({"prompt": "a cat", "steps": 2, "guidance": 3.0}).options(10, own).steps == 2
    with pytest.raises(OptionError, match="guidance level 1: this model is a student"):
        ImageRequest.model_validate({"prompt": "a cat", "guidance": 1.0}).options(10, own)


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 49), ("guidance", 1.0), ("guidance_interval", [0.1, 0.9]), ("solver", "ab2")]
)
def test_a_request_is_refused_by_its_own_field(student: Path, field: str, value: Any) -> None:
    own = load_config(student).student
    assert own is not None
    ((named, why),) = ImageRequest.model_validate({"prompt": "a cat", field: value}).refused_by(own)
    assert named == field
    assert "this model is a student and takes only" in why


def test_a_student_is_inspected_with_its_base(student: Path, teacher: Path) -> None:
    found = inspect(str(student))
    assert not found.problems
    assert found.notes == [f"a student of {teacher}: 2 evaluations per image, guidance 3 folded in"]
    assert [files.what for files in found.files][:2] == ["model", "student"]


def test_a_student_is_not_distilled_again(student: Path, usual: DistillOptions, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a student"):
        go(replace(usual, model=str(student), out=tmp_path / "again"))


def test_a_student_is_no_lora(student: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its adapter fits the base model, but solvers would take its mean velocities for velocities."""
    how = ["--model-path", str(teacher), "--device", "cpu", "--prompt", "Can you generate a cat"]
    assert app.run(["t2i", *how, "--lora", f"{student}:0.5"]) == 2
    assert (
        f"error: --lora {student}: is a student, whose adapter predicts mean velocities; give its folder"
        in capsys.readouterr().err
    )


def test_a_student_on_the_hub_is_no_lora(
    hub_student: FakeHub, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--model-path", str(teacher), "--device", "cpu", "--prompt", "a cat", "--output-dir", str(tmp_path)]
    assert app.run(["t2i", *how, "--lora", STUDENT]) == 2
    assert f"error: --lora {STUDENT}: is a student, whose adapter predicts" in capsys.readouterr().err


def test_a_merged_student_needs_no_base(student: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    assert app.run(["merge", "--model", str(student), "--out", str(merged), "--dtype", "float32"]) == 0
    whole, parts = (ScaleRAE.from_pretrained(str(folder), device="cpu") for folder in (merged, student))
    assert whole.source.student is None
    assert whole.config.student == replace(parts.config.student, base=None)
    condition = torch.ones(whole.config.tokens, whole.config.dit.condition_width)
    assert torch.allclose(whole.sample([condition], [1])[0], parts.sample([condition], [1])[0], atol=1e-5)


def test_a_missing_base_is_named(student: Path) -> None:
    path = student / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"student": config["student"] | {"base": "no/such/folder"}}))
    with pytest.raises(CheckpointError, match=r"config\.json: the student's base model is not found: no/such/folder"):
        find(str(student), "model")
    path.write_text(json.dumps(config | {"student": config["student"] | {"base": str(student)}}))
    with pytest.raises(CheckpointError, match="is a student itself"):
        find(str(student), "model")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("times", [1, 0.5]),
        ("times", [1, 0.5, 0.5, 0]),
        ("times", [1, math.nan, 0]),
        ("times", ["1", 0]),
        ("guidance", -1),
        ("guidance", "4"),
    ],
)
def test_odd_students_are_refused(teacher: Path, tmp_path: Path, field: str, value: Any) -> None:
    config = json.loads((teacher / "config.json").read_text())
    student = {"times": [1, 0.5, 0], "guidance": 4} | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config | {"student": student}))
    with pytest.raises(ConfigError, match=rf"config\.json: student: {field} is"):
        load_config(tmp_path)


def corners(texts: list[str], count: int = 50) -> set[str]:
    """The new texts of `exchanges`, each checked to be the fourth corner of both of its rectangles."""
    made = set()
    for pair in itertools.islice(exchanges(texts, seed=0), count):
        new = set()
        for i, j, k in pair:
            columns = zip(*(texts[n].split() for n in (i, j, k)), strict=True)
            new.add(" ".join(a if b == c else b for a, b, c in columns))
        assert len(new) == len(set(pair)) - 1 == 1
        made |= new
    return made


def test_words_are_exchanged_where_they_have_the_same_role() -> None:
    texts = [f"a {color} {thing}" for color in ("red", "blue", "green") for thing in ("cat", "dog")]
    assert corners([*texts[1:], "draw a red cat", "two", ""]) == {"a red cat"}
    assert corners(texts) == set()  # all are there
    assert corners(texts[1:4]) == set()  # a red cat has but one rectangle
    assert corners(["a cat", "the moon"]) == corners([]) == set()


def test_exchanged_conditions_are_means_of_estimates_that_agree() -> None:
    texts = [f"a {color} {thing}" for color in ("red", "blue", "green") for thing in ("cat", "dog", "owl")]
    color, thing = torch.randn(2, 3, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    conditions = (color[:, None] + thing[None]).view(9, 4, 5)
    values = conditions[1:].flip(0)
    numbers = torch.arange(7, -1, -1)
    found = exchanged_conditions(texts[1:], values, numbers, 5, seed=0)
    assert found.shape == (5, 4, 5)
    assert torch.allclose(found, conditions[0].expand_as(found), atol=1e-5)
    apart = values + torch.randn(8, 4, 5, generator=torch.Generator().manual_seed(1))
    assert len(exchanged_conditions(texts[1:], apart, numbers, 5, seed=0)) == 0


def test_prompts_that_repeat_are_drawn_more_often(usual: DistillOptions, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red cat\na red dog\na red cat\na blue cat\n")
    options = replace(usual, prompts=file, cache_dir=tmp_path / "cache", exchanged=2, out=tmp_path)
    device = torch.device("cpu")
    model = open_model(options.training(), find(options.model, "model"), device, torch.float32)
    conditions, notes = conditions_of(prompts_of(options), options, model, lambda what, done, total: None)
    assert conditions.numbers.tolist() == [0, 1, 0, 2]
    assert len(conditions.values) == 3
    assert "--exchanged 2: only 0 conditions made" in notes[0]
    again, _ = conditions_of(prompts_of(options), options, model, lambda what, done, total: None)
    assert torch.equal(again.values, conditions.values)


def test_a_prompt_that_is_too_long_is_named(usual: DistillOptions, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("a cat\n" + "long " * 1000)
    with pytest.raises(InputError, match=r"^prompt 'Can you generate long long .*tokens long; the model reads at most"):
        go(replace(usual, prompts=tmp_path / "long.txt", out=tmp_path / "out", cache_dir=None))


def test_several_processes_are_refused(usual: DistillOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="2 processes were started, and distill runs in one; start it without"):
        go(replace(usual, out=tmp_path / "out"))


def test_a_model_in_the_folder_is_not_replaced(usual: DistillOptions, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TrainingError, match=r"config\.json: exists already"):
        go(replace(usual, out=tmp_path))
    assert (tmp_path / "config.json").read_text() == "{}"


@pytest.mark.parametrize(("steps", "batch"), [(1, 64), (3, 66), (4, 64), (5, 65), (7, 70), (8, 64)])
def test_any_number_of_steps_has_a_batch(steps: int, batch: int) -> None:
    options = DistillOptions(steps=steps)
    options.check()
    assert options.batch == batch
    assert options.identity()["train_batch_size"] == options.training().train_batch_size == batch


def test_odd_options_are_refused() -> None:
    good = DistillOptions(model="shapes", prompts=Path("p.txt"))
    good.check()
    for change, flag in (
        ({"steps": 9}, "--steps 9"),
        ({"train_batch_size": 6}, "--train-batch-size 6"),
        ({"teacher_steps": 3}, "--teacher-steps 3"),
        ({"rounds": 2000}, "--rounds 2000"),
        ({"optimizer": "muon"}, "--optimizer muon"),
        ({"lora": ("mine",)}, "--lora: a student's folder names its base model only"),
    ):
        with pytest.raises(OptionError, match=flag):
            replace(good, **change).check()
