"""The public object: one Scale-RAE checkpoint that draws, reads and scores images."""

from __future__ import annotations

import copy
import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, Unpack, overload

import torch
from PIL import Image
from torch import Tensor

from scale_rae import flow
from scale_rae.checkpoint import check_latent
from scale_rae.cpu import exact_batch
from scale_rae.decoder import PixelDecoder
from scale_rae.encoder import Encoder
from scale_rae.errors import ConfigError, InputError, counted
from scale_rae.hub import Source
from scale_rae.images import Picture, as_rgb
from scale_rae.language import (
    Conversation,
    LanguageModel,
    ListenOnce,
    Reply,
    TextListener,
    TokenListener,
    hear_text,
    longest_reply,
)
from scale_rae.loading import LoadProgress
from scale_rae.memory import MemoryErrors
from scale_rae.networks import Networks, load
from scale_rae.noise import image_seeds as seeds_of
from scale_rae.options import (
    DECODE_AT_ONCE,
    DEFAULT_ANSWER_TOKENS,
    DEFAULT_MODEL,
    DEFAULT_NEW_TOKENS,
    DEFAULT_SEED,
    DEFAULT_STEPS,
    ModelChoice,
    SamplingOptions,
    Speed,
    check_count,
)
from scale_rae.prompt import QUESTION, ChatTokenizer
from scale_rae.results import Answer, GeneratedImage, GenerateOptions, Generation
from scale_rae.sampling import Trajectory
from scale_rae.scores import Asked, EarlyScore, Score, score_early, score_latents, texts_of

if TYPE_CHECKING:
    from scale_rae.vae import VaeDecoder


READ_AT_ONCE = 64  # conversations
T = TypeVar("T")
Progress = LoadProgress  # what, done, total


def _either(name: str, value: T | None, default: T, alias: str, other: T | None) -> T | None:
    """The value of an option that has two names; None where neither is given.

    Raises:
        InputError: when both are given.
    """
    if other is None:
        return value
    if value not in (None, default):
        raise InputError(f"{name} {value} and {alias} {other}: they are one option; give one of them")
    return other


def _several(latents: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Latents [L, C], of which a single one needs no list."""
    return [latents] if isinstance(latents, Tensor) and latents.dim() == 2 else list(latents)


def _counted(progress: Progress, images: int, callback: flow.StepCallback | None) -> flow.StepCallback:
    """A callback of batches that reports how many of the evaluations of all `images` are done."""
    done = 0

    def step(evaluation: int, evaluations: int, t: float, x: Tensor, v: Tensor) -> None:
        nonlocal done
        total = images * evaluations
        done = min(done + len(x), total)  # a batch that ran out of memory is begun again
        progress("images", done, total)
        if callback is not None:
            callback(evaluation, evaluations, t, x, v)

    return step


class ScaleRAE:
    """A loaded checkpoint, made by `ScaleRAE.from_pretrained` or `scale_rae.load`.

    Latents are [L, C] float32 tensors on the CPU. Encoded images and drawn latents are the same type, so every method that
    takes a latent takes both. Sampling keeps its state in float32 whatever the dtype of the networks.

    Source: Scale-RAE (arXiv 2601.16208).
    """

    def __init__(self, networks: Networks) -> None:
        self._use(networks)
        self.split_batches, self.memory_plan = networks.split_batches, networks.memory_plan
        self.batch_size = networks.batch_size  # where none is chosen
        self.adapters = networks.adapters  # with their weights; merged into the networks

    def __repr__(self) -> str:
        tokens = f"latents of {self.config.tokens} tokens with {self.config.channels} channels"
        return f"ScaleRAE({self.source.name!r}, {self.device}, {str(self.dtype).removeprefix('torch.')}, {tokens})"

    def _use(self, networks: Networks) -> None:
        self._networks = networks
        self.config, self.source, self.tokenizer = networks.config, networks.source, networks.tokenizer
        self.dtype, self.device, self.speed = networks.dtype, networks.device, networks.speed
        self.language, self.dit, self.norm_stats = networks.language, networks.dit, networks.norm_stats
        self.sampler, self.residency = networks.sampler, networks.residency

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] | Source = DEFAULT_MODEL,
        decoder: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        progress: LoadProgress | None = None,
        compile: str = "auto",
        quantize: str | None = None,
        split_batches: bool = True,
        offload: str = "none",
        memory: str | None = None,
        lora: Sequence[str] = (),
    ) -> ScaleRAE:
        """The model `name`: "shapes" (bundled), a folder in the published layout, a hub id, or a `hub.Source`.

        The encoder and the pixel decoder load when first used. On the CPU, the process keeps up to 256 MiB of freed memory
        (`cpu.keep_freed_memory`).

        Args:
            decoder: a folder or hub id; None means a folder `decoder` inside or beside the model's folder, else the
                published decoder for the model's encoder. For a FLUX-VAE-aligned checkpoint the decoder is a VAE: a folder
                `vae` inside or beside the model's, else the VAE that config.json names.
            device: "cpu", "cuda", "cuda:N" or "mps", also as torch.device; None means the best device here.
            dtype: "float32", "bfloat16" or "float16", also as torch.dtype; None means float32 on the CPU and bfloat16 elsewhere.
            revision: of the model on the hub.
            progress: `progress(what, done, total)`, in bytes of weights.
            compile: "auto", "on" or "off", as in `Speed`.
            quantize: None, "none" or one of `options.QUANTIZE`, as in `Speed`.
            split_batches: halve a batch and try again when memory runs out.
            offload: where weights wait: "none" (all on the device), "model" or "stream", as in `Residency`.
            memory: the most memory of the device to take, as in "8G", or "auto" for what is free. Chooses `quantize`, `offload`
                and the default batch size (`memory_plan`), and logs one line on what it chose. Given `quantize` ("none": the
                weights as they are) and `offload` narrow the choice. A GPU's limit then holds for the whole process: what
                would go beyond fails.
            lora: LoRA adapters in PEFT's form, merged into the weights: folders or hub ids, each with ":WEIGHT" behind it if it
                is to count more or less than it was trained to.

        Raises:
            ConfigError, CheckpointError, HubError, DeviceError, InputError: each says what is wrong and what to do.
        """
        source = name if isinstance(name, Source) else None
        adapters = [lora] if isinstance(lora, str | os.PathLike) else lora
        choice = ModelChoice(
            name.name if isinstance(name, Source) else os.fspath(name),
            decoder_repo=decoder,
            revision=revision,
            device=None if device is None else str(device),
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
            compile=compile,
            quantize=quantize,
            offload=offload,
            memory=memory,
            lora=tuple(os.fspath(adapter) for adapter in adapters),
        )
        return cls(load(choice, source, progress, split_batches))

    # --- parts that load when first used -------------------------------------------------------------------------

    @property
    def encoder(self) -> Encoder:
        """The representation encoder; also knows the pixel normalisation the decoder undoes."""
        return self._networks.encoder

    @property
    def decoder(self) -> PixelDecoder | VaeDecoder:
        """The pixel decoder; for a FLUX-VAE-aligned checkpoint the decoder of a VAE (extra `vae`)."""
        return self._networks.decoder

    @property
    def encoder_source(self) -> Source | None:
        """The encoder's files; None until it is loaded."""
        return self._networks.encoder_source

    @property
    def decoder_source(self) -> Source | None:
        """The decoder's files; None until it is loaded."""
        return self._networks.decoder_source

    @property
    def image_size(self) -> int:
        """Pixels along each edge of a decoded picture; loads the decoder."""
        return self._networks.image_size

    # --- drawing -------------------------------------------------------------------------------------------------

    @overload
    def generate(self, prompts: str, **options: Unpack[GenerateOptions]) -> Generation: ...  # type: ignore[overload-overlap]
    @overload
    def generate(self, prompts: Sequence[str], **options: Unpack[GenerateOptions]) -> list[Generation]: ...
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        num_images: int = 1,
        seed: int = DEFAULT_SEED,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        steps: int | None = None,
        solver: str | None = None,
        options: SamplingOptions | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        latents: Sequence[Tensor] | None = None,
        image_seeds: Sequence[Sequence[int]] | None = None,
        batch_size: int | None = None,
        decode: bool = True,
        draw: bool = True,
        callback: flow.StepCallback | None = None,
        progress: Progress | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
    ) -> Generation | list[Generation]:
        """Replies to messages and draws what the replies ask for.

        Of `guidance`, `guidance_interval`, `steps` and `solver`, None is the default of `SamplingOptions`. A student has values of its
        own and refuses others.

        Args:
            prompts: one message or several; the result is one Generation, or a list in the same order.
            num_images: images per prompt. Image j of prompt i is made from noise seeded by
                `image_seed(seed, i, j)`, so it does not depend on the batch it is drawn in.
            seed: what the seeds of the noise are made from.
            guidance: classifier-free guidance scale, 1 for none.
            guidance_interval: (lo, hi): guidance acts only where t is in between.
            steps: of the sampler, from noise to latent.
            solver: one of "euler" (the published schedule), "heun", "dpmpp_2m", "ab2".
            options: the sampler's options as one object, in place of `guidance`, `guidance_interval`, `steps`, `solver`.
            latents: one latent [L, C] per prompt, shown to the model before the message.
            image_seeds: the noise seeds themselves, a list per prompt, instead of `num_images` and `seed`.
            batch_size: images sampled at once (default: `batch_size` of the model, 8 on the CPU and 32 elsewhere).
            draw: False ends a reply where it asks for an image (`asks_for_image`) and draws nothing.
            decode: False makes no pixels: `GeneratedImage.image` is None.
            callback: `callback(evaluation, evaluations, t, x, v)` after each network evaluation of a batch.
            progress: `progress("images", done, total)` after each evaluation of a batch, where an evaluation of n images
                counts n, and `total` is that of all batches.
            guidance_scale: `guidance`, as diffusers calls it.
            num_inference_steps: `steps`, as diffusers calls it.

        Raises:
            InputError: for an empty prompt or an option out of range. ScaleRAEError: when a latent is not finite.
            DeviceError: when memory runs out, saying what would fit.
        """
        guidance = _either("guidance", guidance, 1.0, "guidance_scale", guidance_scale)
        steps = _either("steps", steps, DEFAULT_STEPS, "num_inference_steps", num_inference_steps)
        if options is None:
            options = self.sampler.called_with(guidance, guidance_interval, steps, solver)
        options = self.sampler.chosen(options)
        self.sampler.check(options)
        messages = [prompts] if isinstance(prompts, str) else list(prompts)
        if image_seeds is None:
            image_seeds = seeds_of(len(messages), num_images, seed)
        elif len(image_seeds) != len(messages):
            raise InputError(
                f"{counted(len(messages), 'message')}, but image seeds for {len(image_seeds)}: give one each"
            )
        start = time.perf_counter()
        replies = self.reply(messages, latents=latents, max_new_tokens=max_new_tokens, draw=draw)
        results = [
            Generation(message, self.tokenizer.decode(reply.ids), reply, [])
            for message, reply in zip(messages, replies, strict=True)
        ]
        seconds = {"reply": time.perf_counter() - start}
        jobs = [
            (result, result.reply.condition, s)
            for result, seeds in zip(results, image_seeds, strict=True)
            if result.reply.condition is not None
            for s in seeds
        ]
        start = time.perf_counter()
        seen = callback if progress is None else _counted(progress, len(jobs), callback)
        sampled = self.sample([c for _, c, _ in jobs], [s for _, _, s in jobs], options, batch_size, seen)
        seconds["sampling"] = time.perf_counter() - start
        start = time.perf_counter()
        pixels: Sequence[Image.Image | None] = self.decode(sampled) if decode else [None] * len(sampled)
        seconds["decoding"] = time.perf_counter() - start
        for (result, _, s), latent, image in zip(jobs, sampled, pixels, strict=True):
            result.images.append(GeneratedImage(latent, image, s))
        for result in results:
            result.seconds = seconds
        return results[0] if isinstance(prompts, str) else results

    def reply(
        self,
        messages: Sequence[str],
        latents: Sequence[Tensor] | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        listen: TokenListener | None = None,
        draw: bool = True,
    ) -> list[Reply]:
        """Greedy replies to messages; with `draw`, a reply that asks for an image has its condition [L, Z].

        `latents` are one latent [L, C] per message, shown to the model before it. `listen` is as in `converse`.

        Raises:
            InputError: for an empty or too long message, a limit below 1, or latents that do not fit.
            ConfigError: for latents given to a checkpoint that cannot read them (`check_reads`).
        """
        if isinstance(messages, str):  # whose letters would be the messages
            raise InputError(f"messages {messages!r:.40}: give a list of texts")
        if max_new_tokens < 1:
            raise InputError(f"max new tokens {max_new_tokens}: must be at least 1")
        if latents is None:
            conversations = [Conversation(self.tokenizer.chat(m)) for m in messages]
        else:
            self.check_reads()
            if len(latents) != len(messages):
                raise InputError(
                    f"{counted(len(messages), 'message')} but {counted(len(latents), 'latent')}: give one each"
                )
            conversations = [
                Conversation(self.tokenizer.chat(m, image=True), self.check_latent(latent))
                for m, latent in zip(messages, latents, strict=True)
            ]
        return self.converse(conversations, [max_new_tokens] * len(conversations), listen, draw)

    def converse(
        self,
        conversations: Sequence[Conversation],
        max_new_tokens: Sequence[int],
        listen: TokenListener | None = None,
        draw: bool = True,
    ) -> list[Reply]:
        """Greedy replies to conversations whose last turn is open, each of at most its `max_new_tokens`.

        `listen(i, token)` is called once per token of reply i, as soon as the token is chosen, even if memory runs out and
        the reply begins again. It returns whether that reply is to go on.

        Raises:
            InputError: for a conversation that is longer than the model reads.
        """
        limits = [min(most, self.longest_reply(c)) for c, most in zip(conversations, max_new_tokens, strict=True)]
        listening = None if listen is None else ListenOnce(listen, len(conversations))

        def answer(start: int, stop: int) -> list[Reply]:
            end, image_start = self.tokenizer.chat_end, self.tokenizer.image_start
            hear = None if listening is None else listening.attempt(start)
            return self.language.reply(conversations[start:stop], limits[start:stop], end, image_start, hear, draw)

        return self._networks.in_batches("language", len(conversations), READ_AT_ONCE, answer, "answering", "message")

    def asks_for_image(self, reply: Reply) -> bool:
        """Whether a reply ends where an image begins, drawn or not."""
        return reply.ids[-1:] == [self.tokenizer.image_start]

    def longest_reply(self, conversation: Conversation) -> int:
        """The most tokens of a reply with which conversation, reply and one image fit what the model reads.

        Raises:
            InputError: when not even one token fits.
        """
        return longest_reply(self.config, conversation)

    @torch.inference_mode()
    def sample(
        self,
        conditions: Sequence[Tensor],
        seeds: Sequence[int],
        options: SamplingOptions | None = None,
        batch_size: int | None = None,
        callback: flow.StepCallback | None = None,
        compile: bool | None = None,
    ) -> list[Tensor]:
        """Latents [L, C] of conditions [L, Z], one noise seed per latent.

        Consecutive images whose condition is the very same tensor share its modulations. `compile` says whether compiled
        code draws them; None leaves that to `speed`.

        Raises:
            InputError: for options, seeds or a batch size out of range.
        """
        options = self.sampler.chosen(options)
        self.sampler.check(options, seeds)
        check_count("batch size", batch_size)
        size = self.sampler.whole_prompts(conditions, batch_size or self.batch_size)
        self.sampler.policy.expect(max(self.sampler.policy.expected, len(seeds)))

        def draw(start: int, stop: int) -> list[Tensor]:
            return self.sampler.draw(conditions[start:stop], seeds[start:stop], options, callback, compile)

        return self._networks.in_batches("dit", len(seeds), size, draw, "drawing", "image", "a smaller --batch-size")

    @torch.inference_mode()
    def advance(
        self,
        trajectories: Sequence[Trajectory],
        stop: int,
        options: SamplingOptions,
        batch_size: int | None = None,
        callback: flow.StepCallback | None = None,
        compile: bool | None = None,
    ) -> list[Trajectory]:
        """The trajectories of images after `stop` steps of the sampler; all have taken equally many steps before.

        An image may be dropped on its way: its `latent` is an estimate of what it will be. Arguments are those of `sample`,
        and an image that is taken to its end has the latent that `sample` gives it.

        Raises:
            InputError: for options, seeds or a batch size out of range. ScaleRAEError: when a latent is not finite.
        """
        options = self.sampler.chosen(options)
        self.sampler.check(options, [t.seed for t in trajectories])
        check_count("batch size", batch_size)
        size = batch_size or self.batch_size

        def go_on(start: int, end: int) -> list[Trajectory]:
            return self.sampler.advance(trajectories[start:end], stop, options, callback, compile)

        return self._networks.in_batches(
            "dit", len(trajectories), size, go_on, "drawing", "image", "a smaller --batch-size"
        )

    def estimate(self, t: float, x: Tensor, v: Tensor) -> list[Tensor]:
        """Latents [L, C] that the state x [B, C, S, S] at time t is on its way to: x - t v.

        These are the arguments of a sampling callback, so that an image can be shown while it forms.
        """
        return list(self.sampler.latents(x - t * v).cpu().unbind())

    def expect(self, images: int) -> None:
        """Sets how many images are to be drawn from now on, in all calls; compile="auto" decides by it."""
        self.sampler.policy.expect(images)

    @torch.inference_mode()
    def decode(self, latents: Tensor | Sequence[Tensor], batch_size: int = DECODE_AT_ONCE) -> list[Image.Image]:
        """Pictures of latents [L, C], one or several: 8-bit RGB of `image_size` pixels along each edge.

        Raises:
            InputError: for tensors that are no latents of this model. ConfigError, CheckpointError, HubError: when the decoder
                cannot be loaded. DeviceError: when memory runs out.
        """
        checked = [self.check_latent(latent) for latent in _several(latents)]
        decode = self._networks.decoding()

        def draw(start: int, stop: int) -> list[Image.Image]:
            return decode(checked[start:stop])

        return self._networks.in_batches("decoder", len(checked), batch_size, draw, "decoding", "latent")

    # --- reading -------------------------------------------------------------------------------------------------

    def check_reads(self) -> None:
        """Raises ConfigError for a checkpoint that draws latents it cannot read, as FLUX-VAE-aligned ones do."""
        if self.config.vae is not None:
            raise ConfigError(
                f"{self.source.folder / 'config.json'}: generation_alignment_tower is {self.config.vae!r}: this checkpoint "
                f"draws latents of a VAE, whose {self.config.channels} channels do not fit its language model; it can draw "
                "and decode, not read, answer or judge"
            )

    def encode(self, images: Picture | Sequence[Picture], batch_size: int = 32) -> list[Tensor]:
        """Latents [L, C] of pictures: Pillow images or paths of files, one or several.

        Raises:
            InputError: for a file that holds no picture.
            ConfigError: for a FLUX-VAE-aligned checkpoint, which draws latents of another kind than its encoder's.
        """
        self.check_reads()
        pictures = [images] if isinstance(images, Image.Image | str | os.PathLike) else list(images)

        def encode(start: int, stop: int) -> list[Tensor]:
            shown = [as_rgb(picture) for picture in pictures[start:stop]]
            return self._networks.encode(self.encoder.preprocess(shown))

        return self._networks.in_batches("encoder", len(pictures), batch_size, encode, "encoding", "image")

    def encode_pixels(self, pixels: Tensor, batch_size: int = 32) -> list[Tensor]:
        """Latents [L, C] of normalised pixels [N, 3, H, W], as `encoder.preprocess` makes them."""

        def encode(start: int, stop: int) -> list[Tensor]:
            return self._networks.encode(pixels[start:stop])

        return self._networks.in_batches("encoder", len(pixels), batch_size, encode, "encoding", "image")

    def answer(
        self,
        questions: str | Sequence[str],
        *,
        images: Picture | Sequence[Picture] | None = None,
        latents: Tensor | Sequence[Tensor] | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        listen: TextListener | None = None,
    ) -> list[Answer]:
        """One answer per question about its picture or latent; a single picture or latent serves all questions.

        Pictures are Pillow images or paths of files. `listen(i, text)` is called with answer i so far, whenever whole
        characters were added, and returns whether that answer is to go on.

        Raises:
            InputError: when neither or both of `images` and `latents` are given, or their number does not fit.
        """
        asked = [questions] if isinstance(questions, str) else list(questions)
        if (images is None) == (latents is None):
            raise InputError("give either images or latents to ask about")
        if images is not None:
            latents = self.encode(images)
        assert latents is not None
        shown = _several(latents)
        if len(shown) == 1:
            shown *= len(asked)
        elif len(asked) == 1:
            asked *= len(shown)
        hear = None if listen is None else hear_text(self.tokenizer, listen)
        replies = self.reply(asked, latents=shown, max_new_tokens=max_new_tokens, listen=hear, draw=False)
        return [Answer(self.tokenizer.decode(reply.ids), reply) for reply in replies]

    def score(
        self,
        latents: Tensor | Sequence[Tensor],
        prompt: str,
        *,
        request: str | None = None,
        request_reply: Reply | None = None,
        question: str = QUESTION,
        max_new_tokens: int = DEFAULT_ANSWER_TOKENS,
    ) -> list[Score]:
        """One Score per latent [L, C], of one or several: how well the model itself finds that it matches a prompt.

        `request` is the message that asks for the image (default: the prompt), `request_reply` the model's reply to it, if
        known already, `question` a template with `{prompt}`.

        Raises:
            InputError: for text longer than the model reads, or tensors that are no latents of this model.
            ConfigError: for a checkpoint that cannot read latents (`check_reads`).
        """
        self.check_reads()
        request = request or prompt
        asked = Asked(prompt, request, request_reply or self.reply([request])[0])
        shown = _several(latents)
        return self.score_each(shown, [asked] * len(shown), question, max_new_tokens)

    def score_each(
        self,
        latents: Sequence[Tensor],
        asked: Sequence[Asked],
        question: str = QUESTION,
        max_new_tokens: int = DEFAULT_ANSWER_TOKENS,
    ) -> list[Score]:
        """One Score per latent [L, C], against the prompt of its own `Asked`; several prompts share a batch.

        Latents of one prompt should share one Asked object: what they have in common is then computed once.

        Raises:
            InputError: for an empty prompt, text longer than the model reads, tensors that are no latents of this model, or
                when the numbers of latents and `asked` differ.
            ConfigError: for a checkpoint that cannot read latents (`check_reads`). DeviceError: when memory runs out.
        """
        return self._scored(score_latents, latents, asked, question, max_new_tokens)

    def score_early(
        self,
        latents: Sequence[Tensor],
        asked: Sequence[Asked],
        question: str = QUESTION,
        max_new_tokens: int = DEFAULT_ANSWER_TOKENS,
    ) -> list[EarlyScore]:
        """One EarlyScore per latent [L, C]: the answer and the prompt's scores, in about 0.6 of `score_each`'s time.

        For estimates of half-formed images (`estimate`). Arguments are those of `score_each`.

        Raises:
            InputError, ConfigError, DeviceError: as `score_each` does.
        """
        return self._scored(score_early, latents, asked, question, max_new_tokens)

    def _scored(
        self,
        score: Callable[[LanguageModel, ChatTokenizer, Sequence[Tensor], Sequence[Asked], str, int], list[T]],
        latents: Sequence[Tensor],
        asked: Sequence[Asked],
        question: str,
        max_new_tokens: int,
    ) -> list[T]:
        self.check_reads()
        if len(latents) != len(asked):
            raise InputError(f"{counted(len(latents), 'latent')}, but {len(asked)} of `asked`: give one each")
        checked = [self.check_latent(latent) for latent in latents]

        def run(start: int, stop: int) -> list[T]:
            some, about = checked[start:stop], asked[start:stop]
            return score(self.language, self.tokenizer, some, about, question, max_new_tokens)

        return self._networks.in_batches("language", len(checked), READ_AT_ONCE, run, "scoring", "latent")

    def check_question(self, prompt: str, question: str = QUESTION) -> None:
        """Raises an error if `score` cannot ask this question about a prompt.

        Raises:
            ConfigError: for a checkpoint that cannot read latents. InputError: for text longer than the model reads.
        """
        self.check_reads()
        texts_of(self.config, self.tokenizer, prompt, question)

    def check_latent(self, latent: Tensor) -> Tensor:
        """The latent as [L, C] float32 on the CPU; a leading batch dimension of 1 is dropped.

        Raises:
            InputError: for a wrong type or shape, or values that are not finite.
        """
        return check_latent(latent, self.config.tokens, self.config.channels)

    def exact_batch(self, most: int, options: Sequence[SamplingOptions], one_prompt: bool) -> int:
        """The largest of `most` and its halves whose batches draw, to the bit, what drawing one at a time draws.

        Each of `options` is tried in two steps (a student's in its own), for images of one prompt or of as many prompts as
        images. Call this with one thread of arithmetic, as images will be drawn (`cpu.one_thread`).
        """
        generator = torch.Generator().manual_seed(0)
        shape = (self.config.tokens, self.config.dit.condition_width)
        conditions = [torch.randn(shape, generator=generator).to(self.dtype) for _ in range(most)]
        conditions = conditions[:1] * most if one_prompt else conditions
        if self.config.student is None:
            options = [replace(option, steps=2) for option in options]
        draws = [functools.partial(self.sample, conditions, range(most), option) for option in options]
        return exact_batch(most, draws)

    def with_speed(self, speed: Speed) -> ScaleRAE:
        """The same model, sharing its weights, with another `speed`.

        Choosing fp8 changes the shared weights for good; other quantisations are chosen when a model is loaded. For a quantised
        or offloaded model only `compile` can change.

        Raises:
            InputError, DeviceError: for a choice that does not exist, or that this device does not support.
        """
        other = copy.copy(self)
        other._use(self._networks.with_speed(speed))
        return other

    def release_memory(self) -> None:
        """Frees what is kept between calls: captured graphs and KV caches."""
        self._networks.release_memory()

    def memory_errors(self, what: str, remedy: str = "fewer at once") -> MemoryErrors:
        """A context in which running out of memory raises a DeviceError that names `what` was done and the `remedy`."""
        return self._networks.memory_errors(what, remedy)
