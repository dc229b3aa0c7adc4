import hashlib
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.prepare.pipeline import prepare
from data_pipeline.tokenizer.encoding import Encoding, load_encoding
from tests.unit.data_pipeline.support import config, packaged_texts, write_jsonl
from tests.unit.data_pipeline.tokenizer.support import write_rank_file


def test_a_rank_file_with_a_pattern_is_an_encoding(encoding: Encoding, tmp_path: Path) -> None:
    path = write_rank_file(tmp_path / "mine.tiktoken", encoding.ranks)
    loaded = load_encoding(path, encoding.pattern)
    assert loaded.name == "mine"
    assert loaded.fingerprint == encoding.fingerprint  # end-of-text also has the next free id there
    by_name = load_encoding(path, "cl100k_base")
    text = "\n\n".join(packaged_texts()[:3])
    assert by_name.encode(text).tolist() == encoding.encode(text).tolist()  # an equivalent pattern
    source = write_jsonl(tmp_path / "a.jsonl", [text])
    prepare(config(tmp_path / "data", source, tokenizer=str(path), tokenizer_pattern="cl100k_base"))
    assert load_encoding(tmp_path / "data").fingerprint == by_name.fingerprint


def test_problems_of_a_rank_file_are_reported(encoding: Encoding, tmp_path: Path) -> None:
    path = write_rank_file(tmp_path / "mine.tiktoken", encoding.ranks)
    with pytest.raises(
        ConfigError, match=r"mine\.tiktoken is not one of tiktoken's \(r50k_base, .*set tokeni"
    ):
        load_encoding(path)
    with pytest.raises(ConfigError, match=r"tokenizer_pattern = '\('"):
        load_encoding(path, "(")
    with pytest.raises(
        ConfigError, match=r"tokenizer_pattern is only for \.tiktoken files; tokenizer 'outlast-4k'"
    ):
        load_encoding("outlast-4k", "cl100k_base")
    with pytest.raises(DataError, match="is not the file that tiktoken publishes under this name"):
        load_encoding(write_rank_file(tmp_path / "cl100k_base.tiktoken", encoding.ranks))
    path.write_bytes(path.read_bytes() + b"no rank\n")
    with pytest.raises(DataError, match=r"mine\.tiktoken:\d+: not a rank"):
        load_encoding(path, "cl100k_base")
    few = {token: rank for token, rank in encoding.ranks.items() if token != b"a"}
    with pytest.raises(DataError, match=r"1 of the 256 single bytes have no rank, for example 97"):
        load_encoding(write_rank_file(path, few), "cl100k_base")
    with pytest.raises(DataError, match="two byte strings have the same rank"):
        load_encoding(write_rank_file(path, {**encoding.ranks, b"zzzzqq": 5}), "cl100k_base")


def test_a_rank_file_that_tiktoken_publishes_needs_no_pattern(
    encoding: Encoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published files are not available here, so tiktoken's constructor gets the checksum of another."""
    from tiktoken_ext import openai_public

    path = write_rank_file(tmp_path / "cl100k_base.tiktoken", encoding.ranks)
    theirs = openai_public.cl100k_base
    known = next(
        value for value in theirs.__code__.co_consts if isinstance(value, tuple) and "expected_hash" in value
    )
    assert known == ("expected_hash",)  # the constructor still uses this keyword
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
