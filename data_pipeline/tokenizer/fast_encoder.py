"""Encodes batches of documents: with tiktoken, or with a faster encoder as long as it agrees with tiktoken.

The extra `fast` installs two. gigatoken is at least ten times as fast as tiktoken and supports the split
patterns of tiktoken's own encodings; fastokens is several times as fast and supports any pattern. Neither is
widely used yet, so tiktoken checks them: on a set of hard cases at the start, and on a sample of every batch.
In addition, the ids of a batch must represent exactly as many bytes as went in. Wrong ids are never repaired:
the encoder is rejected and its work discarded.
"""

import binascii
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.tokenizer.encoding import TRAINING_PATTERN, Encoding
from data_pipeline.tokenizer.hard_cases import HARD_CASES
from data_pipeline.tokenizer.rank_files import published_pattern

EncoderChoice = Literal["auto", "tiktoken"]

# tiktoken encodes this many bytes of one document of each batch again. A batch is about one MiB, so the check
# takes less than a tenth of the fastest encoder's time.
_SAMPLE_BYTES = 2048

# The encoders' tables of letters, marks and spaces differ. gigatoken 0.10 has those of Unicode 17, which made
# all of these code points but the last letters or marks; tiktoken 0.14 has Unicode 16. Only fastokens 0.3
# considers U+180E a space. Every code point was compared. A document that contains one of these is encoded by
# tiktoken.
_DOUBTFUL = (
    (0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0x1ACF, 0x1ADD), (0x1AE0, 0x1AEB), (0xA7CE, 0xA7CF),
    (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7),
    (0x10EFA, 0x10EFB), (0x11B60, 0x11B67), (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9), (0x16EA0, 0x16EB8),
    (0x16EBB, 0x16ED3), (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DF2),
    (0x1E6C0, 0x1E6DE), (0x1E6E0, 0x1E6F5), (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD),
    (0x323B0, 0x33479), (0x180E, 0x180E),
)  # fmt: skip
_DOUBTFUL_LEADS = {chr(point).encode()[0] for first, last in _DOUBTFUL for point in (first, last)}

# gigatoken caches every word that it has seen, so it is loaded again once the process has grown by this much.
_MOST_GROWTH_BYTES = 256 << 20

FlatIds = tuple[NDArray[np.uint32], NDArray[np.int64]]
"""The ids of several documents, concatenated, each followed by an end-of-text; and the offsets at which the
documents begin and the last one ends [documents + 1]."""

EncodeBatch = Callable[[Sequence[bytes]], list[NDArray[np.uint32]]]
"""The ids of each document of a batch, without end-of-text."""

LoadEncoder = Callable[[Encoding, Path], EncodeBatch]
"""Loads a fast encoder for an encoding whose ranks are in a `.tiktoken` file. Raises UnsupportedEncoding or
ImportError."""


class EncoderMismatch(Exception):
    """The fast encoder returned other ids than tiktoken, or failed."""


class UnsupportedEncoding(Exception):
    """The fast encoder does not support the encoding's split pattern."""


class Encoder(Protocol):
    """Encodes batches. `name` is the name of the package that computes the ids."""

    name: str

    def encode(self, documents: Sequence[bytes]) -> FlatIds:
        """The ids of `documents`, which are UTF-8, with an end-of-text after each document."""
        ...


class TiktokenEncoder:
    """The reference encoder. Raises DataError for a text that tiktoken cannot encode or encodes in part."""

    name = "tiktoken"

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._bytes_of = encoding.token_bytes()

    def encode(self, documents: Sequence[bytes]) -> FlatIds:
        """See Encoder."""
        all_ids = [self._encoding.encode(document.decode()) for document in documents]
        for ids, document in zip(all_ids, documents, strict=True):
            found = int(self._bytes_of[ids].sum())
            if found != len(document):
                raise DataError(
                    "the tokenizer cannot encode it: its split pattern does not cover all of the text"
                )
        return _flatten(all_ids, self._encoding)


def _flatten(documents: Sequence[NDArray[np.uint32]], encoding: Encoding) -> FlatIds:
    offsets = np.zeros(len(documents) + 1, dtype=np.int64)
    np.cumsum([len(ids) + 1 for ids in documents], out=offsets[1:])
    ended = [np.array([encoding.end_of_text], np.uint32)] * (2 * len(documents))
    ended[::2] = documents
    return np.concatenate(ended), offsets


def _load_gigatoken(encoding: Encoding, ranks: Path) -> EncodeBatch:
    scheme = _gigatoken_schemes().get(encoding.pattern)
    if scheme is None:
        raise UnsupportedEncoding
    from gigatoken.gigatoken_rs import BPETokenizer

    tokenizer = BPETokenizer.from_tiktoken(str(ranks), scheme)
    return lambda documents: [tokenizer.encode(document) for document in documents]


def _gigatoken_schemes() -> dict[str, str]:
    """gigatoken's name for each split pattern that it supports."""
    published = {"r50k_base": "gpt2", "cl100k_base": "gpt4", "o200k_base": "o200k"}
    schemes = {published_pattern(name): scheme for name, scheme in published.items()}
    return {TRAINING_PATTERN: "gpt4", **schemes}


def _load_fastokens(encoding: Encoding, ranks: Path) -> EncodeBatch:
    # One thread per process, because the processes already run in parallel. fastokens reads the variable when
    # its thread pool starts.
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    from fastokens._native import Tokenizer

    tokenizer = Tokenizer.from_tiktoken(
        str(ranks), pattern=encoding.pattern, special_tokens=dict(encoding.special_tokens)
    )

    def encode(documents: Sequence[bytes]) -> list[NDArray[np.uint32]]:
        texts = [document.decode() for document in documents]
        ids, offsets = tokenizer.encode_batch_flat(texts, split_special_tokens=True)
        flat = np.frombuffer(ids, np.uint32)
        return [flat[begin:end] for begin, end in pairwise(np.frombuffer(offsets, np.uint64).tolist())]

    return encode


FAST_ENCODERS: Mapping[str, LoadEncoder] = {"gigatoken": _load_gigatoken, "fastokens": _load_fastokens}
"""The fast encoders by package name, in order of preference."""


class FastEncoder:
    """A fast encoder that is checked against tiktoken in every batch.

    Raises EncoderMismatch when it disagrees with tiktoken.
    """

    def __init__(
        self, encoding: Encoding, name: str, load: LoadEncoder, most_growth_bytes: int = _MOST_GROWTH_BYTES
    ) -> None:
        """Raises UnsupportedEncoding or ImportError as `load` does, and EncoderMismatch at a hard case."""
        self.name = name
        self._encoding = encoding
        self._load_encoder = load
        self._most_growth_bytes = most_growth_bytes
        bytes_of = encoding.token_bytes()
        self._bytes_of = bytes_of.astype(np.min_scalar_type(bytes_of.max()))  # small, to stay in the cache
        self._batches = 0
        self._fast: EncodeBatch | None = None
        self._limit_bytes = 0
        self._load()
        for text in HARD_CASES:
            self._require_equal(self.encode_unchecked([text.encode()])[0], text)

    def encode(self, documents: Sequence[bytes]) -> FlatIds:
        """See Encoder."""
        all_ids = self.encode_unchecked(documents)
        for index, document in enumerate(documents):
            if _is_doubtful(document):
                all_ids[index] = self._encoding.encode(document.decode())
        flat = _flatten(all_ids, self._encoding)
        ends = len(documents) * int(self._bytes_of[self._encoding.end_of_text])  # nearly always 0
        self._require_bytes(flat[0], sum(map(len, documents)) + ends)
        self._check_sample(documents, all_ids)
        if resident_bytes() > self._limit_bytes:
            self._fast = None  # frees its memory before the new one allocates
            self._load()
        return flat

    def encode_unchecked(self, documents: Sequence[bytes]) -> list[NDArray[np.uint32]]:
        """The fast encoder's ids of each document, without end-of-text and without any check of the ids."""
        assert self._fast is not None
        with self._raising_mismatch("failed"):
            all_ids = self._fast(documents)
        if len(all_ids) != len(documents):
            raise EncoderMismatch(
                f"{self.name} returned the ids of {len(all_ids)} documents for {len(documents)}"
            )
        return all_ids

    def _load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ranks.tiktoken"
            lines = (
                binascii.b2a_base64(t, newline=False) + b" %d\n" % id for t, id in self._encoding.by_rank
            )
            path.write_bytes(b"".join(lines))
            with self._raising_mismatch("cannot load the encoding"):
                self._fast = self._load_encoder(self._encoding, path)
        self._limit_bytes = resident_bytes() + self._most_growth_bytes

    def _check_sample(self, documents: Sequence[bytes], all_ids: Sequence[NDArray[np.uint32]]) -> None:
        """Compare one document of the batch, or a part of it, with tiktoken."""
        sample = self._batches % len(documents)
        self._batches += 1
        document = documents[sample]
        if len(document) <= _SAMPLE_BYTES:
            self._require_equal(all_ids[sample], document.decode())
            return
        begin = self._batches * 7919 * _SAMPLE_BYTES % (len(document) - _SAMPLE_BYTES)
        part = document[begin : begin + _SAMPLE_BYTES].decode(errors="ignore")
        self._require_equal(self.encode_unchecked([part.encode()])[0], part)

    @contextmanager
    def _raising_mismatch(self, complaint: str) -> Iterator[None]:
        """Converts errors inside to EncoderMismatch, except ImportError and UnsupportedEncoding."""
        try:
            yield
        except (ImportError, UnsupportedEncoding):
            raise
        except BaseException as error:
            # A panic in Rust is a BaseException of a class that cannot be imported.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise EncoderMismatch(f"{self.name} {complaint}: {str(error)[:200]}") from None

    def _require_bytes(self, ids: NDArray[np.uint32], expected: int) -> None:
        try:
            found = int(np.take(self._bytes_of, ids).sum(dtype=np.int64))
        except IndexError:
            raise EncoderMismatch(f"{self.name} returned an id that the encoding does not have") from None
        if found != expected:
            raise EncoderMismatch(f"{self.name} returned ids of {found} bytes for a text of {expected}")

    def _require_equal(self, ids: NDArray[np.uint32], text: str) -> None:
        if not np.array_equal(ids, self._encoding.encode(text)):
            raise EncoderMismatch(f"{self.name} and tiktoken differ on {text[:40]!r}…")


def _is_doubtful(document: bytes) -> bool:
    """Whether the document contains a character of `_DOUBTFUL`."""
    if document.isascii() or not any(lead in document for lead in _DOUBTFUL_LEADS):
        return False  # nearly all documents; this scan runs at the speed of memory
    return bool(_is_doubtful_point()[np.frombuffer(document.decode().encode("utf-32-le"), "<u4")].any())


@cache
def _is_doubtful_point() -> NDArray[np.bool_]:
    """Whether each code point is in `_DOUBTFUL` [0x110000]."""
    table = np.zeros(0x110000, dtype=np.bool_)
    for first, last in _DOUBTFUL:
        table[first : last + 1] = True
    return table


def resident_bytes() -> int:
    """The resident memory of this process (proc(5)); 0 on a system without /proc."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def open_encoder(
    encoding: Encoding, choice: EncoderChoice, fast: Mapping[str, LoadEncoder] = FAST_ENCODERS
) -> tuple[Encoder, str | None]:
    """The encoder to use, and a message for the user if a fast one was rejected.

    With "auto" it is the first of `fast` that is installed, supports the encoding, and passes the hard cases.
    """
    problems: list[str] = []
    for name, load in fast.items() if choice == "auto" else ():
        try:
            return FastEncoder(encoding, name, load), _message(name, problems)
        except (ImportError, UnsupportedEncoding):
            continue
        except (EncoderMismatch, DataError) as error:
            problems.append(str(error))
    return TiktokenEncoder(encoding), _message("tiktoken", problems)


def _message(name: str, problems: Sequence[str]) -> str | None:
    return f"tokenizing with {name}: {'; '.join(problems)}" if problems else None
