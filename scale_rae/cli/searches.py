"""What `t2i --until-accepted` does: search every prompt, save what was kept, say what became of the candidates."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scale_rae.acceptance import ACCEPTED, DROPPED, REJECTED, Candidate
from scale_rae.cli.app import say
from scale_rae.cli.options import OutputOptions, PostQA, UntilAccepted
from scale_rae.cli.progress import Bars
from scale_rae.cli.runs import ModelInput, Outcome, RunWriter, ask_about, check_lengths, outcome_of
from scale_rae.errors import InputError, counted
from scale_rae.manifest import drawing_manifest, png_text
from scale_rae.options import Sampling, to_record
from scale_rae.outputs import Sample
from scale_rae.prompt import QUESTION
from scale_rae.scaling.experiment import candidate_record
from scale_rae.wording import subject

if TYPE_CHECKING:
    from scale_rae.hub import Source
    from scale_rae.opening import OpenedModel
    from scale_rae.pipeline import ScaleRAE
    from scale_rae.results import SearchResult


def check_search(source: Source, sampling: Sampling, until: UntilAccepted) -> None:
    """Raises OptionError for looks that are not on the sampler's way: before the model's weights are read."""
    from scale_rae.adaptive import check_looks
    from scale_rae.config import load_config

    check_looks(until.search, sampling.options, load_config(source.config_folder))


def search_and_save(
    opened: OpenedModel,
    mode: dict[str, Any],
    inputs: Sequence[ModelInput],
    sampling: Sampling,
    until: UntilAccepted,
    output: OutputOptions,
    bars: Bars,
    post_qa: PostQA,
) -> list[Outcome]:
    """Searches each prompt until images are accepted; each result is saved and printed in turn, as `runs.send` does.

    The model is asked about each candidate what the template of `post_qa` says, QUESTION if it has none.

    Raises:
        InputError: before anything is drawn, for inputs longer than the model reads.
    """
    from scale_rae.prompt_search import Sought, chosen_reward, prompts_at_once, search_each

    assert until.keep is not None
    model = opened.model
    model.check_reads()
    check_lengths(model, inputs)
    question = post_qa.template or QUESTION
    about = [post_qa.prompt if post_qa.template and post_qa.prompt else subject(item.prompt) for item in inputs]
    _check_questions(model, inputs, about, question)
    reward = chosen_reward(model, until.reward, None if until.reward_path is None else str(until.reward_path))
    batch_size = sampling.batch_size or model.batch_size
    asked = {
        "until_accepted": until.keep,
        **{name: value for name, value in to_record(until.search).items() if name != "save_dropped"},
        "reward": None if reward is None else reward.identity(),
        "question": question,
        "post_qa_mode": post_qa.mode,
        "max_new_tokens_qa": post_qa.max_new_tokens,
    }
    found = search_each(
        model,
        [Sought(item.prompt, text, item.index) for item, text in zip(inputs, about, strict=True)],
        reward,
        keep=until.keep,
        search=until.search,
        options=sampling.options,
        seed=sampling.seeds[0],
        question=question,
        post_qa_mode=post_qa.mode,
        max_new_tokens=sampling.max_new_tokens,
        max_new_tokens_qa=post_qa.max_new_tokens,
        batch_size=batch_size,
        watch=bars.watch,
    )
    bars.search(until.keep * len(inputs))
    together = min(len(inputs), prompts_at_once(batch_size, until.keep))
    outcomes = []
    with RunWriter(output, model.device.type == "cpu", bars, len(inputs)) as writer:
        try:
            for item, result in zip(inputs, found, strict=True):
                bars.stop()
                seconds = {name: round(value, 3) for name, value in result.seconds.items()}
                answers: list[dict[str, str]] | None = None
                if post_qa.asked:
                    start = time.perf_counter()
                    pictures = [[image.image for image in result.images]]
                    answers = ask_about(model, [result.prompt], [result], pictures, post_qa, batch_size)[0]
                    seconds["post_qa"] = round(time.perf_counter() - start, 3)
                manifest = drawing_manifest(
                    mode,
                    item.prompt,
                    item.recorded,
                    opened.record(),
                    sampling,
                    [image.seed for image in result.images],
                    batch_size,
                    together,
                    result.text,
                    opened.seconds | seconds,
                )
                manifest["search"] = asked | _search_record(result, until.keep)
                if answers is not None:
                    manifest["post_qa"] = post_qa.record(answers)
                writer.save(manifest, _samples(result, manifest, output), item.label)
                _say_what_became(result, until.keep, bars, alone=len(inputs) == 1)
                outcomes.append(outcome_of(model, result, sampling))
        finally:
            bars.stop()
    return outcomes


def _check_questions(model: ScaleRAE, inputs: Sequence[ModelInput], about: Sequence[str], question: str) -> None:
    """Raises InputError, with their places in the file, for prompts that cannot be asked about."""
    problems = []
    for item, text in zip(inputs, about, strict=True):
        try:
            model.check_question(text, question)
        except InputError as e:
            problems.append(f"{item.where}: {e}" if item.where else str(e))
    if problems:
        raise InputError("; ".join(problems))


def _search_record(result: SearchResult, keep: int) -> dict[str, Any]:
    """What a manifest says of a search's result; `image` is a kept candidate's place among the images."""
    places = {image.candidate: place for place, image in enumerate(result.images)}
    return {
        "about": result.prompt,
        "accepted": result.accepted,
        "filled_up": bool(result.images) and result.accepted < keep,
        "evaluations": result.evaluations,
        "candidates": [
            candidate_record(c, places.get(c.number))
            | {"final": None if c.final is None else {"reward": c.final.reward, **c.final.judgement}}
            for c in result.candidates
        ],
    }


def _samples(result: SearchResult, manifest: dict[str, Any], output: OutputOptions) -> list[Sample]:
    """The kept images, best first, then the half-formed pictures of dropped candidates if they are to be saved."""
    kept = [
        Sample(
            output.enlarged(image.image),
            image.latent if output.save_latent else None,
            png_text(manifest, image.seed),
            seed=image.seed,
        )
        for image in result.images
    ]
    seeds = {c.number: c.seed for c in result.candidates}
    dropped = [
        Sample(
            output.enlarged(picture), None, png_text(manifest, seeds[number]), f"_dropped_{number:05}", seeds[number]
        )
        for number, picture in sorted(result.dropped.items())
    ]
    return kept + dropped


def _say_what_became(result: SearchResult, keep: int, bars: Bars, alone: bool) -> None:
    """Prints on stderr how a search went; for a prompt that is `alone`, also why each candidate was not accepted."""
    if not result.candidates:
        return  # the reply asks for no image
    fates = Counter(c.fate for c in result.candidates)
    counts = ", ".join(
        f"{fates[fate]} {fate}{_reasons(result.candidates, fate)}" for fate in (ACCEPTED, DROPPED, REJECTED)
    )
    begun, evaluations = counted(len(result.candidates), "candidate"), counted(result.evaluations, "evaluation", "g")
    bars.note(f"{result.prompt}: {begun} begun, {counts}; {evaluations}")
    if alone:
        for candidate in result.candidates:
            if candidate.reason is not None:
                bars.note(
                    f"  candidate {candidate.number} (seed {candidate.seed}) {candidate.fate}: {candidate.reason}"
                )
    if result.accepted < keep:
        finished = sum(c.final is not None for c in result.candidates)
        only = f"only {result.accepted} of {counted(keep, 'image')}"
        accepted = f"{only} accepted" if result.accepted else "no candidate was accepted"
        others = "the best image is" if keep == 1 else f"the best {keep - result.accepted} of the rest are"
        say(
            f"warning: {result.prompt}: {accepted}; {others} kept, of {finished} that were drawn to the end; "
            "a larger --max-candidates or a lower --accept-reward may find more"
        )


def _reasons(candidates: Sequence[Candidate], fate: str) -> str:
    """Why candidates have a fate, in brackets: reasons without their numbers, and how many candidates have each."""
    counted = Counter(
        reason if reason.startswith("the model says") else "the score is too low"
        for reason in (c.reason.partition(" at t = ")[0] for c in candidates if c.fate == fate and c.reason is not None)
    )
    return f" ({', '.join(f'{reason}: {count}' for reason, count in counted.most_common())})" if counted else ""
