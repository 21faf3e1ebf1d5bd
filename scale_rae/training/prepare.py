"""Preparation before the first step: latents of pictures, the model's replies, conditions.

The cache's keys are hashes: of picture and encoder for a latent, of sequence and model for a condition.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor

from scale_rae.adapters import Adapter
from scale_rae.config import ScaleRAEConfig
from scale_rae.errors import ConfigError, DataError, InputError, counted, shorten
from scale_rae.hub import Source, find
from scale_rae.images import decode_image
from scale_rae.language import Conversation, LanguageModel, Reply
from scale_rae.loading import load_dit, load_encoder, load_language
from scale_rae.noise import image_seed
from scale_rae.prompt import ChatTokenizer, clean_message
from scale_rae.promptfile import PromptRecord, read_prompts
from scale_rae.quantization import Place
from scale_rae.training.batches import Counts, Sample, embed
from scale_rae.training.cache import TensorCache, key_of, stored_dtype
from scale_rae.training.drawing import draw_latents
from scale_rae.training.passes import read
from scale_rae.training.records import PictureFile, Record, Report, usable
from scale_rae.training.sequences import PICTURE, QUERIES, Message, TokenSequence, tokenized
from scale_rae.training.settings import TrainingOptions
from scale_rae.wording import as_request

T = TypeVar("T")

ENCODE_AT_ONCE, REPLY_AT_ONCE, CONDITIONS_AT_ONCE = 32, 64, 16
DRAW_AT_ONCE = 16
LONGEST_OWN_REPLY = 64  # tokens
_SQUARE = 1.1  # longer by shorter edge, up to which a picture counts as square
_THREADS = 8


@dataclass(frozen=True)
class Model:
    """A model's files, and what its weights are loaded with. `identity` names all that they depend on."""

    source: Source
    config: ScaleRAEConfig
    tokenizer: ChatTokenizer
    adapters: Sequence[Adapter]
    identity: Any
    device: torch.device
    dtype: torch.dtype

    @property
    def place(self) -> Place:
        """Where weights are loaded to."""
        return Place(self.device, self.device, self.dtype)


@dataclass(frozen=True)
class PreparedRecord:
    """A record by the keys of what was prepared; `condition` is "" where the language model learns."""

    where: str
    sequence: TokenSequence
    drawn: tuple[str, ...]
    shown: tuple[str, ...]
    condition: str
    kept: bool = False  # whether the model is to go on drawing it as it does

    @property
    def counts(self) -> Counts:
        """What it adds to the totals of a step."""
        return Counts(len(self.drawn), self.sequence.learnt_tokens, self.kept)


@dataclass(frozen=True)
class Prepared:
    """The records that are trained on, and where their tensors are. `notes` are for the user."""

    records: list[PreparedRecord]
    validation: list[PreparedRecord]  # of the validation prompts, which have no picture yet
    latents: TensorCache
    conditions: TensorCache
    notes: list[str]

    def sample(self, number: int, seed: int) -> Sample:
        """A record's tensors."""
        record = self.records[number]
        drawn, shown = (tuple(self.latents.get(key) for key in keys) for keys in (record.drawn, record.shown))
        condition = self.conditions.get(record.condition) if record.condition else None
        return Sample(record.where, record.sequence, drawn, shown, condition, seed, record.kept)

    @property
    def identity(self) -> str:
        """A key for all that is trained on, in its order."""
        return key_of([(record.sequence, record.drawn, record.shown, record.condition) for record in self.records])


class Caches(NamedTuple):
    """Where a training keeps latents of pictures, the model's replies, and conditions [pictures, L, Z]."""

    latents: TensorCache
    replies: TensorCache
    conditions: TensorCache


def caches(options: TrainingOptions) -> Caches:
    """The caches in the folder that the options choose."""
    return Caches(*(TensorCache(options.cache / name) for name in Caches._fields))


def prepare(records: list[Record], options: TrainingOptions, model: Model, report: Report) -> Prepared:
    """The prepared records, once everything that they need is in the cache.

    Raises:
        DataError: for records that are too long, unless they are to be left out. InputError: when the model draws nothing for
            texts without a reply; for prompts that are too long, or ask for nothing. ConfigError: for a checkpoint whose latents are no encoder's.
    """
    if model.config.vae is not None:
        raise ConfigError(
            f"{model.source.folder / 'config.json'}: generation_alignment_tower is {model.config.vae!r}: training on latents of a VAE "
            "is not supported"
        )
    latents, replies, conditions = caches(options)
    notes: list[str] = []
    if not options.trains_language:
        records = _that_draw(records, options, notes)
    prompts = [
        _asked(f"--validation-prompts, prompt {number}", text, options)
        for number, text in enumerate(options.validation_prompts, start=1)
    ]
    classes = _class_records(options)
    # Lengths without replies, before the model is asked for those.
    records, long = _that_fit(records, [*prompts, *classes], lambda record: too_long(record, model))
    records = usable(records, long, options)
    # Loaded when it is first asked for: a full cache needs none.
    language = functools.cache(lambda: load_language(model.source, model.config, model.place, model.adapters))
    own = _OwnReplies(model, language, options, replies, conditions)
    ends = len(records), len(records) + len(prompts)
    worded = own.worded([*records, *prompts], classes, report, notes)
    of_data, of_prompts, of_classes = worded[: ends[0]], worded[ends[0] : ends[1]], worded[ends[1] :]
    of_data, longer = _that_fit(
        of_data, [*of_prompts, *of_classes], lambda one: too_long(one.record, model, one.sequence)
    )
    usable([one.record for one in of_data], longer, options)
    notes += [f"left out: {problem}" for problem in (*long, *longer)]
    pictures = _encode([one.record for one in of_data], options, model, latents, report, notes)
    learnt, validation = ([_prepared(one, pictures, options, model) for one in some] for some in (of_data, of_prompts))
    kept, seeds = _kept(of_classes, options, model, notes)
    prepared = Prepared([*learnt, *kept], validation, latents, conditions, notes)
    _draw_kept(prepared, kept, seeds, options, model, report)
    if not options.trains_language:
        _conditions([*prepared.records, *prepared.validation], latents, conditions, model, language, report)
    return prepared


def too_long(record: Record, model: Model, sequence: TokenSequence | None = None) -> str | None:
    """What is wrong with a conversation that is longer than the model reads; None for a shorter one.

    `sequence` is the conversation's, if it is known. A reply that is not given does not count.
    """
    if sequence is None:
        sequence = tokenized(model.tokenizer, (record.with_reply("") if record.own_reply else record).messages)
    length, most = sequence.length(model.config.tokens), model.config.max_length
    return None if length <= most else f"{record.where}: {length} tokens long; the model reads at most {most}"


def _that_draw(records: list[Record], options: TrainingOptions, notes: list[str]) -> list[Record]:
    """The records that draw a picture, with a note on the others.

    Raises:
        DataError: when there are none.
    """
    drawing = [record for record in records if record.draws]
    if len(drawing) < len(records):
        notes.append(
            f"left out: {counted(len(records) - len(drawing), 'record')} without a picture to draw (--train {options.train})"
        )
    if not drawing:
        raise DataError(f"no record has a picture to draw, which --train {options.train} learns", [])
    return drawing


def _that_fit(
    of_data: Sequence[T], of_prompts: Sequence[T], problem: Callable[[T], str | None]
) -> tuple[list[T], list[str]]:
    """(records of the data that the model can read, what is wrong with each other one).

    `problem` says what is wrong with a record, and None for one that the model can read.

    Raises:
        InputError: for a prompt that the model cannot read.
    """
    if wrong := [found for one in of_prompts if (found := problem(one))]:
        raise InputError(wrong[0])
    problems = [problem(one) for one in of_data]
    fitting = [one for one, found in zip(of_data, problems, strict=True) if not found]
    return fitting, [found for found in problems if found]


def _prepared(
    one: _Worded, pictures: Mapping[PictureFile, str], options: TrainingOptions, model: Model
) -> PreparedRecord:
    """A record of the data or a validation prompt; `pictures` are the keys of its pictures' latents."""
    drawn, shown = _parted(one.record, pictures)
    condition = ""
    if not options.trains_language:
        own = _own_key(model, one.record.messages[0].text)
        condition = own if one.is_own else key_of(model.identity, one.sequence.ids, shown)
    return PreparedRecord(one.record.where, one.sequence, drawn, shown, condition)


def _kept(
    of_classes: Sequence[_Worded], options: TrainingOptions, model: Model, notes: list[str]
) -> tuple[list[PreparedRecord], list[int]]:
    """(records of the --class-prompts that the model draws, noise seeds of their drawings).

    A note says which prompts it does not draw.

    Raises:
        InputError: when the model draws none of them.
    """
    classes = [one for one in of_classes if one.is_own]
    # A prompt that is repeated has one drawing.
    place = {one.record.messages: number for number, one in enumerate(classes)}
    seeds = [image_seed(options.seed, place[one.record.messages], 0) for one in classes]
    kept = []
    for one, seed in zip(classes, seeds, strict=True):
        message = one.record.messages[0].text
        how = seed, options.num_inference_steps, options.validation_guidance
        picture = key_of(model.identity, "drawn", message, *how)
        kept.append(PreparedRecord(one.record.where, one.sequence, (picture,), (), _own_key(model, message), kept=True))
    if others := [one.record.messages[0].text for one in of_classes if not one.is_own]:
        notes.append(f"{options.class_prompts}: {left_out(others, len(of_classes))}")
    if of_classes and not kept:
        raise InputError(f"{options.class_prompts}: the model draws none of these prompts; give prompts that it draws")
    return kept, seeds


@dataclass(frozen=True)
class Drawable:
    """A prompt that the model draws: its place in a file, its text, and the key of its condition."""

    where: str
    text: str
    condition: str


def drawable(
    file: Path,
    lines: Sequence[PromptRecord],
    options: TrainingOptions,
    model: Model,
    language: Callable[[], LanguageModel],
    report: Report,
) -> tuple[list[Drawable], list[str]]:
    """(prompts of a file that the model draws by itself, notes for the user).

    The conditions of these prompts are in the cache then. With --reply, these are all prompts: the model draws after that
    reply.

    Raises:
        InputError: naming the file, when the model draws none of them; naming the line, for one that is too long with --reply.
    """
    latents, replies, conditions = caches(options)
    places = [f"{file}, line {line.line}" for line in lines]
    messages = [as_request(line.prompt, options.prompt_prefix) for line in lines]
    if options.reply is not None:
        records = [
            _after_reply(place, message, options.reply, model) for place, message in zip(places, messages, strict=True)
        ]
        _conditions(records, latents, conditions, model, language, report)
        found = [Drawable(r.where, line.prompt, r.condition) for line, r in zip(lines, records, strict=True)]
        return found, []
    said = _OwnReplies(model, language, options, replies, conditions).of(messages, report)
    found = [
        Drawable(place, line.prompt, _own_key(model, message))
        for place, line, message in zip(places, lines, messages, strict=True)
        if said[message] is not None
    ]
    if not found:
        raise InputError(f"{file}: the model draws none of these prompts; give prompts that it draws")
    others = [line.prompt for line, message in zip(lines, messages, strict=True) if said[message] is None]
    return found, [f"{file}: {left_out(others, len(lines))}"] if others else []


def _after_reply(where: str, message: str, reply: str, model: Model) -> PreparedRecord:
    """A record whose condition is that of the picture after a given reply to a message.

    Raises:
        InputError: naming `where`, when both are longer than the model reads, or the message holds PICTURE.
    """
    _check_text(message, where)
    talk = Message("user", clean_message(message)), Message("assistant", reply + PICTURE)
    sequence = tokenized(model.tokenizer, talk)
    if problem := too_long(Record(where, talk, ()), model, sequence):
        raise InputError(problem)
    condition = key_of(model.identity, "after a reply", reply, message)
    return PreparedRecord(where, sequence, (), (), condition)


def left_out(prompts: Sequence[str], of: int) -> str:
    """A note for the user on prompts, of so many, that the model answers in words."""
    return f"{len(prompts)} of {counted(of, 'prompt')} left out: the model does not draw, for example, {shorten(prompts[0])!r}"


def _check_text(text: str, where: str) -> None:
    """Raises InputError, naming `where`, for a prompt in which a picture would have a place."""
    if PICTURE in text:
        raise InputError(f"{where}: holds {PICTURE}, which stands for a picture")


def _asked(where: str, text: str, options: TrainingOptions) -> Record:
    """The conversation in which a prompt is drawn, of which there is no picture yet.

    Raises:
        InputError: naming `where`, for a text that asks for nothing.
    """
    try:
        text = clean_message(text)
    except InputError as e:
        raise InputError(f"{where}: {e}") from e
    _check_text(text, where)
    messages = Message("user", as_request(text, options.prompt_prefix)), Message("assistant", PICTURE)
    return Record(where, messages, (), own_reply=True)


def _class_records(options: TrainingOptions) -> list[Record]:
    """The records of --class-prompts, whose drawings should not change."""
    if options.class_prompts is None:
        return []
    prompts = read_prompts(options.class_prompts)
    return [_asked(f"{options.class_prompts}, line {line.line}", line.prompt, options) for line in prompts]


def _draw_kept(
    prepared: Prepared,
    kept: list[PreparedRecord],
    seeds: list[int],
    options: TrainingOptions,
    model: Model,
    report: Report,
) -> None:
    """Draws the pictures of records that are kept, one seed each, with the model as it is."""
    todo = _unfinished(range(len(kept)), DRAW_AT_ONCE, lambda i: prepared.latents.has(kept[i].drawn[0]))
    if not todo:
        return
    dit, norm_stats = load_dit(model.source, model.config, model.place, model.adapters)
    for part in _reported(todo, "drawing class prompts", report):
        conditions = torch.cat([prepared.conditions.get(kept[i].condition) for i in part])
        how = [seeds[i] for i in part], options.validation_guidance, options.num_inference_steps
        drawn = draw_latents(dit, model.config, norm_stats, conditions, *how)
        for i, latent in zip(part, drawn, strict=True):
            prepared.latents.add(kept[i].drawn[0], latent.to(stored_dtype(model.dtype)).clone())


def _unfinished(items: Sequence[T], at_once: int, done: Callable[[T], bool]) -> list[Sequence[T]]:
    """The groups of `at_once` items of which one is not done.

    They do not depend on what a run that was ended had done, since a group's size may decide the last bits.
    """
    groups = [items[start : start + at_once] for start in range(0, len(items), at_once)]
    return [group for group in groups if not all(map(done, group))]


def _reported(groups: Sequence[Sequence[T]], what: str, report: Report) -> Iterator[Sequence[T]]:
    """The groups; the progress is reported before each, and after the last."""
    done, total = 0, sum(map(len, groups))
    for group in groups:
        report(what, done, total)
        yield group
        done += len(group)
    if groups:
        report(what, total, total)


# --- replies and conditions ------------------------------------------------------------------------------------------


def _own_key(model: Model, message: str) -> str:
    return key_of(model.identity, "own reply", message)


class _Worded(NamedTuple):
    """A record with its reply, and as tokens. With `is_own`, the reply is what the model says by itself."""

    record: Record
    sequence: TokenSequence
    is_own: bool


@dataclass(frozen=True)
class _OwnReplies:
    """The model's own replies, for records that give none."""

    model: Model
    language: Callable[[], LanguageModel]
    options: TrainingOptions
    replies: TensorCache
    conditions: TensorCache

    def worded(
        self, records: Sequence[Record], classes: Sequence[Record], report: Report, notes: list[str]
    ) -> list[_Worded]:
        """The records with replies, then those of class prompts.

        With --reply, the model is asked about the latter only. A record whose text the model does not draw gets the reply of
        --reply, or the most common one.
        """
        everything, given = [*records, *classes], self.options.reply
        own = {i: record.messages[0].text for i, record in enumerate(everything) if record.own_reply}
        if not own:
            return [self._worded(record) for record in everything]
        asked = {i: message for i, message in own.items() if given is None or i >= len(records)}
        replies = self.of(list(asked.values()), report)
        said = {i: reply for i, message in asked.items() if (reply := replies[message]) is not None}
        if given is None:
            found = list(said.values())
            texts = [text for r in everything if not r.own_reply for _, text in r.messages]
            usual = Counter(found or [text.partition(PICTURE)[0] for text in texts if PICTURE in text]).most_common(1)
            if not usual:
                raise InputError(
                    f"of {counted(len(own), 'text')} without a reply, the model draws none by itself; give the reply before each picture with --reply"
                )
            given = usual[0][0]
            if others := len(own) - len(said):
                notes.append(
                    f"the reply {given!r} stands before the picture for {others} of {counted(len(own), 'text')}, where the model does not "
                    "draw by itself"
                )
        return [
            self._worded(r.with_reply(said.get(i, given)), i in said) if i in own else self._worded(r)
            for i, r in enumerate(everything)
        ]

    def _worded(self, record: Record, is_own: bool = False) -> _Worded:
        return _Worded(record, tokenized(self.model.tokenizer, record.messages, self.options.text_targets), is_own)

    def of(self, messages: list[str], report: Report) -> dict[str, str | None]:
        """What the model says by message, None where it does not draw; the conditions of the others are kept."""
        model = self.model
        keys = {message: _own_key(model, message) for message in messages}

        def known(message: str) -> bool:
            key = keys[message]
            return self.replies.has(key) and (self.conditions.has(key) or not self.replies.get(key)[0])

        for part in _reported(_unfinished(list(keys), REPLY_AT_ONCE, known), "asking the model", report):
            for message, answer in zip(part, own_replies(model, self.language(), part), strict=True):
                if answer.condition is not None:
                    self.conditions.add(keys[message], answer.condition[None].to(stored_dtype(model.dtype)))
                self.replies.add(keys[message], torch.tensor([answer.condition is not None, *answer.ids]))
        stored = {message: self.replies.get(key).tolist() for message, key in keys.items()}
        return {message: model.tokenizer.decode(ids) if draws else None for message, (draws, *ids) in stored.items()}


def own_replies(model: Model, language: LanguageModel, messages: Sequence[str]) -> list[Reply]:
    """What the model says to messages, with the condition where it draws."""
    conversations = [Conversation(model.tokenizer.chat(clean_message(message))) for message in messages]
    limits = [LONGEST_OWN_REPLY] * len(messages)
    return language.reply(conversations, limits, model.tokenizer.chat_end, model.tokenizer.image_start)


@torch.no_grad()
def _conditions(
    records: Sequence[PreparedRecord],
    latents: TensorCache,
    conditions: TensorCache,
    model: Model,
    language: Callable[[], LanguageModel],
    report: Report,
) -> None:
    """Puts the conditions [pictures, L, Z] of all sequences into the cache, by one pass through each."""
    by_key = {record.condition: record for record in records}
    keys = sorted(by_key, key=lambda key: len(by_key[key].sequence.ids))
    for group in _reported(_unfinished(keys, CONDITIONS_AT_ONCE, conditions.has), "computing conditions", report):
        part = [by_key[key] for key in group]
        shown = [latents.get(key) for record in part for key in record.shown]
        found = forced_conditions(language(), [record.sequence for record in part], shown)
        taken = 0
        for record in part:
            pictures = record.sequence.ids.count(QUERIES)
            value = found[taken : taken + pictures]
            taken += pictures
            conditions.add(record.condition, value.to(stored_dtype(model.dtype)))


def forced_conditions(language: LanguageModel, sequences: Sequence[TokenSequence], shown: Sequence[Tensor]) -> Tensor:
    """Conditions [pictures, L, Z] of the pictures that sequences draw, with their text given."""
    embedded = embed(language, sequences, shown)
    hidden = read(language, embedded.embeds)
    found = language.condition(hidden[embedded.queries])
    return found.view(-1, language.config.tokens, found.shape[-1])


# --- latents ---------------------------------------------------------------------------------------------------------


def _encode(
    records: Sequence[Record],
    options: TrainingOptions,
    model: Model,
    latents: TensorCache,
    report: Report,
    notes: list[str],
) -> dict[PictureFile, str]:
    """The keys of all pictures' latents, once all latents are there.

    A note says how many pictures were stretched.
    """
    from scale_rae.provenance import file_record

    source = find(model.config.encoder_name, "encoder", model.source.folder)
    encoder = (file_record(source), model.config.tokens, model.config.encoder_layer, str(model.dtype))
    files = list(dict.fromkeys(picture for record in records for picture in record.pictures))
    where = {picture: record.where for record in records for picture in record.pictures}

    def key(picture: PictureFile) -> str:
        return key_of(encoder, options.center_crop, hashlib.sha256(picture.read()).hexdigest())

    with ThreadPoolExecutor(_THREADS) as pool:
        keys = dict(zip(files, pool.map(key, files), strict=True))
        by_key = {key: picture for picture, key in keys.items()}
        todo = _unfinished(list(by_key), ENCODE_AT_ONCE, latents.has)
        if not todo:
            return keys
        network = load_encoder(source, model.config, model.dtype, model.device)
        stretched = 0

        def load(picture: PictureFile) -> Image.Image:
            image = decode_image(picture.read(), where[picture])
            return _square(image) if options.center_crop else image

        for part in _reported(todo, "encoding pictures", report):
            images = list(pool.map(load, [by_key[key] for key in part]))
            stretched += sum(network.stretches and max(i.size) > _SQUARE * min(i.size) for i in images)
            encoded = network.encode(network.preprocess(images)).to(stored_dtype(model.dtype)).cpu()
            for name, latent in zip(part, encoded, strict=True):
                latents.add(name, latent.clone())
    if stretched:
        notes.append(
            f"stretched to squares, as the encoder does: {stretched} of {counted(len(by_key), 'picture')}; --center-crop cuts out their "
            "middle instead"
        )
    return keys


def _square(image: Image.Image) -> Image.Image:
    """The middle of a picture, as high as wide."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _parted(record: Record, keys: Mapping[PictureFile, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys of the pictures that a record draws, and of those that it shows."""
    drawn: list[str] = []
    shown: list[str] = []
    pictures = iter(record.pictures)
    for role, text in record.messages:
        for _ in range(text.count(PICTURE) if record.pictures else 0):
            (drawn if role == "assistant" else shown).append(keys[next(pictures)])
    return tuple(drawn), tuple(shown)
