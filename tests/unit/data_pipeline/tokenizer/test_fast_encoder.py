"""The fast encoders beside tiktoken, rank files, and inputs that are hard on both."""

import base64
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.prepare.pipeline import prepare
from data_pipeline.prepare.progress import Progress
from data_pipeline.tokenizer import fast_encoder as encoder_module
from data_pipeline.tokenizer.encoding import END_OF_TEXT, Encoding, load_encoding
from data_pipeline.tokenizer.fast_encoder import (
    FAST,
    HARD_CASES,
    Disagreement,
    FastEncoder,
    TiktokenEncoder,
    Unsuitable,
    open_encoder,
)
from data_pipeline.tokenizer.rank_files import PUBLISHED, read_rank_file
from tests.unit.data_pipeline.support import config, files_of, packaged_texts, write_jsonl

LETTERS = str.maketrans("0123456789", "ghijklmnop")


@pytest.fixture(scope="module")
def encoding() -> Encoding:
    return load_encoding("outlast-4k")


@pytest.fixture(scope="module", params=FAST)
def fast(encoding: Encoding, request: pytest.FixtureRequest) -> FastEncoder:
    return FastEncoder(encoding, request.param)


def _utf8(texts: Sequence[str]) -> list[bytes]:
    return [text.encode() for text in texts]


def _both(encoding: Encoding, fast: FastEncoder, texts: Sequence[str]) -> None:
    ids, offsets = fast.encode(_utf8(texts))
    wanted = [[*encoding.encode(text).tolist(), encoding.end_of_text] for text in texts]
    found = [ids[a:b].tolist() for a, b in pairwise(offsets)]
    assert found == wanted


def test_both_encoders_give_tiktokens_ids_and_where_each_text_begins(
    encoding: Encoding, fast: FastEncoder
) -> None:
    texts = [*packaged_texts()[:50], *HARD_CASES, "", "one"]
    _both(encoding, fast, texts)
    ids, offsets = TiktokenEncoder(encoding).encode(_utf8(texts))
    fast_ids, fast_offsets = fast.encode(_utf8(texts))
    assert np.array_equal(ids, fast_ids)
    assert np.array_equal(offsets, fast_offsets)


@pytest.mark.parametrize("point", [0x180E, 0x88F, 0x10940, 0x1E6F5, 0x323B0, 0x33479])
def test_characters_that_the_encoders_tables_know_otherwise_are_left_to_tiktoken(
    encoding: Encoding, fast: FastEncoder, point: int
) -> None:
    c = chr(point)
    _both(encoding, fast, ["before", f"{c}'s the{c}'s 1{c}23 \n{c}the{c} the  {c}  the{c}", "after"])


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
def test_a_pathological_text_takes_seconds_in_any_encoder(
    encoding: Encoding, tmp_path: Path, text: str, pattern: str
) -> None:
    """With the split patterns of tiktoken's encodings; the time allowed is 50 times what is needed."""
    if pattern != "outlast-4k":
        path = _rank_file(tmp_path / "ranks.tiktoken", encoding.ranks)
        encoding = read_rank_file(path, pattern)
    began_s = time.process_time()
    ids = encoding.encode(text)
    for name in FAST:
        with suppress(Unsuitable):
            fast_ids, _ = FastEncoder(encoding, name).encode(_utf8([text]))
            assert np.array_equal(ids, fast_ids[:-1]), name
    assert time.process_time() - began_s < 10
    assert encoding.decode(ids.tolist()) == text


def test_an_encoder_that_lies_is_found_out_and_its_piece_is_encoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", packaged_texts()[:100])
    prepare(config(tmp_path / "reference", source, encoder="tiktoken"))
    load = FastEncoder.__init__

    def load_wrong(self: FastEncoder, encoding: Encoding, name: str) -> None:
        """It lies once it is loaded."""
        load(self, encoding, name)
        fast = self._fast
        assert fast is not None
        monkeypatch.setattr(self, "_fast", lambda all: [np.zeros_like(ids) for ids in fast(all)])

    monkeypatch.setattr(FastEncoder, "__init__", load_wrong)
    seen: list[Progress] = []
    manifest = prepare(config(tmp_path / "data", source), seen.append)
    messages = [progress.message for progress in seen if progress.message]
    assert len(messages) == 1
    assert messages[0].startswith("tokenizing again with tiktoken: its ids stand for ")
    assert not FAST.keys() & manifest.versions.keys()
    assert files_of(tmp_path / "data") == files_of(tmp_path / "reference")
    assert seen[-1].tokens == manifest.train_tokens + manifest.val_tokens


def test_an_encoder_that_swaps_two_ids_is_found_out_by_the_sample(
    encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = FastEncoder(encoding, "gigatoken")
    real = fast._ids

    def swapped(documents: Sequence[bytes]) -> list[NDArray[np.uint32]]:
        ids, *others = real(documents)
        return [np.concatenate([ids[1::-1], ids[2:]]), *others]

    monkeypatch.setattr(fast, "_ids", swapped)
    with pytest.raises(Disagreement, match=r"gigatoken and tiktoken differ on 'first"):
        fast.encode([b"first words"])
    long = b"x" + b"first words " * 2000
    monkeypatch.setattr(fast, "_batches", 0)
    with pytest.raises(Disagreement, match="gigatoken and tiktoken differ on "):
        fast.encode([long])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda ids: ids[:-1], "gigatoken gave the ids of 1 documents for 2"),
        (lambda ids: [*ids[:-1], ids[-1][:-1]], "its ids stand for 17 bytes of 23"),
        (lambda ids: [ids[0] + 4096, *ids[1:]], "gigatoken gave an id that the encoding does not have"),
    ],
    ids=["no document", "no last token", "no such id"],
)
def test_an_encoder_that_leaves_something_out_is_found_out(
    encoding: Encoding, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Any], Any], message: str
) -> None:
    fast = FastEncoder(encoding, "gigatoken")
    real = fast._fast
    assert real is not None
    monkeypatch.setattr(fast, "_fast", lambda documents: wrong(real(documents)))
    with pytest.raises(Disagreement, match=message):
        fast.encode([b"first words", b"second words"])


def test_an_encoder_that_fails_the_hard_cases_is_passed_over(
    encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_encoder(encoding, "auto")[0].name == "gigatoken"
    assert open_encoder(encoding, "tiktoken")[0].name == "tiktoken"
    ids, wrong = FastEncoder._ids, {"gigatoken"}

    def lie(self: FastEncoder, documents: Sequence[bytes]) -> list[NDArray[np.uint32]]:
        found = ids(self, documents)
        is_turned = documents[0].decode() == HARD_CASES[5] and self.name in wrong
        return [found[0][::-1]] if is_turned else found

    monkeypatch.setattr(FastEncoder, "_ids", lie)
    encoder, message = open_encoder(encoding, "auto")
    assert encoder.name == "fastokens"
    assert message is not None
    assert message.startswith("tokenizing with fastokens: gigatoken and tiktoken differ on '日本語")
    wrong.add("fastokens")
    encoder, message = open_encoder(encoding, "auto")
    assert encoder.name == "tiktoken"
    assert message is not None
    assert message.startswith("tokenizing with tiktoken: gigatoken and tiktoken differ on '日本語")
    assert "; fastokens and tiktoken differ on '日本語" in message


def test_an_encoder_that_remembers_every_word_takes_bounded_memory(
    encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words that never come again: unbounded, these take about 100 MB."""
    monkeypatch.setattr(encoder_module, "_GROWTH_BYTES", 16 << 20)
    fast = FastEncoder(encoding, "gigatoken")
    at_first, most = encoder_module._resident_bytes(), 0
    for batch in range(20):
        text = " ".join(
            f"{x:x}".translate(LETTERS) for x in np.random.default_rng(batch).integers(2**60, size=40_000)
        )
        assert np.array_equal(fast.encode(_utf8([text]))[0][:-1], encoding.encode(text))
        most = max(most, encoder_module._resident_bytes())
    assert at_first > 0
    assert most - at_first < 48 << 20


def test_an_end_of_text_that_is_a_byte_string_too_is_counted_as_one(encoding: Encoding) -> None:
    """As where an encoding is made from a vocabulary that lists its special tokens among the others."""
    listed = replace(encoding, special_tokens={END_OF_TEXT: max(encoding.ranks.values())})
    encoder, message = open_encoder(listed, "auto")
    assert (encoder.name, message) == ("gigatoken", None)
    ids, _ = encoder.encode([b"first words", b"second words"])
    assert np.array_equal(ids, TiktokenEncoder(listed).encode([b"first words", b"second words"])[0])


def test_ranks_that_a_fast_encoder_cannot_load_are_left_to_another(encoding: Encoding) -> None:
    """gigatoken panics at a byte string that no two of lower rank make."""
    encoder, message = open_encoder(_with_tokens(encoding, b"qqqqzzzz"), "auto")
    assert encoder.name != "gigatoken"
    assert message is not None
    assert "gigatoken cannot load it: " in message


def test_a_vocabulary_that_tells_how_texts_end_is_left_to_another(encoding: Encoding) -> None:
    """gigatoken splits as today's cl100k: whitespace at the end of a text is one word for it."""
    encoder, message = open_encoder(_with_tokens(encoding, b"\n "), "auto")
    assert encoder.name == "fastokens"
    assert message is not None
    assert "gigatoken and tiktoken differ on 'how a text ends" in message


def test_where_whitespace_is_cut_for_tiktoken_changes_no_id(encoding: Encoding) -> None:
    """With tokens of as many as 512 spaces."""
    spaced = _with_tokens(encoding, *(b" " * 2**doublings for doublings in range(1, 10)))
    text = " " * 1_000_000
    ids = spaced.encode(text)
    assert (spaced.token_bytes()[ids] == 512).sum() > 1900
    for name in FAST:
        assert np.array_equal(FastEncoder(spaced, name).encode([text.encode()])[0][:-1], ids), name


def test_gigatoken_is_for_the_patterns_that_it_knows(encoding: Encoding, tmp_path: Path) -> None:
    path = _rank_file(tmp_path / "mine.tiktoken", encoding.ranks)
    encoder, message = open_encoder(load_encoding(path, r"\S+|\s+"), "auto")
    assert (encoder.name, message) == ("fastokens", None)


def test_without_a_fast_encoder_tiktoken_does_it(encoding: Encoding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    assert open_encoder(encoding, "auto")[0].name == "fastokens"
    monkeypatch.setitem(sys.modules, "fastokens._native", None)
    encoder, message = open_encoder(encoding, "auto")
    assert (encoder.name, message) == ("tiktoken", None)


def _with_tokens(encoding: Encoding, *tokens: bytes) -> Encoding:
    """The encoding with those `tokens` that it lacks, of the next ranks, and its end-of-text behind them."""
    ranks = dict(encoding.ranks)
    for token in tokens:
        ranks.setdefault(token, len(ranks))
    return replace(encoding, ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


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
