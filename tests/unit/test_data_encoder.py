"""The fast encoder beside tiktoken, rank files, and inputs that are hard on both."""

import base64
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.encoder import (
    HARD_CASES,
    Disagreement,
    FastEncoder,
    TiktokenEncoder,
    open_encoder,
)
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.prepare import Progress, prepare
from data_pipeline.rank_files import PUBLISHED, read_rank_file
from data_pipeline.tokenizer import Encoding, load_encoding
from tests.unit.data_support import config, files_of, packaged_texts, write_jsonl


@pytest.fixture(scope="module")
def encoding() -> Encoding:
    return load_encoding("outlast-4k")


@pytest.fixture(scope="module")
def fast(encoding: Encoding) -> FastEncoder:
    return FastEncoder(encoding)


def _both(encoding: Encoding, fast: FastEncoder, texts: Sequence[str]) -> None:
    ids, offsets = fast.encode(texts)
    wanted = [encoding.encode(text).tolist() for text in texts]
    found = [ids[a:b].tolist() for a, b in pairwise(offsets)]
    assert found == wanted


def test_both_encoders_give_tiktokens_ids_and_where_each_text_begins(
    encoding: Encoding, fast: FastEncoder
) -> None:
    texts = [*packaged_texts()[:50], *HARD_CASES, "", "one"]
    _both(encoding, fast, texts)
    ids, offsets = TiktokenEncoder(encoding).encode(texts)
    fast_ids, fast_offsets = fast.encode(texts)
    assert np.array_equal(ids, fast_ids)
    assert np.array_equal(offsets, fast_offsets)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(), min_size=1, max_size=5))
def test_both_encoders_agree_on_any_text(encoding: Encoding, fast: FastEncoder, texts: list[str]) -> None:
    _both(encoding, fast, texts)


@pytest.mark.parametrize(
    "text",
    [" " * 1_000_000, "a" * 1_000_000, "^" * 1_000_000, "\n" * 1_000_000, " \t" * 500_000, "字" * 300_000],
    ids=["spaces", "letters", "marks", "newlines", "mixed", "ideographs"],
)
@pytest.mark.parametrize("pattern", ["outlast-4k", *PUBLISHED])
def test_a_pathological_text_takes_seconds_in_either_encoder(
    encoding: Encoding, tmp_path: Path, text: str, pattern: str
) -> None:
    """With the split patterns of tiktoken's encodings; the time allowed is 50 times what is needed."""
    if pattern != "outlast-4k":
        path = _rank_file(tmp_path / "ranks.tiktoken", encoding.ranks)
        encoding = read_rank_file(path, pattern)
    began_s = time.process_time()
    ids = encoding.encode(text)
    fast_ids, _ = FastEncoder(encoding).encode([text])
    assert time.process_time() - began_s < 10
    assert np.array_equal(ids, fast_ids)
    assert encoding.decode(ids.tolist()) == text


class _Wrong:
    """A fast encoder that begins to lie once it has read `after` batches."""

    def __init__(self, real: Any, after: int) -> None:
        self._real = real
        self._left = after

    def encode_batch_flat(self, texts: list[str], split_special_tokens: bool) -> tuple[bytes, bytes]:
        ids, offsets = self._real.encode_batch_flat(texts, split_special_tokens=split_special_tokens)
        self._left -= 1
        return (ids if self._left >= 0 else bytes(len(ids)), offsets)


def test_an_encoder_that_lies_is_found_out_and_its_piece_is_encoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", packaged_texts()[:100])
    prepare(config(tmp_path / "reference", source, encoder="tiktoken"))
    load = FastEncoder.__init__

    def load_wrong(self: FastEncoder, encoding: Encoding) -> None:
        load(self, encoding)
        self._fast = _Wrong(self._fast, 0)

    monkeypatch.setattr(FastEncoder, "__init__", load_wrong)
    seen: list[Progress] = []
    manifest = prepare(config(tmp_path / "data", source), seen.append)
    messages = [progress.message for progress in seen if progress.message]
    assert len(messages) == 1
    assert messages[0].startswith("tokenizing again with tiktoken: its ids stand for ")
    assert "fastokens" not in manifest.versions
    assert files_of(tmp_path / "data") == files_of(tmp_path / "reference")
    assert seen[-1].tokens == manifest.train_tokens + manifest.val_tokens


def test_an_encoder_that_swaps_two_ids_is_found_out_by_the_sample(
    encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = FastEncoder(encoding)
    real = fast._ids

    def swapped(texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        ids, offsets = real(texts)
        return np.concatenate([ids[1::-1], ids[2:]]), offsets

    monkeypatch.setattr(fast, "_ids", swapped)
    with pytest.raises(Disagreement, match=r"fastokens and tiktoken differ on 'first"):
        fast.encode(["first words"])
    long = "x" + "first words " * 2000
    monkeypatch.setattr(fast, "_batches", 0)
    with pytest.raises(Disagreement, match="fastokens and tiktoken differ on "):
        fast.encode([long])


def test_an_encoder_that_fails_the_hard_cases_is_passed_over(
    encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_encoder(encoding, "auto")[0].name == "fastokens"
    assert open_encoder(encoding, "tiktoken")[0].name == "tiktoken"
    ids = FastEncoder._ids

    def wrong(self: FastEncoder, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        found, offsets = ids(self, texts)
        return (found[::-1] if texts[0] == HARD_CASES[5] else found), offsets

    monkeypatch.setattr(FastEncoder, "_ids", wrong)
    encoder, message = open_encoder(encoding, "auto")
    assert encoder.name == "tiktoken"
    assert message is not None
    assert message.startswith("tokenizing with tiktoken: fastokens and tiktoken differ on '日本語")


def test_without_the_fast_encoder_tiktoken_does_it(
    encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastokens._native", None)
    encoder, message = open_encoder(encoding, "auto")
    assert (encoder.name, message) == ("tiktoken", None)


def _rank_file(path: Path, ranks: Any) -> Path:
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    path.write_bytes(b"".join(lines))
    return path


def test_a_rank_file_with_a_pattern_is_an_encoding(encoding: Encoding, tmp_path: Path) -> None:
    path = _rank_file(tmp_path / "mine.tiktoken", encoding.ranks)
    loaded = load_encoding(path, encoding.pattern)
    assert loaded.name == "mine"
    assert loaded.fingerprint == encoding.fingerprint  # end-of-text has the next free id there too
    by_name = load_encoding(path, "cl100k_base")
    text = "\n\n".join(packaged_texts()[:3])
    assert by_name.encode(text).tolist() == encoding.encode(text).tolist()  # the same split by other words
    source = write_jsonl(tmp_path / "a.jsonl", [text])
    prepare(config(tmp_path / "data", source, tokenizer=str(path), tokenizer_pattern="cl100k_base"))
    assert load_encoding(tmp_path / "data").fingerprint == by_name.fingerprint


def test_what_is_wrong_with_a_rank_file_is_said(encoding: Encoding, tmp_path: Path) -> None:
    path = _rank_file(tmp_path / "mine.tiktoken", encoding.ranks)
    with pytest.raises(
        ConfigError, match=r"mine\.tiktoken is not one of tiktoken's \(r50k_base, .*set tokeni"
    ):
        load_encoding(path)
    with pytest.raises(ConfigError, match=r"tokenizer_pattern = '\('"):
        load_encoding(path, "(")
    with pytest.raises(
        ConfigError, match=r"tokenizer_pattern is for \.tiktoken files; tokenizer 'outlast-4k'"
    ):
        load_encoding("outlast-4k", "cl100k_base")
    with pytest.raises(DataError, match="is not the file that tiktoken knows by this name"):
        load_encoding(_rank_file(tmp_path / "cl100k_base.tiktoken", encoding.ranks))
    path.write_bytes(path.read_bytes() + b"no rank\n")
    with pytest.raises(DataError, match=r"mine\.tiktoken:\d+: not a rank"):
        load_encoding(path, "cl100k_base")
    few = {token: rank for token, rank in encoding.ranks.items() if token != b"a"}
    with pytest.raises(DataError, match=r"1 of the 256 single bytes have no rank, for example 97"):
        load_encoding(_rank_file(path, few), "cl100k_base")
    with pytest.raises(DataError, match="two byte strings have the same rank"):
        load_encoding(_rank_file(path, {**encoding.ranks, b"zzzzqq": 5}), "cl100k_base")


def test_a_rank_file_that_tiktoken_publishes_needs_no_pattern(
    encoding: Encoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published files are not here; tiktoken is told that ours is the one that it published."""
    import hashlib

    from tiktoken_ext import openai_public

    path = _rank_file(tmp_path / "cl100k_base.tiktoken", encoding.ranks)
    theirs = openai_public.cl100k_base
    known = next(
        value for value in theirs.__code__.co_consts if isinstance(value, tuple) and "expected_hash" in value
    )
    assert known == ("expected_hash",)  # the constructor still says it by this name
    ours = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(
        theirs,
        "__code__",
        theirs.__code__.replace(
            co_consts=tuple(
                ours if isinstance(value, str) and len(value) == 64 else value
                for value in theirs.__code__.co_consts
            )
        ),
    )
    loaded = load_encoding(path)
    assert loaded.name == "cl100k_base"
    assert loaded.special_tokens["<|endofprompt|>"] == 100276
    assert loaded.encode("It's 12345").tolist() == encoding.encode("It's 12345").tolist()
