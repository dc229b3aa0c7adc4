import json
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.tokenizer.encoding import TRAINING_PATTERN, Encoding, load_encoding
from tests.unit.data_pipeline.support import packaged_texts

# o200k's pattern (tiktoken, openai_public.py), for which tiktoken panics on a million spaces
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


@given(text=st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_decoding_the_ids_of_any_text_returns_it(encoding: Encoding, text: str) -> None:
    text = text.encode(errors="ignore").decode()
    ids = encoding.encode(text)
    assert encoding.decode(ids) == text
    assert encoding.token_bytes()[ids].sum() == len(text.encode())


def test_token_bytes_are_the_lengths_of_tokens_and_0_for_special_tokens(encoding: Encoding) -> None:
    lengths = encoding.token_bytes()
    assert lengths.shape == (4096,)
    assert [lengths[id] for id in range(256)] == [1] * 256
    assert lengths[encoding.end_of_text] == 0
    assert all(lengths[id] == len(encoding.bpe.decode_single_token_bytes(id)) for id in range(4095))


def test_text_that_looks_like_a_special_token_is_encoded_as_text(encoding: Encoding) -> None:
    ids = encoding.encode("a<|endoftext|>b")
    assert encoding.end_of_text not in ids
    assert encoding.decode(ids) == "a<|endoftext|>b"


def test_a_million_spaces_are_encoded(encoding: Encoding) -> None:
    o200k_like = Encoding("o200k-like", O200K_PATTERN, encoding.ranks, encoding.special_tokens)
    text = "before" + " " * 1_200_000 + "after" + "\n" * 1_200_000 + "end"
    with pytest.raises(
        ValueError, match="Max stack size exceeded"
    ):  # otherwise the workaround is no longer needed
        o200k_like.bpe.encode_to_numpy(text, disallowed_special=())
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


def test_a_tiktoken_name_gives_tiktokens_ids(encoding: Encoding, monkeypatch: pytest.MonkeyPatch) -> None:
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
        ConfigError, match=r"tokenizer 'gpt2' has no <\|endoftext\|>, which must end every document"
    ):
        load_encoding("gpt2")


def test_the_error_for_a_tiktoken_name_without_a_network_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens on this port
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DataError, match=r"'p50k_edit': tiktoken has no copy .*, with TIKTOKEN_CACHE_DIR"):
        load_encoding("p50k_edit")


def test_the_error_for_an_unknown_name_suggests_the_nearest_one() -> None:
    with pytest.raises(
        ConfigError, match="'outlast4k' is neither a file nor a known encoding; did you mean 'outlast-4k'"
    ):
        load_encoding("outlast4k")
    with pytest.raises(
        ConfigError, match="neither a file nor a known encoding; known encodings: outlast-4k, gpt2"
    ):
        load_encoding("zzz")


def test_a_file_that_is_not_an_encoding_is_refused(tmp_path: Path, encoding: Encoding) -> None:
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
