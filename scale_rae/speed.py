"""How the velocity network runs fast. Each trick is one place here, can be switched off, and changes results by rounding only.

- `before`: time embeddings are computed before the steps, all at once.
- `null`: so are, under guidance, the modulations of the null branch, whose condition is the same for every token and image.
- `shared`: images of one prompt have one condition, so their modulations are computed once.
- `together`: both branches of guidance run as one batch, so weights are read once.
- `pad`: SwiGLU's inner width gets zeros up to a width that tensor cores like.
- `group`: for few images, the adaLN products of several blocks become one that fills the GPU.
- `defer`: a block's last sum is left to the next block's first norm.
- `graph`: one evaluation is captured as a CUDA graph for each (images, prompts, guided or not) and replayed.
- `compile`: each kind of block is compiled once, which fuses everything between the matrix products.
- `quantize`: the blocks' linears in float8 (quantize.py).
- `kernels`: float8 is made, and pairs of channels are rotated, by kernels of our own (kernels.py); needs `defer`.
- `attention`: by a kernel of our own, which rotates as it reads (kernels.py).
- `ahead`: the language model's next token is asked for before the host has seen this one (language.py).

docs/performance.md has what each gains.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_rae.dit import Attend, Block, Deferred, DiT, FinalLayer, SwiGLU, summed
from scale_rae.errors import InputError
from scale_rae.flow import Velocity
from scale_rae.options import check_speed
from scale_rae.quantize import Float8Linear, check_device, quantize

ATTENTION = ("auto", "flash", "own")
PAD_TO = 64  # elements of SwiGLU's inner width
GROUP_ROWS = 2048  # tokens of a batch's prompts for that one block's adaLN product fills the GPU; fewer take several blocks at once
MOST_GRAPHS = 12  # kept at once
MOST_SHAPES = 4096  # that a function is compiled for


@dataclass(frozen=True)
class Speed:
    """Which tricks are used. `graph`, `pad`, `group`, `kernels` and `ahead` act on CUDA devices only. `null` needs `together`.
    `attention` is PyTorch's ("flash"), ours ("own"), or ours where it was measured to be faster ("auto"). "own" needs `kernels`
    and `defer`, without which "auto" is PyTorch's; so it is where ours cannot be had (`_attention`).

    `compile`: "on", "off", or "auto", which compiles on CUDA once enough images are to be drawn to make up for the
    seconds it takes (`ScaleRAE.expect`). `quantize`: None or "fp8".
    """

    compile: str = "auto"
    quantize: str | None = None
    graph: bool = True
    pad: bool = True
    group: bool = True
    before: bool = True
    null: bool = True
    together: bool = True
    shared: bool = True
    defer: bool = True
    kernels: bool = True
    ahead: bool = True
    attention: str = "auto"

    def check(self) -> None:
        """Raises InputError for values that there are not."""
        check_speed(self.compile, self.quantize)
        if self.attention not in ATTENTION:
            raise InputError(f"attention {self.attention!r}: use one of {', '.join(ATTENTION)}")
        if self.attention == "own" and not (self.kernels and self.defer):
            raise InputError(f"attention {self.attention!r}: needs kernels and defer, which are switched off")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled for each shape it meets, whole or with an error.

    Compiled code is kept between runs, in $TORCHINDUCTOR_CACHE_DIR or the user's cache folder.
    """
    import torch._dynamo

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scale_rae" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    # Every batch size is a compilation of the same function; torch gives up at 8, and at 256 in all.
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, name, max(MOST_SHAPES, getattr(torch._dynamo.config, name)))
    return torch.compile(function, dynamic=False, fullgraph=True)


def attention_kernels(device: torch.device) -> AbstractContextManager[None]:
    """On CUDA, what PyTorch may choose from: not cuDNN's attention, which makes a plan for every shape it meets."""
    if device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(kernels)  # type: ignore[no-any-return]


class GraphMemory:
    """What all CUDA graphs of a device share: the stream they are captured on, and with it the memory they work in, which
    belongs to a stream. Hold `lock` from filling a graph's inputs until its output is copied: the next may write there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.lock = device, threading.RLock()
        self._stream: torch.cuda.Stream | None = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def capture(self, function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph of `function`, which is called some times on the way, and the tensor that each replay writes."""
        with self.lock:
            if self._stream is None:
                self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            stream = self._stream
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                for _ in range(2):  # compiles, loads kernels, makes the libraries' workspaces
                    function()
            torch.cuda.current_stream(self.device).wait_stream(stream)
            pool = next((graph.pool() for graph in self._graphs), None)  # a new one once the last graph is gone
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    output = function()
            except RuntimeError as e:  # ending a capture that memory ran out in fails too, and hides why
                if isinstance(e.__context__, torch.OutOfMemoryError):
                    raise e.__context__ from None
                raise
            self._graphs.add(graph)
            return graph, output


@functools.cache
def graph_memory(device: torch.device) -> GraphMemory:
    """The device's."""
    return GraphMemory(device)


class Captured:
    """A function of tensors as a CUDA graph, for inputs of the same shapes as `inputs`."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        self._memory = graph_memory(inputs[0].device)
        self.inputs = [x.clone() for x in inputs]
        self.graph, self.output = self._memory.capture(lambda: function(*self.inputs))

    def __call__(self, *inputs: Tensor) -> Tensor:
        with self._memory.lock:
            for mine, given in zip(self.inputs, inputs, strict=True):
                mine.copy_(given)
            self.graph.replay()
            return self.output.clone()


class Captures:
    """Runs functions of tensors as CUDA graphs, one for each `key`, which says what is run and for which shapes.

    `enabled` False runs them as they are. Of more than `most`, the one that has not run for longest is let go of.
    """

    def __init__(self, enabled: bool, most: int) -> None:
        self.enabled, self.most = enabled, most
        self._graphs: dict[Hashable, Captured] = {}  # in the order of their last run
        self._met: set[Hashable] = set()

    def run(
        self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor, when_it_comes_again: bool = True
    ) -> Tensor:
        """`function(*inputs)`. Capturing takes three runs, so by default what runs once is not captured."""
        if not self.enabled:
            return function(*inputs)
        captured = self._graphs.pop(key, None)
        if captured is None:
            if when_it_comes_again and key not in self._met:
                self._met.add(key)
                return function(*inputs)
            if len(self._graphs) >= self.most:
                del self._graphs[next(iter(self._graphs))]
            captured = Captured(function, inputs)
        self._graphs[key] = captured
        return captured(*inputs)

    def forget(self) -> None:
        """Lets go of the graphs and, with the last that anyone has, the memory they work in."""
        self._graphs.clear()


def pad_swiglu(dit: nn.Module, multiple: int) -> None:
    """Widens each SwiGLU with zeros to a multiple of `multiple`: exact, since a zero row's SiLU(0) · 0 meets a zero column.

    Odd widths (5461 in the published network) cost tensor cores a quarter of their speed. Zeros also stay zeros in
    training: their gradients are products with zeros.
    """
    for module in dit.modules():
        if not isinstance(module, SwiGLU):
            continue
        w12, w3 = module.w12, module.w3
        inner = w3.in_features
        extra = -inner % multiple
        if not extra:
            continue
        gates = w12.weight.detach().view(2, inner, -1)
        w12.weight = nn.Parameter(F.pad(gates, (0, 0, 0, extra)).flatten(0, 1), w12.weight.requires_grad)
        w12.bias = nn.Parameter(F.pad(w12.bias.detach().view(2, inner), (0, extra)).flatten(), w12.bias.requires_grad)
        w3.weight = nn.Parameter(F.pad(w3.weight.detach(), (0, extra)), w3.weight.requires_grad)
        w12.out_features, w3.in_features = 2 * (inner + extra), inner + extra


class _StackedModulations:
    """The adaLN linears of blocks that read one condition, as one matrix of which the blocks' weights are parts."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.width = layers[0].out_features
        self.weight = torch.cat([layer.weight.detach() for layer in layers])  # [blocks · 6D, Z]
        self.bias = torch.cat([layer.bias.detach() for layer in layers])
        for i, layer in enumerate(layers):
            rows = slice(i * self.width, (i + 1) * self.width)
            layer.weight = nn.Parameter(self.weight[rows], requires_grad=False)
            layer.bias = nn.Parameter(self.bias[rows], requires_grad=False)
        self.float8: Float8Linear | None = None

    def quantize(self, layers: Sequence[nn.Linear]) -> None:
        """Goes over to float8, and frees the weights."""
        self.float8 = Float8Linear(self.weight, self.bias)
        del self.weight
        for layer in layers:
            layer.weight = layer.bias = None  # type: ignore[assignment]

    def __call__(self, read: Any, first: int, stop: int) -> Tensor:
        """[..., (stop - first) · 6D] of blocks `first` up to `stop`, for what `_read` made of the condition."""
        rows = slice(first * self.width, stop * self.width)
        if self.float8 is not None:
            return self.float8.product(read, rows)
        return F.linear(read, self.weight[rows], self.bias[rows])


@dataclass(frozen=True)
class _Parts:
    """The network's parts as functions, compiled or not, and the rotary tables that `block` takes."""

    read: Callable[..., Any]
    block: Callable[..., Deferred]
    plain_block: Callable[..., Tensor]
    final: Callable[..., Tensor]
    plain_final: Callable[..., Tensor]
    cos: Tensor
    sin: Tensor


def _read(time: Tensor, condition: Tensor) -> tuple[Tensor, Any]:
    """What the adaLN linears read of time [1, Z] and condition [P, L, Z]: SiLU(c), for the final layer and for the blocks."""
    read = F.silu(F.silu(time[:, None] + condition))
    return read, read


def _read_float8(time: Tensor, condition: Tensor) -> tuple[Tensor, Any]:
    read, _ = _read(time, condition)
    return read, quantize(read)


def _whole_block(
    block: Block, before: Deferred, modulation: Tensor, cos: Tensor, sin: Tensor, null: Tensor | None
) -> Deferred:
    return Deferred(block.modulated(before.x, modulation, cos, sin, null))


def _final(final: FinalLayer, before: Deferred, modulation: Tensor, null: Tensor | None) -> Tensor:
    return final.modulated(summed(before), modulation, null)


def _attention(speed: Speed, dit: DiT) -> Attend:
    """How the blocks that read the condition attend on CUDA. (DDT's others attend as PyTorch does.)

    Float32, and heads that ours has no place for, go on with PyTorch's attention; so does "auto" but on Hopper, where ours was
    measured.
    """
    from scale_rae import kernels

    wanted = speed.attention == "own" or (speed.attention == "auto" and _is_hopper(dit.pos_embed.device))
    own = wanted and kernels.attention_fits(dit.config, dit.dtype)
    return kernels.attend_pairs if own else kernels.attend_flash


def _is_hopper(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] == 9


def _parts(speed: Speed, dit: DiT, compile: bool) -> _Parts:
    """The parts to be run as they are, or to be compiled."""
    block: Callable[..., Deferred] = Block.deferred if speed.defer else _whole_block
    cos, sin = dit.rope_cos, dit.rope_sin
    device = dit.pos_embed.device
    if speed.defer and speed.kernels and device.type == "cuda" and find_spec("triton") is not None:
        from scale_rae import kernels

        attend = _attention(speed, dit)
        # What PyTorch compiles for a plain block is as fast.
        needed = not compile or speed.quantize is not None or attend is not kernels.attend_flash
        if needed and kernels.usable(device):
            block = kernels.plain_block(attend) if speed.quantize is None else kernels.float8_block(attend)
            cos, sin = kernels.of_axis(cos), kernels.of_axis(sin)
    read = _read if speed.quantize is None else _read_float8
    return _Parts(read, block, Block.forward, _final, FinalLayer.forward, cos, sin)


class FastDiT:
    """A velocity network ready for sampling: `DiT.forward`'s result up to rounding, by the tricks of `speed`.

    Changes `dit` in place where a trick needs other weights: padding and stacking leave it working as it is, float8 does not.

    Raises:
        InputError, DeviceError: for options that there are not, or not on this device.
    """

    def __init__(self, dit: DiT, speed: Speed) -> None:
        speed.check()
        self.dit, self.speed = dit, speed
        self.device = dit.pos_embed.device
        on_cuda = self.device.type == "cuda"
        if speed.quantize is not None:
            check_device(self.device, dit.dtype)
        self.shared = dit.dit_blocks[: dit.encoder_depth]  # the blocks whose condition has no part of x
        self.final_shared = dit.config.encoder_depth is None
        if (speed.pad and on_cuda) or speed.quantize is not None:
            pad_swiglu(dit, PAD_TO)
        self.layers: list[Any] = [block.adaLN_modulation[1] for block in self.shared]  # type: ignore[index]
        self.stacked: _StackedModulations | None = None
        if (speed.group and on_cuda) or speed.quantize is not None:
            self.stacked = _StackedModulations(self.layers)
        if speed.quantize is not None and self.stacked is not None:
            self.stacked.quantize(self.layers)
            _quantize_blocks(dit)
        self._eager, self._to_compile = (_parts(speed, dit, compile) for compile in (False, True))
        self._compiled: _Parts | None = None
        self._compiled_sizes: set[tuple[int, int, bool]] = set()
        self._captures = Captures(speed.graph and on_cuda, MOST_GRAPHS)

    def velocities(
        self, condition: Tensor, times: Sequence[float], guided: bool, compile: bool
    ) -> tuple[Velocity, Velocity, Callable[[Tensor, float], tuple[Tensor, Tensor]]]:
        """(conditional, null, both) velocities of a batch, as `flow.guided` takes them, at any of `times`.

        condition [P, L, Z], of P prompts with B / P images each, one after the other. The null branch is there when `guided`.
        """
        null = self.dit.null_condition
        condition = condition.to(self.device, self.dit.dtype)
        speed = self.speed
        modulated = guided and speed.together and speed.null
        rows = self._before_the_steps(tuple(dict.fromkeys(times)), modulated) if speed.before else {}

        def at(t: float) -> tuple[Tensor, Tensor | None]:
            if not speed.before:
                return self._before_the_steps((t,), modulated)[t]
            if t not in rows:  # a solver of one's own, which looks where to go next
                rows.update(self._before_the_steps((t,), modulated))
            return rows[t]

        def conditional(x: Tensor, t: float) -> Tensor:
            return self._run(compile, x, at(t)[0], condition)

        def unconditional(x: Tensor, t: float) -> Tensor:
            assert null is not None
            return self._run(compile, x, at(t)[0], null.expand_as(condition).contiguous())

        def both(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            if not speed.together:
                return conditional(x, t), unconditional(x, t)
            time, modulations = at(t)
            if modulations is None:
                assert null is not None
                conditions = torch.cat([condition, null.expand_as(condition)])
                velocities = self._run(compile, torch.cat([x, x]), time, conditions)
            else:
                velocities = self._run(compile, x, time, condition, modulations)
            v_cond, v_null = velocities.chunk(2)
            return v_cond, v_null

        return conditional, unconditional, both

    def is_compiled(self, batch: int, guided: bool, prompts: int) -> bool:
        """Whether batches of so many images of so many prompts, guided or not, have compiled code already."""
        if guided and self.speed.together:
            size = (batch, prompts, True) if self.speed.null else (2 * batch, 2 * prompts, False)
            return size in self._compiled_sizes
        return (batch, prompts, False) in self._compiled_sizes

    def forget(self) -> None:
        """Lets go of captured graphs and the memory they hold."""
        self._captures.forget()

    def _before_the_steps(self, times: Sequence[float], modulated: bool) -> dict[float, tuple[Tensor, Tensor | None]]:
        """For each time its embedding [1, Z] and, if `modulated`, the null branch's modulations [W]: of the blocks that read
        the condition and, if it does, the final layer, side by side."""
        dit, null = self.dit, self.dit.null_condition
        embedded = dit.t_embedder(torch.tensor(times, device=self.device)).to(dit.dtype)  # [K, Z]
        if not modulated:
            return {t: (row, None) for t, row in zip(times, embedded.split(1), strict=True)}
        assert null is not None
        plain, read = self._eager.read(embedded, null.expand(1, 1, -1))  # [K, 1, Z]
        if self.stacked is not None:
            parts = [self.stacked(read, 0, len(self.layers))]
        else:
            parts = [layer(read) for layer in self.layers]
        if self.final_shared:
            parts.append(dit.final_layer.adaLN_modulation[1](plain))
        modulations = torch.cat(parts, dim=-1).flatten(0, 1)  # [K, W]
        return {t: (row, m) for t, row, m in zip(times, embedded.split(1), modulations, strict=True)}

    def _run(self, compile: bool, *inputs: Tensor) -> Tensor:
        function = self._evaluate_compiled if compile else self._evaluate_eager
        # Images, prompts, whether with the null branch's modulations.
        size = (len(inputs[0]), len(inputs[2]), len(inputs) > 3)
        if compile:
            self._compiled_sizes.add(size)
        with attention_kernels(self.device):
            return self._captures.run((*size, compile), function, *inputs, when_it_comes_again=False)

    def _evaluate_eager(self, *inputs: Tensor) -> Tensor:
        return self.evaluate(self._eager, *inputs)

    def _evaluate_compiled(self, *inputs: Tensor) -> Tensor:
        if self._compiled is None:
            own = self._to_compile
            functions: dict[str, Any] = {
                f.name: compiled(value) for f in fields(own) if callable(value := getattr(own, f.name))
            }
            self._compiled = replace(own, **functions)
        return self.evaluate(self._compiled, *inputs)

    def evaluate(
        self, parts: _Parts, x: Tensor, time: Tensor, condition: Tensor, null_modulations: Tensor | None = None
    ) -> Tensor:
        """One evaluation: velocities [B, C, S, S] float32 of x [B, C, S, S], time [1, Z] embedded, condition [P, L, Z].

        With the null branch's modulations [W] at this time: [2B, C, S, S], the conditional velocities and then the null.
        """
        dit = self.dit
        widths = [layer.out_features for layer in self.layers] + [2 * dit.config.width] * self.final_shared
        null: Sequence[Tensor | None] = [None] * len(widths)
        if null_modulations is not None:
            null = torch.split(null_modulations, widths)
        copies = 1 if null_modulations is None else 2
        tokens = x.to(dit.dtype)
        plain, read = parts.read(time, condition)
        h = dit.x_embedder(tokens) + dit.pos_embed  # [B, L, D]
        h = h.repeat(copies, 1, 1) if copies > 1 else h
        state: Deferred | None = None
        for block, modulation, null_modulation in zip(
            self.shared, self._modulations(read, len(condition)), null, strict=False
        ):
            if state is None:  # a sum, of tensors of its own, as all later ones are: so they are one piece of code
                no_more = None if null_modulation is None else null_modulation[:]
                state = Deferred(h, torch.zeros_like(h), modulation[:], no_more) if self.speed.defer else Deferred(h)
            state = parts.block(block, state, modulation, parts.cos, parts.sin, null_modulation)
        assert state is not None
        if self.final_shared:
            v = parts.final(dit.final_layer, state, dit.final_layer.adaLN_modulation[1](plain), null[-1])
        else:  # DDT: what the first blocks made is the others' condition
            s = F.silu(summed(state))
            if hasattr(dit, "s_projector"):
                s = dit.s_projector(s)
            h = torch.cat([dit.s_embedder(tokens)] * copies)
            for block in dit.dit_blocks[dit.encoder_depth :]:
                h = parts.plain_block(block, h, s, dit.decoder_rope_cos, dit.decoder_rope_sin)
            v = parts.plain_final(dit.final_layer, h, s)
        return v.transpose(1, 2).reshape(copies * x.shape[0], *x.shape[1:]).float()  # [B or 2B, C, S, S]

    def _modulations(self, read: Any, prompts: int) -> Iterator[Tensor]:
        """The modulations [P, L, 6D] of each block in turn."""
        if self.stacked is None:
            for layer in self.layers:
                yield layer(read)
            return
        depth = len(self.layers)
        most = max(1, GROUP_ROWS // (prompts * self.dit.config.tokens)) if self.speed.group else 1
        at_once = max(n for n in range(1, most + 1) if depth % n == 0)  # of one size: other strides, other code
        for first in range(0, depth, at_once):
            yield from self.stacked(read, first, first + at_once).chunk(at_once, dim=-1)


def _quantize_blocks(dit: DiT) -> None:
    """The blocks' linears in float8. The embedders, the final linear and the DDT projector stay as they are."""
    for block in dit.dit_blocks:
        for owner, names in ((block.attn, ("qkv", "proj")), (block.mlp, ("w12", "w3"))):
            for name in names:
                linear: Any = getattr(owner, name)
                setattr(owner, name, Float8Linear(linear.weight.detach(), linear.bias.detach()))
