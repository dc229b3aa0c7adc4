"""Encodings: text ↔ token ids through tiktoken, their offline copy, their fingerprint.

tiktoken computes every id; what stands here keeps the ranks beside the data, so that nothing later needs
a network, and names an encoding by a hash of all that decides its ids. Text that looks like a special
token is text: special ids are appended by us, never parsed out of documents.
"""

import binascii
import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import ConfigError, DataError

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"

# cl100k's split as it was first published, without the possessive quantifiers of today's (tiktoken,
# openai_public.py), which the trainer's regular expressions do not have. Today's also keeps whitespace at the
# end of a text in one; no token that is trained with this one can tell.
TRAINING_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# `\s+(?!\S)` runs out of stack at 1,000,000 whitespace characters in a row and takes 999,023. A power of two,
# as the longest tokens of spaces are: cutting there changes no id.
_LONGEST_WHITESPACE = 1 << 16


@dataclass(frozen=True)
class Encoding:
    """A byte-pair encoding: `ranks` gives each byte string its id, lower ids merge first."""

    name: str
    pattern: str
    ranks: Mapping[bytes, int]
    special_tokens: Mapping[str, int]

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(max(self.ranks.values()), max(self.special_tokens.values()))

    @property
    def end_of_text(self) -> int:
        """The id that ends every document."""
        return self.special_tokens[END_OF_TEXT]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over ranks, pattern and special tokens: equal for equal ids on every text."""
        head = json.dumps([self.pattern, sorted(self.special_tokens.items())]).encode()
        tokens = (b"%d %d " % (id, len(token)) + token for token, id in self.by_rank)
        return hashlib.sha256(head + b"".join(tokens)).hexdigest()

    @cached_property
    def by_rank(self) -> list[tuple[bytes, int]]:
        """Each byte string and its id, by id."""
        return sorted(self.ranks.items(), key=itemgetter(1))

    @cached_property
    def _known(self) -> frozenset[int]:
        return frozenset((*self.ranks.values(), *self.special_tokens.values()))

    @cached_property
    def _bpe(self) -> "tiktoken.Encoding":
        import tiktoken

        return tiktoken.Encoding(
            self.name,
            pat_str=self.pattern,
            mergeable_ranks=dict(self.ranks),
            special_tokens=dict(self.special_tokens),
        )

    def encode(self, text: str) -> NDArray[np.uint32]:
        """The ids of `text`, without an end-of-text. Raises DataError where tiktoken cannot encode it."""
        try:
            return self._encode(text)
        except _GaveUpError:
            pass
        try:
            return np.concatenate([self._encode(part) for part in _cut_whitespace(text)])
        except _GaveUpError as error:
            raise DataError(f"the tokenizer cannot encode it: {error}") from None

    def _encode(self, text: str) -> NDArray[np.uint32]:
        try:
            return self._bpe.encode_to_numpy(text, disallowed_special=())
        except BaseException as error:
            # encode_to_numpy raises ValueError where the other methods panic, and a panic is a BaseException
            # of a class that cannot be imported.
            if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
                raise
            raise _GaveUpError(str(error)[:200]) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Ids that stand for nothing, as the last rows of a padded vocabulary do, are left out, as tokenizers
        leaves them out: a network that has hardly been trained draws them.
        """
        return self._bpe.decode([id for id in ids if id in self._known])

    def token_bytes(self) -> NDArray[np.int64]:
        """The length in bytes of each id [vocab_size]; 0 for special and unused ids."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, id in self.ranks.items():
            lengths[id] = len(token)
        return lengths

    def to_json(self) -> bytes:
        """The content of encoding.json, the same bytes for the same encoding."""
        content = {
            "name": self.name,
            "pattern": self.pattern,
            "special_tokens": dict(sorted(self.special_tokens.items())),
            "fingerprint": self.fingerprint,
            "ranks": {},
        }
        # As json.dumps with indent=0 writes it, which takes a third of a second for 50,000 ranks.
        head = json.dumps(content, indent=0).removesuffix("{}\n}").encode()
        ranks = (
            b'"' + binascii.b2a_base64(token, newline=False) + b'": %d' % id for token, id in self.by_rank
        )
        return head + b"{\n" + b",\n".join(ranks) + b"\n}\n}\n"


class _GaveUpError(Exception):
    """tiktoken's regular expressions ran out of stack."""


def _cut_whitespace(text: str) -> Iterator[str]:
    begin = 0
    for run in re.finditer(rf"\s{{{_LONGEST_WHITESPACE + 1},}}", text):
        for cut in range(run.start() + _LONGEST_WHITESPACE, run.end(), _LONGEST_WHITESPACE):
            yield text[begin:cut]
            begin = cut
    yield text[begin:]


def load_encoding(name_or_file: str | Path, pattern: str | None = None) -> Encoding:
    """The encoding of a packaged name (`outlast-4k`), a file, a data directory, or a tiktoken name.

    A `.tiktoken` file holds ranks alone: where its name is not one of tiktoken's own, `pattern` must say how
    text is split, as a tiktoken name or a regular expression, and end-of-text gets the next free id.

    Raises ConfigError for a name that nothing has, DataError for a file that is no encoding or a tiktoken
    name whose ranks are not on this machine and cannot be downloaded.
    """
    path = Path(name_or_file)
    if path.is_dir() and (path / "encoding.json").exists():
        return _read(path / "encoding.json")
    if path.suffix == ".tiktoken" and path.is_file():
        from data_pipeline.tokenizer.rank_files import read_rank_file

        return read_rank_file(path, pattern)
    if pattern is not None:
        raise ConfigError(
            f"tokenizer_pattern is for .tiktoken files; tokenizer {str(name_or_file)!r} has one of its own"
        )
    if path.is_file():
        return _read(path)
    name = str(name_or_file)
    packaged = _packaged()
    if name in packaged:
        return _read(packaged[name])

    import tiktoken

    known = tiktoken.list_encoding_names()
    if name in known:
        return _from_tiktoken(name)
    names = [*packaged, *known]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    raise ConfigError(f"tokenizer {name!r} is neither a file nor an encoding; {hint}")


def _packaged() -> dict[str, Path]:
    folder = Path(str(resources.files("data_pipeline.encodings")))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def _from_tiktoken(name: str) -> Encoding:
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:  # requests' errors are OSErrors
        raise DataError(
            f"tokenizer {name!r}: tiktoken has no copy of its ranks here and could not download them "
            f"({type(error).__name__}). Run once where there is a network, with TIKTOKEN_CACHE_DIR on a "
            f"shared folder; or name a file of its ranks ({name}.tiktoken), or the encoding.json of a data "
            f"directory that has it."
        ) from None
    if END_OF_TEXT not in encoding._special_tokens:
        raise ConfigError(f"tokenizer {name!r} has no {END_OF_TEXT}, which ends every document")
    return Encoding(name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)


def _read(path: Path) -> Encoding:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        ranks = {
            binascii.a2b_base64(token, strict_mode=True): int(id) for token, id in content["ranks"].items()
        }
        special_tokens = {str(token): int(id) for token, id in content["special_tokens"].items()}
        encoding = Encoding(str(content["name"]), str(content["pattern"]), ranks, special_tokens)
        fingerprint = str(content["fingerprint"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not an encoding (JSON with name, pattern, ranks, special_tokens, fingerprint): "
            f"{type(error).__name__} {error}"
        ) from None
    if END_OF_TEXT not in special_tokens:
        raise DataError(f"{path}: the encoding has no {END_OF_TEXT}, which ends every document")
    if encoding.fingerprint != fingerprint:
        raise DataError(
            f"{path}: the fingerprint {fingerprint[:12]}… does not match the ranks, pattern and special "
            f"tokens ({encoding.fingerprint[:12]}…): the file is damaged or was changed"
        )
    return encoding
