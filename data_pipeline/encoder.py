"""Batches of documents → ids: by tiktoken, or by a faster encoder for as long as it agrees with tiktoken.

fastokens (the extra `fast`) takes any pattern and any ranks and is several times faster, and is not yet
widely used; so tiktoken judges it: on a set of hard cases at the start, and on a sample of every batch. All
its ids together must also stand for exactly the bytes that went in. Nothing it gets wrong is repaired: its
work is thrown away.
"""

import binascii
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.tokenizer import END_OF_TEXT, Encoding

Choice = Literal["auto", "tiktoken"]

# Of each batch so many characters of one document are encoded by both. A batch is a mebibyte, so tiktoken
# spends under a tenth of the fast encoder's time on it.
_SAMPLE_CHARACTERS = 8192

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
)  # fmt: skip


class Disagreement(Exception):
    """The fast encoder gave other ids than tiktoken, or failed."""


class Encoder(Protocol):
    """Encodes batches; `name` is the package that does."""

    name: str

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """The ids of `texts`, one after the other, and where each begins and the last ends [texts + 1]."""
        ...


class TiktokenEncoder:
    """The reference. Raises DataError at a text that tiktoken cannot encode."""

    name = "tiktoken"

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """See Encoder."""
        parts = [self._encoding.encode(text) for text in texts]
        offsets = np.zeros(len(parts) + 1, dtype=np.int64)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        return np.concatenate([np.empty(0, np.uint32), *parts]), offsets


class FastEncoder:
    """fastokens, checked as it goes. Raises Disagreement where it is not what tiktoken is."""

    name = "fastokens"

    def __init__(self, encoding: Encoding) -> None:
        # One thread a process: the processes are the parallelism. Read when its thread pool starts.
        os.environ.setdefault("RAYON_NUM_THREADS", "1")
        from fastokens._native import Tokenizer

        self._encoding = encoding
        self._bytes_of = encoding.token_bytes()
        self._batches = 0
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ranks.tiktoken"
            lines = (binascii.b2a_base64(t, newline=False) + b" %d\n" % id for t, id in encoding.by_rank)
            path.write_bytes(b"".join(lines))
            try:
                self._fast: Any = Tokenizer.from_tiktoken(
                    str(path), pattern=encoding.pattern, special_tokens=dict(encoding.special_tokens)
                )
            except Exception as error:
                raise Disagreement(f"fastokens cannot load it: {str(error)[:200]}") from None
        for text in HARD_CASES:
            self._require_equal(self._ids([text])[0], text)

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """See Encoder."""
        ids, offsets = self._ids(texts)
        expected = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        found = int(self._bytes_of[ids].sum())
        if found != expected or len(offsets) != len(texts) + 1:
            raise Disagreement(f"its ids stand for {found} bytes of {expected}")
        sample = self._batches % len(texts)
        self._batches += 1
        text = texts[sample]
        if len(text) <= _SAMPLE_CHARACTERS:
            self._require_equal(ids[offsets[sample] : offsets[sample + 1]], text)
        else:
            begin = self._batches * 7919 * _SAMPLE_CHARACTERS % (len(text) - _SAMPLE_CHARACTERS)
            part = text[begin : begin + _SAMPLE_CHARACTERS]
            self._require_equal(self._ids([part])[0], part)
        return ids, offsets

    def _ids(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        try:
            ids, offsets = self._fast.encode_batch_flat(list(texts), split_special_tokens=True)
        except BaseException as error:
            # A panic in Rust is a BaseException of a class that cannot be imported.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise Disagreement(f"fastokens failed: {str(error)[:200]}") from None
        return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64).astype(np.int64)

    def _require_equal(self, ids: NDArray[np.uint32], text: str) -> None:
        if not np.array_equal(ids, self._encoding.encode(text)):
            raise Disagreement(f"fastokens and tiktoken differ on {text[:40]!r}…")


def open_encoder(encoding: Encoding, choice: Choice) -> tuple[Encoder, str | None]:
    """The encoder to use, and a sentence for the user where a fast one was wanted and is passed over."""
    if choice == "tiktoken":
        return TiktokenEncoder(encoding), None
    try:
        return FastEncoder(encoding), None
    except ImportError:
        return TiktokenEncoder(encoding), None
    except (Disagreement, DataError) as error:
        return TiktokenEncoder(encoding), f"tokenizing with tiktoken: {error}"
