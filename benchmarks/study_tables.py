"""Tables and plots of scaling_study.py and study_search.py, from the figures that study_analysis.py and study_search.py compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench import table_head, table_row
from benchmarks.study_analysis import JUDGE, MODES


def markdown(figures: dict[str, Any]) -> str:
    """The figures as tables."""
    settings, rounds = figures["study"]["settings"], figures["rounds"]
    names = list(rounds)
    last, reward = names[-1], next(iter(_rewards(figures)))
    lines = [
        "# The scaling study",
        "",
        f"{figures['prompts']} held-out prompts, {figures['images']} images; guidance {settings['guidance_level']:g}, "
        f"{settings['solver']} {settings['steps']} steps, {settings['dtype']}, seed {settings['seed']}; "
        f"{figures['study']['device']}. Brackets: 95 % intervals, bootstrap over prompts."
        + (f" {figures['failed']} prompts failed and count as wrong." if figures["failed"] else ""),
        "",
        "Prompts by how many of their images are correct: "
        + ", ".join(f"{name} {count}" for name, count in figures["prompts_by_correct"].items())
        + ". No choice can do better than the judge itself, which keeps correct images as long as there are any.",
        "",
        f"Share of correct images among all drawn, and among the {settings['n_samples']} kept:",
        "",
        *table_head("", names),
        table_row("all drawn", [_text(rounds[n]["drawn"]) for n in names]),
    ]
    labels = list(rounds[last]["chosen"])
    lines += [table_row(label, [_text(rounds[n]["chosen"][label]["kept"]) for n in names]) for label in labels]
    lines += [
        "",
        "Share of errors removed:",
        "",
        *table_head("", names[1:]),
    ]
    lines += [table_row(x, [_text(rounds[n]["chosen"][x]["errors_removed"]) for n in names[1:]]) for x in labels]
    lines += ["", "Share of prompts whose first-ranked image is correct:", "", *table_head("", names)]
    lines += [table_row(x, [_text(rounds[n]["chosen"][x]["first"]) for n in names]) for x in labels]
    combined = f"combined, {reward}"
    kinds = list(rounds[last]["drawn"]["kinds"])
    lines += [
        "",
        f"By kind of prompt, all drawn and kept by {combined}:",
        "",
        *table_head("", ["all drawn", *names[1:]]),
    ]
    for kind in kinds:
        cells = [rounds[last]["drawn"]["kinds"][kind]]
        cells += [rounds[n]["chosen"][combined]["kinds"][kind] for n in names[1:]]
        lines.append(table_row(kind, [f"{value:.3f}" for value in cells]))
    lines += [
        "",
        "How often the model says yes to images that the judge finds right, and to images that it finds wrong:",
        "",
    ]
    lines += table_head("", [f"{what} ({mode})" for mode in MODES for what in ("yes to right", "yes to wrong")])
    for kind in (*kinds, "overall"):
        cells = []
        for mode in MODES:
            count = figures["answers"][mode][kind]
            cells += [_share(count["yes_to_right"], count["right"]), _share(count["yes_to_wrong"], count["wrong"])]
        lines.append(table_row(kind, [str(cell) for cell in cells]))
    lines += ["", *_seconds_table(figures)]
    return "\n".join(lines) + "\n"


def summary(figures: dict[str, Any], links: str = "") -> str:
    """A short table for a page on scaling: the share kept, with errors removed in brackets."""
    rounds = figures["rounds"]
    names = list(rounds)
    settings = figures["study"]["settings"]
    rows = [f"combined, {reward}" for reward in _rewards(figures)] + ["answer_conf", "answer_logits"]
    rows += [f"image_reward, {reward}" for reward in _rewards(figures)]
    rows += [f"combined, {reward}, image mode" for reward in _rewards(figures)] + [JUDGE]
    lines = [
        f"{figures['prompts']} held-out prompts, guidance {settings['guidance_level']:g}, {settings['solver']} "
        f"{settings['steps']} steps, {figures['study']['device']}: share of correct images among the "
        f"{settings['n_samples']} kept, and in brackets share of errors removed (95 % intervals of the shares kept: "
        f"± {_widest([rounds[n]['chosen'][row]['kept'] for n in names for row in rows]):.3f} or less).",
        "",
        *table_head("kept by", names),
        table_row("nobody (all drawn)", [f"{rounds[n]['drawn']['value']:.3f}" for n in names]),
    ]
    for row in rows:
        cells = []
        for n in names:
            kept, removed = (rounds[n]["chosen"][row][field]["value"] for field in ("kept", "errors_removed"))
            cells.append(f"{kept:.3f}" + (f" ({removed:.2f})" if removed is not None and n != names[0] else ""))
        lines.append(table_row(row, cells))
    return "\n".join([*lines, *(["", links] if links else [])]) + "\n"


def _widest(values: Sequence[dict[str, Any]]) -> float:
    return max(float(max(v["high"] - v["value"], v["value"] - v["low"])) for v in values)


def _seconds_table(figures: dict[str, Any]) -> list[str]:
    stages, rounds = figures["seconds"], list(figures["rounds"])
    if "total" not in stages:
        return ["Seconds were not recorded: every prompt was drawn in more than one go."]
    settings = figures["study"]["settings"]
    whole = settings["scaling_rounds"]
    once = stages["reply"]
    each = stages["total"] - once
    workers = figures["study"]["workers"]
    lines = [
        f"Seconds per prompt ({workers} worker{'s' if workers > 1 else ''}; measured with {whole} rounds, fewer in proportion):",
        "",
        *table_head("", rounds),
    ]
    for name, more in (("latent mode", 0.0), ("image mode", stages["encoding"])):
        cells = [f"{once + (each + more) * int(n.split('x')[1]) / whole:.2f}" for n in rounds]
        lines.append(table_row(name, cells))
    return lines


def _rewards(figures: dict[str, Any]) -> list[str]:
    labels = next(iter(figures["rounds"].values()))["chosen"]
    return [x.split(", ")[1] for x in labels if x.startswith("image_reward, ")]


def _text(value: dict[str, Any], digits: int = 3) -> str:
    if value["value"] is None:
        return "–"
    return f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.3f} ({part}/{whole})" if whole else "–"


def plot(figures: dict[str, Any], path: Path) -> None:
    """Left: share of correct images against images drawn, by metric. Right: errors removed by combined."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rounds = figures["rounds"]
    x = [int(n.split("x")[0]) * int(n.split("x")[1]) for n in rounds]
    kept, removed = plt.subplots(1, 2, figsize=(10.5, 4.4), dpi=150)[1]
    names = [f"{n.split('x')[0]}×{n.split('x')[1]}" for n in rounds]

    def line(axes: Any, label: str, field: str, band: bool, **style: Any) -> None:
        values = [rounds[n]["chosen"][label][field] for n in rounds]
        if any(v["value"] is None for v in values):
            return
        (drawn,) = axes.plot(x, [v["value"] for v in values], marker="o", markersize=4, label=label, **style)
        if band:
            axes.fill_between(
                x, [v["low"] for v in values], [v["high"] for v in values], color=drawn.get_color(), alpha=0.15
            )

    labels = [x for x in next(iter(rounds.values()))["chosen"] if x != JUDGE]
    for label in labels:
        if not label.endswith("image mode"):
            line(kept, label, "kept", label.startswith("combined"), linewidth=2 if label.startswith("combined") else 1)
        if label.startswith("combined"):
            line(removed, label, "errors_removed", True)
    for axes, field in ((kept, "kept"), (removed, "errors_removed")):
        line(axes, JUDGE, field, False, color="black", linestyle=":")
    kept.plot(x, [rounds[n]["drawn"]["value"] for n in rounds], color="black", linestyle="--", label="all drawn")
    kept.set_ylabel(f"correct among the {figures['study']['settings']['n_samples']} kept")
    removed.set_ylabel("share of errors removed")
    for axes in (kept, removed):
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, names)
        axes.minorticks_off()
        axes.set_xlabel("images drawn per prompt")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    kept.figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    kept.figure.savefig(path)


def search_markdown(figures: dict[str, Any]) -> str:
    """The figures of study_search.py as tables."""
    lines = [
        "# Policies of search",
        "",
        "Made by `benchmarks/study_search.py` from records that `benchmarks/study_records.py` made ([the commands](../scaling.md#does-it-help)). "
        "Right: share of right images among the kept, by the judge. Evaluations: of the network, per prompt, with early looks at "
        "their cost. Begun: candidates begun per prompt. Short: share of prompts with fewer accepted images than are kept. "
        "Brackets: 95 % intervals, bootstrap over prompts.",
    ]
    for study in figures["studies"]:
        lines += ["", f"## Guidance {study['study']['guidance']:g}", "", _recorded(study)]
        every = {name: row for some in study["families"].values() for name, row in some.items()}
        timed = any("seconds" in row for row in every.values())
        for keep in sorted({row["keep"] for row in every.values()}, reverse=True):
            heads = ["right", "first right", "evaluations", "begun", "short", *(["seconds"] if timed else [])]
            lines += ["", f"{keep} {'images are' if keep > 1 else 'image is'} kept:", "", *table_head("", heads)]
            for name, row in every.items():
                if row["keep"] == keep:
                    cells = [_text(row["right"]), _text(row["first"])]
                    cells += [_text(row[x], 1) if x in row else "" for x in ("evaluations", "begun")]
                    cells += [_text(row["short"]) if "short" in row else ""]
                    cells += [_text(row["seconds"], 2)] if timed else []
                    lines.append(table_row(name, cells))
        chosen = ["best 4 of 4, combined", "best 4 of 8, combined", "best 4 of 32, combined", "adaptive"]
        lines += [
            "",
            "Right by kind of prompt, in brackets the evaluations of the adaptive search:",
            "",
            *table_head("", chosen),
        ]
        for kind in every["adaptive"]["kinds"]:
            found = [every[name]["kinds"][kind] for name in chosen]
            cells = [f"{value['right']:.3f}" for value in found]
            cells[-1] += f" ({found[-1]['evaluations']:.0f})"
            lines.append(table_row(kind, cells))
    if figures["tuning"]:
        lines += _tuning_tables(figures)
    return "\n".join(lines) + "\n"


def _recorded(study: dict[str, Any]) -> str:
    record = study["study"]
    which = {"only": "held-out prompts", "exclude": "prompts of training"}[record["held_out"]]
    return (
        f"{study['prompts']} {which}, {record['candidates']} candidates each, seed {record['seed']}, {record['solver']} with "
        f"{record['steps']} evaluations, {record['dtype'] or 'float32'}, reward {record['reward']}. A look costs "
        f"{study['costs']['look']:g} evaluations, without reward {study['costs']['look without reward']:g}.{_timed(study)}"
    )


def _timed(study: dict[str, Any]) -> str:
    """Where seconds come from, for a text after a full stop; empty when there are none."""
    if "seconds" not in study["costs"]:
        return ""
    evaluation, look = study["costs"]["seconds"]
    where = study["costs"]["measured on"]
    return f" Seconds: {evaluation:g} per evaluation and {look:g} per look or reading of an image, on {where}."


def _tuning_tables(figures: dict[str, Any]) -> list[str]:
    rule = figures["tuning"][0]["study"]["rule"]
    lines = [
        "",
        "## Thresholds",
        "",
        "A candidate is dropped early when its standing is below the first threshold, and accepted at the end when its standing is at "
        "least the second. The standing is the combined score among the prompt's candidates so far, in standard deviations. Bold: "
        "the defaults. They were chosen on the records of this section, which have other seeds than the figures above. Cells: "
        "right, first right @ evaluations.",
    ]
    for study in figures["tuning"]:
        at = {(row["drop_below"], row["accept_from"]): row for row in study["rows"]}
        default = (rule["drop_below"], rule["accept_from"])
        drops, accepts = (sorted({key[i] for key in at}) for i in (0, 1))
        lines += ["", f"### Guidance {study['study']['guidance']:g}", "", _recorded(study), ""]
        lines += table_head("dropped below ↓, accepted from →", [_signed(x) for x in accepts])
        for drop in drops:
            cells = [_tuned(at.get((drop, a)), (drop, a) == default) for a in accepts]
            lines.append(table_row(_signed(drop), cells))
    return lines


def _tuned(row: dict[str, Any] | None, default: bool) -> str:
    if row is None:
        return ""
    bold = "**" if default else ""
    shares = f"{row['right']['value']:.3f}, {row['first']['value']:.3f}"
    return f"{bold}{shares} @ {row['evaluations']['value']:.0f}{bold}"


def _signed(value: float) -> str:
    return f"{value:g}".replace("-", "−")


SUMMARY = (  # policies on the page about scaling, and what they are called there
    ("best 4 of 4, combined", "4 × 1: 4 drawn, 4 kept"),
    ("best 4 of 8, combined", "4 × 2 (`--scaling-rounds 2`, the default)"),
    ("best 4 of 12, combined", "4 × 3"),
    ("best 4 of 32, combined", "4 × 8"),
    ("adaptive", "`--search adaptive`"),
    ("adaptive, --accept-reward 0", "`--search adaptive --accept-reward 0`"),
    ("adaptive, --reward none", "`--search adaptive --reward none`"),
    (f"best 4 of 32, {JUDGE}", "the judge itself, of 32"),
    ("one accepted", "`--until-accepted 1`"),
    ("one accepted, --accept-reward -1", "`--until-accepted 1 --accept-reward -1`"),
)


def search_summary(figures: dict[str, Any], links: str = "") -> str:
    """A short table of both ways for a page on scaling."""
    studies = figures["studies"]
    every = [{name: row for some in s["families"].values() for name, row in some.items()} for s in studies]
    guidances = [f"guidance {s['study']['guidance']:g}" for s in studies]
    widest = [_widest([rows[name][x] for name, _ in SUMMARY for x in ("right", "first")]) for rows in every]
    lines = [
        f"{studies[0]['prompts']} held-out prompts, {studies[0]['study']['solver']} with {studies[0]['study']['steps']} "
        "evaluations, siglip: share of right images among the kept, share of prompts whose first-ranked image is right, "
        f"evaluations per prompt (95 % intervals of the shares: ± {max(widest):.3f} or less).",
        "",
        *table_head("", [f"{what}, {g}" for g in guidances for what in ("right", "first right", "evaluations")]),
    ]
    for name, label in SUMMARY:
        cells = []
        for rows in every:
            row = rows[name]
            cells += [f"{row[x]['value']:.3f}" for x in ("right", "first")] + [f"{row['evaluations']['value']:.0f}"]
        lines.append(table_row(label, cells))
    return "\n".join([*lines, *(["", links] if links else [])]) + "\n"


def search_plot(figures: dict[str, Any], path: Path) -> None:
    """Share of right images among the kept against evaluations, and against seconds if they are known; a panel per guidance."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    studies = figures["studies"]
    timed = "seconds" in studies[0]["families"]["adaptive"]["adaptive"]
    costs = ["evaluations", *(["seconds"] if timed else [])]
    size = (6.2 * len(studies), 4.6 * len(costs) + 0.8)
    grid = plt.subplots(len(costs), len(studies), figsize=size, dpi=150, squeeze=False)[1]
    families = list(studies[0]["families"])
    colours = dict(zip(families, plt.get_cmap("tab20")(np.linspace(0, 1, len(families))), strict=True))
    for row, cost in zip(grid, costs, strict=True):
        for axes, study in zip(row, studies, strict=True):
            for family, some in study["families"].items():
                points = list(some.values())
                x, y = ([p[field]["value"] for p in points] for field in (cost, "right"))
                bars = [[p["right"]["value"] - p["right"]["low"] for p in points]]
                bars.append([p["right"]["high"] - p["right"]["value"] for p in points])
                adaptive, line = family == "adaptive", "best of n" in family
                axes.errorbar(
                    *(x, y, bars),
                    color="black" if adaptive else colours[family],
                    marker="*" if adaptive else "o" if line else "s",
                    markersize=11 if adaptive else 4,
                    linestyle="-" if line else "none",
                    elinewidth=0.8,
                    linewidth=1,
                    zorder=3 if adaptive else 2,
                    label=family,
                )
            axes.set_xscale("log", base=2)
            if cost == "evaluations":
                whole = [study["study"]["steps"] * n for n in (1, 2, 4, 8, 16, 32)]
                axes.set_xticks(whole, [str(n) for n in whole])
            where = f" on {study['costs']['measured on']}" if cost == "seconds" else ""
            axes.set_xlabel(f"{cost} per prompt{where}")
            axes.set_title(f"guidance {study['study']['guidance']:g}")
            axes.grid(alpha=0.3, which="both")
        row[0].set_ylabel("right among the kept")
    grid[0][-1].legend(fontsize=7, loc="lower right")
    figure = grid[0][0].figure
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
