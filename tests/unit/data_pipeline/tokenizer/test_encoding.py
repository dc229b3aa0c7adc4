import json
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from data_pipeline.corpus import packaged_corpus
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources.held_out import is_held_out
from data_pipeline.tokenizer.encoding import TRAINING_PATTERN, Encoding, load_encoding
from data_pipeline.tokenizer.train import train_tokenizer
from tests.unit.data_pipeline.support import packaged_texts, write_jsonl

# o200k's pattern (tiktoken, openai_public.py), which panics on a million spaces
O200K_PATTERN = "|".join(
    [
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)


@pytest.fixture(scope="module")
def encoding() -> Encoding:
    return load_encoding("outlast-4k")


def test_training_again_gives_the_packaged_encoding_byte_for_byte(tmp_path: Path, encoding: Encoding) -> None:
    out = tmp_path / "outlast-4k.json"
    trained = train_tokenizer([packaged_corpus()], 4096, out, val_fraction=0.1)
    assert trained == encoding
    assert out.read_bytes() == encoding.to_json()
    assert load_encoding(out) == encoding
    assert encoding.vocab_size == 4096
    assert encoding.end_of_text == 4095


def test_ids_equal_those_of_the_trainers_own_tokenizer(encoding: Encoding) -> None:
    texts = packaged_texts()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TRAINING_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4095, min_frequency=2, show_progress=False, initial_alphabet=alphabet
    )
    bpe.train_from_iterator((t for t in texts if not is_held_out(t.encode(), 0.1, 0)), trainer)
    byte_of = {character: byte for byte, character in _byte_characters().items()}
    for text in [*texts[::10], "naïve 東京 🙂 x = 3.14e-4\n\n\tdef f(): pass  ", "it's they'll WE'RE"]:
        theirs = [bytes(byte_of[c] for c in token) for token in bpe.encode(text).tokens]
        ours = list(encoding._bpe.decode_tokens_bytes(encoding.encode(text).tolist()))
        assert ours == theirs


def _byte_characters() -> dict[int, str]:
    # transformers' table, as an independent source of GPT-2's stand-ins for bytes
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return dict(bytes_to_unicode())


@given(text=st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(encoding: Encoding, text: str) -> None:
    text = text.encode(errors="ignore").decode()
    ids = encoding.encode(text)
    assert encoding.decode(ids) == text
    assert encoding.token_bytes()[ids].sum() == len(text.encode())


def test_token_bytes_are_the_lengths_and_special_tokens_have_none(encoding: Encoding) -> None:
    lengths = encoding.token_bytes()
    assert lengths.shape == (4096,)
    assert [lengths[id] for id in range(256)] == [1] * 256
    assert lengths[encoding.end_of_text] == 0
    assert all(lengths[id] == len(encoding._bpe.decode_single_token_bytes(id)) for id in range(4095))


def test_text_that_looks_like_a_special_token_is_text(encoding: Encoding) -> None:
    ids = encoding.encode("a<|endoftext|>b")
    assert encoding.end_of_text not in ids
    assert encoding.decode(ids) == "a<|endoftext|>b"


def test_a_million_spaces_neither_crash_nor_get_lost(encoding: Encoding) -> None:
    o200k_like = Encoding("o200k-like", O200K_PATTERN, encoding.ranks, encoding.special_tokens)
    text = "before" + " " * 1_200_000 + "after" + "\n" * 1_200_000 + "end"
    with pytest.raises(ValueError, match="Max stack size exceeded"):  # else the workaround can go
        o200k_like._bpe.encode_to_numpy(text, disallowed_special=())
    ids = o200k_like.encode(text)
    assert o200k_like.decode(ids) == text


@pytest.mark.parametrize("text", ["a" * 1_000_000, "^" * 1_000_000, " " * 1_000_000, "0" * 1_000_000])
def test_a_megabyte_of_one_character_is_encoded(encoding: Encoding, text: str) -> None:
    ids = encoding.encode(text)
    assert int(encoding.token_bytes()[ids].sum()) == len(text)


def test_the_fingerprint_changes_with_ranks_pattern_and_special_tokens(encoding: Encoding) -> None:
    swapped = dict(encoding.ranks) | {b"a": encoding.ranks[b"b"], b"b": encoding.ranks[b"a"]}
    others = [
        Encoding("x", encoding.pattern, swapped, encoding.special_tokens),
        Encoding("x", encoding.pattern + "|x", encoding.ranks, encoding.special_tokens),
        Encoding("x", encoding.pattern, encoding.ranks, {"<|endoftext|>": 5000}),
    ]
    assert len({encoding.fingerprint, *(other.fingerprint for other in others)}) == 4
    renamed = Encoding("x", encoding.pattern, encoding.ranks, encoding.special_tokens)
    assert renamed.fingerprint == encoding.fingerprint


def test_an_encoding_is_loaded_from_a_data_directory(tmp_path: Path, encoding: Encoding) -> None:
    (tmp_path / "encoding.json").write_bytes(encoding.to_json())
    assert load_encoding(tmp_path) == encoding


def test_a_tiktoken_encoding_keeps_its_ids(encoding: Encoding, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tiktoken.Encoding(
        "gpt2",
        pat_str=TRAINING_PATTERN,
        mergeable_ranks=dict(encoding.ranks),
        special_tokens={"<|endoftext|>": 50256},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: theirs)
    ours = load_encoding("gpt2")
    assert (ours.name, ours.vocab_size, ours.end_of_text) == ("gpt2", 50257, 50256)
    text = packaged_texts()[0]
    assert np.array_equal(ours.encode(text), theirs.encode_ordinary(text))


def test_a_tiktoken_encoding_without_end_of_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tiktoken.Encoding(
        "gpt2",
        pat_str=TRAINING_PATTERN,
        mergeable_ranks={bytes([b]): b for b in range(256)},
        special_tokens={"<eos>": 256},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: theirs)
    with pytest.raises(
        ConfigError, match=r"tokenizer 'gpt2' has no <\|endoftext\|>, which ends every document"
    ):
        load_encoding("gpt2")


def test_a_tiktoken_name_without_a_network_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # a port at which nothing listens
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DataError, match=r"'p50k_edit': tiktoken has no copy .* TIKTOKEN_CACHE_DIR"):
        load_encoding("p50k_edit")


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match="'outlast4k' is neither a file nor an encoding; did you mean 'outlast-4k'"
    ):
        load_encoding("outlast4k")
    with pytest.raises(ConfigError, match="neither a file nor an encoding; known: outlast-4k, gpt2"):
        load_encoding("zzz")


def test_a_file_that_is_no_encoding_is_named(tmp_path: Path, encoding: Encoding) -> None:
    path = tmp_path / "e.json"
    for content in ("", "[]", "{}", '{"ranks": 3}', '{"ranks": {"!": 1}}'):
        path.write_text(content)
        with pytest.raises(DataError, match=r"e\.json is not an encoding"):
            load_encoding(path)
    good = json.loads(encoding.to_json())
    path.write_text(json.dumps(good | {"special_tokens": {}}))
    with pytest.raises(DataError, match=r"e\.json: the encoding has no <\|endoftext\|>"):
        load_encoding(path)
    path.write_text(json.dumps(good | {"pattern": good["pattern"] + "|x"}))
    with pytest.raises(DataError, match=r"e\.json: the fingerprint 6a0605e6e2fa… does not match the ranks"):
        load_encoding(path)


def test_a_vocabulary_that_cannot_be_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["aaaa bbbb"] * 5)
    with pytest.raises(ConfigError, match="vocab_size = 257: 256 bytes and end-of-text alone make 257"):
        train_tokenizer([source], 257, tmp_path / "t.json")
    with pytest.raises(
        ConfigError, match=r"vocab_size = 1000: the sources repeat too little and give \d+ ids at most"
    ):
        train_tokenizer([source], 1000, tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()


def test_training_stops_at_a_broken_document(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["fine", 5])
    with pytest.raises(DataError, match=r"a\.jsonl:2: 'text' is int, not a string"):
        train_tokenizer([source], 300, tmp_path / "t.json")
