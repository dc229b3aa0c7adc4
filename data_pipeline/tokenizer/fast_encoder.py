"""Documents in UTF-8 → ids, in batches: by tiktoken, or by a faster encoder while it agrees with tiktoken.

The extra `fast` has two: gigatoken, ten times faster and more, for the ways in which tiktoken's own encodings
split text, and fastokens, several times faster, for any. Neither is widely used yet; so tiktoken judges
them: on a set of hard cases at the start, and on a sample of every batch. All their ids together must also
stand for exactly the bytes that went in. Nothing they get wrong is repaired: their work is thrown away.
"""

import binascii
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.tokenizer.encoding import END_OF_TEXT, TRAINING_PATTERN, Encoding
from data_pipeline.tokenizer.rank_files import published_pattern

EncoderChoice = Literal["auto", "tiktoken"]

# Of each batch, a mebibyte mostly, so many bytes of one document are encoded by both: under a tenth of the
# fastest encoder's time.
_SAMPLE_BYTES = 2048

# What is a letter, a mark or a space stands in tables. Those of gigatoken 0.10 are of Unicode 17, which made
# letters and marks of all but the last of these code points; tiktoken 0.14 has Unicode 16. U+180E is a space
# for fastokens 0.3 only. Every code point was compared; a text with one of these is left to tiktoken.
_DOUBTFUL = (
    (0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0x1ACF, 0x1ADD), (0x1AE0, 0x1AEB), (0xA7CE, 0xA7CF),
    (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7),
    (0x10EFA, 0x10EFB), (0x11B60, 0x11B67), (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9), (0x16EA0, 0x16EB8),
    (0x16EBB, 0x16ED3), (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DF2),
    (0x1E6C0, 0x1E6DE), (0x1E6E0, 0x1E6F5), (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD),
    (0x323B0, 0x33479), (0x180E, 0x180E),
)  # fmt: skip
_DOUBTFUL_LEADS = {chr(point).encode()[0] for first, last in _DOUBTFUL for point in (first, last)}

# gigatoken remembers every word that it has met: it begins anew once the process has grown by so much.
_GROWTH_BYTES = 256 << 20

HARD_CASES = (
    f"before {END_OF_TEXT} after <|fim_prefix|><|endofprompt|>",
    "".join(map(chr, range(0x20))) + "\x7f\x80\x85\xa0\xad",
    "   leading, trailing   \n\n\n \t\t\r\n\r\r\n  x \u3000\u2028\u2029\u200b\ufeff y",
    "don't DON'T they'Ll it’s 'tis 'S'll''ve",
    "0 12 123 1234 12345 ٣٤٥ ¹²³ ½ Ⅷ 一二三 1,000.00e-10",
    "日本語のテキスト、中文文本。한국어 텍스트 ภาษาไทย हिन्दी தமிழ் العربية עברית",
    "ÀÉÎõü ﬁﬂ ǅ ẞß İı e\u0301a\u0308\u0323 Å\u030a Ω≈ç√ ∑ § ©®™",
    "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 👍🏽 🤷🏿‍♀️ \U0001f9d1\u200d\U0001f680 \U000e0041 \U0010ffff",
    "def f(x):\n\tif x<=0 and not(y!=z):\n\t\treturn {'a':[1,2.5e-3]}  # ünï\n\n\n    }\r\n",
    "<html><body class=\"a-b_c\">&nbsp;&#x27;</body></html>\\n\\t\\\\ C:\\dir\\x /usr/lib/../a.b",
    "aAaA" * 40 + "a" * 3000 + " " * 3000 + "!" * 3000 + "\n" * 300 + "é" * 1000 + "字" * 500,
    " " * 5 + "word" + " " * 7 + "\n" + " " * 3 + "\n" + "word ",
    "how a text ends, where patterns differ \r\n \t",
    "and so \n\n  ",
)  # fmt: skip


Flat = tuple[NDArray[np.uint32], NDArray[np.int64]]
"""(the ids of several documents, each with an end-of-text, one after the other; where each document begins
and the last one ends [documents + 1])"""

_Encode = Callable[[Sequence[bytes]], list[NDArray[np.uint32]]]


class Disagreement(Exception):
    """The fast encoder gave other ids than tiktoken, or failed."""


class Unsuitable(Exception):
    """The fast encoder is not made for this encoding."""


class Encoder(Protocol):
    """Encodes batches; `name` is the package that does."""

    name: str

    def encode(self, documents: Sequence[bytes]) -> Flat:
        """The ids of `documents`, each of them UTF-8, with an end-of-text after each."""
        ...


class TiktokenEncoder:
    """The reference. Raises DataError at a text that tiktoken cannot encode."""

    name = "tiktoken"

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding

    def encode(self, documents: Sequence[bytes]) -> Flat:
        """See Encoder."""
        return _flat([self._encoding.encode(document.decode()) for document in documents], self._encoding)


def _flat(documents: Sequence[NDArray[np.uint32]], encoding: Encoding) -> Flat:
    offsets = np.zeros(len(documents) + 1, dtype=np.int64)
    np.cumsum([len(ids) + 1 for ids in documents], out=offsets[1:])
    ended = [np.array([encoding.end_of_text], np.uint32)] * (2 * len(documents))
    ended[::2] = documents
    return np.concatenate(ended), offsets


def _gigatoken(encoding: Encoding, ranks: Path) -> _Encode:
    """What gives gigatoken's ids. Raises Unsuitable where it does not know how the encoding splits text."""
    scheme = _schemes().get(encoding.pattern)
    if scheme is None:
        raise Unsuitable
    from gigatoken.gigatoken_rs import BPETokenizer

    tokenizer = BPETokenizer.from_tiktoken(str(ranks), scheme)
    return lambda documents: [tokenizer.encode(document) for document in documents]


def _schemes() -> dict[str, str]:
    """Its name for each pattern that it knows."""
    published = {"r50k_base": "gpt2", "cl100k_base": "gpt4", "o200k_base": "o200k"}
    return {
        TRAINING_PATTERN: "gpt4",
        **{published_pattern(name): scheme for name, scheme in published.items()},
    }


def _fastokens(encoding: Encoding, ranks: Path) -> _Encode:
    """What gives fastokens' ids."""
    # One thread a process: the processes are the parallelism. Read when its thread pool starts.
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


FAST = {"gigatoken": _gigatoken, "fastokens": _fastokens}


class FastEncoder:
    """One of FAST, checked as it goes. Raises Disagreement where it is not what tiktoken is."""

    def __init__(self, encoding: Encoding, name: str) -> None:
        """Raises Unsuitable where `name` cannot split text as the encoding does, ImportError without it."""
        self.name = name
        self._encoding = encoding
        bytes_of = encoding.token_bytes()
        self._bytes_of = bytes_of.astype(np.min_scalar_type(bytes_of.max()))  # small, to stay in the cache
        self._batches = 0
        self._load()
        for text in HARD_CASES:
            self._require_equal(self._ids([text.encode()])[0], text)

    def _load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ranks.tiktoken"
            lines = (
                binascii.b2a_base64(t, newline=False) + b" %d\n" % id for t, id in self._encoding.by_rank
            )
            path.write_bytes(b"".join(lines))
            with self._judged("cannot load it"):
                self._fast: _Encode | None = FAST[self.name](self._encoding, path)
        self._limit_bytes = _resident_bytes() + _GROWTH_BYTES

    def encode(self, documents: Sequence[bytes]) -> Flat:
        """See Encoder."""
        all_ids = self._ids(documents)
        for index, document in enumerate(documents):
            if _is_doubtful(document):
                all_ids[index] = self._encoding.encode(document.decode())
        flat = _flat(all_ids, self._encoding)
        ends = len(documents) * int(self._bytes_of[self._encoding.end_of_text])  # nearly always 0
        self._require_bytes(flat[0], sum(map(len, documents)) + ends)
        sample = self._batches % len(documents)
        self._batches += 1
        document = documents[sample]
        if len(document) <= _SAMPLE_BYTES:
            self._require_equal(all_ids[sample], document.decode())
        else:
            begin = self._batches * 7919 * _SAMPLE_BYTES % (len(document) - _SAMPLE_BYTES)
            part = document[begin : begin + _SAMPLE_BYTES].decode(errors="ignore")
            self._require_equal(self._ids([part.encode()])[0], part)
        if _resident_bytes() > self._limit_bytes:
            self._fast = None  # before the new one takes memory
            self._load()
        return flat

    def _ids(self, documents: Sequence[bytes]) -> list[NDArray[np.uint32]]:
        assert self._fast is not None
        with self._judged("failed"):
            all_ids = self._fast(documents)
        if len(all_ids) != len(documents):
            raise Disagreement(f"{self.name} gave the ids of {len(all_ids)} documents for {len(documents)}")
        return all_ids

    @contextmanager
    def _judged(self, complaint: str) -> Iterator[None]:
        """Whatever goes wrong inside is a Disagreement, but for the lack of the encoder."""
        try:
            yield
        except (ImportError, Unsuitable):
            raise
        except BaseException as error:
            # A panic in Rust is a BaseException of a class that cannot be imported.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise Disagreement(f"{self.name} {complaint}: {str(error)[:200]}") from None

    def _require_bytes(self, ids: NDArray[np.uint32], expected: int) -> None:
        try:
            found = int(np.take(self._bytes_of, ids).sum(dtype=np.int64))
        except IndexError:
            raise Disagreement(f"{self.name} gave an id that the encoding does not have") from None
        if found != expected:
            raise Disagreement(f"its ids stand for {found} bytes of {expected}")

    def _require_equal(self, ids: NDArray[np.uint32], text: str) -> None:
        if not np.array_equal(ids, self._encoding.encode(text)):
            raise Disagreement(f"{self.name} and tiktoken differ on {text[:40]!r}…")


def _is_doubtful(document: bytes) -> bool:
    """Whether it has a character of `_DOUBTFUL`."""
    if document.isascii() or not any(lead in document for lead in _DOUBTFUL_LEADS):
        return False  # nearly all texts, at the memory's speed
    return bool(_doubtful()[np.frombuffer(document.decode().encode("utf-32-le"), "<u4")].any())


@cache
def _doubtful() -> NDArray[np.bool_]:
    """Whether a code point is one [0x110000]."""
    table = np.zeros(0x110000, dtype=np.bool_)
    for first, last in _DOUBTFUL:
        table[first : last + 1] = True
    return table


def _resident_bytes() -> int:
    """What this process has in memory (proc(5)); 0 on a system that does not say it there."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def open_encoder(encoding: Encoding, choice: EncoderChoice) -> tuple[Encoder, str | None]:
    """The encoder to use, and a sentence for the user where a fast one was wanted and is passed over."""
    problems: list[str] = []
    for name in FAST if choice == "auto" else ():
        try:
            return FastEncoder(encoding, name), _told(name, problems)
        except (ImportError, Unsuitable):
            continue
        except (Disagreement, DataError) as error:
            problems.append(str(error))
    return TiktokenEncoder(encoding), _told("tiktoken", problems)


def _told(name: str, problems: Sequence[str]) -> str | None:
    return f"tokenizing with {name}: {'; '.join(problems)}" if problems else None
