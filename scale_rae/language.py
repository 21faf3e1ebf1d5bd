"""The language model: Qwen2 (transformers) with latent queries and an image projector, and our decoding loop.

Text and condition are a function of the conversation alone; many images of one prompt differ only in the noise. The
results do not depend on what else is in the batch: rows are padded on the left and padding is masked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2Config, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from scale_rae.config import ScaleRAEConfig
from scale_rae.prompt import IMAGE

_LOGIT_ROWS = 512  # rows of a [rows, vocabulary] float32 block: 0.3 GB at Qwen2.5's vocabulary


@dataclass
class Conversation:
    """Token ids with IMAGE where the latent [L, C] goes; `latent` is there exactly when IMAGE is."""

    ids: list[int]
    latent: Tensor | None = None


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

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def condition(self, hidden: Tensor) -> Tensor:
        """Condition [..., L, Z] from the final-normed hidden states [..., L, H] at the latent queries."""
        return self.diff_head_projector(hidden) if self.config.condition_projector else hidden

    def embed(self, conversation: Conversation) -> Tensor:
        """Input embeddings [T, H]: tokens, and the projected latent in IMAGE's place."""
        parts: list[Tensor] = []
        for kind, ids in _runs(conversation.ids):
            if kind == IMAGE:
                assert conversation.latent is not None
                parts.append(self.model.mm_projector(conversation.latent.to(self.device, self.dtype)))
            else:
                parts.append(self.model.embed_tokens(torch.tensor(ids, device=self.device)))
        return torch.cat(parts)

    @torch.inference_mode()
    def reply(
        self, conversations: Sequence[Conversation], limits: Sequence[int], stop: int, image_start: int
    ) -> list[Reply]:
        """Greedy replies to a batch of conversations, each ended by `stop` (left out), `image_start`, or its limit of
        tokens."""
        rows = [self.embed(c) for c in conversations]
        state = _Batch(self, rows)
        replies = [Reply() for _ in rows]
        open_rows = [row for row, limit in enumerate(limits) if limit > 0]
        hidden = state.last
        while open_rows:
            logits = self.lm_head(hidden).float()  # [B, V]
            best, token = logits.max(dim=-1)
            confidence = self_certainty(logits)
            values = torch.stack([token.double(), best.double(), confidence.double()]).tolist()  # one transfer
            for row in list(open_rows):
                chosen = int(values[0][row])
                if chosen == stop:
                    open_rows.remove(row)
                    continue
                reply = replies[row]
                reply.ids.append(chosen)
                reply.logits.append(values[1][row])
                reply.confidences.append(values[2][row])
                if chosen == image_start or len(reply.ids) == limits[row]:
                    open_rows.remove(row)
            if not open_rows:
                break
            active = torch.zeros(len(rows), 1, dtype=torch.bool, device=self.device)
            active[open_rows] = True
            hidden = state.extend(self.model.embed_tokens(token)[:, None], active)[:, -1]

        drawing = [row for row, reply in enumerate(replies) if reply.ids and reply.ids[-1] == image_start]
        if drawing:
            start = self.model.embed_tokens(torch.tensor([image_start], device=self.device))
            queries = torch.cat([start, self.model.latent_queries.to(self.dtype)])  # [1 + L, H]
            valid = torch.zeros(len(rows), len(queries), dtype=torch.bool, device=self.device)
            valid[drawing] = True
            hidden = state.extend(queries.expand(len(rows), -1, -1), valid)
            for row in drawing:
                replies[row].condition = self.condition(hidden[row, 1:])
        return replies

    @torch.inference_mode()
    def read(self, conversations: Sequence[Conversation]) -> list[Tensor]:
        """Final-normed hidden states [T, H] at every position of each conversation, in one batch."""
        rows = [self.embed(c) for c in conversations]
        state = _Batch(self, rows)
        return [state.hidden[i, -len(row) :] for i, row in enumerate(rows)]

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


class _Batch:
    """A left-padded batch with its key-value cache: prefilled once, then extended."""

    def __init__(self, language: LanguageModel, rows: Sequence[Tensor]) -> None:
        longest = max(len(row) for row in rows)
        embeds = torch.stack([nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])  # [B, T, H]
        lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
        self.language = language
        self.cache = DynamicCache()
        self.valid = torch.zeros(len(rows), 0, dtype=torch.bool, device=embeds.device)
        index = torch.arange(longest, device=embeds.device)
        self.hidden = self.extend(embeds, index >= longest - lengths[:, None])

    @property
    def last(self) -> Tensor:
        """Hidden states [B, H] at the last position of the prefill."""
        return self.hidden[:, -1]

    def extend(self, embeds: Tensor, valid: Tensor) -> Tensor:
        """Hidden states [B, T, H] of new embeddings [B, T, H]; `valid` [B, T] is False where a row has nothing there."""
        past = self.valid.shape[1]
        before = self.valid.sum(dim=1, keepdim=True)
        self.valid = torch.cat([self.valid, valid], dim=1)
        # A row's next position follows its own last valid one, whatever padding lies between.
        positions = (before + valid.cumsum(dim=1) - 1).clamp(min=0)
        output = self.language.model(
            inputs_embeds=embeds,
            attention_mask={"full_attention": self._mask(past, valid)},
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state  # type: ignore[no-any-return]

    def _mask(self, past: int, valid: Tensor) -> Tensor:
        """Allowed [B, 1, T, past + T]: valid keys up to the query's own; a padding query sees itself, to stay finite."""
        new = valid.shape[1]
        key = torch.arange(past + new, device=valid.device)
        query = key[past:, None]
        return (((key <= query) & self.valid[:, None, :]) | (key == query))[:, None]


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
