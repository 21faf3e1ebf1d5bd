"""Tables and plot of scaling_study.py, from the figures that study_analysis.py computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench import table_head, table_row
from benchmarks.study_analysis import JUDGE, MODES, Estimate


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


def _text(value: dict[str, Any]) -> str:
    return str(Estimate(value["value"], value["low"], value["high"]))


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
