"""Mask2Former with Swin (Cheng et al. 2022, arXiv:2112.01527): sizes, names of tensors, loading.

The network is transformers'. Its weights come from the file that MMDetection published, whose tensors are renamed here, or
from a folder with transformers' names. Only the published file gives published scores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from scale_rae.checkpoint import TensorReader
from scale_rae.errors import CheckpointError, ConfigError, OutputError, last_line
from scale_rae.files import check_file, sha256, write_new
from scale_rae.geneval.published import CONVERTED_FROM, DETECTOR_FILE, DETECTOR_SHA256
from scale_rae.geneval.verdicts import CLASSES
from scale_rae.hub import find, import_hub, weight_files
from scale_rae.jsonio import Fields, dump_json, read_json
from scale_rae.layout import TensorShapes, compare

HEADS, LEVELS, POINTS = 8, 3, 4  # of attention, of deformable attention: the same in every size
_MLP_RATIO = 4
_WHAT = "detector"
_COMPUTED = ("relative_position_index", "criterion.empty_weight")  # stored, and not read
_UNUSED = "model.pixel_level_module.encoder.swin.layernorm."  # the network has it, no file does, and nothing uses it


@dataclass(frozen=True)
class Architecture:
    """The sizes of a network; the defaults are those of the published detector."""

    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 18, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    channels: int = 256
    encoder_layers: int = 6
    encoder_width: int = 1024  # of the pixel decoder's feed-forward networks
    decoder_layers: int = 9
    decoder_width: int = 2048
    num_queries: int = 100


PUBLISHED = Architecture()
# Architecture's field -> the field of transformers' Mask2FormerConfig; "backbone_config" has those of the backbone.
_BACKBONE = {"embed_dim": "embed_dim", "depths": "depths", "num_heads": "num_heads", "window_size": "window_size"}
_FIELDS = {
    "channels": "hidden_dim",
    "encoder_layers": "encoder_layers",
    "encoder_width": "encoder_feedforward_dim",
    "decoder_layers": "decoder_layers",  # transformers' number is one larger, since it counts the first prediction
    "decoder_width": "dim_feedforward",
    "num_queries": "num_queries",
}


class Network(nn.Module):
    """transformers' Mask2Former and the class head, with the names of transformers' own checkpoints."""

    def __init__(self, architecture: Architecture = PUBLISHED) -> None:
        """Builds the network on the CPU, with random weights; see `load`."""
        import_hub()
        from transformers import Mask2FormerConfig, Mask2FormerModel

        super().__init__()
        self.architecture = architecture
        self.model = Mask2FormerModel(Mask2FormerConfig(**library_config(architecture)))
        self.class_predictor = nn.Linear(architecture.channels, len(CLASSES) + 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, Q, 81] ("none" last) and mask logits [B, Q, H/4, W/4] of pictures [B, 3, H, W]."""
        output = self.model(pixels, output_hidden_states=True)
        queries = output.transformer_decoder_intermediate_states[-1].transpose(0, 1)  # [B, Q, C], after the last norm
        return self.class_predictor(queries), output.masks_queries_logits[-1]


@dataclass(frozen=True)
class Loaded:
    """A detector's network, and where its weights came from."""

    network: Network
    name: str  # of the file, folder or repository
    sha256: str | None  # of the published file that the weights are from; None for other weights

    @property
    def comparable(self) -> bool:
        """Whether the weights are those of published scores."""
        return self.sha256 == DETECTOR_SHA256


def library_config(architecture: Architecture) -> dict[str, Any]:
    """The fields of transformers' Mask2FormerConfig for an architecture."""
    backbone = {theirs: getattr(architecture, ours) for ours, theirs in _BACKBONE.items()}
    sizes = {theirs: getattr(architecture, ours) for ours, theirs in _FIELDS.items()}
    return {
        **sizes,
        "decoder_layers": architecture.decoder_layers + 1,
        "feature_size": architecture.channels,
        "mask_feature_size": architecture.channels,
        "num_labels": len(CLASSES),
        "backbone_config": {
            "model_type": "swin",
            "image_size": 224,
            "mlp_ratio": _MLP_RATIO,
            "drop_path_rate": 0.0,
            "out_features": [f"stage{i + 1}" for i in range(len(architecture.depths))],
            **{name: list(value) if isinstance(value, tuple) else value for name, value in backbone.items()},
        },
    }


def load(path: str, architecture: Architecture = PUBLISHED) -> Loaded:
    """The detector of MMDetection's .pth file, of a folder with config.json, or of a hub id, on the CPU.

    `architecture` is that of a .pth file; a folder's config.json says its own.

    Raises:
        ConfigError, CheckpointError, HubError: files are missing or damaged, or hold another kind of network; the message
            names the file.
    """
    if (file := Path(path).expanduser()).is_file():
        return _load_file(file, architecture)
    source = find(path, _WHAT)
    config = source.folder / "config.json"
    raw = read_json(config)
    reader = TensorReader(weight_files(source.folder))
    network = _build(_read_architecture(raw, config, reader), config)
    stored = {new_name(name): name for name in reader.tensors if not name.endswith(_COMPUTED)}
    shapes = {name: reader.tensors[old].shape for name, old in stored.items() if not name.startswith(_UNUSED)}
    if differences := str(compare({name: tuple(p.shape) for name, p in _parameters(network).items()}, shapes)):
        raise CheckpointError(f"{source.folder}: {differences}")
    reader.check_floats(stored.values())
    _copy(network, ((name, reader.read(stored[name])) for name in shapes))
    origin = raw.get(CONVERTED_FROM)
    digest = origin.get("sha256") if isinstance(origin, dict) else None
    return Loaded(network, source.name, digest if isinstance(digest, str) else None)


def convert(path: str | Path, out: str | Path, architecture: Architecture = PUBLISHED) -> None:
    """Writes the detector of MMDetection's .pth file into a new folder: config.json, model.safetensors.

    The folder loads faster and needs no trust in a pickle. Its config.json has the file's name and SHA-256.

    Raises:
        CheckpointError: as `load`.
        OutputError: `out` exists, or cannot be written.
    """
    from safetensors.torch import save

    folder = Path(out).expanduser()
    if folder.exists():
        raise OutputError(f"{folder}: exists; give the name of a new folder")
    file = Path(path).expanduser()
    check_file(file, "detector file", CheckpointError)
    loaded = _load_file(file, architecture)
    origin = {"name": loaded.name, "sha256": loaded.sha256}
    config = {"model_type": "mask2former", "architectures": ["Mask2FormerForUniversalSegmentation"]}
    text = dump_json(config | library_config(architecture) | {CONVERTED_FROM: origin}, indent=2)
    weights = {name: parameter.detach().contiguous() for name, parameter in _parameters(loaded.network).items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.", ignore_cleanup_errors=True) as unfinished:
            made = Path(unfinished) / "folder"
            made.mkdir()
            write_new(made / "model.safetensors", save(weights, metadata={"format": "pt"}))
            write_new(made / "config.json", f"{text}\n".encode())
            made.rename(folder)
    except OSError as e:
        raise OutputError(f"{folder}: cannot be written ({e.strerror or e})") from e


def published_layout(architecture: Architecture = PUBLISHED) -> TensorShapes:
    """The names and shapes of the tensors in MMDetection's file, without those that are computed."""
    a = architecture
    layout: TensorShapes = {}
    c, first = a.channels, a.embed_dim
    layout |= {
        "backbone.patch_embed.projection.weight": (first, 3, 4, 4),
        "backbone.patch_embed.projection.bias": (first,),
    }
    layout |= _pair("backbone.patch_embed.norm", first)
    for stage, (depth, heads) in enumerate(zip(a.depths, a.num_heads, strict=True)):
        width = first * 2**stage
        for block in range(depth):
            name = f"backbone.stages.{stage}.blocks.{block}."
            layout |= _pair(f"{name}norm1", width) | _pair(f"{name}norm2", width)
            layout[f"{name}attn.w_msa.relative_position_bias_table"] = ((2 * a.window_size - 1) ** 2, heads)
            layout |= _pair(f"{name}attn.w_msa.qkv", 3 * width, width) | _pair(f"{name}attn.w_msa.proj", width, width)
            layout |= _feed_forward(f"{name}ffn", width, _MLP_RATIO * width)
        if stage + 1 < len(a.depths):
            layout |= _pair(f"backbone.stages.{stage}.downsample.norm", 4 * width)
            layout[f"backbone.stages.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
        layout |= _pair(f"backbone.norm{stage}", width)
    pixels = "panoptic_head.pixel_decoder."
    for level in range(LEVELS):
        width = first * 2 ** (len(a.depths) - 1 - level)
        layout |= _pair(f"{pixels}input_convs.{level}.gn", c)
        layout |= {
            f"{pixels}input_convs.{level}.conv.weight": (c, width, 1, 1),
            f"{pixels}input_convs.{level}.conv.bias": (c,),
        }
    for layer in range(a.encoder_layers):
        name = f"{pixels}encoder.layers.{layer}."
        samples = HEADS * LEVELS * POINTS
        layout |= _pair(f"{name}attentions.0.sampling_offsets", 2 * samples, c)
        layout |= _pair(f"{name}attentions.0.attention_weights", samples, c)
        layout |= _pair(f"{name}attentions.0.value_proj", c, c) | _pair(f"{name}attentions.0.output_proj", c, c)
        layout |= _feed_forward(f"{name}ffns.0", c, a.encoder_width)
        layout |= _pair(f"{name}norms.0", c) | _pair(f"{name}norms.1", c)
    layout[f"{pixels}level_encoding.weight"] = (LEVELS, c)
    layout |= {
        f"{pixels}lateral_convs.0.conv.weight": (c, first, 1, 1),
        f"{pixels}output_convs.0.conv.weight": (c, c, 3, 3),
    }
    layout |= _pair(f"{pixels}lateral_convs.0.gn", c) | _pair(f"{pixels}output_convs.0.gn", c)
    layout |= {f"{pixels}mask_feature.weight": (c, c, 1, 1), f"{pixels}mask_feature.bias": (c,)}
    for layer in range(a.decoder_layers):
        name = f"panoptic_head.transformer_decoder.layers.{layer}."
        for attention in (f"{name}attentions.0.attn.", f"{name}attentions.1.attn."):
            layout |= {f"{attention}in_proj_weight": (3 * c, c), f"{attention}in_proj_bias": (3 * c,)}
            layout |= _pair(f"{attention}out_proj", c, c)
        layout |= _feed_forward(f"{name}ffns.0", c, a.decoder_width)
        layout |= _pair(f"{name}norms.0", c) | _pair(f"{name}norms.1", c) | _pair(f"{name}norms.2", c)
    head = "panoptic_head."
    layout |= _pair(f"{head}transformer_decoder.post_norm", c)
    layout |= {f"{head}{name}.weight": (a.num_queries, c) for name in ("query_embed", "query_feat")}
    layout |= {f"{head}level_embed.weight": (LEVELS, c)} | _pair(f"{head}cls_embed", len(CLASSES) + 1, c)
    for layer in (0, 2, 4):
        layout |= _pair(f"{head}mask_embed.{layer}", c, c)
    return layout


def _pair(name: str, *weight: int) -> TensorShapes:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def _feed_forward(name: str, width: int, inner: int) -> TensorShapes:
    return _pair(f"{name}.layers.0.0", inner, width) | _pair(f"{name}.layers.1", width, inner)


# MMDetection's names (as patterns) -> transformers' in 5.17 and later.
_PIXELS, _DECODER = "model.pixel_level_module.", "model.transformer_module."
_BLOCK, _LAYER = r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.", _PIXELS + r"encoder.swin.encoder.layers.\1.blocks.\2."
_ENCODER_LAYER, _DECODER_LAYER = (
    r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.",
    _PIXELS + r"decoder.encoder.layers.\1.",
)
_QUERY_LAYER, _QUERY = r"panoptic_head\.transformer_decoder\.layers\.(\d+)\.", _DECODER + r"decoder.layers.\1."
_NAMES = {
    r"backbone\.patch_embed\.projection\.": _PIXELS + "encoder.swin.embeddings.patch_embeddings.projection.",
    r"backbone\.patch_embed\.norm\.": _PIXELS + "encoder.swin.embeddings.norm.",
    _BLOCK + r"norm1\.": _LAYER + "layernorm_before.",
    _BLOCK + r"norm2\.": _LAYER + "layernorm_after.",
    _BLOCK + r"attn\.w_msa\.proj\.": _LAYER + "attention.o_proj.",
    _BLOCK + r"attn\.w_msa\.relative": _LAYER + "attention.relative_position_bias.relative",
    _BLOCK + r"ffn\.layers\.0\.0\.": _LAYER + "mlp.fc1.",
    _BLOCK + r"ffn\.layers\.1\.": _LAYER + "mlp.fc2.",
    r"backbone\.stages\.(\d+)\.downsample\.": _PIXELS + r"encoder.swin.encoder.layers.\1.downsample.",
    r"backbone\.norm0\.": _PIXELS + "encoder.hidden_states_norms.stage1.",
    r"backbone\.norm1\.": _PIXELS + "encoder.hidden_states_norms.stage2.",
    r"backbone\.norm2\.": _PIXELS + "encoder.hidden_states_norms.stage3.",
    r"backbone\.norm3\.": _PIXELS + "encoder.hidden_states_norms.stage4.",
    r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.conv\.": _PIXELS + r"decoder.input_projections.\1.0.",
    r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.gn\.": _PIXELS + r"decoder.input_projections.\1.1.",
    _ENCODER_LAYER + r"attentions\.0\.": _DECODER_LAYER + "self_attn.",
    _ENCODER_LAYER + r"norms\.0\.": _DECODER_LAYER + "self_attn_layer_norm.",
    _ENCODER_LAYER + r"norms\.1\.": _DECODER_LAYER + "final_layer_norm.",
    _ENCODER_LAYER + r"ffns\.0\.layers\.0\.0\.": _DECODER_LAYER + "fc1.",
    _ENCODER_LAYER + r"ffns\.0\.layers\.1\.": _DECODER_LAYER + "fc2.",
    r"panoptic_head\.pixel_decoder\.level_encoding\.weight": _PIXELS + "decoder.level_embed",
    r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv\.": _PIXELS + "decoder.adapter_1.0.",
    r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn\.": _PIXELS + "decoder.adapter_1.1.",
    r"panoptic_head\.pixel_decoder\.output_convs\.0\.conv\.": _PIXELS + "decoder.layer_1.0.",
    r"panoptic_head\.pixel_decoder\.output_convs\.0\.gn\.": _PIXELS + "decoder.layer_1.1.",
    r"panoptic_head\.pixel_decoder\.mask_feature\.": _PIXELS + "decoder.mask_projection.",
    r"panoptic_head\.query_embed\.": _DECODER + "queries_embedder.",
    r"panoptic_head\.query_feat\.": _DECODER + "queries_features.",
    r"panoptic_head\.level_embed\.": _DECODER + "level_embed.",
    _QUERY_LAYER + r"attentions\.0\.attn\.": _QUERY + "cross_attn.",
    _QUERY_LAYER + r"attentions\.1\.attn\.out_proj\.": _QUERY + "self_attn.out_proj.",
    _QUERY_LAYER + r"norms\.0\.": _QUERY + "cross_attn_layer_norm.",
    _QUERY_LAYER + r"norms\.1\.": _QUERY + "self_attn_layer_norm.",
    _QUERY_LAYER + r"norms\.2\.": _QUERY + "final_layer_norm.",
    _QUERY_LAYER + r"ffns\.0\.layers\.0\.0\.": _QUERY + "fc1.",
    _QUERY_LAYER + r"ffns\.0\.layers\.1\.": _QUERY + "fc2.",
    r"panoptic_head\.transformer_decoder\.post_norm\.": _DECODER + "decoder.layernorm.",
    r"panoptic_head\.mask_embed\.0\.": _DECODER + "decoder.mask_predictor.mask_embedder.0.0.",
    r"panoptic_head\.mask_embed\.2\.": _DECODER + "decoder.mask_predictor.mask_embedder.1.0.",
    r"panoptic_head\.mask_embed\.4\.": _DECODER + "decoder.mask_predictor.mask_embedder.2.0.",
    r"panoptic_head\.cls_embed\.": "class_predictor.",
}
# One fused query-key-value matrix in MMDetection, three matrices in transformers.
_THIRDS = {
    _BLOCK + r"attn\.w_msa\.qkv\.(weight|bias)": _LAYER + r"attention.{}_proj.\3",
    _QUERY_LAYER + r"attentions\.1\.attn\.in_proj_(weight|bias)": _QUERY + r"self_attn.{}_proj.\2",
}
# Swin's names in transformers before 5.17, which its published checkpoints have too -> those of 5.17 and later.
_OLD_NAMES = {
    r"(pixel_level_module\.encoder)\.(embeddings|encoder)\.": r"\1.swin.\2.",
    r"\.attention\.self\.query\.": ".attention.q_proj.",
    r"\.attention\.self\.key\.": ".attention.k_proj.",
    r"\.attention\.self\.value\.": ".attention.v_proj.",
    r"\.attention\.self\.relative_position_bias_table": ".attention.relative_position_bias.relative_position_bias_table",
    r"\.attention\.output\.dense\.": ".attention.o_proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
}


def renamed(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """MMDetection's tensors under transformers' names; some are split in three, some reordered."""
    for name, tensor in tensors:
        for pattern, target in _THIRDS.items():
            if match := re.fullmatch(pattern, name):
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    yield match.expand(target.format(letter)), part
                break
        else:
            yield _library_name(name), _in_order(tensor) if ".downsample." in name else tensor


def _library_name(name: str) -> str:
    for pattern, target in _NAMES.items():
        if match := re.match(pattern, name):
            return match.expand(target) + name[match.end() :]
    raise AssertionError(f"no name for {name}, which published_layout has")


def _in_order(tensor: Tensor) -> Tensor:
    """A merging layer's tensor [..., 4 C]: column 4 c + (0, 2, 1, 3)[k] becomes column k C + c."""
    parts = tensor.reshape(*tensor.shape[:-1], -1, 4)[..., [0, 2, 1, 3]]  # [..., C, 4]
    return parts.transpose(-1, -2).flatten(-2)


def new_name(name: str) -> str:
    """The name in transformers 5.17 and later of a tensor that may have its older name."""
    for pattern, target in _OLD_NAMES.items():
        name = re.sub(pattern, target, name)
    return name


def _load_file(file: Path, architecture: Architecture) -> Loaded:
    digest = sha256(file)
    _check_digest(file, digest)
    reader = TensorReader([file])
    stored = {name: t.shape for name, t in reader.tensors.items() if not name.endswith(_COMPUTED)}
    differences = compare(published_layout(architecture), stored)
    if any(differences):
        raise CheckpointError(
            f"{file}: not the network of {DETECTOR_FILE}: of its {len(published_layout(architecture))} tensors "
            f"{len(differences.missing)} are missing and {len(differences.misshapen)} have another shape, and "
            f"{len(differences.unexpected)} are unexpected, such as {[*differences.misshapen, *differences.unexpected, *differences.missing][0]}"
        )
    reader.check_floats(stored)
    network = _build(architecture, file)
    _copy(network, renamed((name, reader.read(name)) for name in stored))
    return Loaded(network, file.name, digest)


def _check_digest(file: Path, digest: str) -> None:
    """Raises CheckpointError if the digits that end a file's name do not begin its SHA-256."""
    match = re.fullmatch(r".*-([0-9a-f]{8})\.pth", file.name)
    if match and not digest.startswith(match[1]):
        raise CheckpointError(
            f"{file}: damaged: its SHA-256 begins with {digest[:8]}, not with {match[1]} as its name says; download it again"
        )


def _read_architecture(raw: dict[str, Any], config: Path, reader: TensorReader) -> Architecture:
    """The sizes that a folder's config.json names; the others are transformers' defaults, as published."""
    top = Fields(raw, config)
    top.choice("model_type", ("mask2former",))
    backbone = Fields(top.get("backbone_config", dict, {}), f"{config}: backbone_config")
    backbone.choice("model_type", ("swin",), "swin")
    sizes: dict[str, Any] = {ours: top.count(theirs, getattr(PUBLISHED, ours)) for ours, theirs in _FIELDS.items()}
    sizes["decoder_layers"] = top.count("decoder_layers", PUBLISHED.decoder_layers + 1, least=2) - 1
    for ours in ("embed_dim", "window_size"):
        sizes[ours] = backbone.count(ours, getattr(PUBLISHED, ours))
    for ours in ("depths", "num_heads"):
        values = backbone.get(ours, list, list(getattr(PUBLISHED, ours)))
        if len(values) != len(PUBLISHED.depths) or not all(type(value) is int and 0 < value < 1000 for value in values):
            raise backbone.fail(ours, f"is {values}; must be {len(PUBLISHED.depths)} whole numbers")
        sizes[ours] = tuple(values)
    for layers in (sizes["encoder_layers"], sizes["decoder_layers"], sum(sizes["depths"])):
        reader.check_depth(layers, "the number of layers", config)
    return Architecture(**sizes)


def _build(architecture: Architecture, where: Path) -> Network:
    try:
        return Network(architecture)
    except Exception as e:  # the library's many ways to refuse sizes
        raise ConfigError(f"{where}: not usable sizes of a network ({last_line(e)})") from e


def _parameters(network: Network) -> dict[str, nn.Parameter]:
    """The parameters that checkpoints hold, by their names in transformers 5.17 and later."""
    named = ((new_name(name), parameter) for name, parameter in network.named_parameters())
    return {name: parameter for name, parameter in named if not name.startswith(_UNUSED)}


@torch.no_grad()
def _copy(network: Network, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Fills a network's parameters, and readies it for use."""
    parameters = _parameters(network)
    for name, tensor in tensors:
        parameters[name].copy_(tensor)
    network.requires_grad_(False).eval()
