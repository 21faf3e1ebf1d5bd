"""The language model: Qwen2 with latent queries and an image projector, and the decoding loop: replies and conditions.

Text and condition depend only on the conversation, not on the rest of the batch; images of one prompt differ only in their noise.
qwen2.py has the layers, kv_cache.py the KV cache.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from scale_rae.checkpoint import RowSink
from scale_rae.codes import attention_kind
from scale_rae.config import ScaleRAEConfig
from scale_rae.errors import InputError, counted
from scale_rae.kv_cache import CachePool, KVCache, Transfer
from scale_rae.options import LANGUAGE_KINDS, Speed
from scale_rae.prompt import IMAGE, ChatTokenizer, TextStream
from scale_rae.quantization import (
    Place,
    QuantizedEmbedding,
    QuantizedLinear,
    check_widths,
    quantize_linears,
    rows_in_chunks,
)
from scale_rae.qwen2 import FusedLayer, Qwen2, fuse, self_certainty
from scale_rae.qwen2_modules import Qwen2Modules
from scale_rae.residency import HostEmbedding, Residency, RowsOneByOne, tensors_of

_LOGIT_ROWS = 512  # rows of a [rows, vocabulary] float32 block: 0.3 GB at Qwen2.5's vocabulary
_FUSED = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
_USUAL_REPLY = 64  # tokens; a cache is made for replies of this length and grows for longer ones

TokenListener = Callable[[int, int], bool]
"""Called as `listen(row, token)` with each token as it is chosen; returns whether that reply is to go on."""

TextListener = Callable[[int, str], bool]
"""Called as `listen(row, text)` with a reply so far, whenever whole characters were added; returns as TokenListener."""


@dataclass
class Conversation:
    """Token ids with IMAGE in place of each latent [L, C]; first that of `latent`, then those of `latents`."""

    ids: list[int]
    latent: Tensor | None = None
    latents: Sequence[Tensor] = ()

    def __repr__(self) -> str:
        return f"Conversation({counted(len(self.ids), 'token')}, {counted(len(self.shown), 'latent')})"

    @property
    def shown(self) -> list[Tensor]:
        """All latents, in the order of the IMAGEs."""
        return [*([] if self.latent is None else [self.latent]), *self.latents]


@dataclass
class Reply:
    """A reply's token ids, with the logit and confidence of each chosen token (REFERENCE §10).

    `condition` [L, Z], in the model's dtype, exists if the reply asks for an image (its last id is <im_start>), unless drawing
    was switched off.
    """

    ids: list[int] = field(default_factory=list)
    logits: list[float] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    condition: Tensor | None = None

    def __repr__(self) -> str:
        asked = "" if self.condition is None else f", condition {list(self.condition.shape)}"
        return f"Reply({counted(len(self.ids), 'token')}{asked})"


class LanguageModel(nn.Module):
    """Qwen2 with `latent_queries` and `mm_projector`; parameter names are the published ones.

    `speed` switches, on CUDA, captured passes, compiled decoding steps, and asking for tokens ahead of the host.
    """

    def __init__(self, config: ScaleRAEConfig, speed: Speed | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = Qwen2Modules(config.language)
        self.model.latent_queries = nn.Parameter(torch.zeros(config.tokens, config.hidden_size))
        if config.vae is None:  # else unused: it takes the encoder's latents, but the model draws others
            self.model.mm_projector = projector(config.channels, config.hidden_size, config.projector_depth)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.condition_projector:
            self.diff_head_projector = nn.Linear(config.hidden_size, config.dit.condition_width)
        self._network: Qwen2 | None = None
        self._stays = False  # whether its weights' places are `residency`'s
        self._set(speed or Speed())

    def _set(self, speed: Speed) -> None:
        self._ahead, self._quantize = speed.ahead, speed.quantize
        # Not for "auto": only tens of thousands of tokens repay the seconds of compiling.
        self.caches = CachePool(speed.graph, compile_steps=speed.compile == "on")

    def with_speed(self, speed: Speed) -> LanguageModel:
        """The same model, sharing its weights, with another `speed`."""
        other = copy.copy(self)
        other._set(speed)
        return other

    def quantize(self, kind: str, place: Place) -> dict[str, RowSink]:
        """Quantises the layers' linears, the head and the token embedding, in place; layer by layer where weights exist.

        Without weights (on "meta"), the sinks take those of a checkpoint. nf4 keeps attention, the head and the embedding in int8.

        Raises:
            InputError: for a linear whose numbers of inputs or outputs the kind cannot have.
        """
        sinks: dict[str, RowSink] = {}
        for i, layer in enumerate(self.model.layers):
            for part, names in _FUSED:
                owner, path = getattr(layer, part), f"model.layers.{i}.{part}"
                own = attention_kind(kind) if part == "self_attn" else kind
                for name in names:
                    check_widths(own, *getattr(owner, name).weight.shape)
                sinks |= quantize_linears([(f"{path}.{name}", owner, name) for name in names], own, place)
        by_rows = "int8" if kind == "nf4" else kind
        tied = self.lm_head.weight is self.model.embed_tokens.weight
        rows: Any = self.model.embed_tokens
        (table,) = place.room(by_rows, [rows.num_embeddings], rows.embedding_dim)
        sinks["model.embed_tokens.weight"] = sink = place.sink([table], rows.embedding_dim)
        if not rows.weight.is_meta:
            sink.store(0, rows.weight.detach())
        self.model.embed_tokens = QuantizedEmbedding(table, place.dtype)  # type: ignore[assignment]
        if tied:
            self.lm_head = QuantizedLinear(table, None)  # type: ignore[assignment]
        else:
            sinks |= quantize_linears([("lm_head", self, "lm_head")], by_rows, place)
        return sinks

    @property
    def is_quantized(self) -> bool:
        return isinstance(self.lm_head, QuantizedLinear)

    def fuse(self, residency: Residency | None = None) -> None:
        """Fuses projections that share an input, in place: parameters become views of the fused matrices.

        Before, the weights are quantised, if `speed` says so and they are not yet. `residency` takes layers, head and embedding.
        """
        residency = residency or Residency("none", self.device)
        kind = LANGUAGE_KINDS.get(self._quantize or "")
        with torch.inference_mode(False), torch.no_grad():
            if kind is not None and not self.is_quantized:
                self.quantize(kind, Place(self.device, self.device, self.dtype))
            layers = self._kept([fuse(layer, in_place=True) for layer in self.model.layers], residency)
            self._network = self._as_network(layers)
            self._stays = residency.offloads

    def _kept(self, layers: Sequence[FusedLayer], residency: Residency) -> Sequence[FusedLayer]:
        """The layers for the network, once `residency` has taken all large weights.

        Where blocks are streamed, the head comes after the layers in chunks of about a layer's size, and the embedding's table
        stays on the host, where tokens are looked up.
        """
        table: nn.Module = self.model.embed_tokens
        weights = [self.model.layers, table, self.lm_head]
        if not residency.streams:
            return residency.keep_blocks("language", layers, weights, [table, self.lm_head])
        chunks = rows_in_chunks(self.lm_head, sum(t.nbytes for t in tensors_of(layers[0])))
        blocks: Sequence[Any] = residency.keep_blocks("language", [*layers, *chunks], weights, [table])
        self.model.embed_tokens = HostEmbedding(table, self.device)  # type: ignore[assignment]
        self.lm_head = RowsOneByOne(blocks[len(layers) :])  # type: ignore[assignment]
        return blocks[: len(layers)]

    def network(self) -> Qwen2:
        """The network for `KVCache`; it copies the weights if `fuse` was not called or the weights moved since."""
        if self._stays and self._network is not None:  # comparing streamed layers would copy them
            return self._network
        fused = self._network.layers if self._network is not None else []
        if fused and all(f.is_of(layer) for f, layer in zip(fused, self.model.layers, strict=True)):
            assert self._network is not None
            return self._network
        return self._as_network([fuse(layer) for layer in self.model.layers])

    def _as_network(self, layers: Sequence[FusedLayer]) -> Qwen2:
        return Qwen2(
            embed_tokens=self.model.embed_tokens,
            layers=layers,
            norm=self.model.norm,
            lm_head=self.lm_head,
            rotary_emb=self.model.rotary_emb,
            heads=self.model.heads,
            groups=self.model.groups,
            head_dim=self.model.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    def forget(self) -> None:
        """Frees the caches that are kept for later calls."""
        self.caches.forget()

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def condition(self, hidden: Tensor) -> Tensor:
        """Condition [..., L, Z] from the final-normed hidden states [..., L, H] at the latent queries."""
        return self.diff_head_projector(hidden) if self.config.condition_projector else hidden

    def tokens(self, ids: Sequence[int]) -> Tensor:
        """Embeddings [T, H] of tokens."""
        embedded: Tensor = self.model.embed_tokens(torch.tensor(ids, dtype=torch.long, device=self.device))
        return embedded

    def project(self, latents: Sequence[Tensor]) -> Tensor:
        """Embeddings [N, L, H] of latents [L, C]."""
        shown = torch.stack([latent.to(self.device) for latent in latents])
        projected: Tensor = self.model.mm_projector(shown.to(self.dtype))
        return projected

    def embed(self, conversations: Sequence[Conversation]) -> list[Tensor]:
        """Input embeddings [T, H] per conversation: of its tokens, and the projected latent in the place of IMAGE."""
        shown = [latent for c in conversations for latent in c.shown]
        images = iter(self.project(shown) if shown else ())
        tokens = self.tokens([i for c in conversations for i in c.ids if i != IMAGE])  # all at once, then distributed
        rows, taken = [], 0
        for conversation in conversations:
            parts: list[Tensor] = []
            for is_image, run in groupby(conversation.ids, lambda i: i == IMAGE):
                count = len(list(run))
                if is_image:
                    parts += [next(images) for _ in range(count)]
                else:
                    parts.append(tokens[taken : taken + count])
                    taken += count
            rows.append(torch.cat(parts) if len(parts) > 1 else parts[0])
        return rows

    @torch.inference_mode()
    def reply(
        self,
        conversations: Sequence[Conversation],
        limits: Sequence[int],
        stop: int,
        image_start: int,
        listen: TokenListener | None = None,
        draw: bool = True,
    ) -> list[Reply]:
        """Greedy replies to a batch of conversations.

        A reply ends with `stop` (left out), `image_start`, its limit of tokens, or when `listen` returns False. Without
        `draw`, replies that ask for an image get no condition.
        """
        rows = self.embed(conversations)
        longest = max(len(row) for row in rows)
        with self.cache(len(rows), longest + min(max(limits), _USUAL_REPLY) + 1 + self.config.tokens) as cache:
            return self.reply_in(cache, rows, limits, stop, image_start, draw, listen)

    def reply_in(
        self,
        cache: KVCache,
        rows: Sequence[Tensor] | Tensor,
        limits: Sequence[int],
        stop: int,
        image_start: int,
        draw: bool = True,
        listen: TokenListener | None = None,
    ) -> list[Reply]:
        """`reply` for conversations in a cache that continue with the embeddings [T, H] of their rows."""
        hidden = cache.extend(rows)
        last = hidden[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]  # [B, H]
        start = list(cache.lengths)
        replies = [Reply() for _ in rows]
        open_rows = [row for row, limit in enumerate(limits) if limit > 0]
        most = max(limits)
        # The GPU never waits for the host, which costs one step too many when the last reply ends.
        ahead = 1 if self._ahead and cache.network.on_cuda else 0
        asked, seen = 1, 0
        underway = deque([Transfer(cache.begin(last))]) if open_rows else deque[Transfer]()
        while open_rows:
            while asked <= seen + ahead and asked < most:
                underway.append(Transfer(cache.step()))
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
            # The token <im_start> was chosen, but the model has not read it yet.
            cache.rewind([length + max(0, len(r.ids) - 1) for length, r in zip(start, replies, strict=True)])
            queries = torch.cat([self.tokens([image_start]), self.model.latent_queries.to(self.dtype)])  # [1 + L, H]
            hidden = cache.extend(queries.expand(len(rows), -1, -1))
            for row in drawing:
                replies[row].condition = self.condition(hidden[row, 1:])
        return replies

    def cache(self, batch: int, tokens: int) -> AbstractContextManager[KVCache]:
        """For a `with`: an empty KV cache for a batch of conversations, which grows beyond `tokens` per conversation."""
        return self.caches.lend(self.network(), batch, tokens)

    @torch.inference_mode()
    def confidence_and_loss(self, hidden: Tensor, targets: Sequence[int] | None = None) -> tuple[Tensor, Tensor | None]:
        """Self-certainty [T] at hidden states [T, H] and, given the T tokens that follow them, cross-entropies [T]."""
        confidences, losses = [], []
        for start in range(0, len(hidden), _LOGIT_ROWS):
            logits = self.lm_head(hidden[start : start + _LOGIT_ROWS]).float()
            total = logits.logsumexp(dim=-1)
            confidences.append(self_certainty(logits, total))
            if targets is not None:
                target = torch.tensor(targets[start : start + _LOGIT_ROWS], device=logits.device)
                losses.append(total - logits.gather(1, target[:, None])[:, 0])
        return torch.cat(confidences), torch.cat(losses) if targets is not None else None


def longest_reply(config: ScaleRAEConfig, conversation: Conversation) -> int:
    """The most tokens of a reply with which conversation, reply and one image fit what the model reads.

    Raises:
        InputError: when not even one token fits.
    """
    image = config.tokens
    length = len(conversation.ids) + (image - 1) * len(conversation.shown)
    left = config.max_length - length - image
    if left < 1:
        raise InputError(
            f"the prompt is {length} tokens long; with {image} image tokens the model reads at most "
            f"{config.max_length} (tokenizer_model_max_length)"
        )
    return left


def projector(channels: int, hidden: int, depth: int) -> nn.Module:
    """The network `mm_projector`, latents [..., C] -> embeddings [..., H]: linears, GELUs between them (REFERENCE §3)."""
    if depth == 0:
        return nn.Linear(channels, hidden)
    layers: list[nn.Module] = [nn.Linear(channels, hidden)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(hidden, hidden)]
    return nn.Sequential(*layers)


class ListenOnce:
    """Calls `listen` once per token of each reply, although replies begin again when memory runs out."""

    def __init__(self, listen: TokenListener, replies: int) -> None:
        self._listen, self._heard = listen, [0] * replies

    def attempt(self, start: int) -> TokenListener:
        """A listener for an attempt at the replies from number `start` on; tokens of earlier attempts are left out."""
        chosen: Counter[int] = Counter()

        def hear(row: int, token: int) -> bool:
            chosen[row] += 1
            if chosen[row] <= self._heard[start + row]:
                return True
            self._heard[start + row] += 1
            return self._listen(start + row, token)

        return hear


def hear_text(tokenizer: ChatTokenizer, listen: TextListener) -> TokenListener:
    """A listener to tokens that calls `listen` with a reply's text whenever that has grown by whole characters."""
    streams: dict[int, TextStream] = {}
    texts: dict[int, str] = {}

    def hear(row: int, token: int) -> bool:
        new = streams.setdefault(row, tokenizer.text_stream()).add(token)
        texts[row] = texts.get(row, "") + new
        return not new or listen(row, texts[row])

    return hear
