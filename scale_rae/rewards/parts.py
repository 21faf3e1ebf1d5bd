"""What the rewards share: finding files, building transformers' networks without weights, tokenizers, batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from scale_rae.checkpoint import TensorReader
from scale_rae.errors import CheckpointError, ConfigError, ScaleRAEError, last_line
from scale_rae.files import check_file
from scale_rae.hub import Source, find, import_hub
from scale_rae.images import Picture, as_rgb
from scale_rae.jsonio import read_json
from scale_rae.provenance import file_record
from scale_rae.tokenizer_file import read_qwen2, read_tokenizer_json, reading

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from scale_rae.pipeline import ScaleRAE

BATCH = 32  # pictures scored at once
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
INSTEAD = "or choose --reward siglip or --reward none"

Module = TypeVar("Module", bound=nn.Module)


def operations(network: nn.Module, config: Any) -> float:
    """Floating-point operations of a vision tower for one picture: a multiply-add per weight and patch, counted as two."""
    weights = sum(p.numel() for p in network.parameters() if p.dim() > 1)
    return 2.0 * weights * int(config.image_size // config.patch_size) ** 2


def locate(
    model: ScaleRAE, reward: str, repo: str, needs: str, path: str | None = None, files: tuple[str, ...] = ()
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


def locate_part(model: ScaleRAE, reward: str, repo: str, what: str, first: str) -> Source:
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
    return tokenizer  # type: ignore[no-any-return]


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
