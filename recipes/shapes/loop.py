"""The training loop that all stages share: one step as one CUDA graph, logs, checkpoints, exact continuation.

A stage provides a loss function without arguments. It chooses its own batch from tensors on the device, returns the loss and named
numbers to log, and must not read any value on the host.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scale_rae.training.optim import FlatModel

Metrics = dict[str, Tensor]
LossFunction = Callable[[], tuple[Tensor, Metrics]]
CHUNK_BYTES = 15_000_000
WARMUP_STEPS = 3  # ordinary steps before the graph is captured: they compile kernels and make the libraries' workspaces


@dataclass(frozen=True)
class LoopOptions:
    """How a stage runs. `seconds` is the training time of the whole stage, over all its runs."""

    steps: int
    seconds: float | None = None
    stop_after: float | None = None  # seconds from the start of this process: save and leave, to be continued
    stop_at: int | None = None  # the same by step (a multiple of log_every)
    checkpoint_seconds: float = 120
    log_every: int = 100
    graph: bool = True
    bench: int = 0  # time this many steps, then stop without saving


def add_loop_arguments(parser: argparse.ArgumentParser, steps: int, seconds: float | None) -> None:
    """The arguments of `LoopOptions`, and --compile."""
    parser.add_argument("--steps", type=int, default=steps, help="planned steps; the learning rate follows them")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="training time of the stage; fewer steps are planned to keep it"
    )
    parser.add_argument("--stop-after", type=float, help="seconds from process start: save, leave, continue next time")
    parser.add_argument("--stop-at", type=int, metavar="STEP", help="the same by step")
    parser.add_argument("--checkpoint-seconds", type=float, default=120)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--no-graph", action="store_true", help="launch kernels one by one instead of one CUDA graph")
    parser.add_argument("--no-compile", action="store_true", help="run the networks' blocks uncompiled")
    parser.add_argument("--bench", type=int, default=0, metavar="N", help="time N steps and stop")


def loop_options(args: argparse.Namespace) -> LoopOptions:
    """`LoopOptions` of parsed arguments."""
    return LoopOptions(
        steps=args.steps,
        seconds=args.seconds,
        stop_after=args.stop_after,
        stop_at=args.stop_at,
        checkpoint_seconds=args.checkpoint_seconds,
        log_every=args.log_every,
        graph=not args.no_graph,
        bench=args.bench,
    )


def say(text: str) -> None:
    """A line of progress, at once."""
    print(text, flush=True)


def warn(text: str) -> None:
    """A line nobody is to miss."""
    bar = "!" * 100
    print(f"{bar}\n!!! {text}\n{bar}", file=sys.stderr, flush=True)


_STARTED = time.perf_counter()


def process_seconds() -> float:
    """Seconds since this process read this module, about its start."""
    return time.perf_counter() - _STARTED


def prepare_device(name: str | None) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype that networks compute in: bfloat16 on CUDA, float32 on the CPU."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return device, torch.float32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # its plans are made per shape at run time; flash needs none
    return torch.device("cuda", device.index or 0), torch.bfloat16


def compile_forward(modules: Iterable[nn.Module], fullgraph: bool = True) -> None:
    """Compiles each module's forward; modules of one kind and shape share the compiled code."""
    import torch._dynamo

    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, 64)
    for module in modules:
        restore_forward([module])
        module.forward = torch.compile(module.forward, fullgraph=fullgraph, dynamic=False)  # type: ignore[method-assign]


def restore_forward(modules: Iterable[nn.Module]) -> None:
    """Undoes `compile_forward`."""
    for module in modules:
        module.__dict__.pop("forward", None)


Outcome = Literal["finished", "stopped"]


class Trainer:
    """Runs a stage's steps; see `run`."""

    def __init__(
        self,
        model: FlatModel,
        loss: LossFunction,
        options: LoopOptions,
        folder: Path,
        settings: str,
        compiled: Iterable[nn.Module] = (),
        after_save: Callable[[], None] | None = None,
    ) -> None:
        """`folder` gets log.jsonl and state.pt; `settings` names what a continued run must have in common; `compiled` are the
        modules to compile; `after_save` is called after each state.pt, to write what another process may look at."""
        self.after_save = after_save
        self.compiled = list(compiled)
        self.model, self.loss, self.options, self.folder, self.settings = model, loss, options, folder, settings
        self.names: list[str] = []
        self.sums = torch.zeros(0)
        self.done = 0  # steps
        self.elapsed = 0.0  # seconds of training, over all runs
        self.planned = options.steps
        self.pace = 0.0  # seconds a step, of a benchmark
        self.graph: torch.cuda.CUDAGraph | None = None

    # --- one step ------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Forward, backward and update; adds this step's numbers to `sums`."""
        loss, metrics = self.loss()
        gradients = torch.autograd.grad(loss, self.model.parameters)
        metrics = {"loss": loss.detach(), **metrics, "gradient_norm": self.model.update(gradients)}
        values = torch.stack([value.detach().float() for value in metrics.values()])
        if not self.names:
            self.names = list(metrics)
            self.sums = torch.zeros_like(values)
        self.sums.add_(values)

    def _compile(self) -> int:
        """`_warm_up` with the modules compiled; what cannot be compiled runs as it is, and says so. Returns the steps made."""
        if not self.compiled:
            return self._warm_up()
        for fullgraph, instead in ((True, "compiling with graph breaks"), (False, "running uncompiled")):
            compile_forward(self.compiled, fullgraph)
            try:
                return self._warm_up()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler has many ways to fail
                warn(f"compilation failed, {instead} (slower): {type(error).__name__}: {error}")
        restore_forward(self.compiled)
        return self._warm_up()

    def _warm_up(self) -> int:
        """Ordinary steps, on a side stream where CUDA wants one before a capture. Returns how many."""
        count = min(WARMUP_STEPS, max(1, self.planned - self.done))
        if self.model.device.type != "cuda":
            self.step()
            return 1
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(count):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        return count

    def _capture(self) -> None:
        if self.model.device.type != "cuda" or not self.options.graph:
            return
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.step()
        except Exception as error:  # whatever the driver or a library refuses: go on, slower
            torch.cuda.synchronize()
            warn(f"CUDA graph capture failed, running step by step: {type(error).__name__}: {error}")
            return
        self.graph = graph

    def _one(self) -> None:
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()

    # --- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Steps until the plan is fulfilled or it is time to stop. Continues from state.pt if it is there."""
        options = self.options
        if not options.bench:
            self.resume()
        if self.done >= self.planned:
            return "finished"
        if options.stop_after and process_seconds() > options.stop_after:
            return "stopped"
        start = time.perf_counter()
        self.done += self._compile()
        self._synchronize()
        say(f"first steps and compilation: {time.perf_counter() - start:.1f} s")
        start = time.perf_counter()
        self._capture()
        self._synchronize()
        if self.graph is not None:
            say(f"captured the step as one CUDA graph: {time.perf_counter() - start:.1f} s")
        if options.bench:
            self._bench()
            return "finished"
        return self._train()

    def _train(self) -> Outcome:
        options = self.options
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = saved = time.perf_counter()
        counted = logged = self.done
        self.sums.zero_()
        while True:
            if self.done < self.planned:
                self._one()
                self.done += 1
            finished = self.done >= self.planned
            if self.done % options.log_every and not finished:
                continue
            self._synchronize()
            now = time.perf_counter()
            self.elapsed += now - mark
            pace = (now - mark) / max(1, self.done - counted)
            self._log(self.done - logged, pace)
            mark, counted, logged = time.perf_counter(), self.done, self.done
            self._plan(pace)
            finished = self.done >= self.planned
            stop = options.stop_after is not None and process_seconds() > options.stop_after
            stop |= options.stop_at is not None and self.done >= options.stop_at
            if finished or stop or now - saved > options.checkpoint_seconds:
                self.save()
                if self.after_save:
                    self.after_save()
                saved = mark = time.perf_counter()
            if finished or stop:
                return "finished" if finished else "stopped"

    def _plan(self, pace: float) -> None:
        """Plans fewer steps than asked for when those would take longer than the stage may."""
        if self.options.seconds is None or self.done >= self.planned:
            return
        left = max(0, int((self.options.seconds - self.elapsed) / max(pace, 1e-9)))
        possible = min(self.options.steps, self.done + left)
        if abs(self.planned - possible) > 0.02 * self.planned or left == 0:
            say(f"planning {possible} steps, not {self.planned}, to keep {self.options.seconds:.0f} s")
            self.planned = possible
            self.model.total_steps.fill_(float(possible))

    def _log(self, count: int, pace: float) -> None:
        values = [value / max(1, count) for value in self.sums.tolist()]
        self.sums.zero_()
        record: dict[str, Any] = {
            "step": self.done,
            "seconds": round(self.elapsed, 2),
            "ms_per_step": round(pace * 1000, 3),
            "lr": round(float(self.model.learning_rate()), 5),
            **{name: round(value, 6) for name, value in zip(self.names, values, strict=True)},
        }
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in zip(self.names, values, strict=True))
        say(f"step {self.done:6d}/{self.planned}  {pace * 1000:7.2f} ms  lr {record['lr']:.3f}  {numbers}")

    def _bench(self) -> None:
        for _ in range(5):
            self._one()
        self._synchronize()
        start = time.perf_counter()
        for _ in range(self.options.bench):
            self._one()
        self._synchronize()
        self.pace = (time.perf_counter() - start) / self.options.bench

    def _synchronize(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    # --- continuation --------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes state.pt: a run that loads it goes on bit for bit as this one would (same machine and settings)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        cuda = self.model.device.type == "cuda"
        state = {
            "settings": self.settings,
            "done": self.done,
            "elapsed": self.elapsed,
            "planned": self.planned,
            "random": torch.cuda.get_rng_state(self.model.device) if cuda else torch.get_rng_state(),
            "model": {name: tensor.cpu() for name, tensor in self.model.state().items()},
        }
        temporary = self.folder / f"state.{os.getpid()}.tmp"
        torch.save(state, temporary)
        temporary.replace(self.folder / "state.pt")

    def resume(self) -> bool:
        """Loads state.pt if it is there.

        Raises:
            ValueError: when it was made with other settings.
        """
        path = self.folder / "state.pt"
        if not path.is_file():
            return False
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["settings"] != self.settings:
            raise ValueError(f"{path}: made with other settings; remove it or use another --out\n{state['settings']}")
        self.model.load_state(state["model"])
        self.done, self.elapsed = state["done"], state["elapsed"]
        self.planned = min(self.options.steps, state["planned"])
        self.model.total_steps.fill_(float(self.planned))
        if self.model.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"], self.model.device)
        else:
            torch.set_rng_state(state["random"])
        say(f"continuing {self.folder} from step {self.done} ({self.elapsed:.0f} s trained)")
        return True

    def save_compact(self, folder: Path) -> None:
        """Writes what continues a run nearly as well in a third of the room, as files of at most CHUNK_BYTES: weights and
        average in bfloat16, no momentum."""
        state = {name: tensor.cpu() for name, tensor in self.model.state().items()}
        small = {name: state[name].bfloat16() for name in ("master", "ema", "square")}
        numbers = {"done": self.done, "elapsed": self.elapsed, "planned": self.planned, "settings": self.settings}
        buffer = io.BytesIO()
        torch.save({**numbers, **small}, buffer)
        folder.mkdir(parents=True, exist_ok=True)
        content = buffer.getbuffer()
        for number, start in enumerate(range(0, len(content), CHUNK_BYTES)):
            (folder / f"compact-{number:03}.bin").write_bytes(content[start : start + CHUNK_BYTES])

    def load_compact(self, folder: Path) -> None:
        """Writes a state.pt that continues from `save_compact`'s files.

        Raises:
            ValueError: when they were made with other settings.
        """
        content = b"".join(path.read_bytes() for path in sorted(folder.glob("compact-*.bin")))
        compact = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if compact["settings"] != self.settings:
            raise ValueError(f"{folder}: made with other settings\n{compact['settings']}")
        state = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in self.model.state().items()}
        for name in ("master", "ema", "square"):
            state[name].copy_(compact[name])
        state["step"].fill_(compact["done"])
        state["total_steps"].fill_(compact["planned"])
        self.model.load_state(state)
        self.done, self.elapsed, self.planned = compact["done"], compact["elapsed"], compact["planned"]
        self.save()


def train_stage(
    model: FlatModel,
    loss: LossFunction,
    args: argparse.Namespace,
    folder: Path,
    settings: str,
    compiled: list[nn.Module],
) -> bool:
    """Trains the stage whose folder is `folder`; returns whether it is finished. With --bench, only times its steps."""
    trainer = Trainer(model, loss, loop_options(args), folder, settings, compiled)
    outcome = trainer.run()
    if args.bench:
        say(f"{folder.name}: {trainer.pace * 1000:.2f} ms a step of {args.batch}")
        return False
    return outcome == "finished"
