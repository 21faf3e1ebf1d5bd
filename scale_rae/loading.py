"""Builds networks from files and puts their weights on a device: the steps of `ScaleRAE.from_pretrained`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from scale_rae.adapters import Adapter, model_reader
from scale_rae.checkpoint import RowSink, TensorReader, fill
from scale_rae.codes import decoder_kind
from scale_rae.config import ScaleRAEConfig, load_decoder_config
from scale_rae.decoder import PixelDecoder, quantize_layers
from scale_rae.dit import DiT
from scale_rae.encoder import Encoder
from scale_rae.errors import CheckpointError, ConfigError
from scale_rae.fast_weights import mean_read, quantize_blocks, stack_modulations, stacks_modulations
from scale_rae.hub import DECODER_WEIGHTS, Source, find, own_folders, vae_folder
from scale_rae.language import LanguageModel
from scale_rae.layout import DIT_PREFIX, NORM_STATS, is_not_read, keeps_float32
from scale_rae.memory import MemoryErrors, savings
from scale_rae.options import LANGUAGE_KINDS, PUBLISHED_DECODERS, Speed
from scale_rae.prompt import ChatTokenizer
from scale_rae.quantization import Place
from scale_rae.residency import Residency
from scale_rae.sampling import NormStats

if TYPE_CHECKING:
    from scale_rae.vae import VaeDecoder

LoadProgress = Callable[[str, int, int], None]


def check_headers(source: Source) -> None:
    """Raises CheckpointError, naming the file and the field, where a model's weight files are missing or have wrong headers."""
    model_reader(source)


def load_tokenizer(source: Source, config: ScaleRAEConfig) -> ChatTokenizer:
    """The model's tokenizer.

    Raises:
        CheckpointError: when its files are missing or damaged, or it has more tokens than the model.
    """
    tokenizer = ChatTokenizer(source.folder, config.image_markers)
    if tokenizer.size > config.vocab_size:
        raise CheckpointError(
            f"{source.folder}: the tokenizer has {tokenizer.size} tokens, the model {config.vocab_size} (vocab_size)"
        )
    return tokenizer


def load_networks(
    source: Source,
    config: ScaleRAEConfig,
    dtype: torch.dtype,
    device: torch.device,
    speed: Speed,
    progress: LoadProgress | None = None,
    storage: torch.device | None = None,
    adapters: Sequence[Adapter] = (),
) -> tuple[LanguageModel, DiT, NormStats | None]:
    """The language model and the DiT for `device`, and the norm stats if there are any.

    Weights are in `dtype`, or quantised as `speed` says: each chunk of rows is quantised on `device` when it has been read, so
    that a weight is never whole in `dtype`. They are kept in `storage`, by default on `device`. `adapters` are merged into them.

    Raises:
        CheckpointError: when weights are missing, damaged or of other shapes, or an adapter does not fit. DeviceError: out of
            memory. InputError: for a linear that cannot be quantised so.
    """
    with torch.device("meta"):
        language, dit = LanguageModel(config, speed), DiT(config.dit)
    place = Place(storage or device, device, dtype)
    # Before they are loaded, since fusing them afterwards takes their memory twice.
    stacked = stack_modulations(dit, place) if stacks_modulations(speed, device) and speed.quantize is None else {}
    norm_stats = _fill_networks(source, config, language, dit, place, speed.quantize, progress, adapters, stacked)
    return language, dit, norm_stats


def load_language(
    source: Source,
    config: ScaleRAEConfig,
    place: Place,
    adapters: Sequence[Adapter] = (),
    quantize: str | None = None,
) -> LanguageModel:
    """The language model alone, as `load_networks` loads it."""
    with torch.device("meta"):
        language = LanguageModel(config)
    _fill_networks(source, config, language, None, place, quantize, None, adapters)
    return language


def load_dit(
    source: Source,
    config: ScaleRAEConfig,
    place: Place,
    adapters: Sequence[Adapter] = (),
    quantize: str | None = None,
) -> tuple[DiT, NormStats | None]:
    """The DiT alone, and the norm stats if there are any, as `load_networks` loads them."""
    with torch.device("meta"):
        dit = DiT(config.dit)
    return dit, _fill_networks(source, config, None, dit, place, quantize, None, adapters)


def _fill_networks(
    source: Source,
    config: ScaleRAEConfig,
    language: LanguageModel | None,
    dit: DiT | None,
    place: Place,
    quantize: str | None,
    progress: LoadProgress | None,
    adapters: Sequence[Adapter],
    places: Mapping[str, RowSink] | None = None,
) -> NormStats | None:
    """Loads the networks that are given, built on "meta"; returns the norm stats. `places` take weights of the DiT."""
    reader = model_reader(source, adapters)
    for field, depth in (
        ("num_hidden_layers", config.language["num_hidden_layers"]),
        ("diffusion_model_depth", config.dit.depth),
    ):
        reader.check_depth(depth, field, source.folder / "config.json")
    if language is not None and config.tied_embeddings:
        language.lm_head.weight = language.model.embed_tokens.weight
    storage, device, dtype = place
    norm_stats = _read_norm_stats(reader, config, device)
    wanted = {name: stored for name, stored in reader.tensors.items() if _is_of(name, language, dit)}
    size = sum(math.prod(stored.shape) for stored in wanted.values()) * dtype.itemsize / 2**30
    what = f"loading the weights, {size:.1f} GiB as {str(dtype).removeprefix('torch.')}"
    if quantize is not None:
        what += f", quantised ({quantize})"
    flags = savings(device, quantize, "none" if storage == device else "model")
    modules: dict[str, nn.Module] = {} if language is None else {"": language}
    if dit is not None:
        modules[DIT_PREFIX] = dit
    with MemoryErrors(device, dtype, what, "a smaller checkpoint", flags):
        sinks = _quantize(language, dit, reader, quantize, place)
        sinks |= {DIT_PREFIX + name: sink for name, sink in (places or {}).items()}
        fill(
            modules,
            reader,
            dtype,
            storage,
            keep_float32=keeps_float32,
            ignore=lambda name: is_not_read(name, config) or name not in wanted,
            progress=(lambda done, total: progress("model", done, total)) if progress else None,
            sinks=sinks,
        )
    return norm_stats


def _is_of(name: str, language: LanguageModel | None, dit: DiT | None) -> bool:
    """Whether a stored tensor is of one of the networks that are loaded; a tensor of neither is the language model's."""
    return (dit if name.startswith(DIT_PREFIX) else language) is not None


def _quantize(
    language: LanguageModel | None, dit: DiT | None, reader: TensorReader, kind: str | None, place: Place
) -> dict[str, RowSink]:
    """The sinks of the networks' quantised weights, by the names that checkpoints have for them; none without a kind."""
    if kind is None:
        return {}
    sinks: dict[str, RowSink] = {}
    if dit is not None:
        read = _mean_read(dit, reader) if kind == "nf4" else None
        sinks |= {DIT_PREFIX + name: sink for name, sink in quantize_blocks(dit, kind, place, read).items()}
    if language is not None and kind in LANGUAGE_KINDS:
        sinks |= language.quantize(LANGUAGE_KINDS[kind], place)
    return sinks


def _mean_read(dit: DiT, reader: TensorReader) -> Tensor | None:
    """`fast_weights.mean_read` of a stored network, before it is loaded; None if tensors are wrong, which `fill` reports."""
    parts: dict[str, Tensor] = {f"t_embedder.{name}": value for name, value in dit.t_embedder.named_parameters()}
    if dit.null_condition is not None:
        parts["y_embedder.dropout_embedding"] = dit.null_condition
    stored = {name: reader.tensors.get(DIT_PREFIX + name) for name in parts}
    if any(found is None or found.shape != parts[name].shape for name, found in stored.items()):
        return None
    reader.check_floats([DIT_PREFIX + name for name in parts])
    values = {name: reader.read(DIT_PREFIX + name) for name in parts}
    null = values.pop("y_embedder.dropout_embedding", None)
    with torch.no_grad():
        embedder = copy.deepcopy(dit.t_embedder)
        embedder.load_state_dict({n.removeprefix("t_embedder."): v for n, v in values.items()}, assign=True)
        return mean_read(embedder, null)


def load_encoder(
    source: Source,
    config: ScaleRAEConfig,
    dtype: torch.dtype,
    device: torch.device,
    residency: Residency | None = None,
) -> Encoder:
    """The representation encoder in `source`'s folder. `residency` takes its weights once they are loaded.

    Raises:
        ConfigError, CheckpointError: naming the file, when it does not fit the model or is damaged.
    """
    encoder = Encoder(source.folder, config.tokens, config.encoder_layer, dtype, device, residency)
    if encoder.channels != config.channels and config.vae is None:
        raise ConfigError(
            f"{source.folder}: the encoder's hidden_size is {encoder.channels}, but the "
            f"model's latents have {config.channels} channels (diffusion_model_channels)"
        )
    return encoder


def find_decoder(name: str | None, model: Source, config: ScaleRAEConfig, encoder_kind: Callable[[], str]) -> Source:
    """The files of the pixel decoder called `name` or, without a name, of the decoder that belongs to the model.

    The latter is a folder `decoder` inside or beside the model's folder, else the published decoder for its encoder. A
    FLUX-VAE-aligned model takes a VAE: a folder `vae` inside or beside it, else the VAE that its config.json names.
    """
    own = "decoder" if config.vae is None else "vae"
    source = None
    if name is None:
        what = "decoder" if config.vae is None else "VAE"
        folders = own_folders(model.folder, own)
        source = Source(own, folders[0], own=True, what=what) if folders else None
    if config.vae is not None:
        source = source or find(name or config.vae, "VAE", model.folder)
        return replace(source, folder=vae_folder(source.folder))
    if name is not None:
        return find(name, "decoder", model.folder)
    return source or find(PUBLISHED_DECODERS["dinov2" if encoder_kind() == "dinov2" else "siglip"], "decoder")


def load_decoder(
    source: Source, config: ScaleRAEConfig, place: Place, quantize: str | None = None
) -> PixelDecoder | VaeDecoder:
    """The pixel decoder in `source`'s folder, or a FLUX-VAE-aligned model's VAE (extra `vae`), which is never quantised.

    `quantize` is how the other networks are quantised.

    Raises:
        ConfigError, CheckpointError: naming the file, when it is missing, damaged, or made for other latents.
    """
    folder = source.folder
    if config.vae is not None:
        from scale_rae.vae import load_vae

        return load_vae(folder, config.channels, place.dtype, place.storage)
    weights = folder / DECODER_WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{folder}: not a pixel decoder, which is config.json and {DECODER_WEIGHTS}")
    reader = TensorReader([weights])
    embed = reader.tensors.get("decoder_embed.weight")
    channels = embed.shape[-1] if embed and embed.shape else config.channels
    if channels != config.channels:
        raise CheckpointError(
            f"{weights}: this decoder is for another encoder: it takes latents of {channels} "
            f"channels (decoder_embed.weight), the model's have {config.channels}"
        )
    decoder_config = load_decoder_config(folder, channels)
    reader.check_depth(decoder_config.depth, "decoder_num_hidden_layers", folder / "config.json")
    with torch.device("meta"):
        decoder = PixelDecoder(decoder_config)
    kind = decoder_kind(quantize)
    sinks = {} if kind is None else quantize_layers(decoder, kind, place)
    fill({"": decoder}, reader, place.dtype, place.storage, sinks=sinks)
    return decoder


def _read_norm_stats(reader: TensorReader, config: ScaleRAEConfig, device: torch.device) -> NormStats | None:
    """diff_head.data_mean and data_std, or None if the checkpoint has neither."""
    names = NORM_STATS
    present = [name in reader.tensors for name in names]
    if not any(present):
        return None
    if not all(present):
        file = next(reader.tensors[n].file for n in names if n in reader.tensors)
        raise CheckpointError(f"{file}: has only one of {names[0]} and {names[1]}")
    stats = []
    for name in names:
        value = reader.read(name).to(device, torch.float32, copy=True)
        try:
            torch.broadcast_to(value, (config.tokens, config.channels))
        except RuntimeError as e:
            raise CheckpointError(
                f"{reader.tensors[name].file}: {name} is {list(value.shape)}, which does not broadcast to "
                f"[{config.tokens}, {config.channels}]"
            ) from e
        stats.append(value)
    return stats[0], stats[1]
