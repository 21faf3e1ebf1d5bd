"""What `scale-rae inspect` finds out about a model before it is downloaded: parts, sizes, licence, what is missing or misnamed.

Only config.json and the headers of safetensors files are read. torch is imported only for torch files (.bin, model.pt) on this machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from scale_rae.config import (
    NOT_VISION,
    DecoderConfig,
    DiTConfig,
    ScaleRAEConfig,
    encoder_kind,
    parse_config,
    parse_decoder_config,
    parse_vision_config,
)
from scale_rae.errors import CheckpointError, ScaleRAEError
from scale_rae.headers import NAMES, read_header
from scale_rae.hub import BUNDLED, DECODER_WEIGHTS, Source, needed, own_folders, weight_map, weight_names
from scale_rae.layout import DIT_PREFIX, NORM_STATS, compare, decoder_layout, few, is_not_read, model_layout
from scale_rae.listing import Listing, check_weights, list_files, list_folder
from scale_rae.options import PUBLISHED_DECODERS


class StoredShape(NamedTuple):
    """A tensor as a file declares it: its dtype in torch's names, its shape and bytes."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers."""
        return "float" in self.dtype


@dataclass(frozen=True)
class Part:
    """A part of the model as its files declare it: parameters, bytes, and the dtypes that they are stored in.

    `what` is one of "language model", "diffusion transformer", "projector", "encoder", "decoder"; `detail` has its sizes in words.
    """

    what: str
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    detail: str

    def record(self) -> dict[str, Any]:
        """The part as JSON."""
        return {**vars(self), "dtypes": list(self.dtypes)}


@dataclass(frozen=True)
class Files:
    """Where the files of "model", "encoder" or "decoder" are: bytes on this machine (`here`), and bytes still to download."""

    what: str
    name: str
    commit: str | None
    licence: str | None
    here: int
    download: int

    def record(self) -> dict[str, Any]:
        """The files as JSON."""
        return dict(vars(self))


@dataclass
class Inspection:
    """All that was found. `problems` are reasons why the model cannot be used as it is, `notes` what could not be checked.

    `decoder` are the sizes of the pixel decoder, None where they are not known. `read` counts the bytes that were read from the hub.
    """

    config: ScaleRAEConfig
    files: list[Files] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    tokenizer: str = ""
    decoder: DecoderConfig | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    read: int = 0

    def record(self) -> dict[str, Any]:
        """What was found, as JSON."""
        return {
            "files": [files.record() for files in self.files],
            "parts": [part.record() for part in self.parts],
            "parameters": sum(part.parameters for part in self.parts),
            "download_bytes": sum(files.download for files in self.files),
            "bytes_here": sum(files.here for files in self.files),
            "licence": self.files[0].licence,
            "tokenizer": self.tokenizer,
            "problems": self.problems,
            "notes": self.notes,
            "bytes_read_from_hub": self.read,
        }


def inspect(name: str, decoder: str | None = None, revision: str | None = None) -> Inspection:
    """What there is to know of the model called `name` ("shapes", a folder or a hub id) and the parts that it needs.

    Problems of the encoder's and decoder's files are collected; those of the model's own config and weight files are raised.

    Raises:
        ConfigError, CheckpointError, HubError: naming the file and the field: there is no such model, the hub cannot be asked, or a
            file is damaged.
    """
    model = list_files(name, "model", revision=revision)
    config_file = Path(model.where("config.json"))
    config = parse_config(model.read_json("config.json"), config_file)
    found = Inspection(config)
    own = []
    if config.student is not None:
        found.notes.append(str(config.student))
        if base := config.student.base:
            own = [_files("student", model)]
            model = list_files(base, "model", None if base in BUNDLED else model.folder, config.student.base_revision)
    tensors = _stored(model, found)
    found.files += [_files("model", model), *own]
    if tensors is not None:
        _check_model(model, config, tensors, found)
    found.parts += _model_parts(config, tensors)
    found.tokenizer = _tokenizer(model, config, found)
    listings, kind = [model], ""
    with _noted(found):
        encoder, kind = _look_at_encoder(model, found)
        listings.append(encoder)
    with _noted(found):
        listings.append(_look_at_decoder(model, found, decoder, kind))
    found.read = sum(sum(listing.traffic) for listing in {id(part.traffic): part for part in listings}.values())
    return found


@contextmanager
def _noted(found: Inspection) -> Iterator[None]:
    """Notes an error as a problem, so that the other parts are looked at, too."""
    try:
        yield
    except ScaleRAEError as e:
        found.problems.append(str(e))


# --- the model -------------------------------------------------------------------------------------------------------


def _stored(listing: Listing, found: Inspection) -> dict[str, StoredShape] | None:
    """The tensors in weight files, by their headers; None for torch files that are not on this machine.

    Raises:
        CheckpointError: for missing or damaged files, or an index that does not fit them.
    """
    indices: dict[str, dict[str, Any]] = {}

    def read(index: str) -> dict[str, Any]:
        indices[index] = listing.read_json(index, CheckpointError)
        return indices[index]

    names = weight_names(listing.sizes, listing.name, read)
    tensors: dict[str, StoredShape] = {}
    home: dict[str, str] = {}
    for file in names:
        if file.endswith(".safetensors"):
            check_weights(listing, file)
            declared = _header(listing, file)
        elif (path := listing.here.get(file)) is not None:
            declared = _torch_file(path)
        else:
            found.notes.append(f"{listing.where(file)}: a torch file, whose tensors are checked once it is downloaded")
            return None
        if twice := sorted(declared.keys() & tensors.keys()):
            raise CheckpointError(f"{listing.where(file)}: tensors that {home[twice[0]]} has too: {few(twice)}")
        tensors |= declared
        home |= dict.fromkeys(declared, file)
    for index, content in indices.items():
        _check_index(weight_map(content, listing.where(index)), home, listing.where(index))
    return tensors


def _check_index(index: Mapping[str, str], home: Mapping[str, str], where: str) -> None:
    """Raises CheckpointError for tensors that an index places in a file that does not hold them."""
    lost = [f"{name} in {file}" for name, file in sorted(index.items()) if home.get(name) != file]
    if lost:
        raise CheckpointError(f"{where}: weight_map names tensors that the shards do not hold: {few(lost, 5)}")


def _header(listing: Listing, file: str) -> dict[str, StoredShape]:
    header = read_header(lambda start, stop: listing.read(file, start, stop), listing.sizes[file], listing.where(file))
    return {
        name: StoredShape(NAMES.get(t.dtype, t.dtype.lower()), t.shape, t.stop - t.start) for name, t in header.items()
    }


def _torch_file(path: Path) -> dict[str, StoredShape]:
    from scale_rae.checkpoint import TensorReader

    tensors = TensorReader([path]).tensors
    return {name: StoredShape(str(t.dtype).removeprefix("torch."), t.shape, t.bytes) for name, t in tensors.items()}


def _check_model(
    listing: Listing, config: ScaleRAEConfig, tensors: Mapping[str, StoredShape], found: Inspection
) -> None:
    """Notes what is missing, unexpected or misshapen, and tensors that are no floating-point numbers."""
    stored = {name: t.shape for name, t in tensors.items() if not is_not_read(name, config)}
    if text := str(compare(model_layout(config), stored)):
        found.problems.append(f"{listing.name}: {text}")
    if others := sorted(name for name in stored if not tensors[name].is_float):
        kinds = sorted({tensors[name].dtype for name in others})
        found.problems.append(
            f"{listing.name}: weights must be floating-point numbers, not {', '.join(kinds)}: {few(others)}"
        )
    present = [name for name in NORM_STATS if name in tensors]
    if len(present) == 1:
        found.problems.append(f"{listing.name}: has only one of {' and '.join(NORM_STATS)}")


def _model_parts(config: ScaleRAEConfig, tensors: Mapping[str, StoredShape] | None) -> list[Part]:
    """The language model, the projector of latents and the diffusion transformer; by the config where no tensors are known."""
    if tensors is None:
        tensors = {name: StoredShape("", shape, 0) for name, shape in model_layout(config).items()}
    sizes = config.language
    groups: dict[str, dict[str, StoredShape]] = {"language model": {}, "diffusion transformer": {}, "projector": {}}
    for name, tensor in tensors.items():
        if not is_not_read(name, config) or name in NORM_STATS:
            is_dit = name.startswith((DIT_PREFIX, "diff_head_projector.", *NORM_STATS))
            what = (
                "projector"
                if name.startswith("model.mm_projector.")
                else "diffusion transformer"
                if is_dit
                else "language model"
            )
            groups[what][name] = tensor
    details = {
        "language model": f"Qwen2: {sizes['num_hidden_layers']} layers of {sizes['hidden_size']}, {sizes['vocab_size']:,} tokens, "
        f"conversations of {config.max_length:,}",
        "diffusion transformer": _dit_detail(config.dit),
        "projector": f"latents of {config.channels} channels to {config.hidden_size}, "
        + (f"{config.projector_depth} layers" if config.projector_depth else "linear"),
    }
    return [_part(what, some, details[what]) for what, some in groups.items() if some]


def _part(what: str, tensors: Mapping[str, StoredShape], detail: str) -> Part:
    by_dtype: Counter[str] = Counter()
    for tensor in tensors.values():
        by_dtype[tensor.dtype] += tensor.bytes
    parameters = sum(prod(tensor.shape) for tensor in tensors.values())
    return Part(what, parameters, by_dtype.total(), tuple(n for n, _ in by_dtype.most_common() if n), detail)


def _dit_detail(config: DiTConfig) -> str:
    """Kind and sizes of a velocity network, in words."""
    latent = f"{config.tokens} tokens of {config.channels} channels"
    if config.encoder_depth is None:
        return f"DiT: {config.depth} blocks of {config.width}, {config.heads} heads, {latent}"
    late = config.depth - config.encoder_depth
    kind = "two-width DDT" if config.wide else "DDT"
    return f"{kind}: {config.encoder_depth} blocks of {config.width} and {late} of {config.decoder_width}, {latent}"


def _tokenizer(listing: Listing, config: ScaleRAEConfig, found: Inspection) -> str:
    """Which files the tokenizer is read from; those on this machine are read."""
    names = [n for n in ("tokenizer.json", "vocab.json", "merges.txt") if n in listing.sizes]
    if "tokenizer.json" not in names and names != ["vocab.json", "merges.txt"]:
        found.problems.append(f"{listing.name}: no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
        return ""
    used = names[:1] if names[0] == "tokenizer.json" else names
    if listing.folder is not None:
        from scale_rae.prompt import ChatTokenizer

        try:
            size = ChatTokenizer(listing.folder, config.image_markers).size
        except ScaleRAEError as e:
            found.problems.append(str(e))
        else:
            if size > config.vocab_size:
                problem = f"the tokenizer has {size} tokens, the model {config.vocab_size} (vocab_size)"
                found.problems.append(f"{listing.name}: {problem}")
    return ", ".join(used)


def _files(what: str, listing: Listing) -> Files:
    kind = "VAE" if what == "decoder" and DECODER_WEIGHTS not in listing.sizes else what
    wanted = [name for name in needed(list(listing.sizes), kind) if name in listing.sizes]
    here, download = listing.bytes_of(wanted)
    bundled = {str(folder): name for name, folder in BUNDLED.items()}
    return Files(what, bundled.get(listing.name, listing.name), listing.commit, listing.licence, here, download)


# --- encoder and decoder ---------------------------------------------------------------------------------------------


def _look_at_encoder(model: Listing, found: Inspection) -> tuple[Listing, str]:
    """The encoder's files and kind. Drawing needs its config alone, reading pictures all of it.

    Raises:
        ScaleRAEError: it is not there, or does not fit the model.
    """
    config = found.config
    listing = model.inside(config.encoder_name) or list_files(config.encoder_name, "encoder", model.folder)
    found.files.append(_files("encoder", listing))
    raw, path = listing.read_json("config.json"), Path(listing.where("config.json"))
    kind = encoder_kind(raw, path)
    vision = parse_vision_config(raw, path)
    if "preprocessor_config.json" not in listing.sizes:
        raise CheckpointError(f"{listing.where('preprocessor_config.json')}: no such file; the encoder needs it")
    if vision.width != config.channels and config.vae is None:
        raise CheckpointError(
            f"{path}: hidden_size is {vision.width}, but the model's latents have {config.channels} channels "
            "(diffusion_model_channels)"
        )
    tensors = _stored(listing, found)
    used = {n: t for n, t in (tensors or {}).items() if not n.startswith(NOT_VISION)}
    detail = f"{'DINOv2' if kind == 'dinov2' else 'SigLIP'}: {vision.layers} layers of {vision.width}, pictures of {vision.image}"
    found.parts.append(_part("encoder", used, detail))
    return listing, kind


def _look_at_decoder(model: Listing, found: Inspection, name: str | None, kind: str) -> Listing:
    """The decoder's files, found as `loading.find_decoder` finds them.

    Raises:
        ScaleRAEError: it is not there, or does not fit the model.
    """
    config = found.config
    listing = _decoder_files(model, config, name, kind)
    found.files.append(_files("decoder", listing))
    if config.vae is not None:
        found.notes.append(f"{listing.name}: a VAE, whose tensors are checked when it is loaded")
        return listing
    weights = listing.where(DECODER_WEIGHTS)
    if DECODER_WEIGHTS not in listing.sizes:
        raise CheckpointError(f"{listing.name}: not a pixel decoder, which is config.json and {DECODER_WEIGHTS}")
    raw, path = listing.read_json("config.json"), Path(listing.where("config.json"))
    file = listing.here.get(DECODER_WEIGHTS)
    tensors = None if file is None else _torch_file(file)
    embed = (tensors or {}).get("decoder_embed.weight")
    channels = embed.shape[-1] if embed is not None and embed.shape else config.channels
    if channels != config.channels:
        raise CheckpointError(
            f"{weights}: this decoder is for another encoder: it takes latents of {channels} channels "
            f"(decoder_embed.weight), the model's have {config.channels}"
        )
    found.decoder = sizes = parse_decoder_config(raw, path, channels)
    layout = decoder_layout(sizes)
    if tensors is None:
        found.notes.append(f"{weights}: a torch file, whose tensors are checked once it is downloaded")
        least = 2 * sum(prod(shape) for shape in layout.values())  # in 16 bits
        if listing.sizes[DECODER_WEIGHTS] < least:
            raise CheckpointError(
                f"{weights}: has {listing.sizes[DECODER_WEIGHTS]:,} bytes, but the sizes in config.json take at least {least:,}"
            )
    elif text := str(compare(layout, {n: t.shape for n, t in tensors.items()})):
        raise CheckpointError(f"{weights}: {text}")
    shapes = tensors or {n: StoredShape("", shape, 0) for n, shape in layout.items()}
    detail = f"ViT: {sizes.depth} layers of {sizes.width}, pictures of {sizes.image} x {sizes.image}"
    found.parts.append(_part("decoder", shapes, detail))
    return listing


def _decoder_files(model: Listing, config: ScaleRAEConfig, name: str | None, kind: str) -> Listing:
    """The files of the decoder called `name`, or of the model's own: a VAE, or the one that goes with a `kind` of encoder."""
    what, folder = ("decoder", "decoder") if config.vae is None else ("VAE", "vae")
    if name is None:
        if (inside := model.inside(folder)) is not None:
            return inside
        beside = [] if model.folder is None else own_folders(model.folder, folder)
        if beside:
            return list_folder(Source(folder, beside[0]))
        name = config.vae or PUBLISHED_DECODERS["dinov2" if kind == "dinov2" else "siglip"]
    listing = list_files(name, what, model.folder)
    within = listing.inside("vae") if config.vae is not None and "config.json" not in listing.sizes else None
    return within or listing
