"""Replies do not depend on their company, stop where they should, and cost one pass a token."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from scale_rae import kv_cache
from scale_rae import language as language_module
from scale_rae.cuda_graphs import GraphMemory
from scale_rae.errors import InputError
from scale_rae.kv_cache import CachePool, KVCache, Transfer
from scale_rae.language import Conversation, LanguageModel, Reply
from scale_rae.pipeline import ScaleRAE
from scale_rae.qwen2 import Qwen2, self_certainty

if TYPE_CHECKING:
    from transformers import Qwen2Model

PROMPTS = [
    "Can you generate a photo of a cat on a windowsill?",
    "A cat",
    "I want a photo of three stars and a cross. " * 4,
    "x",
    "Show me a ring left of a heart",
]


@pytest.fixture(scope="module")
def model(models: dict[str, ScaleRAE]) -> ScaleRAE:
    return models["siglip"]


@pytest.fixture(scope="module")
def latents() -> list[Tensor]:
    return list(torch.randn(len(PROMPTS), 256, 768, generator=torch.Generator().manual_seed(5)))


def close(a: Tensor | list[float], b: Tensor | list[float], tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance)


def test_replies_together_are_those_alone(model: ScaleRAE) -> None:
    together = model.reply(PROMPTS, max_new_tokens=12)
    for prompt, reply in zip(PROMPTS, together, strict=True):
        alone = model.reply([prompt], max_new_tokens=12)[0]
        assert reply.ids == alone.ids
        close(reply.logits, alone.logits)
        close(reply.confidences, alone.confidences)
        assert (reply.condition is None) == (alone.condition is None)
        if reply.condition is not None and alone.condition is not None:
            close(reply.condition, alone.condition)
    assert any(r.condition is not None for r in together)
    assert len({len(r.ids) for r in together}) > 1


def test_answers_together_are_those_alone(model: ScaleRAE, latents: list[Tensor]) -> None:
    together = model.answer(PROMPTS, latents=latents, max_new_tokens=8)
    for prompt, latent, answer in zip(PROMPTS, latents, together, strict=True):
        alone = model.answer(prompt, latents=latent, max_new_tokens=8)[0]
        assert answer.reply.ids == alone.reply.ids
        assert answer.text == alone.text
        close(answer.reply.logits, alone.reply.logits)


def test_one_question_for_many_and_many_for_one(model: ScaleRAE, latents: list[Tensor]) -> None:
    each = [model.answer("What is it?", latents=x, max_new_tokens=4)[0].reply.ids for x in latents]
    assert [a.reply.ids for a in model.answer("What is it?", latents=latents, max_new_tokens=4)] == each
    asked = [model.answer(p, latents=latents[0], max_new_tokens=4)[0].reply.ids for p in PROMPTS]
    assert [a.reply.ids for a in model.answer(PROMPTS, latents=latents[0], max_new_tokens=4)] == asked


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_max_new_tokens_means_what_it_says(model: ScaleRAE, latents: list[Tensor], limit: int) -> None:
    replies = [a.reply for a in model.answer(PROMPTS, latents=latents, max_new_tokens=limit)]
    longest = [a.reply for a in model.answer(PROMPTS, latents=latents, max_new_tokens=9)]
    for reply, long in zip(replies, longest, strict=True):
        assert reply.ids == long.ids[:limit]
        assert len(reply.logits) == len(reply.confidences) == len(reply.ids)
    assert max(len(r.ids) for r in replies) == limit


@pytest.mark.parametrize("limit", [0, -1])
def test_max_new_tokens_out_of_range(model: ScaleRAE, limit: int) -> None:
    with pytest.raises(InputError, match=rf"max new tokens {limit}: must be at least 1"):
        model.reply(["A cat"], max_new_tokens=limit)


@pytest.fixture
def scripted(model: ScaleRAE, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes the model say given tokens, and counts its passes."""
    passes: list[tuple[int, ...]] = []
    original = KVCache.forward

    def forward(cache: KVCache, embeds: Tensor, *args: Any, **options: Any) -> Tensor:
        passes.append(tuple(embeds.shape[:2]))
        return original(cache, embeds, *args, **options)

    def start(*rows: list[int]) -> list[tuple[int, ...]]:
        step = iter(range(1000))

        def head(hidden: Tensor) -> Tensor:
            now = next(step)
            logits = torch.zeros(len(hidden), model.config.vocab_size)
            for i, row in enumerate(rows):
                logits[i, row[min(now, len(row) - 1)]] = 5.0
            return logits

        monkeypatch.setattr(model.language.lm_head, "forward", head)
        passes.clear()
        return passes

    monkeypatch.setattr(KVCache, "forward", forward)
    return start


def test_stops_at_the_end_of_a_reply(model: ScaleRAE, scripted: Any) -> None:
    end = model.tokenizer.chat_end
    passes = scripted([65, 66, end, 67], [70, end], [71, 72, 73, 74, end])
    replies = model.reply(PROMPTS[:3], max_new_tokens=50)
    assert [r.ids for r in replies] == [[65, 66], [70], [71, 72, 73, 74]]
    assert all(r.condition is None for r in replies)
    # The prompts once, then one token a step.
    assert [width for _, width in passes[1:]] == [1] * 4


def test_an_image_ends_a_reply(model: ScaleRAE, scripted: Any) -> None:
    end, image = model.tokenizer.chat_end, model.tokenizer.image_start
    passes = scripted([65, image, 66, 67], [70, 71, 72, image], [end])
    replies = model.reply(PROMPTS[:3], max_new_tokens=50)
    assert [r.ids for r in replies] == [[65, image], [70, 71, 72, image], []]
    assert [r.condition is not None for r in replies] == [True, True, False]
    assert [width for _, width in passes[1:]] == [1, 1, 1, 257]
    alone: list[Any] = []
    for row in ([65, image], [70, 71, 72, image]):
        scripted(row)
        alone.append(model.reply([PROMPTS[len(alone)]], max_new_tokens=50)[0])
    for reply, one in zip(replies, alone, strict=False):
        assert reply.condition is not None
        assert one.condition is not None
        close(reply.condition, one.condition)


def test_an_empty_reply_draws_nothing(model: ScaleRAE, scripted: Any) -> None:
    scripted([model.tokenizer.chat_end])
    result = model.generate("A cat")
    assert (result.text, result.images) == ("", [])


def test_a_reply_that_is_cut_before_its_image_draws_nothing(model: ScaleRAE, scripted: Any) -> None:
    scripted([65, 66, model.tokenizer.image_start])
    assert model.generate("A cat", max_new_tokens=2).images == []
    scripted([65, 66, model.tokenizer.image_start])
    assert len(model.generate("A cat", max_new_tokens=3, steps=2, decode=False).images) == 1


def published(language: LanguageModel) -> Qwen2Model:
    """Transformers' own Qwen2 with the weights of a language model."""
    from transformers import Qwen2Config, Qwen2Model  # takes seconds, so not where tests are collected

    config = Qwen2Config(**language.config.language)
    config._attn_implementation = "sdpa"
    network = Qwen2Model(config)
    extra = network.load_state_dict(language.model.state_dict(), strict=False)
    assert not extra.missing_keys
    assert {name.split(".")[0] for name in extra.unexpected_keys} <= {"latent_queries", "mm_projector"}
    return network.eval()


def test_modules_are_those_of_transformers(model: ScaleRAE) -> None:
    """The same hidden states and gradients, which training the bundled model goes by."""
    language, theirs = model.language, published(model.language)
    theirs.requires_grad_(False)
    for name, parameter in theirs.named_parameters():
        assert language.model.get_parameter(name).shape == parameter.shape
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 7, language.config.hidden_size, generator=generator)
    place = torch.arange(7)[None]
    tables = language.model.rotary_emb(embeds, place)
    assert all(torch.equal(a, b) for a, b in zip(tables, theirs.rotary_emb(embeds, place), strict=True))
    mine, reference = (embeds.clone().requires_grad_() for _ in range(2))
    hidden = mine
    for layer in language.model.layers:
        hidden = layer(hidden, tables)
    hidden = language.model.norm(hidden)
    expected = theirs(inputs_embeds=reference, use_cache=False).last_hidden_state
    close(hidden, expected)
    hidden.square().sum().backward()
    expected.square().sum().backward()
    assert mine.grad is not None
    assert reference.grad is not None
    close(mine.grad, reference.grad, 1e-4)


def test_condition_is_one_pass_over_the_whole(model: ScaleRAE) -> None:
    """With a cache or without one: hidden states at the queries after the whole conversation (REFERENCE §4)."""
    reply = model.reply([PROMPTS[0]])[0]
    language = model.language
    with torch.inference_mode():
        ids = [*model.tokenizer.chat(PROMPTS[0]), *reply.ids]
        embeds = torch.cat([language.tokens(ids), language.model.latent_queries])
        hidden = published(language)(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0, -256:]
        assert reply.condition is not None
        close(reply.condition, language.condition(hidden), 2e-5)


def test_self_certainty() -> None:
    """-mean log(V p): 0 for equal logits, and what the definition says for others."""
    assert float(self_certainty(torch.zeros(1, 50))) == pytest.approx(0, abs=1e-6)
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    expected = -(logits.softmax(-1) * 50).log().mean(-1)
    torch.testing.assert_close(self_certainty(logits), expected)
    assert math.isfinite(float(self_certainty(torch.tensor([[1e4, 0.0, -1e4]]))))


def test_no_conversations(model: ScaleRAE) -> None:
    assert model.reply([]) == []
    assert model.generate([]) == []


def test_prompts_and_latents_must_pair(model: ScaleRAE, latents: list[Tensor]) -> None:
    with pytest.raises(InputError, match="2 messages but 3 latents"):
        model.reply(["a", "b"], latents=latents[:3])
    with pytest.raises(InputError):
        model.answer(["a", "b"], latents=latents[:3])
    with pytest.raises(InputError, match="give either images or latents"):
        model.answer("a")
    with pytest.raises(InputError, match="give either images or latents"):
        model.answer("a", images=[], latents=[])


@pytest.mark.parametrize(
    ("latent", "problem"),
    [
        ([[1.0]], "a latent must be a tensor [256, 768], not list"),
        (torch.zeros(256, 767), "the latent is [256, 767] torch.float32; this model's latents are [256, 768] floats"),
        (torch.zeros(2, 256, 768), "[2, 256, 768]"),
        (torch.zeros(256, 768, dtype=torch.int64), "torch.int64"),
        (torch.zeros(256, 768).index_fill(0, torch.tensor([3]), torch.nan), "not finite"),
        (torch.zeros(256, 768).index_fill(1, torch.tensor([3]), torch.inf), "not finite"),
    ],
)
def test_bad_latents(model: ScaleRAE, latent: Any, problem: str) -> None:
    for action in (
        lambda: model.decode([latent]),
        lambda: model.score([latent], "a cat"),
        lambda: model.check_latent(latent),
    ):
        with pytest.raises(InputError) as caught:
            action()
        assert problem in str(caught.value)


def test_latents_of_any_float_dtype_with_a_batch_axis(model: ScaleRAE, latents: list[Tensor]) -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        checked = model.check_latent(latents[0][None].to(dtype))
        assert checked.dtype == torch.float32
        assert checked.shape == (256, 768)


def test_room_for_the_reply(model: ScaleRAE) -> None:
    """A long prompt leaves few tokens for the reply; one that leaves none is refused."""
    length = len(model.tokenizer.chat("a"))
    just = model.config.max_length - model.config.tokens - length
    message = "a" + "zq" * (just // 2)
    assert len(model.reply([message[: len(message) - 4]], max_new_tokens=40)[0].ids) <= 40
    with pytest.raises(InputError, match="tokens long"):
        model.reply([message + "zq" * 5])


def test_a_long_prompt_leaves_its_neighbours_their_room(model: ScaleRAE) -> None:
    """The limit of what the model reads cuts the reply of the row that meets it, and no other."""
    room = model.config.max_length - model.config.tokens - len(model.tokenizer.chat("z"))
    long = "z" + "q" * (room - 2)
    short = next(p for p in PROMPTS if len(model.reply([p], max_new_tokens=10)[0].ids) > 4)
    replies = model.reply([long, short], max_new_tokens=10)
    assert replies[1].ids == model.reply([short], max_new_tokens=10)[0].ids
    assert len(replies[0].ids) <= 2


# --- memory of fixed size, captured steps -----------------------------------------------------------------------------


class FakeGraph:
    """Stands for a CUDA graph: replays by calling the function again, into the same memory."""

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self.function, self.output = function, function().clone()

    def replay(self) -> None:
        self.output.copy_(self.function())

    def pool(self) -> None: ...


@pytest.fixture
def as_on_cuda(models: dict[str, ScaleRAE], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets the webssl model read as on CUDA: fixed memory that is used again, steps ahead of the host, captured."""
    captured: list[int] = []

    def capture(self: object, function: Callable[[], Tensor]) -> tuple[FakeGraph, Tensor]:
        function()
        graph = FakeGraph(function)
        captured.append(1)
        return graph, graph.output

    monkeypatch.setattr(GraphMemory, "capture", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(stream_id=0))
    monkeypatch.setattr(Qwen2, "on_cuda", True)
    monkeypatch.setattr(models["webssl"].language, "caches", CachePool(graph=True, compile_steps=False))
    return captured


def same(replies: list[Reply], expected: list[Reply]) -> None:
    assert [r.ids for r in replies] == [r.ids for r in expected]
    for reply, one in zip(replies, expected, strict=True):
        close(reply.logits, one.logits)
        close(reply.confidences, one.confidences)
        assert (reply.condition is None) == (one.condition is None)
        if reply.condition is not None and one.condition is not None:
            close(reply.condition, one.condition)


def test_captured_steps_say_the_same(
    models: dict[str, ScaleRAE], as_on_cuda: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["webssl"]
    shown = list(torch.randn(len(PROMPTS), 256, model.config.channels, generator=torch.Generator().manual_seed(5)))
    with monkeypatch.context() as plain:
        plain.setattr(Qwen2, "on_cuda", False)
        expected = model.reply(PROMPTS, max_new_tokens=30)
        answers = model.reply(PROMPTS, latents=shown, max_new_tokens=20)
        alone = model.reply(PROMPTS[:1], max_new_tokens=30)
        scores = model.score(shown[:3], "a cat", max_new_tokens=9)
    for _ in range(2):  # the second time in memory that the others left
        same(model.reply(PROMPTS, max_new_tokens=30), expected)
        same(model.reply(PROMPTS, latents=shown, max_new_tokens=20), answers)
        same(model.reply(PROMPTS[:1], max_new_tokens=30), alone)
        for score, one in zip(model.score(shown[:3], "a cat", max_new_tokens=9), scores, strict=True):
            assert score.reply == one.reply
            assert score.prompt_loss == pytest.approx(one.prompt_loss, rel=1e-4)
            assert score.image_conf_score == pytest.approx(one.image_conf_score, rel=1e-3)
    caches = model.language.caches.waiting
    assert sorted({c.rows for c in caches}) == [1, 4, 8]
    assert all(c.slots % 256 == 0 for c in caches)
    passes = [key for c in caches for key in c.passes.keys]
    assert len(passes) > 5
    assert all(width % 32 == 0 for width, _ in passes)
    assert len(as_on_cuda) == sum(len(c.captured_steps) for c in caches) + len(passes)  # each was captured once


def test_values_are_awaited_on_their_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker on cuda:1 has cuda:0 for its current device."""
    recorded: list[object] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: empty(shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=recorded.append))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")

    class OnCuda(Tensor):
        device = torch.device("cuda:1")

    Transfer(torch.zeros(3, 2).as_subclass(OnCuda))
    assert recorded == ["stream of cuda:1"]


def test_replies_that_outgrow_their_memory(
    models: dict[str, ScaleRAE], as_on_cuda: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["webssl"]
    monkeypatch.setattr(kv_cache, "_SLOTS", 32)
    monkeypatch.setattr(kv_cache, "CACHE_SLOTS", 128)
    monkeypatch.setattr(language_module, "_USUAL_REPLY", 8)
    conversations = [Conversation(model.tokenizer.chat(p)) for p in PROMPTS[:3]]
    limits = [400, 3, 290]
    long = model.language.reply(conversations, limits, -1, -1)
    assert [len(r.ids) for r in long] == limits
    monkeypatch.setattr(Qwen2, "on_cuda", False)
    same(long, model.language.reply(conversations, limits, -1, -1))


def test_every_token_is_the_one_without_a_cache(model: ScaleRAE) -> None:
    """Against transformers' own Qwen2 over the whole conversation, in a batch of unequal rows."""
    replies = model.reply(PROMPTS, max_new_tokens=10)
    language = model.language
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        ids = [*model.tokenizer.chat(prompt), *reply.ids]
        with torch.inference_mode():
            embeds = language.tokens(ids)[None]
            hidden = published(language)(inputs_embeds=embeds, use_cache=False).last_hidden_state[0]
            logits = language.lm_head(hidden[len(ids) - len(reply.ids) - 1 : -1])
        assert logits.argmax(-1).tolist() == reply.ids
        close(reply.logits, logits.max(-1).values)
        close(reply.confidences, self_certainty(logits))


def test_no_step_is_taken_beyond_the_limit(
    model: ScaleRAE, scripted: Any, as_on_cuda: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ahead of the host by one step, and one step too many only where a reply ends before its limit."""
    monkeypatch.setattr(model.language, "caches", CachePool(graph=False, compile_steps=False))
    passes = scripted([65, 66, 67, 68, 69])
    assert len(model.reply(["A cat"], max_new_tokens=3)[0].ids) == 3
    assert len(passes) == 1 + 2
    passes = scripted([65, 66, model.tokenizer.chat_end])
    assert model.reply(["A cat"], max_new_tokens=30)[0].ids == [65, 66]
    assert len(passes) == 1 + 3


def test_scores_together_are_those_alone(model: ScaleRAE, latents: list[Tensor]) -> None:
    together = model.score(latents, "a cat on a mat", max_new_tokens=6)
    for latent, score in zip(latents, together, strict=True):
        (alone,) = model.score([latent], "a cat on a mat", max_new_tokens=6)
        assert (score.reply, score.answer, score.question) == (alone.reply, alone.answer, alone.question)
        for name in ("prompt_loss", "prompt_conf_score", "image_conf_score", "response_conf_score"):
            assert getattr(score, name) == pytest.approx(getattr(alone, name), rel=1e-4)


def test_compiled_layer_is_the_layer(
    models: dict[str, ScaleRAE], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = models["webssl"]
    conversations = [Conversation(model.tokenizer.chat(p)) for p in PROMPTS[:2]]
    expected = model.language.reply(conversations, [3, 3], -1, -1)
    monkeypatch.setattr(model.language, "caches", CachePool(graph=False, compile_steps=True))
    monkeypatch.setattr(KVCache, "_round", lambda cache, slots: cache.slots)  # one shape, one compilation
    same(model.language.reply(conversations, [3, 3], -1, -1), expected)
