"""Learning from the model's own verdicts: the loss, the scores, whole runs that go on to the bit, and what warns of self-deceit."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from scale_rae.cli import app
from scale_rae.dit import DiT
from scale_rae.errors import ConfigError, InputError, OptionError, TrainingError
from scale_rae.hub import find
from scale_rae.layout import DIT_PREFIX
from scale_rae.noise import image_seed
from scale_rae.pipeline import ScaleRAE
from scale_rae.prompt import QUESTION, ask_question
from scale_rae.promptfile import read_prompts
from scale_rae.training import reading, self_reward
from scale_rae.training.batches import Scored
from scale_rae.training.losses import between
from scale_rae.training.objective import SelfReward, Totals
from scale_rae.training.optim import FlatModel, OptimizerOptions
from scale_rae.training.reading import Scorer, Scores, log_odds, optimality, spoilt
from scale_rae.training.run import Watcher
from scale_rae.training.self_reward import Rounds, train_on_verdicts, warnings
from scale_rae.training.settings import SelfRewardOptions, TrainingOptions
from scale_rae.training.trainer import Progress
from tests.helpers.forked import in_two_processes

DRAWS = ("Can you generate a photo of a cat on a windowsill?", "Can you generate a photo of a cat on a windowsill?")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first letters stand for yes and no, since the small checkpoints' tokens are bytes."""
    monkeypatch.setattr(
        reading, "answer_tokens", lambda tokenizer, word: {tokenizer.plain(c)[0] for c in (word[0], word[0].upper())}
    )


@pytest.fixture
def options(checkpoints: dict[str, Path], cache: Path, tmp_path: Path) -> TrainingOptions:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(DRAWS))
    own = SelfRewardOptions(
        prompts=prompts,
        prompts_per_round=2,
        images_per_prompt=2,
        steps_per_round=2,
        draw_steps=2,
        condition_noise=0.1,
    )
    return TrainingOptions(
        model=str(checkpoints["ddt"]),
        objective="self-reward",
        self_reward=own,
        out=tmp_path / "out",
        cache_dir=cache,
        device="cpu",
        rank=2,
        learning_rate=1e-3,
        lr_warmup_steps=1,
        max_train_steps=6,
        train_batch_size=2,
        save_steps=3,
        logging_steps=1,
    )


def go(options: TrainingOptions, watcher: Watcher | None = None) -> list[dict[str, Any]]:
    """The log of a training."""
    options.check()
    assert options.self_reward.prompts is not None
    lines = read_prompts(options.self_reward.prompts)
    train_on_verdicts(options, find(options.model, "model"), lines, watcher or Watcher())
    return [json.loads(line) for line in (options.out / "log.jsonl").read_text().splitlines()]


class Killed(BaseException):
    """An end without cleaning up, as kill -9 makes one."""


def test_a_run_that_was_ended_within_a_round_goes_on_to_the_bit(options: TrainingOptions, tmp_path: Path) -> None:
    whole = go(options)
    assert [record["round"] for record in whole] == [1, 1, 2, 2, 3, 3]
    other = replace(options, out=tmp_path / "other")

    def kill(progress: Progress) -> None:
        if progress.step == 4:
            raise Killed

    with pytest.raises(Killed):
        go(other, Watcher(step=kill))
    with pytest.raises(TrainingError, match=r"made otherwise.*beta was 1\.0"):
        go(replace(other, resume=True, self_reward=replace(other.self_reward, beta=0.5)))
    again = go(replace(other, resume=True))
    same = ("step", "loss", "policy", "null", "distance", "reading", "gradient_norm")
    assert [[record[key] for key in same] for record in again] == [[record[key] for key in same] for record in whole]
    name = "adapter_model.safetensors"
    assert (options.out / name).read_bytes() == (other.out / name).read_bytes()
    looks = [json.loads(line) for line in (other.out / "validation" / "log.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [0, 6]
    assert looks[0]["distance"] == 0
    assert looks[1]["distance"] > 0


def test_what_is_liked_better_is_drawn_more(options: TrainingOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    def likes_bright(language: Any, tokenizer: Any, latents: list[Tensor], prompts: Any) -> Tensor:
        return 100 * torch.stack([latent.mean() for latent in latents])

    for module in (reading, self_reward):
        monkeypatch.setattr(module, "log_odds", likes_bright)
    own = replace(options.self_reward, images_per_prompt=4, steps_per_round=4, old_decay=0.0, condition_noise=0.0)
    learning = replace(options, full=True, self_reward=own, learning_rate=1e-3, train_batch_size=4, max_train_steps=12)
    log = go(replace(learning, save_steps=100))
    first, last = log[0]["reading"], log[-1]["reading"]
    assert last > first + 0.5


def test_guidance_is_folded_in(options: TrainingOptions) -> None:
    own = replace(options.self_reward, fold_guidance=3.0, fold_steps=100, reading_weight=0.0, reward="siglip")
    assert own.folding(7) == 7  # all steps
    assert replace(own, fold_steps=None).folding(20) == 8
    assert replace(own, fold_guidance=1.0).folding(20) == 0
    chosen = replace(
        options, max_train_steps=4, self_reward=replace(options.self_reward, fold_guidance=3.0, fold_steps=2)
    )
    scorer = "scale_rae.training.self_reward.Scorer.accepted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, lambda self, scores, standings: torch.ones_like(scores.yes))
        assert [record["round"] for record in go(chosen)] == [1, 1, 2, 2]
        patch.setattr(scorer, lambda self, scores, standings: torch.zeros_like(scores.yes))
        with pytest.raises(TrainingError, match="round 1: the model accepts none of its 4 drawings with guidance 3"):
            go(replace(chosen, out=options.out / "none"))


def test_prompts_that_the_model_answers_in_words_are_drawn_after_a_reply(
    options: TrainingOptions, tmp_path: Path
) -> None:
    other = "Can you generate a photo of a cat on a roof?"
    assert options.self_reward.prompts is not None
    options.self_reward.prompts.write_text(f"{DRAWS[0]}\n{other}\n")
    notes: list[str] = []
    go(replace(options, max_train_steps=1), Watcher(note=notes.append))
    assert any("1 of 2 prompts left out" in note for note in notes)
    notes.clear()
    go(replace(options, max_train_steps=1, reply="Here it is:", out=tmp_path / "after"), Watcher(note=notes.append))
    assert not any("left out" in note for note in notes)
    with pytest.raises(InputError, match=r"prompts\.txt, line 1: 1\d+ tokens long; the model reads at most 1024$"):
        go(replace(options, reply="long " * 300, out=tmp_path / "long"))
    options.self_reward.prompts.write_text("a cat <image>\n")
    with pytest.raises(InputError, match=r"prompts\.txt, line 1: holds <image>, which stands for a picture$"):
        go(replace(options, reply="Here it is:", out=tmp_path / "picture"))


def test_two_processes_learn_what_one_learns(options: TrainingOptions, tmp_path: Path) -> None:
    one = go(replace(options, out=tmp_path / "one", max_train_steps=3))
    two = replace(options, out=tmp_path / "two", train_batch_size=1, max_train_steps=3)
    in_two_processes(lambda: go(two))
    found = [json.loads(line) for line in (two.out / "log.jsonl").read_text().splitlines()]
    for a, b in zip(one, found, strict=True):
        for name in ("loss", "reading", "gradient_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3)


def test_a_loss_that_is_not_finite_names_its_prompts(options: TrainingOptions) -> None:
    broken = replace(options, learning_rate=1e30, lr_warmup_steps=0, lr_scheduler="constant")
    with pytest.raises(
        TrainingError, match=r"^step 2: not finite .*prompts.txt, line \d.* the weights of step 1 are kept"
    ):
        go(broken)


def two_drawings(model: ScaleRAE) -> tuple[DiT, FlatModel, Tensor, Tensor, Tensor]:
    """A velocity network and its parameters; two drawings x and noises [2, C, S, S], and conditions [2, L, Z]."""
    dit, config = copy.deepcopy(model.dit).requires_grad_(), model.config
    flat = FlatModel({DIT_PREFIX: dit}, torch.device("cpu"), torch.float32, OptimizerOptions(), 1)
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(2, config.channels, config.dit.side, config.dit.side, generator=generator) for _ in "ab")
    conditions = torch.randn(2, config.tokens, config.dit.condition_width, generator=generator)
    return dit, flat, x, noise, conditions


def test_the_loss_pushes_from_worse_to_better(models: dict[str, ScaleRAE]) -> None:
    dit, flat, x, noise, conditions = two_drawings(models["ddt"])
    t, none = torch.tensor([0.8, 0.4]), torch.zeros(2, dtype=torch.bool)

    def losses(r: float, dropped: Tensor, beta: float, start: Tensor, folds: bool) -> Tensor:
        objective = SelfReward(dit, flat, start.clone(), flat.master.clone(), beta, 0.0, guidance=3.0)
        batch = Scored(["a", "b"], x, conditions, torch.full((2,), r), t, noise, dropped, folds)
        loss, numbers = objective(batch, Totals(2, 0, 0))
        assert numbers[0] == loss
        return loss

    def gradient(r: float, dropped: Tensor = none, beta: float = 1.0, start: Tensor = flat.master) -> Tensor:
        loss = losses(r, dropped, beta, start, folds=False)
        parts = torch.autograd.grad(loss, flat.parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    better = gradient(1.0)
    torch.testing.assert_close(gradient(0.0), -better)
    assert gradient(0.5).norm() < 1e-5 * better.norm()
    torch.testing.assert_close(gradient(1.0, beta=0.5), better)  # at the old policy, beta changes no direction
    before = flat.master.clone()
    assert gradient(1.0, ~none).norm() == 0  # the null embedding's velocity is what it was
    assert gradient(1.0, ~none, start=before + 0.01).norm() > 0
    assert torch.equal(flat.master, before)
    with torch.no_grad():  # guidance 3 moves the velocity by twice its distance from the null embedding's
        x_t = between(x, t, noise)
        without = dit(x_t, t, dit.null_condition.expand_as(conditions))
        moved = 2 * (dit(x_t, t, conditions) - without)
    torch.testing.assert_close(losses(0.0, none, 1.0, before, folds=True), moved.square().mean())


def test_log_odds_are_those_of_the_answer(models: dict[str, ScaleRAE]) -> None:
    model = models["ddt"]
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(model.config.tokens, model.config.channels, generator=generator) for _ in range(2)]
    prompts = ["a cat", "a photo of two dogs and a red car"]
    both = log_odds(model.language, model.tokenizer, latents, prompts)
    for latent, prompt, value in zip(latents, prompts, both, strict=True):
        alone = log_odds(model.language, model.tokenizer, [latent], [prompt])
        torch.testing.assert_close(alone[0], value, rtol=1e-3, atol=1e-3)
        (answer,) = model.answer(ask_question(QUESTION, prompt), latents=latent, max_new_tokens=1)
        letter = answer.text.strip().lower()
        assert letter not in ("y", "n") or (letter == "y") == bool(value > 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "answer_tokens", lambda tokenizer, word: set())
        with pytest.raises(ConfigError, match="no single token for yes"):
            log_odds(model.language, model.tokenizer, latents, prompts)


def test_drawings_are_measured_by_those_of_their_prompt() -> None:
    scorer = object.__new__(Scorer)
    scorer.options = SelfRewardOptions(reward="siglip")
    scores = Scores(torch.tensor([9.0, -9, 9, 6, 2, 3, -7, -7]), torch.tensor([0.0, 0, 0, 0, 0, 0, 8, -8]))
    standings = scorer.standings(scores, each=2)
    torch.testing.assert_close(standings, torch.tensor([0.5, -0.5, 0, 0, -0.0625, 0.0625, 0.5, -0.5]))
    assert optimality(standings * 3).tolist() == pytest.approx([1, 0, 0.5, 0.5, 0.40625, 0.59375, 1, 0])
    assert scorer.accepted(scores, standings).tolist() == [True, False, True, True, True, True, False, False]
    latents = torch.arange(4.0).repeat_interleave(4).view(4, 4, 1)
    assert halves(spoilt(latents, ["a", "b", "c", "d"])) == [[0, 0, 2, 2], [1, 1, 3, 3], [2, 2, 0, 0], [3, 3, 1, 1]]
    # Half of another drawing of the same prompt may well show it.
    assert halves(spoilt(latents, ["a", "b", "a", "a"])) == [[0, 0, 1, 1], [1, 1, 3, 3], [2, 2, 1, 1], [3, 3, 1, 1]]
    assert spoilt(latents, ["a"] * 4) is None


def halves(latents: torch.Tensor | None) -> list[list[float]]:
    assert latents is not None
    rows: list[list[float]] = latents[:, :, 0].tolist()
    return rows


def test_a_prompt_that_is_there_again_in_a_round_is_drawn_from_other_noise(options: TrainingOptions) -> None:
    """With few prompts, all drawings of a round are others; a prompt's first ones stay what they were."""
    learnt: list[list[torch.Tensor]] = []
    draw = Rounds.draw

    def drawing(rounds: Rounds, conditions: torch.Tensor, seeds: Sequence[int], guidance: float) -> torch.Tensor:
        learnt.append(list(seeds))
        return draw(rounds, conditions, seeds, guidance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rounds, "draw", drawing)
        own = replace(options.self_reward, prompts_per_round=5, images_per_prompt=2)
        go(replace(options, self_reward=own, max_train_steps=1))
    seeds = next(some for some in learnt if len(some) == 10)
    assert len(set(seeds)) == 10
    assert image_seed(options.seed, 0, 2) in seeds


def test_what_the_validation_cannot_check_is_said(options: TrainingOptions) -> None:
    """Both prompts of the file are the same, so no drawing can be spoilt by another prompt's."""
    notes: list[str] = []
    go(replace(options, max_train_steps=1), Watcher(note=notes.append))
    assert any(note.startswith("no reward verifies what is learnt") for note in notes)
    assert any(note.startswith("the validation draws one prompt only") for note in notes)
    assert not any("spoilt drawings, so its reading" in note for note in notes)
    (line, *_) = (options.out / "validation" / "log.jsonl").read_text().splitlines()
    assert {"yes", "reading", "distance"} <= set(json.loads(line))
    assert "yes_to_spoilt" not in json.loads(line)


def test_only_the_validation_sees_the_verifier(options: TrainingOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at both drawings of a validation, and at no drawing of a round."""
    seen: list[int] = []

    class Falling:
        def score(self, images: Sequence[Image.Image], prompt: str) -> list[float]:
            seen.append(len(images))
            return [-10.0 * len(seen)] * len(images)

    monkeypatch.setattr(self_reward, "load_named", lambda *_: Falling())
    notes: list[str] = []
    own = replace(options.self_reward, verify_reward="siglip")
    go(replace(options, self_reward=own, max_train_steps=2, validation_steps=1), Watcher(note=notes.append))
    lines = [json.loads(line) for line in (options.out / "validation" / "log.jsonl").read_text().splitlines()]
    assert [line["verifier"] for line in lines] == [-10.0, -20.0, -30.0]
    assert seen == [2, 2, 2]
    assert not any("no reward verifies" in note for note in notes)


def test_wandb_gets_the_validation_in_the_run_of_its_training(
    options: TrainingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    wandb = SimpleNamespace(run=None, __spec__=object())

    def init(**given: Any) -> Any:
        assert wandb.run is None  # one run only
        wandb.run = run
        return run

    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    go(replace(options, max_train_steps=1, report_to="wandb"))
    assert [step for step, _ in logged] == [0, 1, 1]
    before, step, after = (values for _, values in logged)
    assert before.keys() == after.keys() == {"validation/yes", "validation/reading", "validation/distance"}
    assert {"loss", "reading"} <= step.keys()
    assert not (options.out / "validation" / "tensorboard").exists()


def test_the_kl_weight_counts_the_distance_to_the_start(models: dict[str, ScaleRAE]) -> None:
    dit, flat, x, noise, conditions = two_drawings(models["ddt"])
    none = torch.zeros(2, dtype=torch.bool)
    batch = Scored(["a", "b"], x, conditions, torch.full((2,), 0.7), torch.tensor([0.8, 0.4]), noise, none, False)

    def losses(kl_weight: float) -> tuple[Tensor, Tensor]:
        start = flat.master + 0.01
        loss, numbers = SelfReward(dit, flat, start, flat.master.clone(), 1.0, kl_weight, 1.0)(batch, Totals(2, 0, 0))
        return loss, numbers[3]

    (without, distance), (weighted, _) = losses(0.0), losses(2.0)
    assert distance > 0
    torch.testing.assert_close(weighted - without, 2 * distance)


def test_a_verifier_that_disagrees_warns() -> None:
    first = {"step": 0, "yes": 0.9, "reading": 1.0, "verifier": 3.0, "yes_to_spoilt": 0.2}
    assert warnings(first, first, 0.5) == []
    assert "says yes to 90% of spoilt drawings" in warnings(first | {"yes_to_spoilt": 0.9}, first, 0.5)[0]
    later = first | {"step": 9, "reading": 2.0}
    assert warnings(later | {"verifier": 2.6}, first, 0.5) == []
    assert "may learn to please itself" in warnings(later | {"verifier": 2.4}, first, 0.5)[0]


def test_a_training_that_comes_apart_warns() -> None:
    first = {"step": 0, "yes": 0.9, "reading": 5.0}
    assert warnings(first | {"step": 9, "yes": 0.5}, first, 0.0) == []
    assert (
        "yes to 40% of its drawings, before training to 90%" in warnings(first | {"step": 9, "yes": 0.4}, first, 0.0)[0]
    )
    few = first | {"yes": 0.12}
    assert warnings(few | {"step": 9, "yes": 0.03}, few, 0.0) == []  # may be chance


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "--prompts: give a file of prompts to draw"),
        (["--prompts", "p", "--data", "d"], "--data: has no meaning for --objective self-reward"),
        (["--prompts", "p", "--train", "both"], "--train both: the language model is the judge"),
        (["--prompts", "p", "--reading-weight", "0"], "nothing would score the drawings"),
        (["--prompts", "p", "--reward", "siglip", "--verify-reward", "siglip"], "a verifier must be another"),
        (["--prompts", "p", "--reward-path", "d"], "--reward-path: no reward is chosen"),
        (["--prompts", "p", "--reward-weight", "2"], "--reward-weight: no reward is chosen"),
        (["--prompts", "p", "--fold-steps", "3"], "--fold-steps: has no meaning without --fold-guidance"),
        (
            ["--prompts", "p", "--timesteps-per-sample", "2"],
            "--timesteps-per-sample: has no meaning for --objective self-reward",
        ),
        (["--prompts", "p", "--center-crop"], "--center-crop: has no meaning for --objective self-reward"),
    ],
)
def test_options_without_sense_are_refused(flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["train", "--objective", "self-reward", *flags]) == 2
    assert problem in capsys.readouterr().err
    with pytest.raises(OptionError, match="--images-per-prompt 1"):
        SelfRewardOptions(prompts=Path("p"), images_per_prompt=1).check()


def test_records_of_fine_tuning_have_no_options_of_self_reward() -> None:
    record = TrainingOptions(data=(Path("d"),)).identity()
    assert not {"objective", "beta", "images_per_prompt"} & set(record)
    assert TrainingOptions(objective="self-reward").identity()["beta"] == 1.0
