"""The KV cache: keys and values of a batch of conversations, and the passes of the language model that use it.

- On CUDA, each decoding step is a CUDA graph, and so is every pass whose shape occurs twice.
- A prefix that conversations share, or that is read twice, is prefilled once (`expand`, `rewind`).
- The device starts to compute the next token before the host has read the current one (`Transfer`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from scale_rae.compiling import attention_kernels
from scale_rae.cuda_graphs import Captures, GraphMemory, graph_memory
from scale_rae.footprint import CACHE_SLOTS
from scale_rae.qwen2 import Qwen2, compiled_layer, qwen2_layer, self_certainty

_SLOTS = 256  # on CUDA, slots are allocated, and read by captured passes, in multiples of this
_WIDTHS = 32  # on CUDA, passes over several tokens are padded to a multiple of this, so that shapes recur
_MOST_GRAPHS = 32  # captured passes over several tokens, per batch size


class KVCache:
    """A batch of conversations: the keys and values of row b's token at position p are in slot p.

    Rows are padded on the right. A query at position p sees slots 0 … p. A slot with padding or rewound tokens is
    overwritten before any query sees it, so a mask by position is enough.

    On CUDA, passes are captured if `graph`, and decoding steps compiled if `compile_steps`.
    """

    def __init__(self, network: Qwen2, rows: int, slots: int, graph: bool = True, compile_steps: bool = False) -> None:
        self.network, self.rows, self.batch = network, rows, rows
        self.compile_steps = compile_steps
        self.lengths = [0] * rows
        device = network.device
        self._row = torch.arange(rows, device=device)[:, None]
        self._token = torch.zeros(rows, dtype=torch.long, device=device)
        self._position = torch.zeros(rows, dtype=torch.long, device=device)
        self._steps = 0  # taken since `begin`
        self._first = 0  # position of the first of them, of the longest row
        # Captured decoding steps, by slots that they read and whether they are compiled.
        self.captured_steps: dict[tuple[int, bool], tuple[GraphMemory, torch.cuda.CUDAGraph, Tensor]] = {}
        self.passes = Captures(graph and self.network.on_cuda, _MOST_GRAPHS)  # over several tokens
        self.slots = 0
        self._keys: list[Tensor] = []  # of each layer, [rows, slots, G, d]
        self._values: list[Tensor] = []
        self._grow(slots)

    def restart(self, batch: int, slots: int) -> None:
        """Empties the cache, for `batch` ≤ `rows` conversations."""
        self.batch, self.lengths = batch, [0] * batch
        self._grow(slots)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Shortens each conversation to its length in `lengths`."""
        self.lengths = list(lengths)

    def expand(self, other: KVCache, rows: Sequence[int]) -> None:
        """Copies the conversation in row `rows[b]` of another cache to the start of row b, for every b."""
        self.lengths = [other.lengths[row] for row in rows]
        length = max(self.lengths)
        self._grow(length)
        index = torch.tensor(rows, device=self._row.device)
        for mine, its in zip((*self._keys, *self._values), (*other._keys, *other._values), strict=True):
            mine[: self.batch, :length] = its[index, :length]

    def extend(self, rows: Sequence[Tensor] | Tensor) -> Tensor:
        """Hidden states [B, T, H] of new embeddings: [B, T, H], or [T_b, H] for each row, padded on the right."""
        counts = [len(row) for row in rows]
        longest = max(counts)
        width = -(-longest // _WIDTHS) * _WIDTHS if self.network.on_cuda else longest
        embeds = rows if isinstance(rows, Tensor) else pad_sequence(list(rows), batch_first=True)  # [B, T, H]
        idle = self.rows - self.batch if self.passes.enabled else 0  # idle rows run too, so that one shape serves all
        embeds = F.pad(embeds, (0, 0, 0, width - longest, 0, idle))
        past = torch.tensor([*self.lengths, *(0,) * idle], device=embeds.device)
        reach = max(self.lengths) + width
        self._grow(reach)
        positions = past[:, None] + torch.arange(width, device=embeds.device)
        reach = 0 if max(self.lengths) == 0 else self._round(reach)
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        hidden = self.passes.run((width, reach), partial(self.forward, reach=reach), embeds, positions)
        return hidden[: self.batch, :longest]

    def begin(self, hidden: Tensor) -> Tensor:
        """[3, B] float32: each conversation's next token, its logit and self-certainty, from hidden states [B, H]."""
        self._position[: self.batch] = torch.tensor(self.lengths, device=self._position.device)
        self._steps, self._first = 0, max(self.lengths)
        self._token[: self.batch], record = self.choose(hidden)
        return record

    def step(self) -> Tensor:
        """The next tokens, [3, B] as in `begin`, after the model has read the tokens chosen last."""
        reach = self._first + self._steps + 1
        self._grow(reach)
        reach = self._round(reach)
        self._steps += 1
        if not self.passes.enabled:
            return self._step(reach)[:, : self.batch]
        key = (reach, self.compile_steps)
        if key not in self.captured_steps:
            memory = graph_memory(self.network.device)
            saved = self._token.clone(), self._position.clone()
            self.captured_steps[key] = memory, *memory.capture(lambda: self._step(reach))
            self._token.copy_(saved[0])  # capturing took steps of its own
            self._position.copy_(saved[1])
        memory, graph, record = self.captured_steps[key]
        with memory.turn():
            graph.replay()
            return record[:, : self.batch].clone()

    def _step(self, reach: int) -> Tensor:
        embeds = self.network.embed_tokens(self._token)[:, None]
        hidden = self.forward(embeds, self._position[:, None], reach, step=True)[:, 0]
        token, record = self.choose(hidden)
        self._token.copy_(token)
        # Rows whose reply has ended are still stepped; they must not leave the memory.
        self._position.add_(1).clamp_(max=self.slots - 1)
        return record

    def choose(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens [B] after hidden states [B, H], and [3, B]: each token, its logit, its self-certainty."""
        logits = self.network.lm_head(hidden).float()  # [B, V]
        best, token = logits.max(dim=-1)
        # float32 is exact for 2^24 tokens; MPS has no float64.
        return token, torch.stack([token.float(), best, self_certainty(logits)])

    def forward(self, embeds: Tensor, positions: Tensor, reach: int, step: bool = False) -> Tensor:
        """Final-normed hidden states [B, T, H] of embeddings at positions [B, T].

        Each position sees the slots up to its own, of the first `reach`. `reach` 0 means that the positions are 0 … T-1 and
        nothing comes before them.
        """
        batch = len(embeds)
        cos, sin = self._cos[positions], self._sin[positions]  # [B, T, 1, d]
        mask = None
        if reach:
            seen = torch.arange(reach, device=embeds.device) <= positions[:, None, :, None]  # [B, 1, T, reach]
            mask = torch.zeros(seen.shape, dtype=embeds.dtype, device=embeds.device).masked_fill_(~seen, -torch.inf)
            mask = mask.expand(-1, self.network.heads // self.network.groups, -1, -1).flatten(1, 2)[:, None]
        layer = compiled_layer() if step and self.compile_steps else qwen2_layer
        hidden = embeds
        with attention_kernels(embeds.device):
            for weights, keys, values in zip(self.network.layers, self._keys, self._values, strict=True):
                memory = (keys[:batch], values[:batch])
                hidden = layer(weights, hidden, cos, sin, *memory, self._row[:batch], positions, mask)
        norm = self.network.norm
        return F.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)

    def _round(self, slots: int) -> int:
        """Slots that a pass reads: rounded up on CUDA, where a pass is captured per number of slots."""
        return min(-(-slots // _SLOTS) * _SLOTS, self.slots) if self.network.on_cuda else slots

    def _grow(self, slots: int) -> None:
        """Allocates at least `slots` slots per row."""
        if slots <= self.slots:
            return
        step = _SLOTS if self.network.on_cuda else 64
        slots = -(-slots // step) * step
        network, old = self.network, self.slots
        shape = (self.rows, slots, network.groups, network.head_dim)
        for memory in (self._keys, self._values):
            before = list(memory)
            # Zeros, since what is masked must still be finite.
            memory[:] = [
                torch.zeros(shape, dtype=network.dtype, device=network.device) for _ in range(len(network.layers))
            ]
            for new, one in zip(memory, before, strict=False):
                new[:, :old] = one
        place = torch.arange(slots, device=network.device)[None]
        cos, sin = network.rotary_emb(torch.zeros(1, dtype=network.dtype, device=network.device), place)
        half = sin.shape[-1] // 2
        self._cos = cos[0, :, None]  # [slots, 1, d]
        self._sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)[:, None]
        self.slots = slots
        self.captured_steps.clear()
        self.passes.forget()


class CachePool:
    """The caches of a language model. On CUDA, caches and their captured passes are kept and lent again."""

    def __init__(self, graph: bool, compile_steps: bool) -> None:
        self.graph, self.compile_steps = graph, compile_steps
        self._free: dict[int, list[KVCache]] = {}  # by number of rows

    @contextmanager
    def lend(self, network: Qwen2, batch: int, tokens: int) -> Iterator[KVCache]:
        """For a `with`: an empty cache for a batch of conversations, which grows beyond `tokens` per conversation.

        On CUDA its number of rows is a power of two, so that few sizes serve all batches.
        """
        if not network.on_cuda:
            yield KVCache(network, batch, tokens)
            return
        rows = 1 << (batch - 1).bit_length()
        free = self._free.setdefault(rows, [])
        free[:] = [cache for cache in free if cache.network is network]  # not if the weights have moved
        if free:
            cache = free.pop()
        else:  # with spare slots, since growing loses the graphs
            cache = KVCache(network, rows, max(tokens, CACHE_SLOTS), self.graph, self.compile_steps)
        cache.restart(batch, tokens)
        yield cache
        free.append(cache)  # not after an error, which may have left it half written

    @property
    def waiting(self) -> list[KVCache]:
        """The caches that are kept and not lent."""
        return [cache for caches in self._free.values() for cache in caches]

    def forget(self) -> None:
        """Frees the caches that are not lent."""
        self._free.clear()


class Transfer:
    """Values being copied to the host, while the device continues."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.device.type != "cuda":
            self._values = values
            return
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event()
        # Of the values' device, which need not be the current one.
        self._event.record(torch.cuda.current_stream(values.device))

    def wait(self) -> list[list[float]]:
        """The values; waits for the copy."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()
