"""What rewards and GenEval's colours share: finding files, transformers' networks, CLIP, tokenizers, batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from scale_rae.checkpoint import TensorReader, fill
from scale_rae.config import library_fields
from scale_rae.errors import CheckpointError, ConfigError, ScaleRAEError, last_line
from scale_rae.files import check_file
from scale_rae.hub import Source, find, import_hub, weight_files
from scale_rae.images import Picture, as_rgb
from scale_rae.jsonio import read_json
from scale_rae.provenance import file_record
from scale_rae.tokenizer_file import read_qwen2, read_tokenizer_json, reading

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from scale_rae.encoder import Encoder
    from scale_rae.memory import MemoryErrors
    from scale_rae.residency import Residency

BATCH = 32  # pictures scored at once
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)[:, None, None]
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)[:, None, None]
INSTEAD = "or choose --reward siglip or --reward none"

Module = TypeVar("Module", bound=nn.Module)


class Host(Protocol):
    """What rewards use of a `ScaleRAE`; `scaling.scoring.EncoderOnly` has it too, without loading other networks."""

    source: Source
    device: torch.device
    dtype: torch.dtype
    residency: Residency

    @property
    def encoder(self) -> Encoder:
        """The model's own encoder."""

    @property
    def encoder_source(self) -> Source | None:
        """The encoder's files; None until it is loaded."""

    def memory_errors(self, what: str, remedy: str = ...) -> MemoryErrors:
        """As `ScaleRAE.memory_errors`."""


def operations(network: nn.Module, config: Any) -> float:
    """Floating-point operations of a vision tower for one picture: a multiply-add per weight and patch, counted as two."""
    weights = sum(p.numel() for p in network.parameters() if p.dim() > 1)
    return 2.0 * weights * int(config.image_size // config.patch_size) ** 2


def locate(
    model: Host, reward: str, repo: str, needs: str, path: str | None = None, files: tuple[str, ...] = ()
) -> Source:
    """A reward's weights: the folder `path`, or those that `hub.find` finds by the hub id `repo`.

    `needs` names the files in the error message.

    Raises:
        ScaleRAEError: as `hub.find`; the message also says where the files come from, and names alternatives.
    """
    try:
        return find(path or repo, "reward", model.source.folder, files=files)
    except ScaleRAEError as e:
        raise type(e)(
            f"{e}. {_origin(reward, repo, needs)} into a folder and give --reward-path FOLDER, {INSTEAD}"
        ) from e


def locate_part(model: Host, reward: str, repo: str, what: str, first: str) -> Source:
    """A tokenizer or processor that is not beside a reward's weights, by the hub id `repo`. The file `first` must exist."""
    try:
        return find(repo, what, model.source.folder, files=(first, *(f for f in TOKENIZER_FILES if f != first)))
    except ScaleRAEError as e:
        raise type(e)(
            f"{e}. {_origin(reward, repo, f'{what} files')} into a folder {what} beside the weights, {INSTEAD}"
        ) from e


def require(folder: Path, files: Sequence[str], reward: str, repo: str) -> None:
    """Raises CheckpointError if a reward's folder lacks one of `files`; the message is as `locate`'s."""
    if missing := [file for file in files if not (folder / file).is_file()]:
        lacks = " and no ".join(missing)
        raise CheckpointError(f"{folder}: no {lacks}. {_origin(reward, repo, ' and '.join(files))} there, {INSTEAD}")


def _origin(reward: str, repo: str, needs: str) -> str:
    return f"The reward {reward} needs the {needs} of https://huggingface.co/{repo}: copy them"


def identity(reward: str, source: Source, part: str, part_source: Source) -> dict[str, Any]:
    """`Reward.identity` of a reward whose `part` (its tokenizer, say) may lie in another folder than its weights."""
    found = {"name": reward, "weights": file_record(source)}
    return found if part_source.folder == source.folder else found | {part: file_record(part_source)}


def build(make: Callable[[], Module], where: Path) -> Module:
    """A network of transformers on the meta device, without memory for its weights. Position ids are computed.

    Raises:
        ConfigError: the library cannot build it; the message names `where` the sizes come from.
    """
    import_hub()
    try:
        with torch.device("meta"):
            module = make()
    except Exception as e:  # the library's many ways to refuse a config
        raise ConfigError(f"{where}: not a usable config ({last_line(e)})") from e
    for owner in module.modules():
        if "position_ids" in owner._buffers:  # the only buffer that is computed
            count = owner.get_buffer("position_ids").shape[-1]
            owner._buffers["position_ids"] = torch.arange(count)[None]
    return module


def check_depth(reader: TensorReader, config: Any, path: Path) -> None:
    """Raises ConfigError if a network has more layers than its weights have tensors."""
    layers = config.get("num_hidden_layers") if isinstance(config, dict) else None
    if isinstance(layers, int):
        reader.check_depth(layers, "num_hidden_layers", path)


def load_clip(folder: Path, problem: str, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' CLIPModel with a folder's weights, in `dtype` but for logit_scale, which is float32.

    `problem` is what the error says of a model that is no CLIP.

    Raises:
        ConfigError, CheckpointError: naming the file and what is wrong with it.
    """
    import_hub()
    from transformers import CLIPConfig, CLIPModel

    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != "clip":
        raise ConfigError(f"{path}: model_type {raw.get('model_type')!r} is not clip{problem}")
    reader = TensorReader(weight_files(folder))
    fields = library_fields(raw, path)
    for part in (fields.get("text_config"), fields.get("vision_config")):
        check_depth(reader, part, path)
    network = build(lambda: CLIPModel(CLIPConfig(**fields)), path)
    fill(
        {"": network},
        reader,
        dtype,
        device,
        keep_float32=lambda name: name == "logit_scale",
        ignore=lambda name: name.endswith("position_ids"),
    )
    return network


def clip_tokenizer(folder: Path, network: Any) -> Tokenizer:
    """The tokenizer in a folder for the text tower of a CLIPModel, which cuts texts to what the tower reads.

    Raises:
        CheckpointError: as `read_tokenizer`, or when it has another number of tokens than the tower.
    """
    text = network.config.text_config
    tokenizer = read_tokenizer(folder, "clip")
    if tokenizer.get_vocab_size() != text.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the text tower {text.vocab_size}"
        )
    tokenizer.enable_truncation(text.max_position_embeddings)
    return tokenizer


def clip_pixels(image: Image.Image, side: int) -> NDArray[np.float32]:
    """CLIP's input [3, side, side] for a picture that has pixels: resized, centre cropped, normalised.

    The picture's shorter edge becomes `side`, as torchvision's Resize and CenterCrop do it on Pillow.
    """
    width, height = image.size
    longer = int(side * max(width, height) / min(width, height))
    size = (side, longer) if width <= height else (longer, side)
    resized = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in size)  # half to even
    values = np.asarray(resized.crop((left, top, left + side, top + side)), np.float32)  # [side, side, 3]
    return (values.transpose(2, 0, 1) / np.float32(255) - CLIP_MEAN) / CLIP_STD


def read_tokenizer(folder: Path, kind: str) -> Tokenizer:
    """The tokenizer in a folder: tokenizer.json, else the files of its `kind` ("bert", "clip", "qwen2").

    Raises:
        CheckpointError: there is no tokenizer, or it is damaged; the message names the folder.
    """
    from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer

    tokenizer: Any
    with reading(folder):
        if (folder / "tokenizer.json").exists():
            tokenizer = read_tokenizer_json(folder / "tokenizer.json")
        elif kind == "qwen2" and (folder / "vocab.json").exists():
            tokenizer = read_qwen2(folder)[0]
        elif kind == "bert" and (folder / "vocab.txt").exists():
            check_file(folder / "vocab.txt", "file", CheckpointError)
            tokenizer = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)._tokenizer
        elif kind == "clip" and (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            for name in TOKENIZER_FILES:
                if (folder / name).exists():
                    check_file(folder / name, "file", CheckpointError)
            import_hub()
            from transformers import CLIPTokenizer

            tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
        else:
            files = "vocab.txt" if kind == "bert" else "vocab.json and merges.txt"
            raise CheckpointError(f"{folder}: no tokenizer (tokenizer.json, or {files})")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def pad_id(folder: Path, tokenizer: Tokenizer) -> int:
    """The id of the pad token that a folder's tokenizer_config.json names."""
    path = folder / "tokenizer_config.json"
    token = read_json(path).get("pad_token")
    if isinstance(token, dict):
        token = token.get("content")
    index = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if index is None:
        raise CheckpointError(f"{path}: pad_token is {token!r}; must be a token of the tokenizer beside it")
    return int(index)


def batches(images: Sequence[Picture]) -> Iterator[list[Image.Image]]:
    """The pictures as RGB, `BATCH` at a time."""
    for start in range(0, len(images), BATCH):
        yield [as_rgb(picture) for picture in images[start : start + BATCH]]


def similarity(pictures: Tensor, text: Tensor) -> Tensor:
    """Cosine [N] float32 of embeddings [N, D] and [1, D]."""
    return torch.nn.functional.cosine_similarity(pictures.float(), text.float(), dim=-1)


def checked(scores: Sequence[float], name: str) -> list[float]:
    """The scores; raises ScaleRAEError when one is not finite."""
    if not all(map(math.isfinite, scores)):
        raise ScaleRAEError(f"the reward {name} came out with values that are not finite; try --dtype float32")
    return list(scores)
