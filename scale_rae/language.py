"""The language model: Qwen2 (transformers) with latent queries and an image projector, and our decoding loop.

Text and condition are a function of the conversation alone; many images of one prompt differ only in the noise. The
results do not depend on what else is in the batch.

What makes it fast: keys and values in memory of fixed size, so that a decoding step can be captured as a CUDA graph and
its layers compiled; no waiting for the host between tokens; prefixes read once (`Context.rewind`, `Context.expand`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from scale_rae.config import ScaleRAEConfig
from scale_rae.prompt import IMAGE
from scale_rae.speed import attention_kernels, capture, compiled

_LOGIT_ROWS = 512  # rows of a [rows, vocabulary] float32 block: 0.3 GB at Qwen2.5's vocabulary
_SLOTS = 256  # on CUDA, memory for tokens comes in multiples of this, and so does what a captured step looks at
_USUAL_REPLY = 64  # tokens for that there is memory from the start; longer replies get more when they need it

TokenListener = Callable[[int, int], bool]
"""Called as `listen(row, token)` with each token as it is chosen; returns whether that reply is to go on."""


@dataclass
class Conversation:
    """Token ids with IMAGE where a latent [L, C] goes: `latent`, or those in `latents` one after the other."""

    ids: list[int]
    latent: Tensor | None = None
    latents: Sequence[Tensor] = ()

    @property
    def shown(self) -> list[Tensor]:
        """The latents, in the order of the IMAGEs."""
        return [*([] if self.latent is None else [self.latent]), *self.latents]


@dataclass
class Reply:
    """What the model said. `logits` and `confidences` are those of each chosen token (REFERENCE §10).

    `condition` [L, Z], in the model's dtype, is there when the reply asks for an image (its last id is <im_start>).
    """

    ids: list[int] = field(default_factory=list)
    logits: list[float] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    condition: Tensor | None = None


class LanguageModel(nn.Module):
    """Qwen2 with `latent_queries` and `mm_projector`; parameter names are the published ones."""

    def __init__(self, config: ScaleRAEConfig) -> None:
        super().__init__()
        qwen = Qwen2Config(**config.language)
        qwen._attn_implementation = "sdpa"
        self.config = config
        self.model = Qwen2Model(qwen)
        with torch.device("cpu"):  # also when all else is on "meta": its table is computed, not loaded
            self.model.rotary_emb = Qwen2RotaryEmbedding(config=qwen)
        self.model.latent_queries = nn.Parameter(torch.zeros(config.tokens, config.hidden_size))
        self.model.mm_projector = _projector(config.channels, config.hidden_size, config.projector_depth)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.condition_projector:
            self.diff_head_projector = nn.Linear(config.hidden_size, config.dit.condition_width)
        self.graph = True  # on CUDA, whether decoding steps are captured
        self.compile_steps = False  # whether their layers are compiled
        self._compiled_layer: Callable[..., Tensor] | None = None
        self._contexts: dict[int, list[Context]] = {}

    @property
    def compiled_layer(self) -> Callable[..., Tensor]:
        """`qwen2_layer`, compiled for each shape it meets."""
        if self._compiled_layer is None:
            self._compiled_layer = compiled(qwen2_layer)
        return self._compiled_layer

    def forget(self) -> None:
        """Lets go of contexts kept for later and the memory they hold."""
        self._contexts.clear()

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def on_cuda(self) -> bool:
        """Whether memory and steps are those for CUDA: fixed, captured, asked for ahead of the host."""
        return self.device.type == "cuda"

    def condition(self, hidden: Tensor) -> Tensor:
        """Condition [..., L, Z] from the final-normed hidden states [..., L, H] at the latent queries."""
        return self.diff_head_projector(hidden) if self.config.condition_projector else hidden

    def embed(self, conversation: Conversation) -> Tensor:
        """Input embeddings [T, H]: tokens, and the projected latent in IMAGE's place."""
        parts: list[Tensor] = []
        shown = iter(conversation.shown)
        for kind, ids in _runs(conversation.ids):
            if kind == IMAGE:
                parts.append(self.model.mm_projector(next(shown).to(self.device, self.dtype)))
            else:
                parts.append(self.model.embed_tokens(torch.tensor(ids, device=self.device)))
        return torch.cat(parts)

    @torch.inference_mode()
    def reply(
        self,
        conversations: Sequence[Conversation],
        limits: Sequence[int],
        stop: int,
        image_start: int,
        listen: TokenListener | None = None,
    ) -> list[Reply]:
        """Greedy replies to a batch of conversations, each ended by `stop` (left out), `image_start`, or its limit of
        tokens, or by `listen`."""
        rows = [self.embed(c) for c in conversations]
        longest = max(len(row) for row in rows)
        with self.context(len(rows), longest + min(max(limits), _USUAL_REPLY) + 1 + self.config.tokens) as context:
            return self.reply_in(context, rows, limits, stop, image_start, listen=listen)

    def reply_in(
        self,
        context: Context,
        rows: Sequence[Tensor],
        limits: Sequence[int],
        stop: int,
        image_start: int,
        draw: bool = True,
        listen: TokenListener | None = None,
    ) -> list[Reply]:
        """`reply` after the embeddings [T, H] that each conversation of a context goes on with.

        Without `draw`, replies that ask for an image get no condition.
        """
        hidden = context.extend(rows)
        last = hidden[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]  # [B, H]
        start = list(context.lengths)
        replies = [Reply() for _ in rows]
        open_rows = [row for row, limit in enumerate(limits) if limit > 0]
        most = max(limits)
        # On CUDA, a token is asked for before the host has looked at the one before it: the GPU never waits for the
        # host, at the price of one step too many when the last reply ends.
        ahead = 1 if self.on_cuda else 0
        asked, seen = 1, 0
        underway = deque([_Transfer(context.begin(last))]) if open_rows else deque[_Transfer]()
        while open_rows:
            while asked <= seen + ahead and asked < most:
                underway.append(_Transfer(context.step()))
                asked += 1
            values = underway.popleft().wait()
            seen += 1
            for row in list(open_rows):
                chosen = int(values[0][row])
                if chosen == stop:
                    open_rows.remove(row)
                    continue
                reply = replies[row]
                reply.ids.append(chosen)
                reply.logits.append(values[1][row])
                reply.confidences.append(values[2][row])
                go_on = listen is None or listen(row, chosen)
                if chosen == image_start or len(reply.ids) == limits[row] or not go_on:
                    open_rows.remove(row)

        drawing = [row for row, reply in enumerate(replies) if reply.ids and reply.ids[-1] == image_start]
        if drawing and draw:
            # The token <im_start> was chosen, but not read yet.
            context.rewind([length + max(0, len(r.ids) - 1) for length, r in zip(start, replies, strict=True)])
            read = self.model.embed_tokens(torch.tensor([image_start], device=self.device))
            queries = torch.cat([read, self.model.latent_queries.to(self.dtype)])  # [1 + L, H]
            hidden = context.extend([queries] * len(rows))
            for row in drawing:
                replies[row].condition = self.condition(hidden[row, 1:])
        return replies

    def context(self, batch: int, tokens: int) -> AbstractContextManager[Context]:
        """An empty context for a batch of conversations, at first of so many tokens each, to be used in a `with`.

        On a GPU, the memory is that of an earlier one of the size if that isn't in use, with decoding steps captured.
        """
        return _lend(self._contexts, self, batch, tokens)

    @torch.inference_mode()
    def confidence_and_loss(self, hidden: Tensor, targets: Sequence[int] | None = None) -> tuple[Tensor, Tensor | None]:
        """Self-certainty [T] at hidden states [T, H] and, given the T tokens that follow them, cross-entropies [T]."""
        confidences, losses = [], []
        for start in range(0, len(hidden), _LOGIT_ROWS):
            logits = self.lm_head(hidden[start : start + _LOGIT_ROWS]).float()
            confidences.append(self_certainty(logits))
            if targets is not None:
                target = torch.tensor(targets[start : start + _LOGIT_ROWS], device=logits.device)
                losses.append(nn.functional.cross_entropy(logits, target, reduction="none"))
        return torch.cat(confidences), torch.cat(losses) if targets is not None else None


class Context:
    """A batch of conversations as the model remembers them: keys and values of fixed size, row b's token at position p
    in slot p.

    Rows are padded on the right. A query at position p sees slots 0 … p, and a slot that holds padding or something taken
    back is written anew before any query sees it; so nothing has to be masked but by position.
    """

    def __init__(self, language: LanguageModel, rows: int, slots: int) -> None:
        config = language.model.config
        self.language, self.rows, self.batch = language, rows, rows
        self.lengths = [0] * rows
        self._shape = (config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
        self._layers: Any = language.model.layers
        device = language.device
        self._row = torch.arange(rows, device=device)[:, None]
        self._token = torch.zeros(rows, dtype=torch.long, device=device)
        self._position = torch.zeros(rows, dtype=torch.long, device=device)
        self._steps = 0  # taken since `begin`
        self._first = 0  # position of the first of them, of the longest row
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
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

    def extend(self, rows: Sequence[Tensor]) -> Tensor:
        """Hidden states [B, T, H] of new embeddings, [T_b, H] for each row, padded on the right."""
        longest = max(len(row) for row in rows)
        if all(row is rows[0] for row in rows):
            embeds = rows[0].expand(len(rows), -1, -1)
        else:
            embeds = torch.stack([nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])  # [B, T, H]
        past = torch.tensor(self.lengths, device=embeds.device)
        reach = max(self.lengths) + longest
        self._grow(reach)
        positions = past[:, None] + torch.arange(longest, device=embeds.device)
        fresh = max(self.lengths) == 0
        hidden = self._forward(embeds, positions, 0 if fresh else self._round(reach))
        self.lengths = [length + len(row) for length, row in zip(self.lengths, rows, strict=True)]
        return hidden

    def begin(self, hidden: Tensor) -> Tensor:
        """Chooses each conversation's next token, given the hidden states [B, H] before it.

        Returns [3, B] float64: token, its logit, and self-certainty.
        """
        self._position[: self.batch] = torch.tensor(self.lengths, device=self._position.device)
        self._steps, self._first = 0, max(self.lengths)
        self._token[: self.batch], record = self._choose(hidden)
        return record

    def step(self) -> Tensor:
        """Reads the tokens chosen last, and chooses the next: [3, B] as `begin`, overwritten by the next step."""
        reach = self._first + self._steps + 1
        self._grow(reach)
        reach = self._round(reach)
        self._steps += 1
        if not (self.language.graph and self.language.on_cuda):
            return self._step(reach)[:, : self.batch]
        key = (reach, self.language.compile_steps)
        if key not in self._graphs:
            saved = self._token.clone(), self._position.clone()
            graph, record = capture(lambda: self._step(reach), self.language.device)
            self._token.copy_(saved[0])  # capturing took steps of its own
            self._position.copy_(saved[1])
            self._graphs[key] = graph, record
        graph, record = self._graphs[key]
        graph.replay()
        return record[:, : self.batch]

    def _step(self, reach: int) -> Tensor:
        embeds = self.language.model.embed_tokens(self._token)[:, None]
        hidden = self._forward(embeds, self._position[:, None], reach, step=True)[:, 0]
        token, record = self._choose(hidden)
        self._token.copy_(token)
        # Rows whose reply has ended go on too; they must not leave the cache.
        self._position.add_(1).clamp_(max=self.slots - 1)
        return record

    def _choose(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.language.lm_head(hidden).float()  # [B, V]
        best, token = logits.max(dim=-1)
        return token, torch.stack([token.double(), best.double(), self_certainty(logits).double()])

    def _forward(self, embeds: Tensor, positions: Tensor, reach: int, step: bool = False) -> Tensor:
        """Final-normed hidden states [B, T, H] of embeddings at positions [B, T], which see the first `reach` slots up to
        their own; `reach` 0 says that there is nothing before them and they are at 0 … T-1."""
        language = self.language
        batch = len(embeds)
        cos, sin = self._cos[positions], self._sin[positions]  # [B, T, d]
        mask = None
        if reach:
            seen = torch.arange(reach, device=embeds.device) <= positions[:, None, :, None]  # [B, 1, T, reach]
            mask = torch.zeros(seen.shape, dtype=embeds.dtype, device=embeds.device).masked_fill_(~seen, -torch.inf)
        layer_function = language.compiled_layer if step and language.compile_steps else qwen2_layer
        hidden = embeds
        with attention_kernels(embeds.device):
            for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
                memory = (keys[:batch], values[:batch])
                hidden = layer_function(layer, hidden, cos, sin, *memory, self._row[:batch], positions, mask)
        return language.model.norm(hidden)  # type: ignore[no-any-return]

    def _round(self, slots: int) -> int:
        """Slots to look at: on a GPU one of few numbers, for each of which a step is captured."""
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
        self._cos, self._sin = cos[0], sin[0]  # [slots, d]
        self.slots = slots
        self._graphs.clear()


def qwen2_layer(
    layer: Any,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    row: Tensor,
    positions: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """One of transformers' Qwen2 layers on x [B, T, H], with keys and values [B, slots, G, d] that it adds its own to.

    mask [B, 1, T, reach] is added to the attention to the first `reach` slots; without one, x is all there is, and causal.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(x)
    q, k, v = (
        project(normed).view(*x.shape[:2], -1, keys.shape[-1])  # [B, T, heads, d]
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    cos, sin = cos[:, :, None], sin[:, :, None]
    q, k = q * cos + _half_turn(q) * sin, k * cos + _half_turn(k) * sin
    keys[row, positions] = k
    values[row, positions] = v
    batch, tokens, heads, width = q.shape
    groups = keys.shape[2]
    if mask is None:
        k, v = (t.repeat_interleave(heads // groups, dim=2).transpose(1, 2) for t in (k, v))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True).transpose(1, 2)
    else:
        # The heads that share keys become queries of one head, so that the keys need not be copied for each.
        k, v = (t[:, : mask.shape[-1]].transpose(1, 2) for t in (keys, values))
        q = q.view(batch, tokens, groups, -1, width).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, G, heads/G · T, d]
        mask = mask.expand(-1, heads // groups, -1, -1).flatten(1, 2)[:, None]  # [B, 1, heads/G · T, reach]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = out.view(batch, groups, -1, tokens, width).permute(0, 3, 1, 2, 4)  # [B, T, G, heads/G, d]
    x = x + attention.o_proj(out.reshape(batch, tokens, heads * width))
    return x + layer.mlp(layer.post_attention_layernorm(x))  # type: ignore[no-any-return]


def _half_turn(x: Tensor) -> Tensor:
    """(x₀ … x_{d/2-1}, x_{d/2} … x_{d-1}) → (-x_{d/2} … , x₀ …): Qwen2's rotary embedding turns halves, not neighbours."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


@contextmanager
def _lend(free: dict[int, list[Context]], language: LanguageModel, batch: int, tokens: int) -> Iterator[Context]:
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


class _Transfer:
    """Values on their way to the host, while the device goes on."""

    def __init__(self, values: Tensor) -> None:
        # A copy either way: the next step writes where this one wrote.
        self._event: torch.cuda.Event | None = None
        if values.device.type != "cuda":
            self._values = values.clone()
            return
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> list[list[float]]:
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()  # type: ignore[no-any-return]


def self_certainty(logits: Tensor) -> Tensor:
    """-mean over the vocabulary of log(V p), p = softmax(logits): [..., V] float32 -> [...]. Higher is more certain."""
    return logits.logsumexp(dim=-1) - logits.mean(dim=-1) - math.log(logits.shape[-1])


def _projector(channels: int, hidden: int, depth: int) -> nn.Module:
    if depth == 0:
        return nn.Linear(channels, hidden)
    layers: list[nn.Module] = [nn.Linear(channels, hidden)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(hidden, hidden)]
    return nn.Sequential(*layers)


def _runs(ids: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Splits ids into runs of tokens (kind 0) and single images (kind IMAGE)."""
    runs: list[tuple[int, list[int]]] = []
    for i in ids:
        if i == IMAGE:
            runs.append((IMAGE, [i]))
        elif runs and runs[-1][0] == 0:
            runs[-1][1].append(i)
        else:
            runs.append((0, [i]))
    return runs
