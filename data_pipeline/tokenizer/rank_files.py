"""Encodings out of `.tiktoken` files: a line `base64 rank` for each byte string, and nothing more.

How text is split and which special tokens there are stands in tiktoken's own source for the files that it
publishes, and must be said for any other.
"""

import binascii
import hashlib
from pathlib import Path
from types import FunctionType
from typing import Any

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.tokenizer.encoding import END_OF_TEXT, Encoding

# The encodings whose constructors read one rank file of their own name.
PUBLISHED = ("r50k_base", "p50k_base", "cl100k_base", "o200k_base")


def read_rank_file(path: Path, pattern: str | None) -> Encoding:
    """The encoding of the ranks in `path`.

    With the name of a file that tiktoken publishes it must be that file. Raises DataError where it is
    damaged, ConfigError where `pattern` is missing or not a pattern.
    """
    ranks = _read_ranks(path)
    if pattern is None:
        if path.stem not in PUBLISHED:
            raise ConfigError(
                f"{path}: a file of ranks does not say how text is split, and {path.name} is not one of "
                f"tiktoken's ({', '.join(PUBLISHED)}); set tokenizer_pattern to one of these names or to a "
                f"regular expression"
            )
        return _published(path, ranks)
    split = published_pattern(pattern) if pattern in PUBLISHED else pattern
    encoding = Encoding(path.stem, split, ranks, {END_OF_TEXT: max(ranks.values()) + 1})
    try:
        encoding.encode("a test")
    except DataError as error:
        raise ConfigError(f"tokenizer_pattern = {pattern!r}: {str(error)[:200]}") from None
    return encoding


def published_pattern(name: str) -> str:
    """How the encoding `name` of PUBLISHED splits text."""
    return str(_definition(name, {})["pat_str"])


def _published(path: Path, ranks: dict[bytes, int]) -> Encoding:
    definition = _definition(path.stem, ranks)
    if hashlib.sha256(path.read_bytes()).hexdigest() != definition["sha256"]:
        raise DataError(
            f"{path} is not the file that tiktoken knows by this name (its sha256 differs): it is "
            f"damaged, or another encoding, which needs another name and tokenizer_pattern"
        )
    return Encoding(path.stem, definition["pat_str"], ranks, definition["special_tokens"])


def _definition(name: str, ranks: dict[bytes, int]) -> dict[str, Any]:
    """What tiktoken's constructor of `name` says, with `ranks` in place of a download, and their sha256."""
    from tiktoken_ext import openai_public

    expected: dict[str, Any] = {}

    def ranks_at_hand(_: str, expected_hash: str) -> dict[bytes, int]:
        expected["sha256"] = expected_hash
        return ranks

    constructor = getattr(openai_public, name)
    # The same code with another reader of ranks: nothing global changes.
    offline = FunctionType(
        constructor.__code__, {**constructor.__globals__, "load_tiktoken_bpe": ranks_at_hand}
    )
    return {**offline(), **expected}


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[binascii.a2b_base64(token, strict_mode=True)] = int(rank)
        except ValueError:
            raise DataError(f"{path}:{number}: not a rank (base64 of the bytes, a space, the rank)") from None
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of the 256 single bytes have no rank, for example {missing[0]}"
        )
    if len(set(ranks.values())) != len(ranks):
        raise DataError(f"{path}: two byte strings have the same rank")
    return ranks
