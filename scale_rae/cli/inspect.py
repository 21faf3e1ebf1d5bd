"""The command `scale-rae inspect`: what a model is and what it needs, before it is downloaded."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from scale_rae.cli.app import aligned, show, show_json
from scale_rae.cli.options import Debug
from scale_rae.cli.progress import Bars
from scale_rae.cli.signature import expanded
from scale_rae.errors import ScaleRAEError
from scale_rae.inspection import Inspection, inspect
from scale_rae.options import DEFAULT_MODEL, MODEL, MODEL_HELP, Knob, check_device_name, memory_bytes

MEMORIES = ("4G", "6G", "8G", "12G", "16G", "24G", "80G")
_GIB, _GB = 1 << 30, 10**9
_Row = tuple[str, ...]


@expanded
def command(
    *,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default="what --model-path says")
    ] = None,
    model_path: Annotated[
        str, Knob("MODEL as a flag, so that a default of yours counts.", MODEL, aliases=("model",))
    ] = DEFAULT_MODEL,
    decoder_repo: Annotated[
        str | None,
        typer.Option(
            help="Pixel decoder: hub id or folder. Default: the one that matches the model.", rich_help_panel=MODEL
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a model on the hub.", rich_help_panel=MODEL)
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Estimate for cpu, cuda, cuda:N or mps. Default: the best there is.", rich_help_panel=MODEL),
    ] = None,
    memory: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE|auto",
            help=f"Estimate for this much memory; may be given several times. Default: {', '.join(MEMORIES)}, auto.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Say what a model is, what is missing, how much would be downloaded, and what it needs to run on this machine.

    Of a model on the hub, only config.json and the heads of its weight files are read. Exits 1 if something is missing or misnamed.
    """
    if model is None:
        model = model_path
    bars = Bars()
    try:
        check_device_name(device)
        requests = {text: memory_bytes(text) for text in memory or (*MEMORIES, "auto")}
        with bars.waiting("reading"):
            found = inspect(model, decoder_repo, revision)
        with bars.waiting("measuring the device"):
            estimates = _estimates(found, device, requests)
    except ScaleRAEError as e:
        if json:
            show_json({"model": model, "error": str(e)})
        raise
    if json:
        show_json({"model": model, **found.record(), **estimates})
    else:
        show(_text(model, found, estimates))
    if found.problems:
        raise typer.Exit(1)


def _estimates(found: Inspection, device_name: str | None, requests: dict[str, int | None]) -> dict[str, Any]:
    """What the device is, and what `--memory` would choose there for each request; for a CPU also what a GPU would need."""
    from scale_rae.footprint import Footprint, published_decoder
    from scale_rae.machine import describe, measure
    from scale_rae.memory import pick_device, pick_dtype
    from scale_rae.memory_plan import table

    device = pick_device(device_name)
    dtype = pick_dtype(None, device)
    machine = describe(device, dtype)
    rates = measure(device, dtype)
    name = str(dtype).removeprefix("torch.")
    limits = {text: machine.usable if size is None else size for text, size in requests.items()}
    decoder = found.decoder
    if decoder is None and found.config.vae is None:
        decoder = published_decoder(found.config.channels)
    footprint = Footprint(found.config, decoder, machine.kind, name, machine.kernels)
    result: dict[str, Any] = {
        "device": {
            "name": machine.name,
            "kind": machine.kind,
            "dtype": name,
            "memory_bytes": machine.total,
            "free_bytes": machine.free,
            "products_per_second": round(rates.products),
            "memory_bytes_per_second": round(rates.memory),
            "host_bytes_per_second": round(rates.bus),
        },
        "memory": table(footprint, limits, rates),
    }
    if machine.kind != "cuda":
        sizes = {text: size for text, size in requests.items() if size is not None}
        result["memory_on_cuda"] = table(Footprint(found.config, decoder), sizes, None)
    return result


# --- as text ---------------------------------------------------------------------------------------------------------


def _text(model: str, found: Inspection, estimates: dict[str, Any]) -> str:
    lines = [_title(model, found), ""]
    rows: list[_Row] = [("part", "parameters", "on disk", "dtype", "")]
    for part in found.parts:
        stored = _gb(part.bytes) if part.bytes else "?"
        rows.append((part.what, f"{part.parameters:,}", stored, ", ".join(part.dtypes) or "?", part.detail))
    rows.append(("all", f"{sum(part.parameters for part in found.parts):,}", "", "", ""))
    lines += [*aligned(rows, right=(1, 2)), ""]
    rows = [("files", "here", "to download", "licence", "")]
    for files in found.files:
        where = files.name + (f" at {files.commit[:12]}" if files.commit else "")
        rows.append((files.what, _gb(files.here), _gb(files.download), files.licence or "not stated", where))
    rows.append(("all", _gb(sum(f.here for f in found.files)), _gb(sum(f.download for f in found.files)), "", ""))
    lines += [*aligned(rows, right=(1, 2)), ""]
    lines.append(f"tokenizer: {found.tokenizer or 'none'}")
    lines += [f"note: {note}" for note in found.notes]
    lines += [f"problem: {problem}" for problem in found.problems] or [
        "every tensor is there, with the name and shape it should have"
    ]
    device = estimates["device"]
    lines += ["", f"on {device['name']} ({device['memory_bytes'] / _GIB:.1f} GiB), {device['dtype']}; estimates:"]
    lines += _memory_rows(estimates["memory"], seconds=True)
    if "memory_on_cuda" in estimates:
        lines += ["", "on a CUDA GPU, bfloat16; estimates:", *_memory_rows(estimates["memory_on_cuda"], seconds=False)]
    return "\n".join(lines)


def _title(model: str, found: Inspection) -> str:
    files = found.files[0]
    commit = f", commit {files.commit[:12]}" if files.commit else ""
    return f"{model}: Scale-RAE{commit}, licence {files.licence or 'not stated'}"


def _memory_rows(table: list[dict[str, Any]], seconds: bool) -> list[str]:
    head: _Row = ("memory", "peak", "images at once", *(("one image", "per image of many") if seconds else ()), "flags")
    rows = [head]
    for row in table:
        name = row["memory"] + (f" ({row['bytes'] / _GIB:.1f})" if row["memory"] == "auto" else "")
        if "problem" in row:
            text = row["problem"].partition(": ")[2]
            rows.append((name, "", "", *(("", "") if seconds else ()), text))
            continue
        flags = [f"--quantize {row['quantize']}"] if row["quantize"] else []
        flags += [f"--offload {row['offload']}"] if row["offload"] != "none" else []
        times = (f"{row['seconds_alone']:.2g} s", f"{row['seconds_per_image']:.2g} s") if seconds else ()
        peak = f"{row['peak_bytes'] / _GIB:.1f} GiB"
        rows.append((name, peak, str(row["batch_size"]), *times, " ".join(flags) or "none needed"))
    return aligned(rows, right=tuple(range(1, len(head) - 1)))


def _gb(size: int) -> str:
    return f"{size / _GB:.2f} GB" if size >= _GB // 10 else f"{size / 10**6:.1f} MB"
