"""Parameters, bytes, operations, peak memory and seconds of a model, from its config. Imports no torch.

Weights are counted exactly: the tests compare every form with the tensors of a loaded model. Activations, peak and seconds are
estimates; the constants behind them stand at the top, each with where it comes from.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from math import prod

from scale_rae.codes import BLOCK, GROUP_ROWS, PAD_TO, PLAIN_AT_ONCE, attention_kind, decoder_kind, mlp_kind
from scale_rae.config import DecoderConfig, DiTConfig, ScaleRAEConfig
from scale_rae.layout import DIT_PREFIX, decoder_layout, dit_layout, keeps_float32, language_layout, swiglu_inner
from scale_rae.options import DEFAULT_STEPS, LANGUAGE_KINDS

# --- figures behind the estimates ------------------------------------------------------------------------------------

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CACHE_SLOTS = 1024  # tokens per row that a KV cache is made for, at least; kv_cache makes them
REPLY_TOKENS, PROMPT_TOKENS = 10, 64  # of the reply that asks for an image, and of the prompt with its chat

# Memory that no tensor of ours is in. CUDA: the context and loaded kernels, which is the driver's count less what torch reserved:
# 0.58 to 0.59 GiB after drawing within a limit, which frees stacks (H200, 1.5B/2.4B); 0.74 to 0.76 without one. CPU: Python with
# torch imported.
CONTEXT = {"cuda": 620 << 20, "cpu": 450 << 20, "mps": 200 << 20}
# What the allocator loses to rounding and fragments, as a share of what is allocated, and at least: it reserved 1.23 GiB for 1.21 in
# streams, 4.86 for 4.79 in turns (H200, 1.5B/2.4B).
FRAGMENTS, LEAST_FRAGMENTS = 0.015, 20 << 20
# Graphs and eager passes keep memory of their own, and both branches of guidance run as one batch.
PASSES = 2
# Forms whose weights are converted to the model's dtype before each product, one matrix at a time.
CONVERTED = ("int8", "fp8-storage", "nf4")
PLAIN_FORM = 12  # bytes of float32 values and copies per weight while the plain form converts it

# The share of a device's matrix products (measured on squares) that a network of one image reaches, and that of many: 0.40 for one
# image uncompiled, 0.82 for 32 compiled (H200, docs/figures/gpu.md); a CPU's products are slow enough to hide all else.
SHARES = {"cuda": (0.40, 0.82), "cpu": (0.55, 0.65), "mps": (0.40, 0.60)}
HALFWAY = 4  # images with which a GPU is halfway between the two
# Speed of the DiT's products against those in bfloat16. fp8: docs/figures/gpu.md; int8-products: of its matrices at 2,048 rows, less
# what is not products (H200).
GAIN = {"fp8": 1.6, "int8-products": 1.35}
# Bytes that the device's memory moves per converted weight: one read, one written, at 3.5 of 4.2 TB/s (H200).
CONVERSION = 3.2
# Seconds per pass of the language model that no product explains.
LAUNCH = {"cuda": 0.0025, "cpu": 0.0005, "mps": 0.004}


# --- operations ------------------------------------------------------------------------------------------------------


def flops(config: DiTConfig) -> float:
    """Floating-point operations of one evaluation of one image: its matrix products, a multiply-add counted as two."""

    def block(width: int, condition_width: int) -> int:
        attention = 4 * width**2 + 2 * config.tokens * width
        return attention + 3 * width * swiglu_inner(width) + 6 * width * condition_width

    depth = config.depth if config.encoder_depth is None else config.encoder_depth
    width = config.decoder_width or config.width
    condition_width = config.condition_width if config.encoder_depth is None else width
    blocks = depth * block(config.width, config.condition_width) + (config.depth - depth) * block(width, width)
    embedders = config.channels * (config.width + (0 if config.encoder_depth is None else width))
    final = 2 * width * condition_width + width * config.channels
    return 2.0 * config.tokens * (blocks + embedders + final)


# --- weights ---------------------------------------------------------------------------------------------------------

_BLOCK = re.compile(re.escape(DIT_PREFIX) + r"dit_blocks\.(\d+)\.")
_IN_BLOCK = ("attn.qkv.weight", "attn.proj.weight", "mlp.w12.weight", "mlp.w3.weight", "adaLN_modulation.1.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def stored_bytes(kind: str | None, shape: tuple[int, ...], dtype_bytes: int) -> int:
    """Bytes of a weight: quantised (`kind`, for a matrix) with its scales, or in a dtype of `dtype_bytes`."""
    if kind is None:
        return prod(shape) * dtype_bytes
    rows, columns = shape
    if kind == "nf4":
        return rows * columns // 2 + 2 * (rows * columns // BLOCK)  # a bfloat16 scale per block
    return rows * columns + 4 * rows  # a float32 scale per row


@dataclass(frozen=True)
class Weights:
    """Bytes of the weights by what happens to them: `blocks` of a network may be streamed, `rest` always stays on the device.

    `embedding` is the language model's token embedding, `head` its output matrix where that is a tensor of its own.
    """

    language_blocks: int
    language_rest: int
    embedding: int
    head: int
    dit_blocks: int
    dit_rest: int
    decoder: int
    largest_block: int  # of both networks
    largest_matrix: int  # of the quantised ones of the velocity network; in weights, not bytes

    @property
    def language(self) -> int:
        """Bytes of all of the language model."""
        return self.language_blocks + self.language_rest + self.embedding + self.head

    @property
    def dit(self) -> int:
        """Bytes of all of the velocity network."""
        return self.dit_blocks + self.dit_rest

    @property
    def total(self) -> int:
        """Bytes of everything that draws."""
        return self.language + self.dit + self.decoder


@dataclass(frozen=True)
class Way:
    """How a model runs: quantisation, residency, and images at once."""

    quantize: str | None = None
    offload: str = "none"
    batch: int = 1


@dataclass(frozen=True)
class Rates:
    """What a device does per second: operations of matrix products in the model's dtype, bytes of its memory, bytes from the host."""

    products: float
    memory: float
    bus: float


@dataclass(frozen=True)
class Seconds:
    """Estimated seconds of drawing one batch of one prompt: the reply, copying weights to the device, sampling, decoding."""

    reply: float
    copies: float
    sampling: float
    decoding: float
    batch: int

    @property
    def total(self) -> float:
        """Of the batch."""
        return self.reply + self.copies + self.sampling + self.decoding

    @property
    def each(self) -> float:
        """Per image."""
        return self.total / self.batch


@dataclass(frozen=True)
class Footprint:
    """Sizes of a model on a device of a kind ("cuda", "cpu", "mps"), in a dtype of options.DTYPES.

    `decoder` None counts no decoder (a VAE's sizes are not known here). `kernels`: quantised products have kernels of our own.
    """

    config: ScaleRAEConfig
    decoder: DecoderConfig | None
    device: str = "cuda"
    dtype: str = "bfloat16"
    kernels: bool = True
    _cached: dict[str | None, Weights] = field(default_factory=dict, compare=False, repr=False)

    @property
    def parameters(self) -> dict[str, int]:
        """Numbers of parameters of the parts; a head that is tied to the embedding counts once."""
        language = language_layout(self.config)
        head = prod(language.pop("lm_head.weight"))
        found = {"language": _count(language) + (0 if self.config.tied_embeddings else head)}
        found["dit"] = _count(dit_layout(self.config.dit))
        if self.decoder is not None:
            found["decoder"] = _count(decoder_layout(self.decoder))
        return found

    def weights(self, quantize: str | None) -> Weights:
        """Bytes of the weights as they are kept for drawing."""
        if quantize not in self._cached:
            self._cached[quantize] = self._weights(quantize)
        return self._cached[quantize]

    def _weights(self, quantize: str | None) -> Weights:
        sizes: Counter[str] = Counter()
        blocks: Counter[str] = Counter()
        largest = 0
        pads = quantize is not None or self.device == "cuda"
        tensors = language_layout(self.config) | dit_layout(self.config.dit)
        for name, shape in tensors.items():
            kind = self._kind(name, quantize)
            shape = _padded(name, shape) if pads else shape
            width = 4 if keeps_float32(name) else DTYPE_BYTES[self.dtype]
            size = stored_bytes(kind, shape, width)
            if match := _BLOCK.match(name) or _LAYER.match(name):
                part = "dit_blocks" if name.startswith(DIT_PREFIX) else "language_blocks"
                blocks[match[0]] += size
            elif name == "lm_head.weight":
                part = "tied" if self.config.tied_embeddings else "head"
            elif name == "model.embed_tokens.weight":
                part = "embedding"
            else:
                part = "dit_rest" if name.startswith(DIT_PREFIX) else "language_rest"
            sizes[part] += size
            if kind is not None and name.startswith(DIT_PREFIX):
                largest = max(largest, prod(shape))
        return Weights(
            language_blocks=sizes["language_blocks"],
            language_rest=sizes["language_rest"],
            embedding=sizes["embedding"],
            head=sizes["head"],
            dit_blocks=sizes["dit_blocks"],
            dit_rest=sizes["dit_rest"],
            decoder=self._decoder_bytes(decoder_kind(quantize)),
            largest_block=max(blocks.values()),
            largest_matrix=largest,
        )

    def _decoder_bytes(self, kind: str | None) -> int:
        """Bytes of the decoder with the linears of its layers in a form."""
        layout = {} if self.decoder is None else decoder_layout(self.decoder)
        return sum(
            stored_bytes(
                kind if len(shape) == 2 and name.startswith("decoder_layers.") else None, shape, DTYPE_BYTES[self.dtype]
            )
            for name, shape in layout.items()
        )

    def _kind(self, name: str, quantize: str | None) -> str | None:
        """The quantisation of a tensor: None for those that keep the dtype."""
        if quantize is None:
            return None
        if match := _BLOCK.match(name):
            if name[match.end() :] not in _IN_BLOCK:
                return None
            if ".adaLN_modulation." in name:
                return quantize if quantize != "fp8" or self._is_early(name) else None
            if ".attn." in name:
                return attention_kind(quantize)
            return mlp_kind(quantize, int(match[1]), self.config.dit.depth)
        kind = LANGUAGE_KINDS.get(quantize)
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            return "int8" if kind == "nf4" else kind
        if kind is None or not (_LAYER.match(name) and name.endswith("_proj.weight")):
            return None
        return attention_kind(kind) if ".self_attn." in name else kind

    def allows(self, quantize: str | None) -> bool:
        """Whether all weights can have a quantised form: nf4 needs rows of whole blocks."""
        if quantize != "nf4":
            return True
        tensors = language_layout(self.config) | dit_layout(self.config.dit)
        return all(
            _padded(name, shape)[1] % BLOCK == 0
            for name, shape in tensors.items()
            if self._kind(name, quantize) == "nf4"
        )

    def _is_early(self, name: str) -> bool:
        """Whether a block's tensor is one of the blocks that read the condition (all but those of a DDT's second part)."""
        match, early = _BLOCK.match(name), self.config.dit.encoder_depth
        return match is not None and (early is None or int(match[1]) < early)

    # --- activations -------------------------------------------------------------------------------------------------

    def sampling_memory(self, way: Way) -> int:
        """Bytes of activations while a batch of images of as many prompts is drawn, both branches of guidance included."""
        dit, e = self.config.dit, DTYPE_BYTES[self.dtype]
        width = max(dit.width, dit.decoder_width or 0)
        inner = _up(swiglu_inner(width))
        rows = dit.tokens * way.batch
        state = 4 * 4 * dit.channels  # x, noise, velocity and a copy, float32
        # Residuals, qkv, attention, SwiGLU; norms.
        hidden = e * (4 * width + 3 * width + width + 3 * inner) + 2 * 4 * width
        groups = self.device == "cuda" and way.offload != "stream" and way.quantize not in CONVERTED
        grouped = max(rows, GROUP_ROWS) if groups else rows
        return PASSES * rows * (state + hidden) + 2 * grouped * 6 * width * e

    def cache_memory(self, rows: int) -> int:
        """Bytes of the keys and values of `rows` conversations, which stay between calls on CUDA."""
        sizes, e = self.config.language, DTYPE_BYTES[self.dtype]
        slots = CACHE_SLOTS if self.device == "cuda" else PROMPT_TOKENS + REPLY_TOKENS + self.config.tokens
        keys = sizes["hidden_size"] // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
        return int(rows * slots * sizes["num_hidden_layers"] * 2 * keys * e)

    def language_memory(self, rows: int) -> int:
        """Bytes of activations while `rows` conversations are replied to."""
        sizes, e = self.config.language, DTYPE_BYTES[self.dtype]
        hidden, vocabulary = sizes["hidden_size"], sizes["vocab_size"]
        tokens = rows * (PROMPT_TOKENS + self.config.tokens)
        passes = tokens * e * (6 * hidden + 3 * sizes["intermediate_size"])
        logits = rows * vocabulary * (4 + 4 + e)
        return int(PASSES * passes + logits)

    def decoding_memory(self, batch: int) -> int:
        """Bytes of activations while a batch of latents becomes pictures."""
        if self.decoder is None:
            return 0
        e, width = DTYPE_BYTES[self.dtype], self.decoder.width
        tokens = batch * (self.decoder.patches**2 + 1)
        pixels = batch * 3 * self.decoder.image**2
        return PASSES * tokens * e * (6 * width + 2 * self.decoder.inner) + pixels * (2 * e + 3 * 4 + 1)

    # --- peak --------------------------------------------------------------------------------------------------------

    def peak(self, way: Way) -> int:
        """Estimated bytes of the device's memory at the peak of loading and drawing, the context of CUDA included."""
        return max(self.loading_peak(way), self.drawing_peak(way))

    def loading_peak(self, way: Way) -> int:
        """`peak` while the weights are read and made ready."""
        w = self.weights(way.quantize)
        stays = w.language + w.dit if way.offload == "none" else w.language_rest + w.dit_rest
        return self._with_losses(stays)

    def drawing_peak(self, way: Way) -> int:
        """`peak` while one prompt's batch is drawn: the weights that `residency` keeps on the device, and activations.

        These are all weights ("none"), the largest part ("model"), or two blocks and the decoder ("stream").
        """
        w = self.weights(way.quantize)
        parts = (w.language - w.language_rest, w.dit_blocks, w.decoder)
        stays = w.language_rest + w.dit_rest
        if way.offload == "none":
            stays += sum(parts)
        elif way.offload == "model":
            stays += max(parts)
        else:
            stays += 2 * w.largest_block + w.decoder
        passes = (
            self.language_memory(1),
            self.sampling_memory(way) + self._converted(way.quantize),
            self.decoding_memory(way.batch),
        )
        return self._with_losses(stays + self.cache_memory(1) + max(passes))

    def _converted(self, quantize: str | None) -> int:
        """Bytes of the weights that are converted for a product."""
        if quantize not in CONVERTED:
            return 0
        largest = self.weights(quantize).largest_matrix
        if self.kernels and self.device == "cuda":
            return largest * DTYPE_BYTES[self.dtype]
        return min(largest, PLAIN_AT_ONCE) * PLAIN_FORM

    def _with_losses(self, tensors: int) -> int:
        least = 0 if self.device == "cpu" else LEAST_FRAGMENTS
        return tensors + max(int(FRAGMENTS * tensors), least) + CONTEXT[self.device]

    # --- seconds -----------------------------------------------------------------------------------------------------

    def seconds(self, way: Way, rates: Rates, steps: int | None = None) -> Seconds:
        """Estimated seconds of drawing one prompt's batch: `steps` evaluations without guidance, by default the model's own."""
        if steps is None:
            steps = self.config.student.steps if self.config.student else DEFAULT_STEPS
        w = self.weights(way.quantize)
        copies = 0.0
        language = w.language_blocks + (w.head or w.embedding)
        token = language / rates.memory + LAUNCH[self.device]
        sizes = self.config.language
        width, inner = sizes["hidden_size"], sizes["intermediate_size"]
        read = PROMPT_TOKENS + 1 + self.config.tokens
        pass_flops = 2.0 * read * sizes["num_hidden_layers"] * (4 * width**2 + 3 * width * inner)
        passes = pass_flops / (rates.products * SHARES[self.device][0])
        if way.offload == "stream":
            token = max(token, language / rates.bus)
            passes = max(passes, 2 * language / rates.bus)
            copies = w.decoder / rates.bus
        elif way.offload == "model":
            copies = (language + w.dit_blocks + w.decoder) / rates.bus
        evaluation = max(self.evaluation(way, rates), self.transfer(way, rates))
        decoder_flops = 0.0
        if self.decoder is not None:
            decoder_flops = 2.0 * (self.decoder.patches**2 + 1) * _count(decoder_layout(self.decoder)) * way.batch
        return Seconds(
            reply=REPLY_TOKENS * token + passes,
            copies=copies,
            sampling=steps * evaluation,
            decoding=max(decoder_flops / (rates.products * self._share(way.batch)), w.decoder / rates.memory),
            batch=way.batch,
        )

    def evaluation(self, way: Way, rates: Rates) -> float:
        """Estimated seconds that the device computes for one evaluation of a batch of images of one prompt."""
        dit = self.config.dit
        once = 0.0  # the modulations of the condition, which the images of a prompt share
        if dit.encoder_depth is None:
            once = 2.0 * dit.tokens * dit.depth * 6 * dit.width * dit.condition_width
        work = way.batch * (flops(dit) - once) + once
        w = self.weights(way.quantize)
        products = work / (rates.products * self._share(way.batch) * GAIN.get(way.quantize or "", 1.0))
        if way.quantize in CONVERTED:  # in each evaluation anew
            moved = CONVERSION if self.kernels and self.device == "cuda" else 2 * PLAIN_FORM
            products += moved * _count(dit_layout(dit)) / rates.memory
        return max(products, w.dit_blocks / rates.memory)

    def transfer(self, way: Way, rates: Rates) -> float:
        """Estimated seconds for which one evaluation's weights stream to the device; 0 unless they are streamed."""
        return self.weights(way.quantize).dit_blocks / rates.bus if way.offload == "stream" else 0.0

    def hidden_images(self, way: Way, rates: Rates) -> int:
        """How many images one evaluation can compute while its weights stream in; at least 1."""
        most = 1
        while most < 256 and self.evaluation(replace(way, batch=most + 1), rates) <= self.transfer(way, rates):
            most += 1
        return most

    def _share(self, batch: int) -> float:
        one, many = SHARES[self.device]
        return one + (many - one) * (batch - 1) / (batch - 1 + HALFWAY)


def published_decoder(channels: int) -> DecoderConfig:
    """The sizes of the published pixel decoders (ViT-XL), for a decoder that is not on this machine yet."""
    return DecoderConfig(channels, width=1152, depth=28, heads=16, inner=4096, patch=14, image=224, eps=1e-12)


def _count(layout: dict[str, tuple[int, ...]]) -> int:
    return sum(prod(shape) for shape in layout.values())


def _padded(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor with SwiGLU's inner width padded."""
    if ".mlp.w12." in name:
        return (2 * _up(shape[0] // 2), *shape[1:])
    return (shape[0], _up(shape[1])) if name.endswith(".mlp.w3.weight") else shape


def _up(width: int) -> int:
    return -(-width // PAD_TO) * PAD_TO
