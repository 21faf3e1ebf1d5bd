"""Reads tokenizer files with bounds, and without transformers, whose import takes seconds.

The library `tokenizers` does not expect hostile files. It allocates memory by numbers in a file, which can end the process, and
some contents make it panic, which Python sees as a BaseException.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scale_rae.errors import CheckpointError, ScaleRAEError, last_line
from scale_rae.files import read_bytes
from scale_rae.jsonio import read_json

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_MOST_BYTES = 64 << 20  # of one file; Gemma's tokenizer.json, which SigLIP 2 has, has 34 MB
_LARGEST = 1 << 24  # of any number in a file; no vocabulary has so many tokens
# What Qwen2's tokenizer splits texts at before it merges.
_PIECES = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
_END_OF_TEXT = "<|endoftext|>"
_NAMED = {  # tokens with a name in tokenizer_config.json, and what they are without it
    **dict.fromkeys(("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")),
    **dict.fromkeys(("eos_token", "unk_token", "pad_token"), _END_OF_TEXT),
}


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turns what a damaged tokenizer raises, panics of the library too, into a CheckpointError that names the folder."""
    try:
        yield
    except ScaleRAEError:
        raise
    except Exception as e:  # the many ways a damaged file fails inside the library
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({last_line(e)[:300]})") from e
    except BaseException as e:
        if type(e).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{folder}: the tokenizer cannot be read (damaged: {last_line(e)[:300]})") from e


def read_tokenizer_json(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, without its padding and truncation.

    Raises:
        CheckpointError: naming the file, when it is damaged or holds numbers that no tokenizer has.
    """
    from tokenizers import Tokenizer

    with reading(path.parent):
        data = read_bytes(path, _MOST_BYTES, "file", CheckpointError)
        _object(path, data)
        tokenizer = Tokenizer.from_buffer(data)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer


def read_qwen2(folder: Path) -> tuple[Tokenizer, Tokenizer]:
    """A folder's Qwen2 tokenizer as transformers' Qwen2Tokenizer makes it, and the same without any added token.

    Vocabulary and merges come from tokenizer.json, or from vocab.json and merges.txt; all else is Qwen2's.

    Raises:
        CheckpointError: naming the folder or file, when there is none or it is damaged.
    """
    whole = _object(folder / "tokenizer.json") if _is_there(folder / "tokenizer.json") else None
    if whole is None and not _is_there(folder / "vocab.json"):
        raise CheckpointError(f"{folder}: no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    with reading(folder):
        settings = _settings(folder / "tokenizer_config.json")
        if whole is not None:
            model = whole.get("model")
            if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
                raise CheckpointError(f"{folder / 'tokenizer.json'}: model is not a BPE, as Qwen2's is")
            vocabulary = model.get("vocab")
            pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model.get("merges") or ()]
        else:
            vocabulary = _object(folder / "vocab.json")
            pairs = _merges(folder / "merges.txt")
        if not isinstance(vocabulary, dict) or not all(type(i) is int and i >= 0 for i in vocabulary.values()):
            raise CheckpointError(f"{folder}: the tokenizer's vocabulary must map tokens to whole numbers")
        prefix = settings.get("add_prefix_space") is True
        full, plain = _build(vocabulary, pairs, prefix), _build(vocabulary, pairs, prefix)
        full.add_tokens(_added_tokens(folder, settings, whole))
        return full, plain


def _build(vocabulary: dict[str, int], merges: list[Any], prefix: bool) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, continuing_subword_prefix="", end_of_word_suffix="")
    )
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _added_tokens(folder: Path, settings: dict[str, Any], whole: dict[str, Any] | None) -> list[AddedToken]:
    """The tokens beside the vocabulary, in the order of their ids; those without an id come last."""
    from tokenizers import AddedToken

    numbered: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in settings:
        for index, token in settings["added_tokens_decoder"].items():
            numbered[int(index)] = AddedToken(**token)
    else:  # older layouts
        mapped = _settings(folder / "special_tokens_map.json")
        settings = settings | mapped | {"extra_special_tokens": [*_extra(settings), *_extra(mapped)]}
        special = {_content(token) for token in _special(settings)}
        for content, index in _settings(folder / "added_tokens.json").items():
            numbered[index] = AddedToken(content, normalized=content not in special, special=content in special)
        for token in (whole or {}).get("added_tokens", ()):
            fields = dict(token)
            numbered[fields.pop("id")] = AddedToken(**fields)
    tokens = [token for _, token in sorted(numbered.items(), key=lambda item: item[0])]
    known = {token.content for token in tokens}
    special = {_content(token) for token in _special(settings)}
    for token in tokens:
        token.special = token.special or token.content in special
    for token in _special(settings):
        if _content(token) not in known:
            known.add(_content(token))
            tokens.append(AddedToken(_content(token), special=True))
    return tokens


def _named(settings: dict[str, Any]) -> list[Any]:
    """The tokens that settings give a name, as texts or objects."""
    values = [settings.get(name, default) for name, default in _NAMED.items()]
    values += [v for k, v in settings.items() if k.endswith("_token") and k not in _NAMED and isinstance(v, str)]
    extra = settings.get("extra_special_tokens")
    values += extra.values() if isinstance(extra, dict) else ()
    return [value for value in values if value is not None]


def _special(settings: dict[str, Any]) -> list[Any]:
    """Those and the special tokens without a name."""
    return [*_named(settings), *_extra(settings)]


def _extra(settings: dict[str, Any]) -> list[Any]:
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    return [] if isinstance(extra, dict) else list(extra)


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _merges(path: Path) -> list[Any]:
    lines = read_bytes(path, _MOST_BYTES, "file", CheckpointError).decode().split("\n")
    lines = lines[:-1] if not lines[-1] else lines
    return [tuple(line.removesuffix("\r").split(" ")) for line in lines if not line.startswith("#version")]


def _settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty without one. Its numbers never reach the library."""
    return read_json(path, "file", CheckpointError) if _is_there(path) else {}


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _object(path: Path, data: bytes | None = None) -> dict[str, Any]:
    data = read_bytes(path, _MOST_BYTES, "file", CheckpointError) if data is None else data
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_int=_number)
    except RecursionError as e:
        raise CheckpointError(f"{path}: not valid JSON (nested too deeply)") from e
    except ValueError as e:
        raise CheckpointError(f"{path}: not valid JSON ({last_line(e)[:300]})") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def _number(text: str) -> int:
    """A whole number in a tokenizer's file.

    Raises:
        ValueError: for one that stands for no token and no length.
    """
    if len(text) > 9 or abs(int(text)) >= _LARGEST:
        raise ValueError(f"the number {text[:20]} is beyond {_LARGEST}")
    return int(text)
