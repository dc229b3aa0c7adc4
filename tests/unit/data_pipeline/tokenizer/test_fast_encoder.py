"""The fast encoders compared with tiktoken, on ordinary and on difficult input."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.prepare.pipeline import prepare
from data_pipeline.prepare.progress import Progress
from data_pipeline.prepare.worker_pool import encode_all
from data_pipeline.tokenizer.encoding import END_OF_TEXT, Encoding, load_encoding
from data_pipeline.tokenizer.fast_encoder import (
    FAST_ENCODERS,
    EncodeBatch,
    EncoderMismatch,
    FastEncoder,
    LoadEncoder,
    TiktokenEncoder,
    UnsupportedEncoding,
    open_encoder,
    resident_bytes,
)
from data_pipeline.tokenizer.hard_cases import HARD_CASES
from data_pipeline.tokenizer.rank_files import PUBLISHED
from tests.unit.data_pipeline.support import config, files_of, packaged_texts, write_jsonl
from tests.unit.data_pipeline.tokenizer.support import write_rank_file

LETTERS = str.maketrans("0123456789", "ghijklmnop")


@pytest.fixture(scope="module", params=FAST_ENCODERS)
def fast(encoding: Encoding, request: pytest.FixtureRequest) -> FastEncoder:
    return _open(encoding, request.param)


def _open(encoding: Encoding, name: str) -> FastEncoder:
    return FastEncoder(encoding, name, FAST_ENCODERS[name])


def _faulty(
    change: Callable[[list[Any], Sequence[bytes]], list[Any]], name: str = "gigatoken"
) -> LoadEncoder:
    """Loads the fast encoder `name`; `change` changes the ids of every batch but the hard cases."""
    hard_cases = {text.encode() for text in HARD_CASES}

    def load(encoding: Encoding, ranks: Path) -> EncodeBatch:
        encode = FAST_ENCODERS[name](encoding, ranks)
        return lambda documents: (
            encode(documents) if documents[0] in hard_cases else change(encode(documents), documents)
        )

    return load


def _utf8(texts: Sequence[str]) -> list[bytes]:
    return [text.encode() for text in texts]


def _require_tiktokens_ids(encoding: Encoding, fast: FastEncoder, texts: Sequence[str]) -> None:
    ids, offsets = fast.encode(_utf8(texts))
    wanted = [[*encoding.encode(text).tolist(), encoding.end_of_text] for text in texts]
    found = [ids[a:b].tolist() for a, b in pairwise(offsets)]
    assert found == wanted


def test_fast_encoders_return_tiktokens_ids_and_document_offsets(
    encoding: Encoding, fast: FastEncoder
) -> None:
    texts = [*packaged_texts()[:50], *HARD_CASES, "", "one"]
    _require_tiktokens_ids(encoding, fast, texts)
    ids, offsets = TiktokenEncoder(encoding).encode(_utf8(texts))
    fast_ids, fast_offsets = fast.encode(_utf8(texts))
    assert np.array_equal(ids, fast_ids)
    assert np.array_equal(offsets, fast_offsets)


@pytest.mark.parametrize("point", [0x180E, 0x88F, 0x10940, 0x1E6F5, 0x323B0, 0x33479])
def test_documents_with_characters_that_the_encoders_classify_differently_are_encoded_by_tiktoken(
    encoding: Encoding, fast: FastEncoder, point: int
) -> None:
    c = chr(point)
    texts = ["before", f"{c}'s the{c}'s 1{c}23 \n{c}the{c} the  {c}  the{c}", "after"]
    _require_tiktokens_ids(encoding, fast, texts)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(), min_size=1, max_size=5))
def test_fast_encoders_agree_with_tiktoken_on_any_text(
    encoding: Encoding, fast: FastEncoder, texts: list[str]
) -> None:
    _require_tiktokens_ids(encoding, fast, texts)


@pytest.mark.parametrize(
    "text",
    [" " * 1_000_000, "a" * 1_000_000, "^" * 1_000_000, "\n" * 1_000_000, " \t" * 500_000, "字" * 300_000],
    ids=["spaces", "letters", "marks", "newlines", "mixed", "ideographs"],
)
@pytest.mark.parametrize("pattern", ["outlast-4k", *PUBLISHED])
def test_every_encoder_takes_only_seconds_for_a_pathological_text(
    encoding: Encoding, tmp_path: Path, text: str, pattern: str
) -> None:
    """Uses the split patterns of tiktoken's encodings. The time allowed is 50 times the time needed."""
    if pattern != "outlast-4k":
        path = write_rank_file(tmp_path / "ranks.tiktoken", encoding.ranks)
        encoding = load_encoding(path, pattern)
    began_s = time.process_time()
    ids = encoding.encode(text)
    for name in FAST_ENCODERS:
        with suppress(UnsupportedEncoding):
            fast_ids, _ = _open(encoding, name).encode(_utf8([text]))
            assert np.array_equal(ids, fast_ids[:-1]), name
    assert time.process_time() - began_s < 10
    assert encoding.decode(ids.tolist()) == text


def test_a_chunk_that_a_fast_encoder_encodes_wrongly_is_encoded_again_with_tiktoken(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", packaged_texts()[:100])
    prepare(config(tmp_path / "reference", source, encoder="tiktoken"))
    faulty = _faulty(lambda all_ids, _: [np.zeros_like(ids) for ids in all_ids])
    encode = partial(encode_all, open_encoder=partial(open_encoder, fast={"gigatoken": faulty}))
    seen: list[Progress] = []
    manifest = prepare(config(tmp_path / "data", source), seen.append, encode)
    messages = [progress.message for progress in seen if progress.message]
    assert len(messages) == 1
    assert messages[0].startswith("tokenizing again with tiktoken: gigatoken returned ids of ")
    assert not FAST_ENCODERS.keys() & manifest.versions.keys()
    assert files_of(tmp_path / "data") == files_of(tmp_path / "reference")
    assert seen[-1].tokens == manifest.train_tokens + manifest.val_tokens


@pytest.mark.parametrize("repeats", [1, 2000])
def test_the_sample_of_a_batch_detects_two_swapped_ids(encoding: Encoding, repeats: int) -> None:
    def swap(all_ids: list[Any], _: Sequence[bytes]) -> list[Any]:
        first, *others = all_ids
        return [np.concatenate([first[1::-1], first[2:]]), *others]

    fast = FastEncoder(encoding, "gigatoken", _faulty(swap))
    with pytest.raises(EncoderMismatch, match="gigatoken and tiktoken differ on "):
        fast.encode([b"first words " * repeats])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda all_ids, _: all_ids[:-1], "gigatoken returned the ids of 1 documents for 2"),
        (
            lambda all_ids, _: [*all_ids[:-1], all_ids[-1][:-1]],
            "gigatoken returned ids of 17 bytes for a text of 23",
        ),
        (
            lambda all_ids, _: [all_ids[0] + 4096, *all_ids[1:]],
            "gigatoken returned an id that the encoding does not have",
        ),
    ],
    ids=["no document", "no last token", "no such id"],
)
def test_missing_and_unknown_ids_are_detected(encoding: Encoding, change: Any, message: str) -> None:
    fast = FastEncoder(encoding, "gigatoken", _faulty(change))
    with pytest.raises(EncoderMismatch, match=message):
        fast.encode([b"first words", b"second words"])


def test_an_encoder_that_fails_a_hard_case_is_rejected(encoding: Encoding) -> None:
    assert open_encoder(encoding, "auto")[0].name == "gigatoken"
    assert open_encoder(encoding, "tiktoken")[0].name == "tiktoken"

    def failing(name: str) -> LoadEncoder:
        def load(encoding: Encoding, ranks: Path) -> EncodeBatch:
            encode = FAST_ENCODERS[name](encoding, ranks)
            return lambda documents: [
                ids[::-1] if document.decode() == HARD_CASES[5] else ids
                for ids, document in zip(encode(documents), documents, strict=True)
            ]

        return load

    encoder, message = open_encoder(encoding, "auto", {**FAST_ENCODERS, "gigatoken": failing("gigatoken")})
    assert encoder.name == "fastokens"
    assert message is not None
    assert message.startswith("tokenizing with fastokens: gigatoken and tiktoken differ on '日本語")
    encoder, message = open_encoder(encoding, "auto", {name: failing(name) for name in FAST_ENCODERS})
    assert encoder.name == "tiktoken"
    assert message is not None
    assert message.startswith("tokenizing with tiktoken: gigatoken and tiktoken differ on '日本語")
    assert "; fastokens and tiktoken differ on '日本語" in message


def test_an_encoder_that_caches_every_word_takes_bounded_memory(encoding: Encoding) -> None:
    """The words never repeat; without the bound, the cache would take about 100 MB."""
    fast = FastEncoder(encoding, "gigatoken", FAST_ENCODERS["gigatoken"], most_growth_bytes=16 << 20)
    at_first, most = resident_bytes(), 0
    for batch in range(20):
        text = " ".join(
            f"{x:x}".translate(LETTERS) for x in np.random.default_rng(batch).integers(2**60, size=40_000)
        )
        assert np.array_equal(fast.encode(_utf8([text]))[0][:-1], encoding.encode(text))
        most = max(most, resident_bytes())
    assert at_first > 0
    assert most - at_first < 48 << 20


def test_an_end_of_text_that_is_also_an_ordinary_token_is_counted_once(encoding: Encoding) -> None:
    """Some encodings are made from a vocabulary that lists its special tokens among the others."""
    listed = replace(encoding, special_tokens={END_OF_TEXT: max(encoding.ranks.values())})
    encoder, message = open_encoder(listed, "auto")
    assert (encoder.name, message) == ("gigatoken", None)
    ids, _ = encoder.encode([b"first words", b"second words"])
    assert np.array_equal(ids, TiktokenEncoder(listed).encode([b"first words", b"second words"])[0])


def test_ranks_that_a_fast_encoder_cannot_load_are_left_to_another(encoding: Encoding) -> None:
    """gigatoken panics at a byte string that is not the concatenation of two with lower ranks."""
    encoder, message = open_encoder(_with_tokens(encoding, b"qqqqzzzz"), "auto")
    assert encoder.name != "gigatoken"
    assert message is not None
    assert "gigatoken cannot load the encoding: " in message


def test_a_vocabulary_for_which_the_end_of_a_text_matters_is_left_to_another(encoding: Encoding) -> None:
    """gigatoken splits like today's cl100k: it keeps whitespace at the end of a text in one word."""
    encoder, message = open_encoder(_with_tokens(encoding, b"\n "), "auto")
    assert encoder.name == "fastokens"
    assert message is not None
    assert "gigatoken and tiktoken differ on 'how a text ends" in message


def test_splitting_long_whitespace_for_tiktoken_changes_no_id(encoding: Encoding) -> None:
    """The encoding has tokens of up to 512 spaces."""
    spaced = _with_tokens(encoding, *(b" " * 2**doublings for doublings in range(1, 10)))
    text = " " * 1_000_000
    ids = spaced.encode(text)
    assert (spaced.token_bytes()[ids] == 512).sum() > 1900
    for name in FAST_ENCODERS:
        assert np.array_equal(_open(spaced, name).encode([text.encode()])[0][:-1], ids), name


def test_gigatoken_is_used_only_for_the_patterns_that_it_supports(encoding: Encoding, tmp_path: Path) -> None:
    path = write_rank_file(tmp_path / "mine.tiktoken", encoding.ranks)
    encoder, message = open_encoder(load_encoding(path, r"\S+|\s+"), "auto")
    assert (encoder.name, message) == ("fastokens", None)


def test_tiktoken_encodes_if_no_fast_encoder_is_installed(
    encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    assert open_encoder(encoding, "auto")[0].name == "fastokens"
    monkeypatch.setitem(sys.modules, "fastokens._native", None)
    encoder, message = open_encoder(encoding, "auto")
    assert (encoder.name, message) == ("tiktoken", None)


def _with_tokens(encoding: Encoding, *tokens: bytes) -> Encoding:
    """The encoding extended by `tokens`, which get the next ranks; end-of-text comes after them."""
    ranks = dict(encoding.ranks)
    for token in tokens:
        ranks.setdefault(token, len(ranks))
    return replace(encoding, ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})
