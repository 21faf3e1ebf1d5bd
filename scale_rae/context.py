"""The language model's layers over a batch of conversations: keys and values in memory of fixed size, and what that allows.

- A decoding step is a CUDA graph, and so is any pass whose shape comes again.
- Weights that read the same input are one matrix, and a layer is 16 kernels rather than transformers' 40: at batch 1 each
  takes longer to launch than to run.
- A prefix that conversations share, or that is read twice, is read once (`expand`, `rewind`).
- The device is asked for the next token before the host has looked at this one (`Transfer`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale_rae.speed import Captures, attention_kernels, compiled, graph_memory

if TYPE_CHECKING:
    from scale_rae.language import LanguageModel

_SLOTS = 256  # on CUDA, memory for tokens comes in multiples of this, and so does what a captured pass looks at
_WIDTHS = 32  # on CUDA, passes over several tokens are padded to a multiple of this, so that their shapes come again
_MOST_GRAPHS = 32  # of passes over several tokens, for each size of batch


class FusedLayer(NamedTuple):
    """The weights of one of transformers' Qwen2 layers."""

    norm1: Tensor
    qkv: Tensor  # [(heads + 2 groups) d, H]
    qkv_bias: Tensor
    out: Tensor
    norm2: Tensor
    gate_up: Tensor  # [2 M, H]
    down: Tensor
    eps: float

    def is_of(self, layer: Any) -> bool:
        """Whether these are the very weights of `layer`, and not those of another time."""
        parts = (layer.self_attn.q_proj.weight, layer.self_attn.q_proj.bias, layer.mlp.gate_proj.weight)
        rest = (layer.input_layernorm.weight, layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight)
        mine = (self.qkv, self.qkv_bias, self.gate_up, self.norm1, self.out, self.down)
        return all(a.data_ptr() == b.data_ptr() for a, b in zip((*parts, *rest), mine, strict=True))


def fuse(layer: Any, for_good: bool = False) -> FusedLayer:
    """A layer's weights for `qwen2_layer`. `for_good` makes the layer's own parameters parts of the new matrices."""

    def side_by_side(linears: Sequence[nn.Linear], name: str) -> Tensor:
        parts = [getattr(linear, name) for linear in linears]
        whole = torch.cat([p.detach() for p in parts])
        if for_good:
            for part, place in zip(parts, torch.split(whole, [len(p) for p in parts]), strict=True):
                part.data = place
        return whole

    attention, mlp = layer.self_attn, layer.mlp
    qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
    return FusedLayer(
        norm1=layer.input_layernorm.weight.detach(),
        qkv=side_by_side(qkv, "weight"),
        qkv_bias=side_by_side(qkv, "bias"),
        out=attention.o_proj.weight.detach(),
        norm2=layer.post_attention_layernorm.weight.detach(),
        gate_up=side_by_side((mlp.gate_proj, mlp.up_proj), "weight"),
        down=mlp.down_proj.weight.detach(),
        eps=layer.input_layernorm.variance_epsilon,
    )


def qwen2_layer(
    weights: FusedLayer,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    row: Tensor,
    positions: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """One Qwen2 layer on x [B, T, H] at positions [B, T]; it adds to keys and values [B, slots, G, d].

    cos, sin [B, T, 1, d] are those of the positions, sin's first half negated. mask [B, 1, heads/G · T, reach] is added to
    the attention to the first `reach` slots; without one, x is all there is, and causal. row [B, 1] counts the rows.
    """
    batch, tokens, hidden = x.shape
    groups, d = keys.shape[2:]
    normed = F.rms_norm(x, (hidden,), weights.norm1, weights.eps)
    qkv = F.linear(normed, weights.qkv, weights.qkv_bias).view(batch, tokens, -1, d)
    heads = qkv.shape[2] - 2 * groups
    # Qwen2's rotary embedding turns channel i with channel i + d/2.
    qk, v = torch.split(qkv, [heads + groups, groups], dim=2)
    qk = torch.addcmul(qk * cos, qk.roll(d // 2, dims=-1), sin)
    q, k = torch.split(qk, [heads, groups], dim=2)
    keys[row, positions] = k
    values[row, positions] = v
    if mask is None:
        k, v = (t.repeat_interleave(heads // groups, dim=2).transpose(1, 2) for t in (k, v))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True).transpose(1, 2)
    else:
        # The heads that share keys become queries of one head, so that the keys need not be copied for each.
        k, v = (t[:, : mask.shape[-1]].transpose(1, 2) for t in (keys, values))
        q = q.reshape(batch, tokens, groups, -1, d).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, G, heads/G · T, d]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = out.view(batch, groups, -1, tokens, d).permute(0, 3, 1, 2, 4)  # [B, T, G, heads/G, d]
    x = x + F.linear(out.reshape(batch, tokens, heads * d), weights.out)
    normed = F.rms_norm(x, (hidden,), weights.norm2, weights.eps)
    gate, up = F.linear(normed, weights.gate_up).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, weights.down)


@lru_cache
def _compiled_layer() -> Any:
    return compiled(qwen2_layer)


def self_certainty(logits: Tensor, total: Tensor | None = None) -> Tensor:
    """-mean over the vocabulary of log(V p), p = softmax(logits): [..., V] float32 -> [...]. Higher is more certain.

    `total` is the logits' logsumexp, if it is known.
    """
    total = logits.logsumexp(dim=-1) if total is None else total
    return total - logits.mean(dim=-1) - math.log(logits.shape[-1])


class Context:
    """A batch of conversations as the model remembers them: row b's token at position p has its keys and values in slot p.

    Rows are padded on the right. A query at position p sees slots 0 … p, and a slot that holds padding or something taken
    back is written anew before any query sees it; so nothing has to be masked but by position.
    """

    def __init__(self, language: LanguageModel, rows: int, slots: int) -> None:
        config = language.model.config
        self.language, self.rows, self.batch = language, rows, rows
        self.lengths = [0] * rows
        self._heads = config.num_attention_heads
        self._shape = (config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
        self._layers = language.layers()
        device = language.device
        self._row = torch.arange(rows, device=device)[:, None]
        self._token = torch.zeros(rows, dtype=torch.long, device=device)
        self._position = torch.zeros(rows, dtype=torch.long, device=device)
        self._steps = 0  # taken since `begin`
        self._first = 0  # position of the first of them, of the longest row
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._passes = Captures(language.graph and language.on_cuda, _MOST_GRAPHS)
        self.slots = 0
        self._keys: list[Tensor] = []  # of each layer, [rows, slots, G, d]
        self._values: list[Tensor] = []
        self._grow(slots)

    def restart(self, batch: int, slots: int) -> None:
        """Empties it, for `batch` ≤ `rows` conversations."""
        self.batch, self.lengths = batch, [0] * batch
        self._grow(slots)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Takes back what each conversation has beyond so many tokens."""
        self.lengths = list(lengths)

    def expand(self, context: Context) -> None:
        """Begins every conversation with that of a context of one."""
        (length,) = context.lengths
        self._grow(length)
        for mine, its in zip((*self._keys, *self._values), (*context._keys, *context._values), strict=True):
            mine[: self.batch, :length] = its[:1, :length]
        self.lengths = [length] * self.batch

    def extend(self, rows: Sequence[Tensor] | Tensor) -> Tensor:
        """Hidden states [B, T, H] of new embeddings: [B, T, H], or [T_b, H] for each row, padded on the right."""
        counts = [len(row) for row in rows]
        longest = max(counts)
        width = -(-longest // _WIDTHS) * _WIDTHS if self.language.on_cuda else longest
        if isinstance(rows, Tensor):
            embeds = F.pad(rows, (0, 0, 0, width - longest))
        else:
            embeds = torch.stack([F.pad(row, (0, 0, 0, width - len(row))) for row in rows])  # [B, T, H]
        idle = self.rows - self.batch if self._passes.enabled else 0  # they come along, so that one shape serves all
        embeds = F.pad(embeds, (0, 0, 0, 0, 0, idle))
        past = torch.tensor([*self.lengths, *(0,) * idle], device=embeds.device)
        reach = max(self.lengths) + width
        self._grow(reach)
        positions = past[:, None] + torch.arange(width, device=embeds.device)
        reach = 0 if max(self.lengths) == 0 else self._round(reach)
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        hidden = self._passes.run((width, reach), partial(self._forward, reach=reach), embeds, positions)
        return hidden[: self.batch, :longest]

    def begin(self, hidden: Tensor) -> Tensor:
        """Chooses each conversation's next token, given the hidden states [B, H] before it.

        Returns [3, B] float64: token, its logit, and self-certainty.
        """
        self._position[: self.batch] = torch.tensor(self.lengths, device=self._position.device)
        self._steps, self._first = 0, max(self.lengths)
        self._token[: self.batch], record = self._choose(hidden)
        return record

    def step(self) -> Tensor:
        """Reads the tokens chosen last, and chooses the next: [3, B] as `begin`."""
        reach = self._first + self._steps + 1
        self._grow(reach)
        reach = self._round(reach)
        self._steps += 1
        if not self._passes.enabled:
            return self._step(reach)[:, : self.batch]
        key = (reach, self.language.compile_steps)
        memory = graph_memory(self.language.device)
        if key not in self._graphs:
            saved = self._token.clone(), self._position.clone()
            self._graphs[key] = memory.capture(lambda: self._step(reach))
            self._token.copy_(saved[0])  # capturing took steps of its own
            self._position.copy_(saved[1])
        with memory.lock:
            graph, record = self._graphs[key]
            graph.replay()
            return record[:, : self.batch].clone()

    def _step(self, reach: int) -> Tensor:
        embeds = self.language.model.embed_tokens(self._token)[:, None]
        hidden = self._forward(embeds, self._position[:, None], reach, step=True)[:, 0]
        token, record = self._choose(hidden)
        self._token.copy_(token)
        # Rows whose reply has ended go on too; they must not leave the memory.
        self._position.add_(1).clamp_(max=self.slots - 1)
        return record

    def _choose(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.language.lm_head(hidden).float()  # [B, V]
        best, token = logits.max(dim=-1)
        return token, torch.stack([token.double(), best.double(), self_certainty(logits).double()])

    def _forward(self, embeds: Tensor, positions: Tensor, reach: int, step: bool = False) -> Tensor:
        """Final-normed hidden states [B, T, H] of embeddings at positions [B, T], which see the first `reach` slots up to
        their own; `reach` 0 says that there is nothing before them and they are at 0 … T-1."""
        language, batch = self.language, len(embeds)
        cos, sin = self._cos[positions], self._sin[positions]  # [B, T, 1, d]
        mask = None
        if reach:
            seen = torch.arange(reach, device=embeds.device) <= positions[:, None, :, None]  # [B, 1, T, reach]
            mask = torch.zeros(seen.shape, dtype=embeds.dtype, device=embeds.device).masked_fill_(~seen, -torch.inf)
            mask = mask.expand(-1, self._heads // self._shape[0], -1, -1).flatten(1, 2)[:, None]
        layer = _compiled_layer() if step and language.compile_steps else qwen2_layer
        hidden = embeds
        with attention_kernels(embeds.device):
            for weights, keys, values in zip(self._layers, self._keys, self._values, strict=True):
                memory = (keys[:batch], values[:batch])
                hidden = layer(weights, hidden, cos, sin, *memory, self._row[:batch], positions, mask)
        norm = language.model.norm
        return F.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)

    def _round(self, slots: int) -> int:
        """Slots to look at: on CUDA one of few numbers, for each of which a pass is captured."""
        return min(-(-slots // _SLOTS) * _SLOTS, self.slots) if self.language.on_cuda else slots

    def _grow(self, slots: int) -> None:
        """Makes room for so many tokens a row."""
        if slots <= self.slots:
            return
        step = _SLOTS if self.language.on_cuda else 64
        slots = -(-slots // step) * step
        language, old = self.language, self.slots
        shape = (self.rows, slots, *self._shape)
        for memory in (self._keys, self._values):
            before = list(memory)
            # Zeros, since what is masked must still be finite.
            memory[:] = [torch.zeros(shape, dtype=language.dtype, device=language.device) for _ in self._layers]
            for new, one in zip(memory, before, strict=False):
                new[:, :old] = one
        place = torch.arange(slots, device=language.device)[None]
        cos, sin = language.model.rotary_emb(torch.zeros(1, dtype=language.dtype, device=language.device), place)
        half = sin.shape[-1] // 2
        self._cos = cos[0, :, None]  # [slots, 1, d]
        self._sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)[:, None]
        self.slots = slots
        self._graphs.clear()
        self._passes.forget()


@contextmanager
def lend(free: dict[int, list[Context]], language: LanguageModel, batch: int, tokens: int) -> Iterator[Context]:
    """A context from `free` or a new one; on CUDA it is kept for the next that asks, and has a power of two of rows."""
    if not language.on_cuda:
        yield Context(language, batch, tokens)
        return
    rows = 1 << (batch - 1).bit_length()
    waiting = free.setdefault(rows, [])
    context = waiting.pop() if waiting else Context(language, rows, max(tokens, 4 * _SLOTS))  # growing loses its graphs
    context.restart(batch, tokens)
    yield context
    waiting.append(context)  # not after an error, which may have left it half written


class Transfer:
    """Values on their way to the host, while the device goes on."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.device.type != "cuda":
            self._values = values
            return
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # Of the values' device, which need not be the current one.
        self._event.record(torch.cuda.current_stream(values.device))

    def wait(self) -> list[list[float]]:
        """The values, once they are here."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()  # type: ignore[no-any-return]
