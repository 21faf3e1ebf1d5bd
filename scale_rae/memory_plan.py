"""`--memory`: how a model runs so that its peak stays below a limit: quantisation, residency, and images at once.

Imports no torch. Ways are tried in the order of WAYS, and the first that fits is chosen. The order prefers the exact weights where they
cost little, and never trades exactness for speed that nobody asked for:

1. Unquantised weights, all on the device: exact and fastest.
2. Unquantised, each part on the device in its turn (`--offload model`): still exact, and costs one copy of the weights per batch,
   which takes less than a second for the published models.
3. int8, resident, then in turns: half of bfloat16's memory, with small errors.
4. nf4, resident, then in turns: little more than a quarter of the memory, with larger errors (docs/memory.md has how many pictures of
   the bundled model stay right).
5. int8, then nf4, streamed (`--offload stream`): the least memory, but every evaluation copies all weights. int8 comes
   first, because streaming takes nearly the same memory whatever the weights' form. Unquantised weights take twice as long to stream, so
   they are streamed only where `--offload stream` asks for it.

fp8 and int8-products quantise activations too, which gains speed but no memory, and fp8-storage is as large as int8 and less exact:
they are chosen only where `--quantize` says so. `--quantize` and `--offload` narrow the choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from scale_rae.errors import DeviceError, counted
from scale_rae.footprint import Footprint, Rates, Way
from scale_rae.options import OFFLOAD, default_batch_size, quantisation

WAYS = (
    *((None, "none"), (None, "model"), ("int8", "none"), ("int8", "model"), ("nf4", "none"), ("nf4", "model")),
    *(("int8", "stream"), ("nf4", "stream")),
)
MOST_STREAMED = 64  # images at once
_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """The chosen way with its estimated peak in bytes, for a limit in bytes that was asked for as `request` ("8G", "auto").

    `because` says why nothing before it in WAYS was chosen.
    """

    request: str
    limit: int
    way: Way
    peak: int
    because: str

    def __str__(self) -> str:
        """One line: what was chosen, and why."""
        asked = f"memory {self.request}" + (f" ({self.limit / _GIB:.1f} GiB)" if self.request == "auto" else "")
        return f"{asked}: {flags(self.way)}, {counted(self.way.batch, 'image')} at once, about {self.peak / _GIB:.1f} GiB at the peak; {self.because}"

    def record(self) -> dict[str, Any]:
        """What manifests record of it; the quantisation and the residency have fields of their own there."""
        return {"request": self.request, "bytes": self.limit, "batch_size": self.way.batch}


def flags(way: Way) -> str:
    """The flags of a way: its quantisation and residency."""
    words = ([f"--quantize {way.quantize}"] if way.quantize else []) + (
        [f"--offload {way.offload}"] if way.offload != "none" else []
    )
    return " ".join(words) or "unquantised, all on the device"


def choose(
    request: str,
    limit: int,
    footprint: Footprint,
    rates: Callable[[], Rates] | None = None,
    quantize: str | None = None,
    offload: str = "none",
) -> Plan:
    """The first of WAYS whose peak is at most `limit` bytes, with as many images at once as fit.

    `quantize` and `offload` other than the defaults narrow the choice; quantize "none" is no default. `rates` measures the
    device, and is called only if the weights are streamed: as many images are then drawn at once as compute while their
    weights are copied.

    Raises:
        DeviceError: when nothing fits, with the least that is possible.
    """
    possible = possible_ways(footprint.device, quantize, offload)
    ways = [Way(kind, mode) for kind, mode in possible if quantize is not None or footprint.allows(kind)]
    peaks = [footprint.peak(way) for way in ways]
    chosen = next((i for i, peak in enumerate(peaks) if peak <= limit), None)
    asked = (("quantize", quantize), ("offload", None if offload == "none" else offload))
    given = " ".join(f"--{name} {value}" for name, value in asked if value is not None)
    if chosen is None:
        least = min(range(len(ways)), key=lambda i: peaks[i])
        raise DeviceError(
            f"--memory {request}{'' if request != 'auto' else f' ({limit / _GIB:.1f} GiB)'}: this model needs at least "
            f"{_up(peaks[least])}{f' with {given}' if given else ''} ({flags(ways[least])})"
        )
    way = ways[chosen]
    most = default_batch_size(footprint.device)
    if way.offload == "stream" and rates is not None:
        most = min(max(1, footprint.hidden_images(way, rates())), MOST_STREAMED)
    batch = next((n for n in _sizes(most) if footprint.peak(replace(way, batch=n)) <= limit), 1)
    way = replace(way, batch=batch)
    because = f"that fits with the given {given}" if given else "everything fits as it is"
    if chosen:
        before = ways[chosen - 1]
        because = f"{flags(before)} would take {peaks[chosen - 1] / _GIB:.1f} GiB"
    return Plan(request, limit, way, footprint.peak(way), because)


def possible_ways(device: str, quantize: str | None, offload: str) -> list[tuple[str | None, str]]:
    """The ways to try, in order: WAYS, narrowed by a given quantisation and residency, and to what the device can do."""
    kinds = [None, "int8", "nf4"] if quantize is None else [quantisation(quantize)]
    modes = ("none",) if device != "cuda" else OFFLOAD if offload == "none" else (offload,)
    known = [way for way in WAYS if way[0] in kinds and way[1] in modes]
    narrowed = quantize is not None or offload != "none"
    rest = [(kind, mode) for mode in modes for kind in kinds if (kind, mode) not in known] if narrowed else []
    return known + rest


def _sizes(most: int) -> list[int]:
    """Batch sizes to try: `most`, and the powers of two below it, largest first."""
    return [most, *(n for n in (64, 32, 16, 8, 4, 2, 1) if n < most)]


def _up(size: int) -> str:
    """A size in GiB, rounded up to a tenth: with it as the limit, it fits."""
    return f"{-(-size * 10 // _GIB) / 10:.1f}G"


def table(
    footprint: Footprint,
    requests: dict[str, int],
    rates: Rates | None,
    quantize: str | None = None,
    offload: str = "none",
) -> list[dict[str, Any]]:
    """What `choose` chooses for each limit (its name and bytes), as JSON, with estimated seconds per image if `rates` are known.

    Seconds are those of one image drawn alone, and per image where as many of one prompt are drawn at once as fit.
    """
    rows: list[dict[str, Any]] = []
    for request, limit in requests.items():
        row: dict[str, Any] = {"memory": request, "bytes": limit}
        try:
            plan = choose(request, limit, footprint, None if rates is None else lambda: rates, quantize, offload)
        except DeviceError as e:
            rows.append(row | {"problem": str(e)})
            continue
        way = plan.way
        row |= {"quantize": way.quantize, "offload": way.offload, "batch_size": way.batch, "peak_bytes": plan.peak}
        if rates is not None:
            alone, together = (footprint.seconds(w, rates) for w in (replace(way, batch=1), way))
            row |= {"seconds_alone": round(alone.total, 3), "seconds_per_image": round(together.each, 3)}
        rows.append(row)
    return rows
