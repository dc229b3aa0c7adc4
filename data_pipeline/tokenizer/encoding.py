"""Encodings: text ↔ token ids, and the file that keeps an encoding next to the data.

tiktoken computes every id. This module loads an encoding by name, file or data directory, and writes it to
encoding.json, so that no later step needs a network. A fingerprint identifies an encoding: a hash of
everything that determines its ids. Text that looks like a special token is encoded as text; only Outlast
itself appends special ids.
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
from data_pipeline.tokenizer.rank_files import read_rank_file

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"

# The split pattern of the encodings that Outlast trains: cl100k's as first published, before tiktoken
# (openai_public.py) gave it possessive quantifiers, which the trainer's regular expressions lack. The current
# pattern also keeps whitespace at the end of a text in one token; encodings trained with this one contain no
# token for which that matters.
TRAINING_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# `\s+(?!\S)` overflows the stack at 1,000,000 whitespace characters in a row; 999,023 still work. The limit
# is a power of two, as are the longest tokens of spaces, so splitting there changes no id.
_LONGEST_WHITESPACE = 1 << 16


@dataclass(frozen=True)
class Encoding:
    """A byte-pair encoding. `ranks` maps each byte string to its id; lower ids merge first."""

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
        """The sha256 of ranks, pattern and special tokens. Equal fingerprints mean equal ids for any text."""
        head = json.dumps([self.pattern, sorted(self.special_tokens.items())]).encode()
        tokens = (b"%d %d " % (id, len(token)) + token for token, id in self.by_rank)
        return hashlib.sha256(head + b"".join(tokens)).hexdigest()

    @cached_property
    def by_rank(self) -> list[tuple[bytes, int]]:
        """Each byte string and its id, in order of the ids."""
        return sorted(self.ranks.items(), key=itemgetter(1))

    @cached_property
    def bpe(self) -> "tiktoken.Encoding":
        """This encoding as an object of tiktoken's."""
        import tiktoken

        return tiktoken.Encoding(
            self.name,
            pat_str=self.pattern,
            mergeable_ranks=dict(self.ranks),
            special_tokens=dict(self.special_tokens),
        )

    @cached_property
    def _known_ids(self) -> frozenset[int]:
        return frozenset((*self.ranks.values(), *self.special_tokens.values()))

    def encode(self, text: str) -> NDArray[np.uint32]:
        """The ids of `text`, without an end-of-text. Raises DataError if tiktoken cannot encode the text."""
        try:
            return self._encode(text)
        except _StackOverflowError:
            pass
        try:
            return np.concatenate([self._encode(part) for part in _split_whitespace(text)])
        except _StackOverflowError as error:
            raise DataError(f"the tokenizer cannot encode it: {error}") from None

    def _encode(self, text: str) -> NDArray[np.uint32]:
        try:
            return self.bpe.encode_to_numpy(text, disallowed_special=())
        except BaseException as error:
            # encode_to_numpy raises ValueError where tiktoken's other methods panic. A panic is a
            # BaseException of a class that cannot be imported.
            if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
                raise
            raise _StackOverflowError(str(error)[:200]) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not valid UTF-8 become U+FFFD.

        Ids without a token are skipped, as `tokenizers` skips them. A padded vocabulary has such ids, and a
        barely trained network samples them.
        """
        return self.bpe.decode([id for id in ids if id in self._known_ids])

    def token_bytes(self) -> NDArray[np.int64]:
        """The length in bytes of each id [vocab_size]; special and unused ids have length 0."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, id in self.ranks.items():
            lengths[id] = len(token)
        return lengths

    def to_json(self) -> bytes:
        """The content of encoding.json. Equal encodings have equal bytes."""
        content = {
            "name": self.name,
            "pattern": self.pattern,
            "special_tokens": dict(sorted(self.special_tokens.items())),
            "fingerprint": self.fingerprint,
            "ranks": {},
        }
        # The result equals that of json.dumps with indent=0, which takes 0.3 s for 50,000 ranks.
        head = json.dumps(content, indent=0).removesuffix("{}\n}").encode()
        ranks = (
            b'"' + binascii.b2a_base64(token, newline=False) + b'": %d' % id for token, id in self.by_rank
        )
        return head + b"{\n" + b",\n".join(ranks) + b"\n}\n}\n"


class _StackOverflowError(Exception):
    """tiktoken's regular expressions overflowed their stack."""


def _split_whitespace(text: str) -> Iterator[str]:
    """Yields `text` in parts that contain no run of whitespace longer than _LONGEST_WHITESPACE."""
    begin = 0
    for run in re.finditer(rf"\s{{{_LONGEST_WHITESPACE + 1},}}", text):
        for end in range(run.start() + _LONGEST_WHITESPACE, run.end(), _LONGEST_WHITESPACE):
            yield text[begin:end]
            begin = end
    yield text[begin:]


def load_encoding(name_or_file: str | Path, pattern: str | None = None) -> Encoding:
    """The encoding with a packaged name (`outlast-4k`) or a tiktoken name, in a file or in a data directory.

    A `.tiktoken` file contains only ranks. If tiktoken does not publish a file of that name, `pattern` must
    give the split pattern, as a tiktoken name or a regular expression; end-of-text gets the next free id.

    Raises ConfigError for an unknown name. Raises DataError for a file that is not an encoding, and for a
    tiktoken name whose ranks are not on this machine and cannot be downloaded.
    """
    path = Path(name_or_file)
    if path.is_dir() and (path / "encoding.json").exists():
        return _read_json(path / "encoding.json")
    if path.suffix == ".tiktoken" and path.is_file():
        return _from_rank_file(path, pattern)
    if pattern is not None:
        raise ConfigError(
            f"tokenizer_pattern is only for .tiktoken files; tokenizer {str(name_or_file)!r} has its own"
        )
    if path.is_file():
        return _read_json(path)
    name = str(name_or_file)
    packaged = _packaged()
    if name in packaged:
        return _read_json(packaged[name])

    import tiktoken

    known = tiktoken.list_encoding_names()
    if name in known:
        return _from_tiktoken(name)
    names = [*packaged, *known]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known encodings: {', '.join(names)}"
    raise ConfigError(f"tokenizer {name!r} is neither a file nor a known encoding; {hint}")


def _packaged() -> dict[str, Path]:
    folder = Path(str(resources.files("data_pipeline.encodings")))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def _from_rank_file(path: Path, pattern: str | None) -> Encoding:
    ranks, split, special_tokens = read_rank_file(path, pattern)
    encoding = Encoding(path.stem, split, ranks, special_tokens or {END_OF_TEXT: max(ranks.values()) + 1})
    if pattern is not None:
        try:
            encoding.encode("a test")
        except DataError as error:
            raise ConfigError(f"tokenizer_pattern = {pattern!r}: {str(error)[:200]}") from None
    return encoding


def _from_tiktoken(name: str) -> Encoding:
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:  # the errors of requests are OSErrors
        raise DataError(
            f"tokenizer {name!r}: tiktoken has no copy of its ranks on this machine and could not download "
            f"them ({type(error).__name__}). Run once on a machine with a network, with TIKTOKEN_CACHE_DIR "
            f"on a shared folder; or name a file of the ranks ({name}.tiktoken), or the encoding.json of a "
            f"data directory."
        ) from None
    if END_OF_TEXT not in encoding._special_tokens:
        raise ConfigError(f"tokenizer {name!r} has no {END_OF_TEXT}, which must end every document")
    return Encoding(name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)


def _read_json(path: Path) -> Encoding:
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
        raise DataError(f"{path}: the encoding has no {END_OF_TEXT}, which must end every document")
    if encoding.fingerprint != fingerprint:
        raise DataError(
            f"{path}: the fingerprint {fingerprint[:12]}… does not match the ranks, pattern and special "
            f"tokens ({encoding.fingerprint[:12]}…): the file is damaged or was changed"
        )
    return encoding
