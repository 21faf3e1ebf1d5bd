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
from scale_rae.tokenizer_file import read_qwen2, read_tokenizer_json, reading

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from scale_rae.pipeline import ScaleRAE

BATCH = 32  # pictures scored at once
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
INSTEAD = "or choose --reward siglip or --reward none"

Module = TypeVar("Module", bound=nn.Module)


def locate(
    model: ScaleRAE, reward: str, repo: str, needs: str, path: str | None = None, files: tuple[str, ...] = ()
) -> Source:
    """A reward's weights: the folder `path`, or what `hub.find` finds by the hub id `repo`; `needs` says it in words.

    Raises:
        ScaleRAEError: of the kind that `find` raises; it names where the files come from and the alternatives.
    """
    try:
        return find(path or repo, "reward", model.source.folder, files=files)
    except ScaleRAEError as e:
        raise type(e)(
            f"{e}. {_origin(reward, repo, needs)} into a folder and give --reward-path FOLDER, {INSTEAD}"
        ) from e


def locate_part(model: ScaleRAE, reward: str, repo: str, what: str, first: str) -> Source:
    """A tokenizer or processor that isn't beside a reward's weights, by the hub id `repo`; `first` is the file it must have."""
    try:
        return find(repo, what, model.source.folder, files=(first, *(f for f in TOKENIZER_FILES if f != first)))
    except ScaleRAEError as e:
        raise type(e)(
            f"{e}. {_origin(reward, repo, f'{what} files')} into a folder {what} beside the weights, {INSTEAD}"
        ) from e


def require(folder: Path, files: Sequence[str], reward: str, repo: str) -> None:
    """Raises CheckpointError for files that a reward's folder lacks, as `locate` does."""
    if missing := [file for file in files if not (folder / file).is_file()]:
        lacks = " and no ".join(missing)
        raise CheckpointError(f"{folder}: no {lacks}. {_origin(reward, repo, ' and '.join(files))} there, {INSTEAD}")


def _origin(reward: str, repo: str, needs: str) -> str:
    return f"The reward {reward} needs the {needs} of https://huggingface.co/{repo}: copy them"


def build(make: Callable[[], Module], where: Path) -> Module:
    """A network of transformers on the meta device: no memory, no random weights; its places count from 0.

    Raises:
        ConfigError: naming `where` the sizes come from, when they make no network.
    """
    import_hub()
    try:
        with torch.device("meta"):
            module = make()
    except Exception as e:  # the library's many ways to refuse a config
        raise ConfigError(f"{where}: not a usable config ({last_line(e)})") from e
    for owner in module.modules():
        if "position_ids" in owner._buffers:  # the one thing in these networks that is computed
            count = owner.get_buffer("position_ids").shape[-1]
            owner._buffers["position_ids"] = torch.arange(count)[None]
    return module


def check_depth(reader: TensorReader, config: Any, path: Path) -> None:
    """Raises ConfigError for a network of more layers than its weights can have."""
    layers = config.get("num_hidden_layers") if isinstance(config, dict) else None
    if isinstance(layers, int):
        reader.check_depth(layers, "num_hidden_layers", path)


def read_tokenizer(folder: Path, kind: str) -> Tokenizer:
    """A folder's tokenizer of a `kind` ("bert", "clip", "qwen2"), which decides what files other than tokenizer.json mean.

    Raises:
        CheckpointError: naming the folder, when there is none or it is damaged.
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
