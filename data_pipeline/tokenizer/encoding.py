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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.git_lfs import require_no_pointer
from data_pipeline.tokenizer.hard_cases import HARD_CASES
from data_pipeline.tokenizer.rank_files import LARGEST_ID, is_rank_file, read_rank_file

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
    """A byte-pair encoding. `ranks` maps each byte string to its id; lower ids merge first.

    `end_of_text_token` is the special token that ends every document.
    """

    name: str
    pattern: str
    ranks: Mapping[bytes, int]
    special_tokens: Mapping[str, int]
    end_of_text_token: str = END_OF_TEXT

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(max(self.ranks.values()), max(self.special_tokens.values()))

    @property
    def end_of_text(self) -> int:
        """The id that ends every document."""
        return self.special_tokens[self.end_of_text_token]

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of ranks, pattern and special tokens. Equal fingerprints mean equal ids for any text."""
        content: list[Any] = [self.pattern, sorted(self.special_tokens.items())]
        if self.end_of_text_token != END_OF_TEXT:
            content.append(self.end_of_text_token)
        head = json.dumps(content).encode()
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

    def require_lossless(self) -> None:
        """Raises ConfigError unless decoding the ids of each hard case returns the text."""
        for text in HARD_CASES:
            try:
                found = self.decode(self.encode(text))
            except DataError as error:
                raise ConfigError(
                    f"tokenizer {self.name!r} with the split pattern {self.pattern!r}: {str(error)[:200]}"
                ) from None
            if found != text:
                raise ConfigError(
                    f"tokenizer {self.name!r} loses text, because its split pattern {self.pattern!r} does "
                    f"not cover every character: {text[:40]!r} becomes {found[:40]!r}. Correct the pattern; "
                    f"a backslash is written once, while a tokenizer.json shows it twice"
                )

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
            **({} if self.end_of_text_token == END_OF_TEXT else {"end_of_text": self.end_of_text_token}),
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


def load_encoding(
    name_or_file: str | Path, pattern: str | None = None, end_of_text: str | None = None
) -> Encoding:
    """The encoding with a packaged name (`outlast-4k`) or a tiktoken name, in a file or in a data directory.

    A rank file (`.tiktoken`, or any file of such lines) contains only ranks. If tiktoken does not publish a
    file of that name, `pattern` must give the split pattern, as a tiktoken name or a regular expression, and
    `end_of_text` may give the end-of-text as `TOKEN=ID`; otherwise it gets the next free id.

    Raises ConfigError for an unknown name, and for a pattern that loses text. Raises DataError for a file
    that is not an encoding, and for a tiktoken name whose ranks are not on this machine and cannot be
    downloaded.
    """
    path = Path(name_or_file)
    if path.is_dir() and (path / "encoding.json").exists():
        return _read_json(path / "encoding.json")
    if path.is_file():
        require_no_pointer(path)
        if is_rank_file(path):
            return _from_rank_file(path, pattern, end_of_text)
    for setting, value in (("tokenizer_pattern", pattern), ("end_of_text", end_of_text)):
        if value is not None:
            raise ConfigError(
                f"{setting} is only for rank files (.tiktoken); tokenizer {str(name_or_file)!r} has its own "
                f"or is not such a file"
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


def _from_rank_file(path: Path, pattern: str | None, end_of_text: str | None) -> Encoding:
    ranks, split, special_tokens = read_rank_file(path, pattern)
    if special_tokens is not None:
        if end_of_text is not None:
            raise ConfigError(
                f"end_of_text = {end_of_text!r}: tiktoken publishes {path.name} with its own end-of-text; "
                f"leave end_of_text out, or give tokenizer_pattern too"
            )
        return Encoding(path.stem, split, ranks, special_tokens)
    token, id = _end_of_text(path, ranks, end_of_text)
    encoding = Encoding(path.stem, split, ranks, {token: id}, token)
    try:
        encoding.require_lossless()
    except ConfigError as error:
        raise ConfigError(f"tokenizer_pattern = {pattern!r}: {error}") from None
    return encoding


# The highest id of rank files after which the next id is not end-of-text but another special token or none:
# whose file it is, and the end-of-text of those who published it.
_KNOWN_RANK_FILES = {
    100_255: ("cl100k_base", "<|endoftext|>=100257"),
    199_997: ("o200k_base", "<|endoftext|>=199999"),
    50_280: ("p50k_base", "<|endoftext|>=50256"),
    127_999: ("Llama 3", "<|end_of_text|>=128001"),
    199_999: ("Llama 4", "<|end_of_text|>=200001"),
}


def _end_of_text(path: Path, ranks: Mapping[bytes, int], given: str | None) -> tuple[str, int]:
    """The special token that ends documents, and its id."""
    highest = max(ranks.values())
    if given is None:
        if highest in _KNOWN_RANK_FILES:
            owner, published = _KNOWN_RANK_FILES[highest]
            raise ConfigError(
                f"{path}: its highest id is {highest:,}, as in the rank file of {owner}, whose end-of-text "
                f"is not the next id. Set end_of_text, for example end_of_text = {published!r} as there, or "
                f"'{END_OF_TEXT}={highest + 1}' for the next id"
            )
        return END_OF_TEXT, highest + 1
    token, equals, number = given.rpartition("=")
    if not equals:
        token = END_OF_TEXT
    if not token or not (number.isascii() and number.isdigit()):
        raise ConfigError(
            f"end_of_text = {given!r}: expected TOKEN=ID, for example '<|end_of_text|>=128001', or only the "
            f"id"
        )
    id = int(number)
    if id > LARGEST_ID:
        raise ConfigError(f"end_of_text = {given!r}: an id is at most {LARGEST_ID}")
    taken = next((token for token, rank in ranks.items() if rank == id), None)
    if taken is not None:
        raise ConfigError(
            f"end_of_text = {given!r}: {path} gives id {id} to the bytes {taken!r}; the next free id is "
            f"{highest + 1}"
        )
    return token, id


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
        end_of_text = str(content.get("end_of_text", END_OF_TEXT))
        encoding = Encoding(str(content["name"]), str(content["pattern"]), ranks, special_tokens, end_of_text)
        fingerprint = str(content["fingerprint"])
        _require_distinct_ids([*ranks.values(), *special_tokens.values()])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is not an encoding (JSON with name, pattern, ranks, special_tokens, fingerprint): "
            f"{type(error).__name__} {error}"
        ) from None
    if end_of_text not in special_tokens:
        raise DataError(f"{path}: the encoding has no {end_of_text}, which must end every document")
    if encoding.fingerprint != fingerprint:
        raise DataError(
            f"{path}: the fingerprint {fingerprint[:12]}… does not match the ranks, pattern and special "
            f"tokens ({encoding.fingerprint[:12]}…): the file is damaged or was changed"
        )
    return encoding


def _require_distinct_ids(ids: Sequence[int]) -> None:
    wrong = [id for id in ids if not 0 <= id <= LARGEST_ID]
    if wrong:
        raise ValueError(f"id {wrong[0]} is outside 0 to {LARGEST_ID}")
    if len(set(ids)) != len(ids):
        raise ValueError("two tokens have the same id")
