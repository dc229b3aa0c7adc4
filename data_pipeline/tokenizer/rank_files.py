"""Reads `.tiktoken` files: a line `base64 rank` for each byte string, and nothing else.

Such a file does not say how text is split or which special tokens exist. For the files that tiktoken
publishes, tiktoken's source says it. For any other file, the user must give the split pattern.
"""

import binascii
import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

from data_pipeline.errors import ConfigError, DataError

# The encodings whose constructors read exactly one rank file, which has the encoding's name.
PUBLISHED = ("r50k_base", "p50k_base", "cl100k_base", "o200k_base")

# Tables with an entry for each id are held in memory. The largest known vocabularies have about 2^18 ids.
LARGEST_ID = (1 << 24) - 1


class RankFile(NamedTuple):
    """What a rank file defines: ids by byte string, the split pattern, and the special tokens if known."""

    ranks: dict[bytes, int]
    pattern: str
    special_tokens: Mapping[str, int] | None


def is_rank_file(path: Path) -> bool:
    """Whether the file at `path` has the suffix or the first line of a rank file."""
    if path.suffix == ".tiktoken":
        return True
    try:
        with path.open("rb") as file:
            token, rank = file.read(4096).partition(b"\n")[0].split()
        return rank.isdigit() and bool(binascii.a2b_base64(token, strict_mode=True))
    except (OSError, ValueError):
        return False


def read_rank_file(path: Path, pattern: str | None) -> RankFile:
    """The content of the rank file at `path`.

    Without a `pattern` the file must be one that tiktoken publishes, under its published name. Raises
    DataError if the file is damaged, ConfigError if a pattern is needed.
    """
    ranks = _read_ranks(path)
    if pattern is not None:
        return RankFile(ranks, published_pattern(pattern) if pattern in PUBLISHED else pattern, None)
    if path.stem not in PUBLISHED:
        raise ConfigError(
            f"{path}: a rank file does not say how text is split, and {path.name} is not one of tiktoken's "
            f"({', '.join(PUBLISHED)}); set tokenizer_pattern to one of these names or to a regular "
            f"expression"
        )
    definition = _definition(path.stem, ranks)
    if hashlib.sha256(path.read_bytes()).hexdigest() != definition["sha256"]:
        raise DataError(
            f"{path} is not the file that tiktoken publishes under this name (its sha256 differs): it is "
            f"damaged, or it is another encoding, which needs another name and tokenizer_pattern"
        )
    return RankFile(ranks, definition["pat_str"], definition["special_tokens"])


def published_pattern(name: str) -> str:
    """The split pattern of the encoding `name`, one of PUBLISHED."""
    return str(_definition(name, {})["pat_str"])


def _definition(name: str, ranks: dict[bytes, int]) -> dict[str, Any]:
    """What tiktoken's constructor of `name` returns for these `ranks`, and the sha256 that it expects."""
    from tiktoken_ext import openai_public

    expected: dict[str, Any] = {}

    def return_ranks(_: str, expected_hash: str) -> dict[bytes, int]:
        expected["sha256"] = expected_hash
        return ranks

    constructor = getattr(openai_public, name)
    # Runs the constructor's code with a function that returns `ranks` instead of downloading them. No
    # global state changes.
    offline = FunctionType(
        constructor.__code__, {**constructor.__globals__, "load_tiktoken_bpe": return_ranks}
    )
    return {**offline(), **expected}


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            text, id = binascii.a2b_base64(token, strict_mode=True), int(rank)
        except ValueError:
            raise DataError(
                f"{path}:{number}: not a rank (a rank is the bytes in base64, a space, and a number)"
            ) from None
        if not 0 <= id <= LARGEST_ID:
            raise DataError(f"{path}:{number}: rank {id} is outside 0 to {LARGEST_ID}")
        if text in ranks:
            raise DataError(f"{path}:{number}: the bytes {text!r} have a rank already, {ranks[text]}")
        ranks[text] = id
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of the 256 single bytes have no rank, for example {missing[0]}"
        )
    if len(set(ranks.values())) != len(ranks):
        raise DataError(f"{path}: two byte strings have the same rank")
    return ranks
