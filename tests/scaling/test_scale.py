"""What an experiment leaves: the tree, the records, the same whichever way it was run; bad input."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scale_rae.language import Reply
from scale_rae.noise import image_seed
from scale_rae.pipeline import ScaleRAE
from scale_rae.sampling import LatentSampler
from scale_rae.scaling.settings import Settings
from tests.conftest import GOLDEN_CASES
from tests.helpers.made_checkpoints import GOLDENS
from tests.scaling.conftest import NAME, PROMPTS, QUICK, Scale, record, snapshot, write_prompts


def test_tree_and_records(scale: Scale, reference: dict[str, bytes]) -> None:
    samples = [f"samples/{i:05}.png" for i in range(4)]
    names = [f"{index}/{name}" for index in ("00000", "00002", "00007") for name in ("metadata.jsonl", *samples)]
    assert sorted(n for n in reference if not n.startswith(".work")) == sorted(names)
    first = json.loads(reference["00000/metadata.jsonl"])
    assert first["tag"] == "single_object"
    assert first["include"] == [{"class": "circle", "count": 1}]
    assert first["request"] == "Can you generate a photo of a red circle"
    assert first["prompt"] == "a photo of a red circle"
    assert (first["index"], first["n_samples"], first["scaling_rounds"]) == (0, 2, 2)
    assert first["image_seeds"] == [image_seed(42, 0, i) for i in range(4)]
    assert first["reward"] is first["all_ir_scores"] is first["top_ir_indices"] is None
    assert list(first["text_responses"]) == ["0", "1", "2", "3"]
    for entry in first["text_responses"].values():
        assert entry["question"] == "Does this image align with the prompt: a photo of a red circle?"
        sign = {"yes": entry["yes_conf_score"], "no": -entry["no_conf_score"], "uncertain": 0}
        assert entry["score"] == sign[entry["answer"]]
        assert {"reply", "prompt_loss", "prompt_conf_score", "image_conf_score", "response_conf_score"} < entry.keys()
    assert json.loads(reference["00007/metadata.jsonl"])["image_seeds"][0] == image_seed(42, 7, 0)


def test_underscores_and_the_guides_script(tmp_path: Path, scale: Scale) -> None:
    root = Path(__file__).parents[2]
    argv = [sys.executable, root / "scaling_experiment.py", "t2i", "--metadata_file", tmp_path / "none.jsonl", *QUICK]
    ran = subprocess.run([str(a) for a in argv], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 1
    assert ran.stderr == f"error: {tmp_path}/none.jsonl: no such prompt file\n"


def test_a_prompts_reply_is_made_once(
    scale: Scale, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four images in two batches, and what is judged, all from one reply."""
    asked: list[str] = []
    reply = ScaleRAE.reply

    def counted(self: ScaleRAE, messages: Any, *args: Any, **options: Any) -> list[Reply]:
        asked.extend([messages] if isinstance(messages, str) else messages)
        return reply(self, messages, *args, **options)

    monkeypatch.setattr(ScaleRAE, "reply", counted)
    assert scale().code == 0
    assert sorted(asked) == sorted(f"Can you generate {record['prompt']}" for record in PROMPTS)
    assert snapshot(scale.folder) == reference


def test_two_workers_leave_the_same_bytes(scale: Scale, reference: dict[str, bytes]) -> None:
    assert scale("--devices", "cpu,cpu", device=False).code == 0
    assert snapshot(scale.folder) == reference
    for rank in range(2):
        assert (scale.folder / "logs" / f"worker-{rank}.log").read_text().rstrip().endswith("done")


def test_launched_ranks_leave_the_same_bytes(
    scale: Scale, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(
        "scale_rae.scaling.ranks.share",
        lambda prompts, todo, together, worker, workers: ([[p] for p in prompts[worker::workers]], []),
    )
    assert scale().code == 1  # rank 0's prompts are not there
    assert [p.name for p in sorted(scale.folder.glob("0*"))] == ["00007"]
    monkeypatch.setenv("RANK", "0")
    assert scale().code == 0
    assert snapshot(scale.folder) == reference


def test_a_worker_takes_over_what_others_leave(
    scale: Scale, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "2"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    assert scale().code == 0
    assert snapshot(scale.folder) == reference


def test_batch_size_and_threads_do_not_decide_on_the_cpu(
    scale: Scale, monkeypatch: pytest.MonkeyPatch, batches: list[tuple[int, int]]
) -> None:
    """With the reward, which sees every pixel, and enough steps for rounding to show."""

    def run(name: str, threads: int, batch_size: int) -> dict[str, bytes]:
        scale.out = scale.out.with_name(name)
        scale.folder = scale.out / NAME
        torch.set_num_threads(threads)
        try:
            options = ("--limit", 1, "--reward", "siglip", "--steps", 5, "--guidance-level", 3)
            assert scale(*options, "--batch-size", batch_size).code == 0
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
        return {n: data for n, data in snapshot(scale.folder).items() if not n.startswith(".work")}

    reference = run("one", 1, 4)
    assert len(reference) == 5
    assert max(images for _, images in batches) == 4, "this CPU's sums depend on the batch"
    assert run("three", 3, 3) == reference
    monkeypatch.setattr("scale_rae.scaling.worker.MOST_PER_THREAD", 1)
    batches.clear()
    assert run("one by one", 2, 4) == reference
    assert {images for _, images in batches} == {1}


def test_a_cpu_whose_sums_depend_on_the_batch_draws_one_by_one(scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves what it always left."""
    together: list[int] = []
    draw = LatentSampler.sample_batch

    def rounds(self: LatentSampler, condition: torch.Tensor, seeds: Any, *rest: Any) -> torch.Tensor:
        together.append(len(seeds))
        return draw(self, condition, seeds, *rest) + 1e-6 * (len(seeds) > 1)

    monkeypatch.setattr(LatentSampler, "sample_batch", rounds)
    assert scale("--limit", 1).code == 0
    tried = len(together) - together[::-1].index(2)
    assert together[tried:] == [1, 1, 1, 1]


def test_a_cpu_without_memory_for_several_draws_one_by_one(scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, sizes = LatentSampler.sample_batch, list[int]()

    def limited(self: LatentSampler, condition: torch.Tensor, seeds: Any, *rest: Any) -> torch.Tensor:
        sizes.append(len(seeds))
        if len(seeds) > 1:
            raise torch.OutOfMemoryError("not enough memory")
        return draw(self, condition, seeds, *rest)

    monkeypatch.setattr(LatentSampler, "sample_batch", limited)
    assert scale("--limit", 1).code == 0
    tried = len(sizes) - sizes[::-1].index(2)
    assert sizes[tried:] == [1, 1, 1, 1]


@pytest.mark.usefixtures("in_batches")
def test_another_batch_size_differs_by_rounding(scale: Scale, tmp_path: Path) -> None:
    """As on a GPU; there in bfloat16 rounding is coarser."""
    records = []
    for size in (2, 3):
        scale.out = tmp_path / str(size)
        scale.folder = scale.out / NAME
        assert scale("--batch-size", size).code == 0
        records.append({index: record(scale.folder, index) for index in (0, 2, 7)})
    for index, theirs in records[0].items():
        mine = records[1][index]
        for i in range(4):
            images = [Image.open(tmp_path / size / NAME / f"{index:05}" / "samples" / f"{i:05}.png") for size in "23"]
            a, b = (np.asarray(image).astype(int) for image in images)
            assert np.abs(a - b).max() <= 1
            for key, value in theirs["text_responses"][str(i)].items():
                other = mine["text_responses"][str(i)][key]
                assert other == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value)


def test_reward_ranks(scale: Scale, reward: object) -> None:
    assert scale("--reward", "imagereward", "--save-latents", "--limit", 1).code == 0
    found = record(scale.folder)
    scores = found["all_ir_scores"]
    assert found["reward"] == "imagereward"
    assert len(scores) == 4
    assert found["top_ir_indices"] == sorted(range(4), key=lambda i: (-scores[i], i))[:2]
    latent = torch.load(scale.folder / "00000" / "samples" / "00003_latent.pt", weights_only=True)
    assert latent.dim() == 2
    described = json.loads((scale.folder / "experiment.json").read_text())
    assert described["reward"] == {"name": "imagereward", "revision": "stub"}


def test_a_reward_with_too_few_scores_is_named(scale: Scale, reward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward, "score", lambda self, images, prompt: [0.0] * (len(images) - 1))
    result = scale("--reward", "imagereward", "--limit", 1)
    assert result.code == 1
    assert re.search(r"the reward gave \d scores? for \d images?", result.err)


def test_image_mode_reads_the_decoded_image(scale: Scale, reference: dict[str, bytes]) -> None:
    assert scale("--post-qa-mode", "image", "--limit", 1).code == 0
    found = record(scale.folder.with_name("2_qa_prompt_template_scale_image"))
    assert found["qa_mode"] == "image"
    other = json.loads(reference["00000/metadata.jsonl"])
    assert found["image_seeds"] == other["image_seeds"]
    assert found["text_responses"]["0"]["prompt_loss"] != other["text_responses"]["0"]["prompt_loss"]


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_the_records_scores_are_the_goldens(
    case: str,
    checkpoints: dict[str, Path],
    models: dict[str, ScaleRAE],
    scale: Scale,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    golden = dict(np.load(GOLDENS / f"{case}.npz", allow_pickle=False))
    write_prompts(scale.prompts, [{"prompt": "a photo of a cat on a windowsill"}])
    # The goldens' request has a question mark that the guide's prefix does not add.
    monkeypatch.setattr(Settings, "request", lambda self, prompt: f"Can you generate {prompt}?")
    replies: list[Reply] = []  # every one that is made; an experiment records of its tokens only what the guide does
    begin = Reply.__init__

    def noted(self: Reply, *args: Any, **values: Any) -> None:
        begin(self, *args, **values)
        replies.append(self)

    monkeypatch.setattr(Reply, "__init__", noted)
    options = ["--steps", 49, "--solver", "euler", "--n-samples", 1, "--scaling-rounds", 1]
    options += ["--post-qa-max-new-tokens", 13, "--model-path", checkpoints[case], "--save-latents"]
    assert scale(*options).code == 0
    folder = scale.out / "model" / "1_qa_prompt_template_scale_latent"
    entry = record(folder)["text_responses"]["0"]

    def close(actual: Any, key: str) -> None:
        expected = golden[key]
        assert np.abs(np.asarray(actual) - expected).max() <= 2e-5 * np.abs(expected).max()

    latent = torch.load(folder / "00000" / "samples" / "00000_latent.pt", weights_only=True).numpy()
    close(latent if latent.shape == golden["t2i.latent"].shape else latent[::32], "t2i.latent")
    image = np.asarray(Image.open(folder / "00000" / "samples" / "00000.png")).astype(int)
    assert np.abs(image - golden["decode.image"].astype(int)).max() <= 1
    assert record(folder)["output_text"] == str(golden["t2i.text"])

    tokenizer = models[case].tokenizer
    assert tokenizer.chat(entry["question"], image=True) == golden["qa.input_ids"].tolist()
    (reply,) = [r for r in replies if r.ids == golden["qa.output_ids"].tolist()]
    close(reply.logits, "qa.logits")
    close(reply.confidences, "qa.conf")
    assert entry["reply"] == tokenizer.decode(golden["qa.output_ids"].tolist())
    assert entry["response_conf_score"] == pytest.approx(golden["qa.conf"].mean(), rel=2e-5)
    assert entry["answer"] == "uncertain"
    close(entry["prompt_loss"], "score.prompt_loss")
    close(entry["prompt_conf_score"], "score.prompt_conf")
    close(entry["image_conf_score"], "score.image_conf")


def test_an_answer_is_as_long_as_the_model_reads_at_most(scale: Scale, reference: dict[str, bytes]) -> None:
    """However long it may be: memory is for what the model reads."""
    assert scale("--limit", 1, "--post-qa-max-new-tokens", 10**12).code == 0
    assert snapshot(scale.folder)["00000/metadata.jsonl"] == reference["00000/metadata.jsonl"]


def test_a_question_of_ones_own(scale: Scale, tmp_path: Path) -> None:
    result = scale("--post-qa-prompt", "Is this true:", "--limit", 1)
    assert result.code == 0
    assert "note: no {prompt} in the question 'Is this true:': the prompt is put at its end" in result.err
    folder = scale.folder.with_name("2_prompt_scale_latent")
    assert record(folder)["text_responses"]["0"]["question"] == "Is this true: a photo of a red circle"


def test_the_guides_template_is_read_from_where_one_is(
    scale: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "qa_prompt_template.txt").write_text("Is {prompt} there?\n")
    monkeypatch.chdir(tmp_path)
    assert scale("--limit", 1).code == 0
    assert record(scale.folder)["text_responses"]["0"]["question"] == "Is a photo of a red circle there?"


@pytest.mark.parametrize(
    ("prompt", "request_"),
    [
        ("a cat", "Can you generate a cat"),
        ("Can you generate a cat?", "Can you generate a cat?"),
        ("can you draw a cat", "can you draw a cat"),
        ("Show me a cat", "Show me a cat"),
        ("I want a cat", "I want a cat"),
        ("paint brushes on a table", "Can you generate paint brushes on a table"),
        ("candy on a plate", "Can you generate candy on a plate"),
    ],
)
def test_the_request_is_the_prompt_with_its_prefix(prompt: str, request_: str) -> None:
    assert Settings("p.jsonl", "m").request(prompt) == request_


def test_prefix_of_ones_own() -> None:
    assert Settings("p.jsonl", "m", prompt_prefix="").request("a cat") == "a cat"
    assert Settings("p.jsonl", "m", prompt_prefix="Picture:").request("a cat") == "Picture: a cat"
    assert Settings("p.jsonl", "m", prompt_prefix="Picture:").request("picture: a cat") == "picture: a cat"


def test_the_folder_is_named_by_model_rounds_and_question(tmp_path: Path) -> None:
    settings = Settings("p.jsonl", "nyu-visionx/Scale-RAE-Qwen1.5B_DiT2.4B")
    assert settings.folder(tmp_path) == tmp_path / "Scale-RAE-Qwen1-5B_DiT2-4B" / "2_qa_prompt_template_scale_latent"


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("scale_rae.networks.load", load)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("options", "error", "code"),  # 2 for values that no run can use, as for those that cannot be parsed
    [
        (["--n-samples", 0], "--n-samples 0: must be at least 1", 2),
        (["--n-samples", 10**9, "--scaling-rounds", 10**9], "at most 1,000,000 images of a prompt", 2),
        (["--scaling-rounds", -1], "--scaling-rounds -1: must be at least 1", 2),
        (["--post-qa-max-new-tokens", 0], "--post-qa-max-new-tokens 0: must be at least 1", 2),
        (["--limit", 0], "--limit 0: must be at least 1", 2),
        (["--seed", -1], "--seed -1: must be at least 0", 2),
        (["--steps", 0], "steps", 2),
        (["--guidance-level", -1], "guidance", 2),
        (["--device", "gpu"], "device 'gpu'", 2),
        (["--guidance-interval", 1, 0], "interval", 2),
        (["--post-qa-template-path", "nowhere.txt"], "nowhere.txt: no such question template", 1),
        (["--device", "cuda:99"], "device cuda:99", 1),
        (["--quantize", "fp8"], "fp8", 1),
    ],
)
def test_bad_options(scale: Scale, options: list[object], error: str, code: int) -> None:
    result = scale(*options)
    assert result.code == code
    assert result.err.startswith("error: ")
    assert error in result.err
    assert not scale.out.exists()


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    "options", [["--batch-size", "x"], ["--batch-size", 0], ["--reward", "beauty"], ["--devices", "cpu"]]
)
def test_wrong_usage(scale: Scale, options: list[object]) -> None:
    assert scale(*options).code == 2


@pytest.mark.usefixtures("no_loading")
def test_bad_prompt_files_name_every_line(scale: Scale) -> None:
    scale.prompts.write_text('{"prompt": "a"}\n{"prompt": 3}\nnonsense\n{"prompt": "b", "index": 0}\n')
    result = scale()
    assert result.code == 1
    for text in ("line 2", "line 3", "line 4: index 0 is that of line 1 already"):
        assert text in result.err


def test_missing_reward_is_said_before_anything_is_drawn(scale: Scale) -> None:
    result = scale("--reward", "imagereward", "--reward-path", "/nowhere/at/all")
    assert result.code == 1
    assert "/nowhere/at/all" in result.err
    assert not list(scale.folder.glob("0*"))


def test_extra_fields_do_not_decide(scale: Scale) -> None:
    write_prompts(scale.prompts, [PROMPTS[0] | {"seed": 3, "n_samples": 99}])
    assert scale().code == 0
    assert record(scale.folder)["n_samples"] == 2
    assert record(scale.folder)["seed"] == 3
    assert record(scale.folder)["prompt_fields"] == {"n_samples": 99}  # not lost


@pytest.mark.parametrize(
    "option",
    [
        ["--solver", "heun"],
        ["--guidance-level", 3],
        ["--guidance-level", 3, "--guidance-interval", 0.5, 1],
        ["--steps", 3],
        ["--dtype", "bfloat16"],
        ["--prompt-prefix", "Please draw "],
    ],
    ids=str,
)
def test_options_reach_the_workers(scale: Scale, reference: dict[str, bytes], option: list[object]) -> None:
    result = scale("--limit", 1, *option)
    assert result.code == 0, result.err
    name = "00000/samples/00000.png"
    assert snapshot(scale.folder)[name] != reference[name]
    with (
        Image.open(io.BytesIO(snapshot(scale.folder)[name])) as drawn,
        Image.open(io.BytesIO(reference[name])) as plain,
    ):
        assert np.asarray(drawn).tolist() != np.asarray(plain).tolist()


def test_a_question_that_the_model_cannot_read_is_refused_before_drawing(scale: Scale, tmp_path: Path) -> None:
    template = tmp_path / "long.txt"
    template.write_text("word " * 1200)
    result = scale("--limit", 1, "--post-qa-template-path", template)
    assert result.code == 1
    assert "the question is" in result.err
    assert "the model reads at most 1024" in result.err
    assert len(result.err) < 1500  # the template is not repeated whole
    assert not list(scale.out.rglob("*.png"))


def test_latents_on_disk_are_deterministic(tmp_path: Path) -> None:
    from scale_rae.outputs import latent_bytes

    a, b = (hashlib.sha256(latent_bytes(torch.ones(3, 4))).hexdigest() for _ in range(2))
    assert a == b
