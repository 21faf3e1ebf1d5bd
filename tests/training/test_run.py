"""Whole trainings of a small checkpoint: what is learnt, what is kept, and that a run goes on to the bit."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from scale_rae.cli import app
from scale_rae.cli.train import TrainingBar
from scale_rae.errors import DataError, InputError, OutputError, TrainingError
from scale_rae.hub import find
from scale_rae.pipeline import ScaleRAE
from scale_rae.training import prepare, run
from scale_rae.training.checkpoints import Checkpoints
from scale_rae.training.records import no_report, read_records
from scale_rae.training.run import Watcher, train
from scale_rae.training.settings import TrainingOptions
from scale_rae.training.trainer import Progress
from tests.helpers.forked import in_two_processes

TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A plain square."}]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three captioned pictures, and a list of them with a question."""
    folder = tmp_path_factory.mktemp("data")
    captions = []
    for color in ("red", "green", "blue"):
        Image.new("RGB", (20, 16), color).save(folder / f"{color}.png")
        captions.append({"file_name": f"{color}.png", "text": f"a {color} square"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, captions)))
    mixed = [*captions[:2], {"image": "blue.png", "conversations": TALK}]
    (folder / "mixed.jsonl").write_text("\n".join(map(json.dumps, mixed)))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def options(checkpoints: dict[str, Path], data: Path, cache: Path, tmp_path: Path) -> TrainingOptions:
    return TrainingOptions(
        model=str(checkpoints["ddt"]),
        data=(data,),
        out=tmp_path / "out",
        cache_dir=cache,
        device="cpu",
        reply="Here you go:\n",
        rank=2,
        learning_rate=1e-3,
        lr_warmup_steps=1,
        max_train_steps=4,
        train_batch_size=2,
        save_steps=2,
        logging_steps=1,
    )


def go(options: TrainingOptions, watcher: Watcher | None = None) -> list[dict[str, Any]]:
    """The log of a training."""
    options.check()
    records, _ = read_records(options)
    train(options, find(options.model, "model"), records, watcher or Watcher())
    return [json.loads(line) for line in (options.out / "log.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    names = ("adapter_config.json", "adapter_model.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


class Killed(BaseException):
    """An end without cleaning up, as kill -9 makes one."""


def test_a_run_that_was_ended_goes_on_to_the_bit(
    options: TrainingOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(options, logging_steps=3)  # the log's line of step 3 has steps from before and after the end
    whole = go(options)
    assert [record["step"] for record in whole] == [3, 4]
    assert sorted(path.name for path in options.out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    with pytest.raises(TrainingError, match="holds checkpoints of a training; go on with --resume"):
        go(options)

    def load_nothing(*arguments: Any) -> Any:
        raise AssertionError("the cache has all that is needed")

    monkeypatch.setattr(prepare, "load_language", load_nothing)
    monkeypatch.setattr(prepare, "load_encoder", load_nothing)
    monkeypatch.setattr(run, "load_language", load_nothing)
    other = replace(options, out=tmp_path / "other")

    def kill(progress: Progress) -> None:
        if progress.step == 3:
            raise Killed

    with pytest.raises(Killed):
        go(other, Watcher(step=kill))
    with pytest.raises(
        TrainingError,
        match=rf"made otherwise: seed was 42; use the same .*; a training with --lora {other.out}/checkpoint-2 begins",
    ):
        go(replace(other, resume=True, seed=1))
    notes: list[str] = []
    again = go(replace(other, resume=True), Watcher(note=notes.append))
    assert notes == ["continuing after step 2"]
    keys = ("step", "loss", "flow_by_t", "gradient_norm", "learning_rate")
    assert [[record[key] for key in keys] for record in again] == [[record[key] for key in keys] for record in whole]
    assert files(other.out) == files(options.out)


def test_preparing_goes_on_to_the_bit(options: TrainingOptions, tmp_path: Path) -> None:
    """Whatever of the cache a run that was ended had written, and whatever a user removed."""
    prompts = tmp_path / "known.txt"
    prompts.write_text("".join(f"Can you generate a photo of a cat on {n} windowsills?\n" for n in (1, 2, 3, 4)))
    chosen = replace(
        options,
        reply=None,
        class_prompts=prompts,
        max_train_steps=1,
        num_inference_steps=2,
        cache_dir=tmp_path / "cache",
    )

    def prepared(out: str) -> dict[Path, bytes]:
        go(replace(chosen, out=tmp_path / out))
        return {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.safetensors")}

    whole = prepared("one")
    assert len(whole) == 3 + 2 * 4 + 3 + 7  # pictures, drawings and their conditions, conditions of texts, replies
    for kind in ("latents", "replies", "conditions"):
        for path in sorted(path for path in whole if kind in path.parts)[::2]:
            path.unlink()
    assert prepared("two") == whole


def test_the_networks_learn_and_the_result_is_used(options: TrainingOptions, data: Path) -> None:
    chosen = replace(
        options,
        data=(data / "mixed.jsonl",),
        train="both",
        learning_rate=3e-2,
        max_train_steps=12,
        condition_dropout=0.0,
        gradient_checkpointing=True,
        save_steps=100,
        ema_decay=0.5,
    )
    log = go(chosen)
    assert sum(record["text"] for record in log[-3:]) < 0.9 * sum(record["text"] for record in log[:3])
    model = ScaleRAE.from_pretrained(options.model, device="cpu", lora=[str(chosen.out)])
    plain = ScaleRAE.from_pretrained(options.model, device="cpu")
    condition = torch.zeros(model.config.tokens, model.config.dit.condition_width)
    assert not torch.equal(model.sample([condition], [0])[0], plain.sample([condition], [0])[0])
    message = "Can you generate a red square"
    assert model.reply([message])[0].logits != plain.reply([message])[0].logits


def test_accumulated_parts_are_one_batch(options: TrainingOptions, tmp_path: Path) -> None:
    options = replace(options, max_train_steps=2, timesteps_per_sample=2)
    one = go(options)
    parts = go(replace(options, out=tmp_path / "parts", train_batch_size=1, gradient_accumulation_steps=2))
    for a, b in zip(one, parts, strict=True):
        assert a["images_per_second"] * a["seconds_per_step"] == pytest.approx(2, rel=0.01)  # not one per time
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("rate", "full", "kept"),
    [
        (1e30, False, "the weights of step 1 are kept: .* by --lora {out}/checkpoint-1; begin again in another --out"),
        (1e30, True, "the state of step 1 is kept in {out}/checkpoint-1, .* --resume .*; begin again in another --out"),
        (1e39, False, "those of step 1 are not finite, either, and not kept; begin again with a lower"),
    ],
)
def test_a_loss_that_is_not_finite_stops_with_its_step_and_records(
    options: TrainingOptions, rate: float, full: bool, kept: str
) -> None:
    broken = replace(options, learning_rate=rate, full=full, lr_warmup_steps=0, lr_scheduler="constant")
    kept = kept.format(out=re.escape(str(options.out)))
    with pytest.raises(TrainingError, match=rf"^step 2: not finite .*metadata.jsonl, line \d.* {kept}"):
        go(broken)
    assert len(list(broken.out.glob("checkpoint-*"))) == (rate == 1e30)


@pytest.mark.parametrize(
    ("case", "crop", "told"), [("siglip", False, True), ("siglip", True, False), ("ddt", False, False)]
)
def test_stretched_pictures_are_noted(
    options: TrainingOptions, checkpoints: dict[str, Path], tmp_path: Path, case: str, crop: bool, told: bool
) -> None:
    """SigLIP's preprocessing stretches, DINOv2's crops."""
    chosen = replace(options, model=str(checkpoints[case]), center_crop=crop, cache_dir=tmp_path / "cache")
    model = run.open_model(chosen, find(chosen.model, "model"), torch.device("cpu"), torch.float32)
    notes = prepare.prepare(read_records(chosen)[0], chosen, model, no_report).notes
    note = "stretched to squares, as the encoder does: 3 of 3 pictures; --center-crop cuts out their middle instead"
    assert (note in notes) == told


def test_validation_draws_the_same_noise_each_time(options: TrainingOptions) -> None:
    chosen = replace(
        options,
        learning_rate=0.0,
        validation_prompts=("a red square", "a blue\none"),
        validation_steps=2,
        num_inference_steps=2,
        max_train_steps=2,
        validation_guidance=1.5,
    )
    go(chosen)
    first, last = sorted((chosen.out / "validation").iterdir())
    assert (first.name, last.name) == ("step-000000.png", "step-000002.png")
    assert first.read_bytes() == last.read_bytes()
    with Image.open(first) as sheet:
        assert len(set(sheet.convert("L").tobytes())) > 20


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (" ", "the prompt is empty"),
        ("an <image>", "holds <image>"),
        ("long " * 3000, "tokens long; the model reads at most"),
    ],
)
def test_validation_prompts_that_cannot_be_drawn_are_refused(options: TrainingOptions, text: str, problem: str) -> None:
    with pytest.raises(InputError, match=f"^--validation-prompts, prompt 2: .*{problem}"):
        go(replace(options, validation_prompts=("a cat", text)))


def test_the_model_is_asked_nothing_that_is_too_long_for_it(
    options: TrainingOptions, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"file_name": str(data / "red.png"), "text": text} for text in ("a red square", "long " * 300)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked: list[str] = []
    ask = prepare.own_replies

    def watched(model: Any, language: Any, messages: list[str]) -> Any:
        asked.extend(messages)
        return ask(model, language, messages)

    monkeypatch.setattr(prepare, "own_replies", watched)
    chosen = replace(options, data=(tmp_path / "data.jsonl",), reply=None, cache_dir=tmp_path / "cache")
    with pytest.raises(DataError) as error:
        go(chosen)
    assert error.value.problems[0].startswith(f"{tmp_path / 'data.jsonl'}, line 2: 1")
    assert "tokens long; the model reads at most 1024" in error.value.problems[0]
    assert not asked
    with pytest.raises(InputError, match="of 1 text without a reply, the model draws none"):
        go(replace(chosen, skip_bad=True))
    assert asked == ["Can you generate a red square"]


@pytest.mark.parametrize("full", [False, True])
def test_two_processes_learn_what_one_learns(options: TrainingOptions, tmp_path: Path, full: bool) -> None:
    options = replace(options, full=full, validation_prompts=("a red square",) * full, num_inference_steps=2)
    one = go(replace(options, out=tmp_path / "one"))
    two = replace(options, out=tmp_path / "two", train_batch_size=1)
    in_two_processes(lambda: go(two))
    found = [json.loads(line) for line in (two.out / "log.jsonl").read_text().splitlines()]
    for a, b in zip(one, found, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)
    path = "checkpoint-4/training_state.pt"  # whole, though with --full each process has kept a half of it
    states = [torch.load(tmp_path / run / path, weights_only=True)["state"] for run in ("one", "two")]
    for name, value in states[0].items():
        assert (value - states[1][name]).norm() <= 1e-3 * value.norm()
    if full:  # either continues the other, whatever the number of processes
        go(replace(options, out=two.out, resume=True, max_train_steps=4))


def test_what_is_to_be_kept_is_kept(options: TrainingOptions, data: Path, tmp_path: Path) -> None:
    model = ScaleRAE.from_pretrained(options.model, device="cpu")
    draws = "Can you generate a photo of a cat on a windowsill?"
    prompts = tmp_path / "known.txt"
    prompts.write_text(draws + "\n")
    learning = replace(options, learning_rate=2e-2, max_train_steps=12, ema_decay=0.5, num_inference_steps=4)
    forgets, keeps = (replace(learning, out=tmp_path / name) for name in ("forgets", "keeps"))
    keeps = replace(keeps, class_prompts=prompts, train_batch_size=4)
    go(forgets)
    log = go(keeps)
    assert log[0]["kept"] == 0  # B is zero in the first step
    assert log[1]["kept"] > 0
    condition = model.reply([draws])[0].condition
    assert condition is not None
    x = torch.randn(1, model.config.channels, 16, 16, generator=torch.Generator().manual_seed(0))

    def velocity(lora: Path | None) -> torch.Tensor:
        changed = ScaleRAE.from_pretrained(options.model, device="cpu", lora=[str(lora)] if lora else [])
        with torch.no_grad():
            return changed.dit(x, torch.tensor([0.7]), condition[None])

    base = velocity(None)
    assert (velocity(keeps.out) - base).square().mean() < 0.5 * (velocity(forgets.out) - base).square().mean()


def test_the_record_of_a_training_has_all_options_that_decide_and_the_adapters_below(
    options: TrainingOptions, tmp_path: Path
) -> None:
    first = replace(options, max_train_steps=1, out=tmp_path / "first")
    second = replace(options, max_train_steps=1, lora=(f"{first.out}:0.5",))
    for chosen, adapters in ((first, []), (second, [{"name": str(first.out), "weight": 0.5}])):
        go(chosen)
        made = json.loads((chosen.out / "training.json").read_text())["options"]
        assert (made["lora"], made["train_batch_size"], made["processes"]) == (adapters, 2, 1)
        assert (made["data"], made["lr_warmup_steps"], made["class_prompts"]) == ([str(chosen.data[0])], 1, None)


def test_all_weights_are_trained_into_a_checkpoint(options: TrainingOptions) -> None:
    chosen = replace(options, full=True, train="dit", max_train_steps=2, optimizer="muon")
    go(chosen)
    trained = ScaleRAE.from_pretrained(str(chosen.out / "model"), device="cpu")
    base = ScaleRAE.from_pretrained(options.model, device="cpu")
    for mine, its in ((trained.dit, base.dit), (trained.language, base.language)):
        same = [torch.equal(a, b) for a, b in zip(mine.parameters(), its.parameters(), strict=True)]
        assert all(same) if mine is trained.language else sum(same) < 0.1 * len(same)


@pytest.mark.parametrize(
    ("full", "name"), [(False, "adapter_config.json"), (False, "adapter_model.safetensors"), (True, "model")]
)
def test_what_another_made_is_not_replaced(options: TrainingOptions, full: bool, name: str) -> None:
    (options.out / "model").mkdir(parents=True)
    if not full:
        (options.out / name).write_text("mine")
    with pytest.raises(TrainingError, match=f"{name}: exists already, without a checkpoint"):
        go(replace(options, full=full, resume=True))
    assert (options.out / "model").is_dir()


def test_a_folder_that_cannot_be_written_is_named(options: TrainingOptions, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file/out: cannot be written"):
        go(replace(options, out=tmp_path / "file/out"))


def test_a_checkpoint_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 2368 vs 2262")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match="checkpoint-2: cannot be written; is the disk full"):
        Checkpoints(tmp_path, {}).write(2, {}, lambda folder: (folder / "adapter").touch())
    assert not list(tmp_path.iterdir())  # what was written takes no place


def test_what_a_broken_run_leaves_replaces_no_older_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {}, keep=1)
    for step in (2, 4, 5):
        checkpoints.write(step, {}, lambda folder: None, trim=step < 5)
    assert checkpoints.steps() == [4, 5]


def test_what_a_killed_run_had_begun_to_write_is_removed(options: TrainingOptions) -> None:
    other = options.out / ".hidden.a-b.tmp"
    options.out.mkdir()
    for path in (options.out / ".adapter_model.safetensors.71-140532669905792.tmp", other):
        path.write_bytes(b"a part")
    go(replace(options, max_train_steps=1))
    assert [path for path in options.out.iterdir() if path.name.startswith(".")] == [other]


def test_other_data_are_named(tmp_path: Path) -> None:
    Checkpoints(tmp_path, {"records": "3f", "seed": 1}).write(2, {}, lambda folder: None)
    with pytest.raises(
        TrainingError, match=r"made otherwise: the training data or their order differ; use the same .* another --out$"
    ):
        Checkpoints(tmp_path, {"records": "4a", "seed": 1}).newest()


def test_data_are_read_before_a_model_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scale_rae.cli.train.find", lambda *a, **k: pytest.fail("looked for the model first"))
    assert app.run(["train", "--model", "nobody/nothing", "--data", str(tmp_path), "--out", str(tmp_path / "o")]) == 1
    assert f"{tmp_path}: holds no training data" in capsys.readouterr().err


def test_bad_records_are_listed_by_one_of_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    for rank, listed in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert app.run(["train", "--data", str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "o")]) == 1
        assert ("bad.jsonl, line 1: not valid JSON" in capsys.readouterr().err) == listed


def test_resuming_without_a_checkpoint_says_so(options: TrainingOptions) -> None:
    notes: list[str] = []
    go(replace(options, max_train_steps=1, resume=True), Watcher(note=notes.append))
    assert notes == [f"{options.out}: no checkpoint yet; from step 1"]


def test_wandb_gets_what_the_log_has(options: TrainingOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((step, values))

        def finish(self) -> None:
            calls.append("finished")

    def init(**given: Any) -> Run:
        calls.append(given)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, run=None, __spec__=object()))
    log = go(replace(options, max_train_steps=2, report_to="wandb"))
    begun, *logged, end = calls
    assert (begun["group"], begun["config"]["rank"], end) == ("out", 2, "finished")
    assert [(step, values["loss"]) for step, values in logged] == [(record["step"], record["loss"]) for record in log]
    assert {name for name in logged[0][1] if "flow_by_t" in name} <= {f"flow_by_t/0.{i}" for i in range(10)}


def test_an_interrupted_training_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for expected in ("no checkpoint was written yet", "run the same command with --resume"):
        with pytest.raises(KeyboardInterrupt), TrainingBar(tmp_path):
            raise KeyboardInterrupt
        assert expected in capsys.readouterr().err
        (tmp_path / "checkpoint-5").mkdir(exist_ok=True)
