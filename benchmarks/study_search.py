"""What each policy of search would have kept, and at which cost, replayed from records: JSON, tables, plot. Nothing is drawn.

    python benchmarks/study_search.py --records runs/g1/records.jsonl runs/g4/records.jsonl --tune runs/s1/records.jsonl
      runs/s4/records.jsonl --json docs/figures/search.json --markdown docs/figures/search.md --plot docs/figures/search.png
      --into docs/scaling.md

study_records.py makes the records. Policies are best-of-n by several metrics, and adaptive searches; both follow the
package's own rules (ranking.py, acceptance.py). Thresholds are compared on the files of --tune only.

Costs are evaluations of the network for one image, with both branches of guidance as one. An early look counts as many
evaluations as it has floating-point operations (`adaptive.look_cost`). With --seconds, which study_seconds.py measures, costs
are also in seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks.bench import write_between_marks, write_json
from benchmarks.study_analysis import JUDGE, WORDS, Bootstrap, read_lines
from benchmarks.study_tables import search_markdown, search_plot, search_summary
from scale_rae import acceptance
from scale_rae.acceptance import DEFAULT_THRESHOLDS, Candidate, Look, Rules, Thresholds
from scale_rae.errors import InputError, ScaleRAEError
from scale_rae.options import SamplingOptions, SearchOptions
from scale_rae.ranking import Verdicts, rank

KEEP = 4
LOOK = (0.84,)  # the times of the bundled model's usual looks
COUNTS = (4, 8, 12, 16, 32)  # images of best-of-n
METRICS = ("combined", "combined_v1", "image_reward", "prompt_conf")
DROPS = (-0.55, -0.4, -0.25, -0.1, 0.05)  # standings tried for the tuning
ACCEPTS = (-0.65, -0.5, -0.35, -0.2, -0.05)
NEEDED = ("yes_conf_score", "prompt_conf_score")  # of the metrics that are replayed


@dataclass(frozen=True)
class Prompt:
    """A prompt's records: whether each candidate's final picture is right, and the looks at it by evaluation."""

    kind: str
    right: list[bool]
    times: list[float]  # of the evaluations
    stages: dict[int, list[Look]]  # the last is of the finished images

    def early(self, t: float) -> int:
        """The evaluation nearest to t.

        Raises:
            InputError: when there is no record of it.
        """
        evaluation = 1 + int(np.argmin([abs(time - t) for time in self.times]))
        if evaluation not in self.stages:
            raise InputError(f"no record of evaluation {evaluation} (t = {t:.2f}); study_records.py --evaluations")
        return evaluation


@dataclass(frozen=True)
class BestOf:
    """Draws `count` images to the end and keeps the best by a metric; None: the judge chooses."""

    metric: str | None
    count: int
    keep: int = KEEP


@dataclass(frozen=True)
class Adaptive:
    """An adaptive search; `reward` is the name of the records' reward, or None to do without; `looks` False drops nothing early."""

    keep: int = KEEP
    options: SearchOptions = field(default_factory=lambda: SearchOptions(check_at=LOOK))
    thresholds: Thresholds = DEFAULT_THRESHOLDS
    reward: str | None = "siglip"
    looks: bool = True

    @property
    def rules(self) -> Rules:
        """What such a search goes by."""
        return Rules(self.keep, self.options, self.reward, self.thresholds)


@dataclass(frozen=True)
class Outcome:
    """What a policy kept of one prompt, and what it did for that."""

    right: float  # share of the kept
    first: bool  # whether the first-ranked is right
    network: int  # evaluations
    looks: int  # early ones
    finished: int
    begun: int
    short: bool = False  # whether fewer than enough were accepted


def read_records(path: Path) -> tuple[dict[str, Any], list[Prompt]]:
    """A file's description and its prompts.

    Raises:
        InputError: when there is no such file or it holds no records.
    """
    first, *lines = read_lines(path) or [{}]
    if "study" not in first or not lines:
        raise InputError(f"{path}: holds no records; study_records.py makes them")
    return first["study"], [_prompt(line) for line in lines]


def _prompt(line: dict[str, Any]) -> Prompt:
    end = len(line["times"])
    stages = {}
    for name, stage in line["stages"].items():
        t = None if int(name) == end else line["times"][int(name) - 1]
        stages[int(name)] = [
            Look(t, {"answer": WORDS[answer]} | {x: stage[x][i] for x in NEEDED}, stage["reward"][i])
            for i, answer in enumerate(stage["answer"])
        ]
    return Prompt(line["tag"], [mark == "1" for mark in line["correct"]], line["times"], stages)


def replay(prompt: Prompt, policy: BestOf | Adaptive) -> Outcome:
    """What a policy would have kept of a prompt's candidates.

    Raises:
        InputError: when the records lack what the policy looks at.
    """
    if isinstance(policy, BestOf):
        finals = prompt.stages[len(prompt.times)][: policy.count]
        best = sorted(range(policy.count), key=lambda i: not prompt.right[i])
        if policy.metric is not None:
            verdicts = Verdicts.made([look.judgement for look in finals], [look.reward or 0.0 for look in finals])
            best = rank(verdicts, policy.metric).order
        kept, first = best[: policy.keep], best[0]
        share = float(np.mean([prompt.right[i] for i in kept]))
        network = policy.count * len(prompt.times)
        return Outcome(share, prompt.right[first], network, 0, policy.count, policy.count)
    candidates = searched(prompt, policy)
    kept = acceptance.kept(candidates, policy.rules)
    accepted = sum(c.fate == acceptance.ACCEPTED for c in candidates)
    return Outcome(
        float(np.mean([prompt.right[i] for i in kept])),
        prompt.right[kept[0]],
        int(sum(c.evaluations for c in candidates)),
        sum(len(c.looks) for c in candidates),
        sum(c.final is not None for c in candidates),
        len(candidates),
        accepted < policy.keep,
    )


def searched(prompt: Prompt, policy: Adaptive) -> list[Candidate]:
    """The candidates of an adaptive search and what became of them; their `evaluations` are without looks."""
    end = len(prompt.times)
    stops = [prompt.early(t) for t in policy.options.check_at] if policy.looks else []

    def look(stop: int, number: int) -> Look:
        seen = prompt.stages[stop][number]
        return seen if policy.reward else dataclasses.replace(seen, reward=None)

    candidates: list[Candidate] = []
    while numbers := acceptance.next_wave(candidates, policy.rules):
        if numbers[-1] >= len(prompt.right):
            raise InputError(f"the records have {len(prompt.right)} candidates per prompt, which are too few")
        revived = [candidates[number] for number in numbers if number < len(candidates)]
        for candidate in revived:
            candidate.revive()
        wave = revived or [Candidate(number, number) for number in numbers]
        for stop in stops if not revived else ():
            for candidate in wave:
                if not candidate.fate:
                    candidate.looks.append(look(stop, candidate.number))
                    candidate.evaluations = stop
            acceptance.drop(candidates, wave, policy.rules)
        for candidate in wave:
            if not candidate.fate:
                candidate.final = look(end, candidate.number)
                candidate.evaluations = end + (candidate.evaluations if revived else 0)
        acceptance.accept(candidates, wave, policy.rules)
        candidates = acceptance.with_wave(candidates, wave)
    return candidates


def policies(prompt: Prompt) -> dict[str, dict[str, BestOf | Adaptive]]:
    """Every policy that is reported, by family and name. A family is a line or colour of the plot."""
    early = sorted(prompt.stages)[:-1]
    times = {stop: prompt.times[stop - 1] for stop in early}
    standard = prompt.early(LOOK[0])
    found: dict[str, dict[str, BestOf | Adaptive]] = {}
    for metric in (*METRICS, None):
        family = f"best of n, {metric or JUDGE}"
        found[family] = {f"best {KEEP} of {n}, {metric or JUDGE}": BestOf(metric, n) for n in COUNTS}
    found["adaptive"] = {"adaptive": Adaptive()}
    found["adaptive, other times"] = {
        "adaptive, no early look": Adaptive(looks=False),
        **{
            f"adaptive, --check-at {times[stop]:.2f} (evaluation {stop})": Adaptive(
                options=SearchOptions(check_at=(times[stop],))
            )
            for stop in early
            if stop != standard
        },
    }
    later = [stop for stop in early if stop > standard]
    if later:
        t = times[later[-1]]
        both = SearchOptions(check_at=(times[standard], t))
        found["adaptive, other times"][f"adaptive, also --check-at {t:.2f} (evaluation {later[-1]})"] = Adaptive(
            options=both
        )
    found["adaptive, a threshold of the reward"] = {
        f"adaptive, --accept-reward {r}": Adaptive(options=SearchOptions(check_at=LOOK, accept_reward=float(r)))
        for r in (-4, -2, 0, 2)
    }
    found["adaptive, without reward"] = {"adaptive, --reward none": Adaptive(reward=None)}
    found["adaptive, at most 16"] = {
        "adaptive, --max-candidates 16": Adaptive(options=SearchOptions(check_at=LOOK, max_candidates=16)),
    }
    found["one image, adaptive"] = {
        "one accepted": Adaptive(1),
        **{
            f"one accepted, --accept-reward {r}": Adaptive(1, SearchOptions(check_at=LOOK, accept_reward=float(r)))
            for r in (-4, -2, -1, 0)
        },
        "one accepted, --reward none": Adaptive(1, reward=None),
    }
    ones = (1, 2, 4, 8)
    found["one image, best of n, combined"] = {f"best of {n}, combined": BestOf("combined", n, 1) for n in ones}
    return found


def measured(
    prompts: Sequence[Prompt], policy: BestOf | Adaptive, costs: dict[str, Any], bootstrap: Bootstrap
) -> dict[str, Any]:
    """A policy's figures, each with its interval."""
    outcomes = [replay(prompt, policy) for prompt in prompts]

    def share(values: Iterable[float]) -> dict[str, Any]:
        return dict(bootstrap.share(np.array([float(v) for v in values])).__dict__)

    cost = costs["look" if not isinstance(policy, Adaptive) or policy.reward else "look without reward"]
    kinds = dict.fromkeys(prompt.kind for prompt in prompts)
    figures = {
        "keep": policy.keep,
        "right": share(o.right for o in outcomes),
        "first": share(o.first for o in outcomes),
        "evaluations": share(o.network + cost * o.looks for o in outcomes),
        "begun": share(o.begun for o in outcomes),
        "kinds": {
            kind: {
                "right": float(np.mean([o.right for o, p in zip(outcomes, prompts, strict=True) if p.kind == kind])),
                "evaluations": float(
                    np.mean(
                        [o.network + cost * o.looks for o, p in zip(outcomes, prompts, strict=True) if p.kind == kind]
                    )
                ),
            }
            for kind in kinds
        },
    }
    if isinstance(policy, Adaptive):
        figures["short"] = share(o.short for o in outcomes)
    if seconds := costs.get("seconds"):
        evaluation, read = seconds
        figures["seconds"] = share(o.network * evaluation + (o.looks + o.finished) * read for o in outcomes)
    return figures


@functools.cache
def _look_cost(model_path: str, reward: str | None, guidance: float) -> float:
    """What a look costs, in evaluations."""
    import scale_rae
    from scale_rae.adaptive import look_cost
    from scale_rae.rewards import load_reward

    model = scale_rae.load(model_path, device="cpu")
    loaded = load_reward(reward, model) if reward is not None else None
    return look_cost(model, loaded, SamplingOptions(guidance=guidance), encodes=False)


def analyse(
    records: Sequence[Path],
    tune: Sequence[Path],
    seconds: Sequence[Sequence[float]] = (),
    measured_on: str | None = None,
) -> dict[str, Any]:
    """All figures: of every policy on `records`, and of the grid of thresholds on `tune`.

    `seconds` has, for each file of records, the seconds of an evaluation and of a look; `measured_on` says where they come from.

    Raises:
        InputError: when a file is missing or lacks what a policy needs, or `seconds` are not one pair per file, or it is not
            said where they were measured.
    """
    if bool(seconds) != bool(measured_on):
        raise InputError("--seconds and --measured-on go together: the figures say where the seconds were measured")
    if seconds and len(seconds) != len(records):
        raise InputError(f"--seconds is given {len(seconds)} times for {len(records)} files of --records")
    studies = []
    for i, path in enumerate(records):
        study, prompts, costs, bootstrap = _study(path)
        if seconds:
            costs |= {"seconds": list(seconds[i]), "measured on": measured_on}
        families = {
            family: {name: measured(prompts, policy, costs, bootstrap) for name, policy in some.items()}
            for family, some in policies(prompts[0]).items()
        }
        studies.append({"study": study, "prompts": len(prompts), "costs": costs, "families": families})
    tuning = []
    for path in tune:
        study, prompts, costs, bootstrap = _study(path)
        grid = [Thresholds(drop_below=d, accept_from=a) for d in DROPS for a in ACCEPTS]
        rows = [
            dataclasses.asdict(t) | measured(prompts, Adaptive(thresholds=t), costs, bootstrap)
            for t in dict.fromkeys([DEFAULT_THRESHOLDS, *grid])
        ]
        tuning.append({"study": study, "prompts": len(prompts), "costs": costs, "rows": rows})
    return {"studies": studies, "tuning": tuning}


def _study(path: Path) -> tuple[dict[str, Any], list[Prompt], dict[str, Any], Bootstrap]:
    """A file's description, prompts, costs and resamples."""
    study, prompts = read_records(path)
    shown = {name: value for name, value in study.items() if name not in ("out", "workers", "seconds")}
    about = study["model_path"], study["reward"], study["guidance"]
    costs: dict[str, Any] = {"look": _look_cost(*about), "look without reward": _look_cost(about[0], None, about[2])}
    return shown | {"rule": dataclasses.asdict(DEFAULT_THRESHOLDS)}, prompts, costs, Bootstrap(len(prompts))


def write(figures: dict[str, Any], args: argparse.Namespace) -> None:
    """Prints the tables and writes the files that the options name."""
    text = search_markdown(figures)
    print(text)
    write_json(args.json, figures)
    if args.markdown:
        args.markdown.write_text(text)
    if args.plot:
        search_plot(figures, args.plot)
    if args.into:
        folder = args.into.parent
        links = []
        if args.markdown:
            links = [f"[All policies, with intervals]({os.path.relpath(args.markdown, folder)})."]
        if args.plot:
            links.append(f"![Right images against evaluations]({os.path.relpath(args.plot, folder)})")
        write_between_marks(args.into, "search", search_summary(figures, "\n\n".join(links)))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which records there are."""
    parser.add_argument("--records", type=Path, nargs="+", default=[], help="records of study_records.py to report on")
    parser.add_argument("--tune", type=Path, nargs="*", default=[], help="records to compare thresholds on")
    parser.add_argument(
        "--seconds",
        type=float,
        nargs=2,
        action="append",
        default=[],
        metavar=("EVALUATION", "LOOK"),
        help="seconds per image of an evaluation and of a look, as study_seconds.py prints them; once for each file of --records",
    )
    parser.add_argument("--measured-on", help="where --seconds were measured, for tables and plot")


def main() -> None:
    """Analyses, prints, and writes the files that the options name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--plot", type=Path, help="draw the plot here")
    parser.add_argument("--into", type=Path, help="put a summary between this page's marks")
    args = parser.parse_args()
    if not args.records:
        parser.error("--records FILE is missing")
    try:
        write(analyse(args.records, args.tune, args.seconds, args.measured_on), args)
    except ScaleRAEError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
