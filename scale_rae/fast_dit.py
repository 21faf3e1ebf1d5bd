"""FastDiT: the velocity network with all speed tricks. Each trick has one place and one switch, and changes only rounding.

- `before`: time embeddings of all steps are computed before the first.
- `null`: under guidance, the null branch's modulations are also computed before the first step, because its condition is the
  same for every token and image.
- `shared`: images of one prompt share their condition, so the condition's modulations are computed once.
- `together`: both branches of guidance run as one batch, so the weights are read once.
- `pad`: SwiGLU's inner width is padded with zeros to a multiple that tensor cores handle well.
- `group`: for few images, the adaLN products of several blocks become one product that fills the GPU.
- `defer`: a block's final residual addition is left to the next block's first norm, which fuses it.
- `graph`: one evaluation is captured as a CUDA graph for each (images, prompts, guided or not) and replayed.
- `compile`: each kind of block is compiled once, which fuses everything between the matrix products.
- `quantize`: the blocks' linears are quantised (quantization.py); "fp8" multiplies in float8 (float8.py).
- `kernels`: Triton kernels (kernels.py) quantise activations and rotate queries and keys; needs `defer`.
- `attention`: a Triton kernel (kernels.py) computes attention and rotates queries and keys as it reads them.
- `few`: for one or two images in float8, on Hopper, Triton kernels (few_images.py) run between a block's products; needs `kernels`
  and our attention. True: in bfloat16, too, where they gain nothing.

docs/performance.md lists what each trick gains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scale_rae.codes import GROUP_ROWS, PAD_TO
from scale_rae.compiling import attention_kernels, compiled
from scale_rae.cuda_graphs import Captures
from scale_rae.dit import Block, DiT, FinalLayer
from scale_rae.fast_blocks import (
    Attend,
    Deferred,
    attend_rotating,
    deferred_block,
    few_block,
    final_layer,
    per_image,
    quantized_block,
    summed,
    summed_block,
    with_attention,
)
from scale_rae.fast_weights import (
    StackedModulations,
    is_quantized,
    modulation_of,
    pad_swiglu,
    quantize_blocks,
    stacks_modulations,
)
from scale_rae.flow import Velocity
from scale_rae.options import Speed
from scale_rae.quantization import Place, check_quantize, own_kernels, quantize_tokens
from scale_rae.residency import Residency
from scale_rae.toolchain import runs_own_kernels

MOST_GRAPHS = 24  # captured graphs that are kept
FEW_ROWS = 512  # rows (tokens of a batch's images, guided ones twice) up to which `few_block` is faster


@dataclass(frozen=True)
class Functions:
    """The functions that compute the network's parts, compiled or not, and the rotary tables that `block` takes."""

    read: Callable[..., Any]
    block: Callable[..., Deferred]
    plain_block: Callable[..., Tensor]
    final: Callable[..., Tensor]
    plain_final: Callable[..., Tensor]
    # For up to FEW_ROWS rows; never compiled, since its kernels leave nothing to fuse.
    few_block: Callable[..., Deferred] | None
    cos: Tensor
    sin: Tensor

    def block_for(self, rows: int) -> Callable[..., Deferred]:
        """The block function for so many tokens of a batch."""
        return self.block if self.few_block is None or rows > FEW_ROWS else self.few_block


def _read(time: Tensor, condition: Tensor) -> tuple[Tensor, Any]:
    """SiLU(c) twice, for the final layer and for the blocks. time [1, Z], condition [P, L, Z]."""
    read = F.silu(F.silu(time[:, None] + condition))
    return read, read


def _read_quantized(kind: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Any]]:
    """`_read` with a SiLU(c) for the blocks that is quantised for their products of a kind."""

    def read_quantized(time: Tensor, condition: Tensor) -> tuple[Tensor, Any]:
        read, _ = _read(time, condition)
        return read, quantize_tokens(kind, read)

    return read_quantized


def choose_functions(speed: Speed, dit: DiT, compile: bool) -> Functions:
    """The functions for a network on its device. With `compile`, the functions that are to be compiled."""
    block: Callable[..., Deferred] = deferred_block if speed.defer else summed_block
    few: Callable[..., Deferred] | None = None
    cos, sin = dit.rope_cos, dit.rope_sin
    device, kind = dit.pos_embed.device, speed.quantize
    quantizes = kind == "fp8" or (kind == "int8-products" and own_kernels(kind, device, dit.dtype))
    if speed.defer and speed.kernels and runs_own_kernels(device):
        from scale_rae import kernels

        attend = _choose_attention(speed, dit)
        # A compiled block in bfloat16 is as fast with PyTorch's rotation as with ours.
        if not compile or quantizes or attend is not attend_rotating:
            block = with_attention(quantized_block if quantizes else deferred_block, attend)
            cos, sin = kernels.of_axis(cos), kernels.of_axis(sin)
        wanted = kind == "fp8" if speed.few is None else speed.few
        if wanted and attend is kernels.attend_pairs and kind in (None, "fp8") and _few_block_fits(dit):
            few = few_block
    read = _read_quantized(kind) if quantizes and kind is not None else _read
    return Functions(read, block, Block.forward, final_layer, FinalLayer.forward, few, cos, sin)


def _few_block_fits(dit: DiT) -> bool:
    """Whether `few_block` supports a network, which must be on Hopper, where it was measured, in bfloat16."""
    if not _is_hopper(dit.pos_embed.device) or dit.dtype != torch.bfloat16:
        return False
    from scale_rae import few_images

    inner = dit.dit_blocks[0].mlp.w3.in_features  # type: ignore[union-attr]
    return dit.config.tokens % 16 == 0 and few_images.fits(dit.config.width, inner)  # type: ignore[arg-type]


def _choose_attention(speed: Speed, dit: DiT) -> Attend:
    """The attention on CUDA of the blocks that read the condition. (A DDT's remaining blocks use PyTorch's attention.)

    For float32, and for head widths that our kernel does not support, PyTorch's attention is returned. "auto" chooses our kernel
    only on Hopper, where it was measured.
    """
    from scale_rae import kernels

    own = speed.attention == "own" or (speed.attention == "auto" and _is_hopper(dit.pos_embed.device))
    own = own and kernels.attention_fits(dit.config, dit.dtype)
    return kernels.attend_pairs if own else attend_rotating


def _is_hopper(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] == 9


class FastDiT:
    """A velocity network with the tricks of `speed`. It computes `DiT.forward`, up to rounding.

    Padding, stacking and quantising change the weights of `dit` in place. Afterwards `dit` itself can still be used.

    Raises:
        InputError, DeviceError: an option does not exist, or this device does not support it.
    """

    def __init__(self, dit: DiT, speed: Speed, residency: Residency | None = None) -> None:
        speed.check()
        self.dit, self.speed = dit, speed
        self.device = dit.pos_embed.device
        residency = residency or Residency("none", self.device)
        on_cuda = self.device.type == "cuda"
        if speed.quantize is not None:
            check_quantize(speed.quantize, self.device, dit.dtype)
            if not is_quantized(dit):
                with torch.inference_mode(False), torch.no_grad():
                    quantize_blocks(dit, speed.quantize, Place(self.device, self.device, dit.dtype))
        self.final_shared = dit.config.encoder_depth is None
        if speed.pad and on_cuda and speed.quantize is None:
            pad_swiglu(dit, PAD_TO)
        blocks: Sequence[Any] = list(dit.dit_blocks)
        self.layers: list[Any] = [block.adaLN_modulation[1] for block in blocks[: dit.encoder_depth]]
        self.stacked: StackedModulations | None = None
        if stacks_modulations(speed, self.device) and not residency.streams:
            self.stacked = StackedModulations(self.layers)
        stacked = () if self.stacked is None else (self.stacked.weight, self.stacked.bias)
        blocks = residency.keep_blocks("dit", blocks, stacked, [dit.t_embedder])
        self.shared = blocks[: dit.encoder_depth]  # blocks whose condition does not depend on x
        self.own_condition = blocks[dit.encoder_depth :]
        self._eager, self._to_compile = (choose_functions(speed, dit, compile) for compile in (False, True))
        self._compiled: Functions | None = None
        self._compiled_sizes: set[tuple[int, int, bool]] = set()
        self._captures = Captures(speed.graph and on_cuda, MOST_GRAPHS)

    def velocities(
        self,
        condition: Tensor,
        times: Sequence[float],
        guided: bool,
        compile: bool,
        prompt_of: Tensor | None = None,
    ) -> tuple[Velocity, Velocity, Callable[[Tensor, float], tuple[Tensor, Tensor]]]:
        """(conditional, null, both) velocity functions of a batch, for `flow.guided`.

        condition [P, L, Z] has P prompts, with B / P consecutive images per prompt or, in any order, those that `prompt_of`
        [B] names by the numbers of their prompts. `times` are the times at which the solver will evaluate. The null branch is
        only available if `guided`.
        """
        null = self.dit.null_condition
        condition = condition.to(self.device, self.dit.dtype)
        prompt_of = None if prompt_of is None else prompt_of.to(self.device)
        speed = self.speed
        modulated = guided and speed.together and speed.null
        rows = self._before_the_steps(tuple(dict.fromkeys(times)), modulated) if speed.before else {}

        def at(t: float) -> tuple[Tensor, Tensor | None]:
            if not speed.before:
                return self._before_the_steps((t,), modulated)[t]
            if t not in rows:  # a solver that chooses its times while it runs
                rows.update(self._before_the_steps((t,), modulated))
            return rows[t]

        def conditional(x: Tensor, t: float) -> Tensor:
            return self._run(compile, x, at(t)[0], condition, prompt_of=prompt_of)

        def unconditional(x: Tensor, t: float) -> Tensor:
            assert null is not None
            return self._run(compile, x, at(t)[0], null.expand_as(condition).contiguous(), prompt_of=prompt_of)

        def both(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            if not speed.together:
                return conditional(x, t), unconditional(x, t)
            time, modulations = at(t)
            if modulations is None:
                assert null is not None
                conditions = torch.cat([condition, null.expand_as(condition)])
                twice = None if prompt_of is None else torch.cat([prompt_of, prompt_of + len(condition)])
                velocities = self._run(compile, torch.cat([x, x]), time, conditions, prompt_of=twice)
            else:
                velocities = self._run(compile, x, time, condition, modulations, prompt_of)
            v_cond, v_null = velocities.chunk(2)
            return v_cond, v_null

        return conditional, unconditional, both

    def is_compiled(self, batch: int, guided: bool, prompts: int) -> bool:
        """Whether code is compiled for batches of `batch` images of `prompts` prompts, with or without guidance."""
        if guided and self.speed.together:
            size = (batch, prompts, True) if self.speed.null else (2 * batch, 2 * prompts, False)
            return size in self._compiled_sizes
        return (batch, prompts, False) in self._compiled_sizes

    def forget(self) -> None:
        """Frees captured graphs and their memory."""
        self._captures.forget()

    def _before_the_steps(self, times: Sequence[float], modulated: bool) -> dict[float, tuple[Tensor, Tensor | None]]:
        """Time -> (embedding [1, Z], the null branch's modulations [W] if `modulated`, else None).

        The modulations are concatenated over the blocks that read the condition and, without a DDT, the final layer.
        """
        dit, null = self.dit, self.dit.null_condition
        embedded = dit.t_embedder(torch.tensor(times, device=self.device)).to(dit.dtype)  # [K, Z]
        if not modulated:
            return {t: (row, None) for t, row in zip(times, embedded.split(1), strict=True)}
        assert null is not None
        plain, read = self._eager.read(embedded, null.expand(1, 1, -1))  # [K, 1, Z]
        if self.stacked is not None:
            parts = [self.stacked(read, 0, len(self.layers))]
        else:
            parts = [modulation_of(block, read) for block in self.shared]
        if self.final_shared:
            parts.append(dit.final_layer.adaLN_modulation[1](plain))
        modulations = torch.cat(parts, dim=-1).flatten(0, 1)  # [K, W]
        return {t: (row, m) for t, row, m in zip(times, embedded.split(1), modulations, strict=True)}

    def _run(
        self,
        compile: bool,
        x: Tensor,
        time: Tensor,
        condition: Tensor,
        null_modulations: Tensor | None = None,
        prompt_of: Tensor | None = None,
    ) -> Tensor:
        size = (len(x), len(condition), null_modulations is not None)
        if compile:
            self._compiled_sizes.add(size)
        options = {"null_modulations": null_modulations, "prompt_of": prompt_of}
        given = {name: value for name, value in options.items() if value is not None}

        def function(x: Tensor, time: Tensor, condition: Tensor, *values: Tensor) -> Tensor:
            functions = self._compiled_functions() if compile else self._eager
            return self.evaluate(functions, x, time, condition, **dict(zip(given, values, strict=True)))

        key = (*size, prompt_of is not None, compile)
        with attention_kernels(self.device):
            return self._captures.run(key, function, x, time, condition, *given.values(), when_it_comes_again=False)

    def _compiled_functions(self) -> Functions:
        if self._compiled is None:
            own = self._to_compile
            functions: dict[str, Any] = {
                f.name: compiled(value)
                for f in fields(own)
                if f.name != "few_block" and callable(value := getattr(own, f.name))
            }
            self._compiled = replace(own, **functions)
        return self._compiled

    def evaluate(
        self,
        functions: Functions,
        x: Tensor,
        time: Tensor,
        condition: Tensor,
        null_modulations: Tensor | None = None,
        prompt_of: Tensor | None = None,
    ) -> Tensor:
        """Velocities [B, C, S, S] float32 of x [B, C, S, S]; time [1, Z] is embedded, condition [P, L, Z].

        With the null branch's modulations [W] at this time: [2B, C, S, S], first the conditional branch, then the null branch.
        `prompt_of` [B] has the number of each image's prompt; without it, each prompt has B / P consecutive images.
        """
        dit = self.dit
        widths = [layer.out_features for layer in self.layers] + [2 * dit.config.width] * self.final_shared
        null: Sequence[Tensor | None] = [None] * len(widths)
        if null_modulations is not None:
            null = torch.split(null_modulations, widths)
        copies = 1 if null_modulations is None else 2
        tokens = x.to(dit.dtype)
        plain, read = functions.read(time, condition)
        h = dit.x_embedder(tokens) + dit.pos_embed  # [B, L, D]
        h = h.repeat(copies, 1, 1) if copies > 1 else h
        state: Deferred | None = None
        block_of = functions.block_for(h.shape[0] * h.shape[1])
        modulated = self._modulated_blocks(read, len(condition), prompt_of)
        for (block, modulation), null_modulation in zip(modulated, null, strict=False):
            if state is None:  # a sum like all later states, so that one compiled block serves all
                no_more = None if null_modulation is None else null_modulation[:]
                state = Deferred(h, torch.zeros_like(h), modulation[:], no_more) if self.speed.defer else Deferred(h)
            state = block_of(block, state, modulation, functions.cos, functions.sin, null_modulation)
        assert state is not None
        if self.final_shared:
            modulation = per_image(dit.final_layer.adaLN_modulation[1](plain), prompt_of)
            v = functions.final(dit.final_layer, state, modulation, null[-1])
        else:  # DDT: the output of the first blocks is the condition of the remaining blocks
            s = F.silu(summed(state))
            if hasattr(dit, "s_projector"):
                s = dit.s_projector(s)
            h = torch.cat([dit.s_embedder(tokens)] * copies)
            for block in self.own_condition:
                h = functions.plain_block(block, h, s, dit.decoder_rope_cos, dit.decoder_rope_sin)
            v = functions.plain_final(dit.final_layer, h, s)
        return v.transpose(1, 2).reshape(copies * x.shape[0], *x.shape[1:]).float()  # [B or 2B, C, S, S]

    def _modulated_blocks(self, read: Any, prompts: int, prompt_of: Tensor | None) -> Iterator[tuple[Block, Tensor]]:
        """The blocks that read the condition, each with its modulations [P, L, 6D], or [B, L, 6D] with `prompt_of` [B]."""
        if self.stacked is None:
            for block in self.shared:
                yield block, per_image(modulation_of(block, read), prompt_of)
            return
        yield from zip(self.shared, self._modulations(self.stacked, read, prompts, prompt_of), strict=True)

    def _modulations(
        self, stacked: StackedModulations, read: Any, prompts: int, prompt_of: Tensor | None
    ) -> Iterator[Tensor]:
        depth = len(self.layers)
        # Weights that are converted for each product are converted a block at a time: those of eight blocks would take 0.4 GB.
        group = self.speed.group and self.speed.quantize not in ("int8", "fp8-storage", "nf4")
        most = max(1, GROUP_ROWS // (prompts * self.dit.config.tokens)) if group else 1
        at_once = max(n for n in range(1, most + 1) if depth % n == 0)  # equal groups: other strides compile other code
        for first in range(0, depth, at_once):
            for modulation in stacked(read, first, first + at_once).chunk(at_once, dim=-1):
                yield per_image(modulation, prompt_of)
