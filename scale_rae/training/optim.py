"""FlatModel and its optimizer: weights in one buffer, Muon or AdamW, moving average.

Muon moves hidden matrices, AdamW the rest.

No step waits for the host (except with 8-bit AdamW): every number that changes (step count, learning rate) is a tensor on the
device, so a whole training step can be one CUDA graph. `FlatModel` lays out all parameters in one float32 buffer:

    [ hidden matrices, grouped by shape | other parameters | parameters that compute in float32 ]

Modules compute with views of this buffer (float32) or of a copy in the compute dtype (bfloat16). Optimizer state, gradients and the
moving average have the same layout, so updates are few kernels and a checkpoint is a few tensors.

In several processes, each may keep only its part of the master weights, moments and average (ZeRO stage 1, arXiv:1910.02054).

Muon (Jordan et al. 2024) replaces a matrix' momentum by the nearest orthogonal matrix. Its step here is
lr · sqrt(max(1, rows / columns)) · orthogonal matrix, lr about 0.02 (that convention, not the one that imitates Adam's step).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from scale_rae.training.adamw8bit import EightBitMoments
from scale_rae.training.parallel import Group

UPDATE_AT_ONCE = 1 << 26  # elements, because AdamW's update takes several copies of them
ALIGN = 128  # elements: every tensor that is not a part of a stack begins at a multiple

_SHARED = ("master", "ema", "mean", "square")  # buffers that processes may share

# The number of stacked matrices in a hidden weight, by the end of its name. All other weights are AdamW's: embeddings,
# queries, patch and latent embedders, projectors, output layers.
_PIECES: tuple[tuple[str, int], ...] = (
    (r"dit_blocks\.\d+\.attn\.qkv\.weight", 3),
    (r"dit_blocks\.\d+\.attn\.proj\.weight", 1),
    (r"dit_blocks\.\d+\.mlp\.w12\.weight", 2),
    (r"dit_blocks\.\d+\.mlp\.w3\.weight", 1),
    (r"dit_blocks\.\d+\.adaLN_modulation\.1\.weight", 6),
    (r"layers\.\d+\.self_attn\.(q|k|v|o|out)_proj\.weight", 1),
    (r"layers\.\d+\.mlp\.(gate_proj|up_proj|down_proj|fc1|fc2)\.weight", 1),
    (r"decoder_layers\.\d+\.attention\.attention\.(query|key|value)\.weight", 1),
    (r"decoder_layers\.\d+\.(attention\.output|intermediate|output)\.dense\.weight", 1),
)


def matrices_in(name: str) -> int:
    """How many matrices of its own Muon sees in the parameter `name`, 0 for AdamW's parameters."""
    return next((pieces for pattern, pieces in _PIECES if re.search(pattern + "$", name)), 0)


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer's options; learning rates are peak values.

    `warmup` steps and the share `decay` are those of the default schedule, `trapezoid`."""

    kind: Literal["muon", "adamw", "adamw8bit"] = "muon"
    lr: float = 1e-3  # AdamW
    muon_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.95
    weight_decay: float = 0.01  # hidden matrices only
    warmup: int = 300
    decay: float = 0.4
    clip: float = 1.0  # gradient norm of the parameters that AdamW moves; 0 does not clip
    ema: float = 0.9995


Schedule = Callable[[Tensor, Tensor], Tensor]
"""(step, total steps), each [] on the device and the first step 1, -> the learning rate's factor in 0..1, []."""


def trapezoid(options: OptimizerOptions) -> Schedule:
    """Linear warm-up, constant, linear to zero over the last `decay` share of the steps."""

    def factor(step: Tensor, total: Tensor) -> Tensor:
        rise = step / max(1, options.warmup)
        fall = (total - step + 1) / (total * options.decay)
        return torch.minimum(rise, fall).clamp(0, 1)

    return factor


def warmed_up(kind: Literal["cosine", "linear", "constant"], warmup: int) -> Schedule:
    """Linear warm-up over `warmup` steps, then constant, or falling to zero after the last step."""

    def factor(step: Tensor, total: Tensor) -> Tensor:
        rise = step / max(1, warmup)
        done = ((step - 1 - warmup) / (total - warmup).clamp(min=1)).clamp(0, 1)
        after = {
            "cosine": 0.5 + 0.5 * torch.cos(math.pi * done),
            "linear": 1 - done,
            "constant": torch.ones_like(done),
        }[kind]
        return torch.where(step <= warmup, rise, after)

    return factor


@dataclass(frozen=True)
class _Slot:
    """A parameter's place in the buffer."""

    name: str
    parameter: nn.Parameter
    offset: int

    def view(self, buffer: Tensor, start: int = 0) -> Tensor:
        """The slot's part of a buffer whose first element has the number `start`."""
        at = self.offset - start
        return buffer[at : at + self.parameter.numel()].view(self.parameter.shape)


@dataclass(frozen=True)
class _Stack:
    """n matrices [rows, columns] that lie one after the other from `offset`."""

    offset: int
    count: int
    rows: int
    columns: int

    def view(self, buffer: Tensor) -> Tensor:
        """The matrices [n, rows, columns] in a buffer of all elements."""
        return buffer[self.offset : self.offset + self.count * self.rows * self.columns].view(
            self.count, self.rows, self.columns
        )


class FlatModel:
    """The parameters of several modules in one buffer, and their optimizer (module docstring).

    `modules` maps name prefixes to modules; a parameter that appears twice (tied) is one. `keep_float32(name)` says which
    parameters compute in float32 when the others compute in `dtype`. Parameters that `trains(name)` denies stay as they are.
    AdamW's learning rate of a parameter is multiplied by `rate(name)`. The processes of `group` share the optimizer's state, which
    only AdamW without weight decay can: `refresh`, `tensors`, `state` and `averaged` must then be called in all of them.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        device: torch.device,
        dtype: torch.dtype,
        options: OptimizerOptions,
        total_steps: int,
        keep_float32: Callable[[str], bool] = lambda name: False,
        trains: Callable[[str], bool] = lambda name: True,
        rate: Callable[[str], float] = lambda name: 1.0,
        schedule: Schedule | None = None,
        group: Group | None = None,
    ) -> None:
        self.options, self.device, self.dtype = options, device, dtype
        self._group = group or Group()
        if self._group.size > 1 and (options.kind != "adamw" or options.weight_decay):
            raise ValueError("only the state of AdamW without weight decay can be shared")
        self._schedule = schedule or trapezoid(options)
        for module in modules.values():
            module.to(device)
        self._lay_out(_named(modules, trains), keep_float32)

        self.gradient = torch.zeros(self.size, device=device)
        self.compute = torch.zeros(self.float32_start, device=device, dtype=dtype) if dtype != torch.float32 else None
        whole = torch.zeros(self.size, device=device)
        for slot in self.slots:
            slot.view(whole).copy_(slot.parameter.detach())
        own = self._part(self._group.index)
        alone = self._group.size == 1
        self.master = whole if alone else whole[own.start : own.stop].clone()
        # What parameters in float32 are views of: the master weights themselves, unless those are shared.
        self._plain_start = 0 if self.compute is None else self.float32_start
        self._plain = whole[self._plain_start :] if alone else whole[self._plain_start :].clone()
        del whole
        self._own, size = own, len(own)
        self.ema = self.master.clone()
        in_8_bits = options.kind == "adamw8bit"
        self.mean = torch.zeros(0 if in_8_bits else size, device=device)  # momentum; AdamW's first moment
        self.adam_start = self.muon_end if options.kind == "muon" else 0
        self.square = torch.zeros(0 if in_8_bits else size - self.adam_start, device=device)
        self.step = torch.zeros((), device=device)
        self.total_steps = torch.tensor(float(total_steps), device=device)
        for slot in self.slots:
            if self.compute is None or slot.offset >= self.float32_start:
                slot.parameter.data = slot.view(self._plain, self._plain_start)
            else:
                slot.parameter.data = slot.view(self.compute)
        self.refresh()
        self.parameters = [slot.parameter for slot in self.slots]
        self._gradients = [slot.view(self.gradient) for slot in self.slots]
        self._float32_slots = sum(slot.offset < self.float32_start for slot in self.slots)
        self._rates = self._runs_of_rates(rate)
        self._moments = EightBitMoments(self._rates, size, device) if in_8_bits else None

    def _runs_of_rates(self, rate: Callable[[str], float]) -> list[tuple[int, int, float]]:
        """(start, stop, rate) of AdamW's part of this process's part of the buffer.

        They are runs of equal rates, in pieces of at most UPDATE_AT_ONCE."""
        marks = [(slot.offset, rate(slot.name)) for slot in self.slots if slot.offset >= self.adam_start]
        runs: list[tuple[int, float]] = []
        for offset, value in marks:
            if not runs or runs[-1][1] != value:
                runs.append((offset if runs else self.adam_start, value))
        stops = [*(start for start, _ in runs[1:]), *([self.size] if runs else [])]
        return [
            (at, min(at + UPDATE_AT_ONCE, stop, self._own.stop), value)
            for (start, value), stop in zip(runs, stops, strict=True)
            for at in range(max(start, self._own.start), min(stop, self._own.stop), UPDATE_AT_ONCE)
        ]

    def _lay_out(self, named: Mapping[str, nn.Parameter], keep_float32: Callable[[str], bool]) -> None:
        """Gives each parameter its place in the buffer, as the module's docstring draws it."""
        groups: dict[tuple[int, int], list[tuple[str, nn.Parameter, int]]] = {}
        others: list[tuple[str, nn.Parameter]] = []
        last: list[tuple[str, nn.Parameter]] = []
        for name, parameter in named.items():
            pieces = matrices_in(name)
            if keep_float32(name):
                last.append((name, parameter))
            elif pieces:
                rows, columns = parameter.shape
                groups.setdefault((rows // pieces, columns), []).append((name, parameter, pieces))
            else:
                others.append((name, parameter))
        self.slots: list[_Slot] = []
        self.stacks: list[_Stack] = []
        offset = 0
        for (rows, columns), members in sorted(groups.items()):
            self.stacks.append(_Stack(offset, sum(pieces for _, _, pieces in members), rows, columns))
            for name, parameter, _ in members:
                self.slots.append(_Slot(name, parameter, offset))
                offset += parameter.numel()
            offset = _aligned(offset)
        self.muon_end = offset
        for name, parameter in others:
            self.slots.append(_Slot(name, parameter, offset))
            offset = _aligned(offset + parameter.numel())
        self.float32_start = offset
        for name, parameter in last:
            self.slots.append(_Slot(name, parameter, offset))
            offset = _aligned(offset + parameter.numel())
        self._filled = offset
        self.size = _aligned(offset, ALIGN * self._group.size)

    def _part(self, index: int) -> range:
        """The elements whose state the process of this number keeps."""
        count = self.size // self._group.size
        return range(index * count, (index + 1) * count)

    def refresh(self) -> None:
        """Brings the weights that the modules compute with up to the master weights."""
        if self._group.size == 1:
            if self.compute is not None:
                self.compute.copy_(self.master[: self.float32_start])
            return
        for index in range(self._group.size):
            part = self._part(index)
            for buffer, first in ((self.compute, 0), (self._plain, self._plain_start)):
                count = 0 if buffer is None else len(buffer)
                start, stop = max(part.start, first), min(part.stop, first + count)
                if buffer is None or start >= stop:
                    continue
                piece = buffer[start - first : stop - first]
                if index == self._group.index:
                    piece.copy_(self.master[start - part.start : stop - part.start])
                self._group.send(piece, index)

    def _whole(self, own: Tensor) -> Tensor:
        """A buffer of all elements, in the first process, from each process's part of it.

        It is on the CPU if processes share it.
        """
        if self._group.size == 1:
            return own
        parts = []
        for index in range(self._group.size):
            piece = own.clone() if index == self._group.index else torch.empty_like(own)
            self._group.send(piece, index)
            parts += [piece.cpu()] if self._group.is_first else []
        return torch.cat(parts)[: self._filled] if parts else own.new_empty(0)

    def tensors(self, averaged: bool = True) -> dict[str, Tensor]:
        """Each parameter by name, float32: the moving average, or the master weights.

        Other processes than the first get none.
        """
        buffer = self._whole(self.ema if averaged else self.master)
        return {slot.name: slot.view(buffer) for slot in self.slots} if self._group.is_first else {}

    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Starts from these weights (master and average)."""
        for slot in self.slots:
            slot.view(self.master).copy_(tensors[slot.name])
        self.ema.copy_(self.master)
        self.refresh()

    def update(self, gradients: Sequence[Tensor]) -> Tensor:
        """Takes a step; the gradient norm of AdamW's parameters before clipping, [] on the device."""
        self.collect(gradients)
        norm = self.gradient_norm()
        self.apply(norm)
        return norm

    @torch.no_grad()
    def collect(self, gradients: Sequence[Tensor], add: bool = False) -> None:
        """Puts gradients into the buffer, in the order of `parameters`, or adds them to those there."""
        for part in (slice(0, self._float32_slots), slice(self._float32_slots, None)):  # one dtype each: few kernels
            targets, values = self._gradients[part], list(gradients[part])
            if targets and add:
                torch._foreach_add_(targets, values)
            elif targets:
                torch._foreach_copy_(targets, values)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """The norm of the collected gradients of AdamW's parameters, [] on the device."""
        norm: Tensor = torch.linalg.vector_norm(self.gradient[self.adam_start :])
        return norm

    @torch.no_grad()
    def apply(self, norm: Tensor) -> None:
        """Moves the weights by the collected gradients, whose `gradient_norm` is `norm`."""
        o = self.options
        self.step.add_(1)
        lr = self.learning_rate()
        if o.weight_decay:
            peak = o.muon_lr if o.kind == "muon" else o.lr
            self.master[: self.muon_end].mul_(1 - lr * (peak * o.weight_decay))
        if o.kind == "muon":
            for stack in self.stacks:
                gradient, momentum = stack.view(self.gradient), stack.view(self.mean)
                momentum.lerp_(gradient, 1 - o.momentum)
                direction = orthogonalised(gradient.lerp(momentum, o.momentum), self.dtype)
                scale = o.muon_lr * math.sqrt(max(1.0, stack.rows / stack.columns))
                stack.view(self.master).sub_(direction * (lr * scale))
        self._adamw(lr, norm)
        self.ema.lerp_(self.master, 1 - torch.clamp((1 + self.step) / (10 + self.step), max=o.ema))
        self.refresh()

    def _adamw(self, lr: Tensor, norm: Tensor) -> None:
        """AdamW's part of `apply`; `lr` is the schedule's factor."""
        o = self.options
        beta1, beta2 = o.betas
        clip = (o.clip / (norm + 1e-6)).clamp(max=1) if o.clip else torch.ones_like(norm)
        if self._moments is not None:
            step, factor, clipping = torch.stack([self.step, lr, clip]).tolist()  # waits for the device
            self._moments.update(self.master, self.gradient, int(step), factor * o.lr, clipping, o.betas)
            return
        bias1, bias2 = 1 - beta1**self.step, 1 - beta2**self.step
        for start, stop, rate in self._rates:
            first, last = start - self._own.start, stop - self._own.start
            gradient, mean, master = self.gradient[start:stop], self.mean[first:last], self.master[first:last]
            square = self.square[first - self.adam_start : last - self.adam_start]
            gradient.mul_(clip)
            mean.lerp_(gradient, 1 - beta1)
            square.lerp_(gradient.square(), 1 - beta2)
            move = mean / ((square / bias2).sqrt_().add_(1e-8))
            master.sub_(move * (lr * (o.lr * rate) / bias1))

    def learning_rate(self) -> Tensor:
        """The schedule's factor in 0..1 at `step`, [] on the device."""
        return self._schedule(self.step, self.total_steps)

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which the modules compute with the moving average."""
        return self.using(self.ema)

    @contextmanager
    def using(self, weights: Tensor) -> Iterator[None]:
        """A context in which the modules compute with other weights, which have the layout of `master`."""
        kept = self.master.clone()
        self.master.copy_(weights)
        self.refresh()
        try:
            yield
        finally:
            self.master.copy_(kept)
            self.refresh()

    def state(self) -> dict[str, Tensor]:
        """Everything that continues a run exactly, but for the random generator.

        Where processes share it, the first gets all of it.
        """
        return {name: self._whole(t) if name in _SHARED else t for name, t in self._state().items()}

    def _state(self) -> dict[str, Tensor]:
        """This process's part of the state."""
        moments = self._moments.state() if self._moments is not None else {}
        return {name: getattr(self, name) for name in (*_SHARED, "step", "total_steps")} | moments

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state`."""
        for name, tensor in self._state().items():
            if name in _SHARED and self._group.size > 1:
                part = state[name][self._own.start : self._own.stop]
                tensor[: len(part)].copy_(part)
            else:
                tensor.copy_(state[name])
        self.refresh()


def _named(modules: Mapping[str, nn.Module], trains: Callable[[str], bool]) -> dict[str, nn.Parameter]:
    """The parameters that `trains` allows, by name; one that appears twice (tied) has its first name."""
    named: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            if id(parameter) not in seen and trains(prefix + name):
                seen.add(id(parameter))
                named[prefix + name] = parameter
    return named


def _aligned(offset: int, to: int = ALIGN) -> int:
    return -(-offset // to) * to


def orthogonalised(matrices: Tensor, dtype: torch.dtype, iterations: int = 5) -> Tensor:
    """About the nearest orthogonal matrix to each of [n, r, c], float32.

    Its singular values are within some 0.7 to 1.2. Newton-Schulz iteration with Muon's quintic:
    X <- a X + (b A + c A²) X, A = X X'.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).to(dtype).contiguous()
    for _ in range(iterations):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()
