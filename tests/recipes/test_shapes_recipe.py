"""The bundled model's recipe: what training computes is what inference computes, and a tiny run goes all the way."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.shapes import (
    common,
    curves,
    data,
    encoder,
    export,
    invented,
    joint,
    networks,
    reader,
    refit,
    self_reward,
    settings,
    spoilt,
    train,
)
from recipes.shapes.common import Vocabulary
from recipes.shapes.loop import LoopOptions, Trainer
from recipes.shapes.settings import FULL, TINY
from recipes.shapes.tokenizer import ANSWER_WORDS, words
from scale_rae.fast_weights import crop_swiglu
from scale_rae.language import Conversation, LanguageModel
from scale_rae.pipeline import ScaleRAE
from scale_rae.prompt import ChatTokenizer
from scale_rae.shapes import draw, world
from scale_rae.shapes.judge import judge
from scale_rae.training import passes
from scale_rae.training.optim import FlatModel, OptimizerOptions, matrices_in, orthogonalised

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return common.vocabulary(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def _same_precision() -> Iterator[None]:
    """Training sets how matrices are multiplied, which other tests must not inherit."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def small_pools(vocabulary: Vocabulary, device: torch.device = CPU) -> joint.Pools:
    draws = data.make("draw", 64, 0, vocabulary.encoder, data.DRAW_KINDS, workers=1)
    names = data.make("name", 64, 0, vocabulary.encoder, data.DRAW_KINDS, workers=1)
    reads = data.make("read", 64, 0, vocabulary.encoder, world.SCENE_KINDS, workers=1)
    generator = torch.Generator().manual_seed(0)
    shape = (64, TINY.tokens * TINY.channels)
    latents = tuple(torch.randn(shape, generator=generator).bfloat16().to(device) for _ in range(2))
    return joint.Pools(TINY, vocabulary, draws, names, reads, (latents[0], latents[1]), device)


def small_trainer(vocabulary: Vocabulary, folder: Path, kind: str = "muon", steps: int = 8, **options: int) -> Trainer:
    common.set_seed(0)
    made = small_pools(vocabulary)
    optimizer = OptimizerOptions(kind=kind, warmup=2)
    config, language, dit, model = joint.build(vocabulary, TINY, CPU, torch.float32, optimizer, steps)
    loss = joint.Loss(
        config,
        language,
        dit,
        made,
        joint.Batch(draw=8, follow=3, name=4, read=6, chat=2, copies=2),
        torch.float32,
        model.step,
    )
    return Trainer(model, loss, LoopOptions(steps=steps, log_every=4, **options), folder, "same")


def with_large_weights(vocabulary: Vocabulary, folder: Path) -> joint.Loss:
    """`small_trainer`'s loss; the language model's weights are far from their small initial values."""
    loss = small_trainer(vocabulary, folder).loss
    assert isinstance(loss, joint.Loss)
    for parameter in loss.language.parameters():
        nn.init.normal_(parameter, std=0.2)
    return loss


# Tokenizer and data -----------------------------------------------------------------------------------------------------------


def test_every_word_is_one_token(vocabulary: Vocabulary) -> None:
    for word in [*words(), *ANSWER_WORDS, *(f" {word}" for word in ANSWER_WORDS)]:
        assert len(vocabulary.tokenizer.plain(word)) == 1, word
    assert vocabulary.size < 800


def test_word_table_is_the_tokenizer(vocabulary: Vocabulary) -> None:
    encode, tokenizer = vocabulary.encoder, vocabulary.tokenizer
    scenes = list(world.sample(np.random.default_rng(1), 300, data.DRAW_KINDS))
    asked = world.questions(random.Random(1), scenes)
    for message in [*(data.prompt_of(random.Random(2), scene)[0] for scene in scenes), *world.CHATS]:
        assert [*encode.head, *encode(message), *encode.tail] == tokenizer.chat(message)
    for question, answer in asked:
        ids = tokenizer.chat(question, image=True)
        following, place = encode.question(question, answer)
        assert [*encode.image_head, -200, *following[:place]] == ids
        assert following[place:] == [*tokenizer.plain(answer), tokenizer.chat_end]


def test_data_is_the_same_for_any_number_of_workers(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CHUNK", 50)
    one, two = (data.make("read", 120, 3, vocabulary.encoder, world.SCENE_KINDS, workers) for workers in (1, 2))
    for a, b in ((one.scenes, two.scenes), (one.texts, two.texts)):
        for field in dataclasses.fields(a):
            assert np.array_equal(getattr(a, field.name), getattr(b, field.name))


def test_training_never_shows_or_says_what_is_held_out(vocabulary: Vocabulary) -> None:
    color_shapes, pairs, counts = (
        set(held) for held in (world.HELD_OUT_COLOR_SHAPES, world.HELD_OUT_SHAPE_PAIRS, world.HELD_OUT_COUNTS)
    )
    for stream, kinds in (
        ("encode", world.SCENE_KINDS),
        ("draw", data.DRAW_KINDS),
        ("read", world.SCENE_KINDS),
        ("name", data.DRAW_KINDS),
    ):
        chunk = data.make(stream, 3000, 5, vocabulary.encoder, kinds, workers=1)
        for scene in (*invented.named(chunk.scenes), *invented.named(chunk.second)):
            shapes = [thing.shape for thing in scene.objects]
            assert color_shapes.isdisjoint((thing.color, thing.shape) for thing in scene.objects)
            assert pairs.isdisjoint((a, b) for a in shapes for b in shapes)
            assert counts.isdisjoint((shapes.count(shape), shape) for shape in shapes)
        for ids, length in zip(chunk.texts.ids, chunk.texts.length, strict=True):
            text = vocabulary.tokenizer.decode(ids[:length].tolist())
            assert not any(f"{color} {shape}" in text for color, shape in color_shapes), text
            assert not any(f"{world.NUMBERS[n]} {world.plural(shape)}" in text for n, shape in counts), text
            if stream in ("draw", "name"):
                named = [shape for shape in world.SHAPES if re.search(rf"\b{shape}", text)]
                assert pairs.isdisjoint((a, b) for a in named for b in named), text
            assert not any(wording.partition("{")[0] in text for wording in world.HELD_OUT_WORDINGS), text


# The same computation as inference --------------------------------------------------------------------------------------------


class Scripted(nn.Module):
    """An output layer that says the world's reply whatever the hidden state."""

    def __init__(self, language: LanguageModel, reply: list[int]) -> None:
        super().__init__()
        self.weight, self.reply, self.said = language.lm_head.weight, reply, 0

    def forward(self, hidden: Tensor) -> Tensor:
        logits = torch.zeros(len(hidden), len(self.weight))
        logits[:, self.reply[self.said]] = 1
        self.said += 1
        return logits


def test_self_reward_draws_nothing_held_out(tmp_path: Path) -> None:
    learnt, verified = (file.read_text().splitlines() for file in self_reward.write_prompts(tmp_path, 400, 20))
    held_out = {line["prompt"] for line in world.prompts(2000, "only", 0) if line["tag"] != "single_object"}
    assert len(learnt) == 400
    assert len(verified) == 20
    assert not held_out & {*learnt, *verified}
    assert not {*learnt} & {*verified}


def test_condition_in_training_is_the_condition_at_inference(vocabulary: Vocabulary, tmp_path: Path) -> None:
    loss = with_large_weights(vocabulary, tmp_path)
    language, made = loss.language, loss.pools
    rows = torch.arange(6)
    hidden = passes.hidden_states(language, loss.embed(made.draw.ids[rows].long()), loss.rotary)
    trained = loss.queried(hidden, made.draw.length[rows])
    language.lm_head = Scripted(language, vocabulary.encoder.reply)
    count = len(vocabulary.encoder.reply)
    messages = [Conversation(made.draw.ids[i, : made.draw.length[i] - count].tolist()) for i in rows]
    replies = language.reply(messages, [20] * len(messages), vocabulary.end, vocabulary.tokenizer.image_start)
    for reply, condition in zip(replies, trained, strict=True):
        assert reply.ids == vocabulary.encoder.reply
        assert reply.condition is not None
        torch.testing.assert_close(reply.condition, condition, atol=1e-4, rtol=1e-4)


def test_condition_after_a_picture_in_training_is_that_at_inference(vocabulary: Vocabulary, tmp_path: Path) -> None:
    loss = with_large_weights(vocabulary, tmp_path)
    language, made = loss.language, loss.pools
    rows = torch.arange(5)
    latents = made.read_latents[rows].float().view(-1, made.tokens, made.channels)
    hidden = passes.hidden_states(language, loss.after_pictures(rows, latents), loss.shown_rotary)
    trained = loss.queried(hidden, made.draw.length[rows] + loss.further)
    encoder = vocabulary.encoder
    language.lm_head = Scripted(language, encoder.reply)
    messages = []
    for i, latent in zip(rows, latents, strict=True):
        request = made.draw.ids[i, len(encoder.head) : made.draw.length[i] - len(encoder.reply)].tolist()
        messages.append(Conversation([*encoder.image_head, -200, *encoder.image_between, *request], latent))
    text = vocabulary.tokenizer.decode(messages[0].ids[len(encoder.image_head) + 1 + 2 : -len(encoder.tail)])
    assert messages[0].ids == vocabulary.tokenizer.chat(text, image=True)
    replies = language.reply(messages, [20] * len(messages), vocabulary.end, vocabulary.tokenizer.image_start)
    for reply, condition in zip(replies, trained, strict=True):
        assert reply.condition is not None
        torch.testing.assert_close(reply.condition, condition, atol=1e-4, rtol=1e-4)


def test_some_alignment_questions_quote_a_request(vocabulary: Vocabulary) -> None:
    chunk = data.make("read", 2000, 0, vocabulary.encoder, data.READ_KINDS, workers=1)
    texts = [
        vocabulary.tokenizer.decode(i[:n].tolist()) for i, n in zip(chunk.texts.ids, chunk.texts.length, strict=True)
    ]
    asked = [text for text in texts if "align with the prompt" in text]
    quoting = [text for text in asked if "prompt: a photo of" not in text]
    assert 0.05 < len(quoting) / len(asked) < 0.2
    assert any("prompt: Can you generate a photo of" in text for text in quoting)
    assert not any(wording.partition("{")[0] in text for wording in world.HELD_OUT_WORDINGS for text in quoting)


def test_no_text_is_true_of_a_spoilt_picture(vocabulary: Vocabulary) -> None:
    reads = data.make("read", 2000, 0, vocabulary.encoder, world.SCENE_KINDS, workers=1)
    ruined = np.flatnonzero(spoilt.which(reads.scenes, reads.second))
    assert 0.03 < len(ruined) / len(reads.scenes) < 0.15
    assert all(
        {thing.color for thing in scene.objects} <= set(world.COLORS) for scene in invented.named(reads.scenes[ruined])
    )
    for ids, length in zip(reads.texts.ids[ruined], reads.texts.length[ruined], strict=True):
        assert vocabulary.tokenizer.decode(ids[:length].tolist()).endswith("No.")
    pairs = data.make("match", 2000, 0, vocabulary.encoder, world.SCENE_KINDS, workers=1)
    assert (pairs.attributes.any(1) == ~spoilt.which(pairs.scenes, pairs.second)).all()

    scenes, second = reads.scenes[ruined[:60]], reads.second[ruined[:60]]
    pictures = spoilt.mixed(draw.draw(scenes), draw.draw(second), torch.Generator().manual_seed(0))
    told = [[*world.true_prompts(a), *world.true_prompts(b)] for a, b in zip(scenes, second, strict=True)]
    accepted = [
        any(judge(picture.permute(1, 2, 0).numpy(), prompt.metadata()).correct for prompt in prompts)
        for picture, prompts in zip(pictures, told, strict=True)
    ]
    assert np.mean(accepted) < 0.02
    for name, chunk in (("draw", data.DRAW_KINDS), ("encode", world.SCENE_KINDS)):
        other = data.make(name, 200, 0, vocabulary.encoder, chunk, workers=1)
        assert not spoilt.which(other.scenes, other.second).any()


def test_quads_exchange_names_some_of_them_made_up(vocabulary: Vocabulary) -> None:
    assert not set(invented.NAMES) & {*world.SHAPES, *world.COLORS}
    chunk = data.make("name", 2000, 0, vocabulary.encoder, data.DRAW_KINDS, workers=1)
    told = chunk.attributes[:, : world.MAX_OBJECTS]
    shapes = told[told < len(invented.SHAPE_NAMES)]
    assert 0.2 < (shapes >= len(world.SHAPES)).mean() < 0.5
    for ids, length, classes in zip(chunk.texts.ids, chunk.texts.length, chunk.attributes, strict=True):
        text = vocabulary.tokenizer.decode(ids[:length].tolist())
        for number in classes[: world.MAX_OBJECTS]:
            assert number == len(invented.SHAPE_NAMES) or invented.SHAPE_NAMES[number] in text
    for p, q, r, s in chunk.attributes.reshape(-1, 4, chunk.attributes.shape[1]):
        assert (p != r).any()
        assert (p != s).any()
        assert (np.sort([p, q], 0) == np.sort([r, s], 0)).all()


def test_invented_things_stand_among_real_ones(vocabulary: Vocabulary) -> None:
    scenes = world.sample(np.random.default_rng(0), 2000, data.DRAW_KINDS)
    mixed, has = invented.put_in(np.random.default_rng(1), scenes)
    real, hued = len(world.SHAPES), len(world.COLORS)
    new_shape, new_color = mixed.shape >= real, mixed.color >= hued
    assert (has == (new_shape | new_color).any(1)).all()
    assert 0.3 < has.mean() < invented.SHARE
    assert not has[scenes.kind == world.SCENE_KINDS.index("counting")].any()
    assert set(mixed.shape[new_shape].tolist()) == set(range(real, invented.forms()))
    assert set(mixed.color[new_color].tolist()) == set(range(hued, invented.hues()))
    for before, after in zip(list(scenes), invented.named(mixed), strict=True):
        made_up = [thing.shape for thing in after.objects if thing.shape not in world.SHAPES]
        assert len(set(made_up)) == len(made_up)
        assert [thing.x for thing in after.objects] == [thing.x for thing in before.objects]
        text, classes = data.prompt_of(random.Random(0), after)
        assert len(classes) == len(data.ATTRIBUTES)
        assert all(name in text for name in made_up)
        if after.kind == "color_attr":
            assert len({thing.color for thing in after.objects}) == 2


def test_scenes_with_invented_things_show_nothing_held_out() -> None:
    scenes, _ = invented.put_in(np.random.default_rng(1), world.sample(np.random.default_rng(0), 8000, ("mixed",)))
    assert not any(world.shows_held_out(scene.objects) for scene in invented.named(scenes))


def test_invented_pictures_show_their_forms_and_hues() -> None:
    atlas = invented.atlas()
    assert np.array_equal(atlas[: len(world.SHAPES)], draw.distance_atlas())
    reach = draw.REACH * np.hypot(*np.meshgrid(*[np.linspace(-1, 1, draw.ATLAS_SIZE)] * 2))
    for page in atlas[len(world.SHAPES) :]:
        assert reach[page < 0].max() < 1.0  # within the object's circle, so that objects stay apart
        assert 0.1 < (page < 0).mean() * (2 * draw.REACH) ** 2 / np.pi < 0.9
    for a, b in itertools.combinations(range(len(atlas)), 2):
        either, both = (atlas[a] < 0) | (atlas[b] < 0), (atlas[a] < 0) & (atlas[b] < 0)
        assert both.sum() < 0.88 * either.sum(), (a, b)
    scenes, _ = invented.put_in(np.random.default_rng(1), world.sample(np.random.default_rng(0), 200, ("colors",)))
    everything = {i for i, row in enumerate(scenes.shape) if row[0] >= len(world.SHAPES)}
    assert everything
    plain = draw.draw(scenes, as_float=True)  # the world's own pages leave invented shapes out
    full = draw.draw(scenes, as_float=True, atlas=atlas)
    differs = (plain - full).abs().flatten(1).amax(1) > 0.1
    assert set(differs.nonzero().flatten().tolist()) == everything


def test_questions_about_invented_things_are_answered_by_what_is_there() -> None:
    scenes = world.sample(np.random.default_rng(0), 2000, ("mixed", "position"))
    scenes, has = invented.put_in(np.random.default_rng(1), scenes)
    rng, said = random.Random(0), Counter[tuple[str, str]]()
    for scene in itertools.compress(invented.named(scenes), has):
        question, answer = data.invented_question(rng, scene)
        if question == world.DESCRIBE:
            assert answer == world.describe(scene)
            continue
        told = question.removeprefix("Does this image align with the prompt: a photo of ").removesuffix("?")
        if place := re.fullmatch(rf"a (\w+) ({'|'.join(world.RELATIONS)}) a (\w+)", told):
            of = {thing.shape: thing for thing in scene.objects}
            here = {(b, world.relation(of[b], of[a]), a) for a, b in itertools.permutations(of, 2)}
            assert (place.groups() in here) == (answer == world.YES), (told, scene)
        else:
            things = sorted(world.with_article(f"{thing.color} {thing.shape}") for thing in scene.objects)
            assert (sorted(re.split(", | and ", told)) == things) == (answer == world.YES), (told, scene)
        said["relation" if place else "list", answer] += 1
    assert min(said.values()) > 50
    assert len(said) == 4


def test_additive_conditions_leave_nothing_over(vocabulary: Vocabulary, tmp_path: Path) -> None:
    loss = small_trainer(vocabulary, tmp_path).loss
    assert isinstance(loss, joint.Loss)
    a, b, c, d = torch.randn(4, 3, 2, 5)
    condition = torch.stack([a + b, c + d, a + d, c + b], 1).flatten(0, 1)
    assert loss.additive(condition) < 1e-10
    assert loss.additive(condition.square()) > 1e-2


def test_reading_in_training_is_reading_at_inference(vocabulary: Vocabulary, tmp_path: Path) -> None:
    loss = with_large_weights(vocabulary, tmp_path)
    language, made = loss.language, loss.pools
    rows = torch.arange(6)
    ids, place = made.read.ids[rows].long(), made.image_place
    latents = made.read_latents[rows].float().view(-1, made.tokens, made.channels)
    embeds = loss.embed(ids)
    embeds[:, place : place + made.tokens] = language.model.mm_projector(latents)
    hidden = passes.hidden_states(language, embeds, loss.rotary)
    talks = []
    for i in rows:
        sequence = ids[i, : made.read.length[i]].tolist()
        talks.append(Conversation([*sequence[:place], -200, *sequence[place + made.tokens :]], latents[i]))
    embedded = language.embed(talks)
    with torch.inference_mode(), language.cache(len(talks), made.width) as cache:
        read = cache.extend(embedded)
    for ours, theirs, row in zip(hidden, read, embedded, strict=True):
        torch.testing.assert_close(ours[: len(row)], theirs[: len(row)], atol=1e-4, rtol=1e-4)


def test_encoder_in_training_is_transformers_encoder(vocabulary: Vocabulary) -> None:
    torch.manual_seed(0)
    siglip, _ = encoder.build(vocabulary, TINY)
    pixels = torch.randn(3, 3, TINY.image, TINY.image)
    ids = torch.randint(vocabulary.size, (3, settings.CAPTION_TOKENS))
    with torch.no_grad():
        out = siglip(input_ids=ids, pixel_values=pixels)
        vision = siglip.vision_model(pixels, output_hidden_states=True)
        hidden = networks.image_tokens(siglip, pixels)
        image, text = networks.pooled_image(siglip, hidden), networks.pooled_text(siglip, ids)
        logits = torch.nn.functional.normalize(image) @ torch.nn.functional.normalize(text).T
        logits = logits * siglip.logit_scale.exp() + siglip.logit_bias
    torch.testing.assert_close(hidden, vision.hidden_states[-1])
    torch.testing.assert_close(logits, out.logits_per_image, atol=1e-5, rtol=1e-5)


def test_padded_swiglu_computes_the_same_and_stays_zero_outside(vocabulary: Vocabulary) -> None:
    torch.manual_seed(0)
    preset = dataclasses.replace(TINY, dit_width=40, dit_heads=2)  # inner width 106
    _, _, dit = networks.build_joint(vocabulary.model_config(preset))
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.1)
    inner = int(2 / 3 * 4 * 40)
    cropped = crop_swiglu(dict(dit.named_parameters()))
    bare = type(dit)(dit.config)
    bare.load_state_dict(cropped)
    networks.pad_swiglu(bare, 8)
    assert bare.dit_blocks[0].mlp.w3.in_features == 112 != inner
    x, t, y = torch.randn(2, 32, 4, 4), torch.rand(2), torch.randn(2, 16, 32)
    plain = type(dit)(dit.config)
    plain.load_state_dict(cropped)
    torch.testing.assert_close(bare(x, t, y), plain(x, t, y), atol=1e-5, rtol=1e-5)
    options = OptimizerOptions(warmup=1)
    model = FlatModel({"": bare}, CPU, torch.float32, options, 10)
    for _ in range(3):
        model.update(torch.autograd.grad(bare(x, t, y + bare.null_condition).square().mean(), model.parameters))
    mlp = bare.dit_blocks[0].mlp
    assert not mlp.w3.weight[:, inner:].any()
    assert not mlp.w12.weight.view(2, 112, 40)[:, inner:].any()


# Optimizer --------------------------------------------------------------------------------------------------------------------


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 24, 16), (2, 16, 24)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape), torch.float32))
        assert values.max() < 1.3
        assert values.median() > 0.6


def test_hidden_matrices_are_muons_and_the_rest_is_not(vocabulary: Vocabulary) -> None:
    _, _, _, model = joint.build(vocabulary, TINY, CPU, torch.float32, OptimizerOptions(), 10)
    split = {slot.name: slot.offset < model.muon_end for slot in model.slots}
    assert split["model.layers.0.self_attn.q_proj.weight"]
    assert split["diff_head.model.dit_blocks.1.adaLN_modulation.1.weight"]
    for name in ("model.embed_tokens.weight", "model.latent_queries", "diff_head.model.final_layer.linear.weight"):
        assert not split[name]
    assert matrices_in("diff_head.model.dit_blocks.3.attn.qkv.weight") == 3
    covered = sum(stack.count * stack.rows * stack.columns for stack in model.stacks)
    assert covered == sum(s.parameter.numel() for s in model.slots if split[s.name])


def test_update_follows_the_formulas() -> None:
    """AdamW against torch's own, on parameters that Muon does not take."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    options = OptimizerOptions(kind="adamw", lr=0.01, warmup=1, decay=1e-6, clip=1e9, ema=0.0)
    model = FlatModel({"": ours}, CPU, torch.float32, options, 10**9)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=options.betas, weight_decay=0.0)
    for _ in range(5):
        x = torch.randn(4, 5)
        model.update(torch.autograd.grad(ours(x).square().sum(), model.parameters))
        reference.zero_grad()
        theirs(x).square().sum().backward()
        reference.step()
    torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.tensors()["weight"], ours.weight.detach())


def test_compute_copy_follows_the_master_weights() -> None:
    layer = nn.Linear(8, 8)
    model = FlatModel({"": layer}, CPU, torch.bfloat16, OptimizerOptions(warmup=1), 10, lambda name: name == "bias")
    assert layer.weight.dtype == torch.bfloat16
    assert layer.bias.dtype == torch.float32
    x = torch.ones(1, 8)
    loss = (x.bfloat16() @ layer.weight.T).float().sum() + layer.bias.sum()
    before = layer.weight.clone()
    model.update(torch.autograd.grad(loss, model.parameters))
    assert not torch.equal(before, layer.weight)
    assert torch.equal(layer.weight, model.tensors(averaged=False)["weight"].bfloat16())


# The loop ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_continued_run_is_bit_for_bit_the_same(vocabulary: Vocabulary, tmp_path: Path, kind: str) -> None:
    whole = small_trainer(vocabulary, tmp_path / "whole", kind, steps=8)
    assert whole.run() == "finished"
    first = small_trainer(vocabulary, tmp_path / "parts", kind, steps=8, stop_at=4)
    assert first.run() == "stopped"
    torch.manual_seed(99)
    second = small_trainer(vocabulary, tmp_path / "parts", kind, steps=8)
    assert second.run() == "finished"
    for name, tensor in whole.model.state().items():
        assert torch.equal(tensor, second.model.state()[name]), name


def test_a_compact_state_continues_nearly_the_same(vocabulary: Vocabulary, tmp_path: Path) -> None:
    first = small_trainer(vocabulary, tmp_path / "a", steps=8, stop_at=4)
    first.run()
    first.save_compact(tmp_path / "compact")
    second = small_trainer(vocabulary, tmp_path / "b", steps=8)
    second.load_compact(tmp_path / "compact")
    torch.testing.assert_close(second.model.master, first.model.master, atol=1e-2, rtol=1e-2)
    assert second.run() == "finished"
    assert second.done == 8


class OnlyDevice(TorchDispatchMode):
    """Notes operations that make a CPU tensor, read a value, or have a result of a size that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = str(func)
        results = out if isinstance(out, (tuple, list)) else [out]
        host = any(isinstance(t, Tensor) and t.device.type == "cpu" for t in results)
        if host or any(word in name for word in ("local_scalar", "nonzero", "masked_select", "unique")):
            self.bad.append(name)
        return out


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_step_never_leaves_the_device(vocabulary: Vocabulary, tmp_path: Path, kind: str) -> None:
    """On the meta device at full size in bfloat16: no value, no CPU tensor, no dtype that does not fit."""
    meta = torch.device("meta")
    optimizer = OptimizerOptions(kind=kind)
    config, language, dit, model = joint.build(vocabulary, FULL, meta, torch.bfloat16, optimizer, 100)
    made = joint.Pools.__new__(joint.Pools)
    made.__dict__.update(small_pools(vocabulary).__dict__)
    made.tokens, made.channels, made.side, made.width = FULL.tokens, FULL.channels, FULL.side, 112
    for name in ("draw", "name", "read", "chat"):
        size = len(getattr(made, name))
        ids, number = torch.zeros(size, 112, dtype=torch.int16), torch.zeros(size, dtype=torch.long)
        setattr(made, name, joint.Sequences(ids.to(meta), number.to(meta), number.to(meta)))
    for name in ("draw_latents", "read_latents"):
        setattr(made, name, torch.empty(64, FULL.tokens * FULL.channels, dtype=torch.bfloat16, device=meta))
    made.reply, made.mean, made.std = (t.to(meta) for t in (made.reply, torch.zeros(96), torch.ones(96)))
    for name in ("attributes", "name_attributes", "shown_head"):
        setattr(made, name, getattr(made, name).to(meta))
    loss = joint.Loss(config, language, dit, made, joint.Batch(), torch.bfloat16)
    trainer = Trainer(model, loss, LoopOptions(steps=10), tmp_path, "")
    trainer.step()
    with OnlyDevice() as watch:
        trainer.step()
    assert not watch.bad
    assert trainer.sums.device == meta


def test_wrong_settings_are_refused(vocabulary: Vocabulary, tmp_path: Path) -> None:
    small_trainer(vocabulary, tmp_path, steps=4).run()
    other = small_trainer(vocabulary, tmp_path, steps=8)
    other.settings = "other"
    with pytest.raises(ValueError, match="other settings"):
        other.resume()


# The whole recipe -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stages_in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has `train` run every stage but the last, export's look, in this process; returns the stages run so far."""
    alone, ran = train.run, list[str]()

    def run(module: str, arguments: Sequence[str]) -> None:
        ran.append(module)
        if module == "sample":
            alone(module, arguments)
        else:
            importlib.import_module(f"recipes.shapes.{module}").main(list(arguments))

    monkeypatch.setattr(train, "run", run)
    return ran


def test_tiny_run_from_nothing_to_a_model_that_loads(
    tmp_path: Path, stages_in_this_process: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, target = tmp_path / "run", tmp_path / "model"
    assert train.main(["--tiny", "--out", str(out), "--export", str(target)])
    assert stages_in_this_process == ["encoder", "decoder", "reward", "joint", "export", "reader", "export", "sample"]
    for stage, name in (
        ("encoder", "loss"),
        ("decoder", "loss"),
        ("reward", "loss"),
        ("joint", "flow"),
        ("joint", "answer"),
        ("reader", "text"),
    ):
        log = [json.loads(line) for line in (out / stage / "log.jsonl").read_text().splitlines()]
        assert log[-1][name] < log[0][name], (stage, name)
    assert curves.plot(out, tmp_path / "curves.png") == ["encoder", "decoder", "reward", "joint", "reader"]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    model = ScaleRAE.from_pretrained(str(target), device="cpu")
    assert isinstance(model.tokenizer, ChatTokenizer)
    image = world_picture()
    latent = model.encode([image])[0]
    assert latent.shape == (TINY.tokens, TINY.channels)
    assert model.decode([latent])[0].size == (TINY.image, TINY.image)
    assert model.norm_stats is not None
    assert model.norm_stats[0].shape == (1, TINY.channels)
    assert model.answer("Describe this image.", latents=latent, max_new_tokens=4)
    conditions = [torch.zeros(TINY.tokens, TINY.z_channels)]
    assert model.sample(conditions, [0])[0].shape == (TINY.tokens, TINY.channels)
    assert (tmp_path / "sheet-g1.png").is_file()

    worse, again = out / train.DRAWN, tmp_path / "again"
    more = ["--out", str(again), "--start-from", str(target), "--earlier", str(worse), "--earlier-pool", "14"]
    assert reader.main([*train.TINY["reader"].split(), *more, "--export", str(again / "model")])
    said = capsys.readouterr().out
    assert all(f"drawings of {folder}, right: " in said for folder in (target, again / "earlier-1"))
    assert (again / "model" / "config.json").is_file()

    refitted = again / "refitted"
    refit.main(
        [str(again / "model"), "--conditions-of", str(target), "--export", str(refitted), "--tiny", "--prompts", "16"]
    )
    assert "after solving the projector: " in capsys.readouterr().out
    before, after = export.stored(again / "model"), export.stored(refitted)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"diff_head_projector.weight", "diff_head_projector.bias"}
    assert {name: tensor.dtype for name, tensor in before.items()} == {
        name: tensor.dtype for name, tensor in after.items()
    }

    train.take_parts(target, tmp_path / "next")  # its encoder and decoder begin another run
    for part in ("encoder", "decoder"):
        first = out / ("reward" if part == "encoder" else part) / f"{part}.safetensors"
        taken, made = (common.load_weights(p) for p in (tmp_path / "next" / part / f"{part}.safetensors", first))
        assert taken.keys() == made.keys()
        assert all(torch.equal(taken[name], made[name]) for name in made)


def world_picture():
    from scale_rae.shapes import draw

    return draw.to_pil(world.sample(np.random.default_rng(0), 1), TINY.image)[0]


class Uncompilable(nn.Linear):
    """Fails when it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            raise RuntimeError("no")
        return super().forward(x)


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_compiled_runs_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = Uncompilable(4, 4)
    model = FlatModel({"": layer}, CPU, torch.float32, OptimizerOptions(), 4)
    loss = lambda: (layer(torch.ones(2, 4)).square().mean(), {})  # noqa: E731
    trainer = Trainer(model, loss, LoopOptions(steps=4, log_every=2), tmp_path, "", [layer])
    assert trainer.run() == "finished"
    assert "compilation failed" in capsys.readouterr().err


def test_start_from_takes_the_exported_weights(vocabulary: Vocabulary, tmp_path: Path) -> None:
    _, _, _, trained = joint.build(vocabulary, TINY, CPU, torch.float32, OptimizerOptions(), 10)
    common.save_weights(tmp_path / "model.safetensors", joint.weights(trained))
    common.set_seed(1)
    _, _, _, fresh = joint.build(vocabulary, TINY, CPU, torch.float32, OptimizerOptions(), 10)
    joint.start_from(fresh, tmp_path)
    stored = common.load_weights(tmp_path / "model.safetensors")
    taken = joint.weights(fresh)
    assert taken.keys() == stored.keys()
    assert all(torch.equal(taken[name], stored[name].float()) for name in stored)
