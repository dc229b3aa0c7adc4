import base64
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.prepare.pipeline import prepare
from data_pipeline.tokenizer.encoding import END_OF_TEXT, Encoding, load_encoding
from data_pipeline.tokenizer.fast_encoder import TiktokenEncoder
from data_pipeline.tokenizer.rank_files import PUBLISHED
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
        ConfigError, match=r"tokenizer_pattern is only for rank files \(\.tiktoken\); tokenizer 'outlast-4k'"
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


@pytest.mark.parametrize(
    "pattern",
    [r"\\s+|[a-z]+", r"\w+", "ZZZ", r"[ -~\s]+", r"[^\U000e0041]+|\s", r"\p{L}+|\p{N}+|\s+"],
)
def test_a_pattern_that_loses_text_is_refused_before_anything_is_prepared(
    encoding: Encoding, tmp_path: Path, pattern: str
) -> None:
    path = write_rank_file(tmp_path / "mine.tiktoken", encoding.ranks)
    with pytest.raises(ConfigError, match="loses text, because its split pattern"):
        load_encoding(path, pattern)
    hand_made = tmp_path / "mine.json"
    hand_made.write_bytes(Encoding("mine", pattern, encoding.ranks, {END_OF_TEXT: 4095}).to_json())
    source = write_jsonl(tmp_path / "a.jsonl", ["second  document; with punctuation"])
    with pytest.raises(ConfigError, match="loses text, because its split pattern"):
        prepare(config(tmp_path / "data", source, tokenizer=str(hand_made)))
    assert not (tmp_path / "data").exists()


def test_the_pattern_of_a_published_encoding_loses_no_text(encoding: Encoding, tmp_path: Path) -> None:
    path = write_rank_file(tmp_path / "mine.tiktoken", encoding.ranks)
    for name in PUBLISHED:
        load_encoding(path, name)


def test_a_document_that_the_pattern_does_not_cover_is_broken(encoding: Encoding) -> None:
    lossy = Encoding("lossy", r"[a-z ]+", encoding.ranks, encoding.special_tokens)
    assert TiktokenEncoder(lossy).encode([b"all of it"])[0][-1] == 4095
    with pytest.raises(DataError, match="its split pattern does not cover all of the text"):
        TiktokenEncoder(lossy).encode([b"all of it", b"not ALL of it"])


def test_the_end_of_text_of_a_rank_file_can_be_set(encoding: Encoding, tmp_path: Path) -> None:
    path = write_rank_file(tmp_path / "mine.tiktoken", encoding.ranks)
    pattern = encoding.pattern
    named = load_encoding(path, pattern, "<|end_of_text|>=5001")
    assert (named.end_of_text, named.vocab_size) == (5001, 5002)
    assert dict(named.special_tokens) == {"<|end_of_text|>": 5001}
    assert load_encoding(path, pattern, "5001").special_tokens == {END_OF_TEXT: 5001}
    (tmp_path / "named.json").write_bytes(named.to_json())
    assert load_encoding(tmp_path / "named.json") == named
    same_id = load_encoding(path, pattern, "5001")
    assert same_id.fingerprint != named.fingerprint
    assert "end_of_text" not in json.loads(same_id.to_json())
    source = write_jsonl(tmp_path / "a.jsonl", ["one"])
    settings = {"tokenizer": str(path), "tokenizer_pattern": pattern, "end_of_text": "<|end_of_text|>=5001"}
    manifest = prepare(config(tmp_path / "data", source, **settings))
    assert manifest.encoding.end_of_text == 5001
    assert load_encoding(tmp_path / "data") == replace(named, name="mine")


@pytest.mark.parametrize(
    ("end_of_text", "reason"),
    [
        ("<|end|>=97", "gives id 97 to the bytes b'.+'; the next free id is 4095"),
        ("<|end|>", "expected TOKEN=ID"),
        ("<|end|>=-1", "expected TOKEN=ID"),
        ("=4095", "expected TOKEN=ID"),
        ("<|end|>=99999999999", "an id is at most 16777215"),
    ],
)
def test_an_impossible_end_of_text_is_refused(
    encoding: Encoding, tmp_path: Path, end_of_text: str, reason: str
) -> None:
    path = write_rank_file(tmp_path / "mine.tiktoken", encoding.ranks)
    with pytest.raises(ConfigError, match=f"end_of_text = .*{reason}"):
        load_encoding(path, encoding.pattern, end_of_text)
    with pytest.raises(ConfigError, match=r"end_of_text is only for rank files \(\.tiktoken\)"):
        load_encoding("outlast-4k", None, end_of_text)


def test_the_next_id_is_no_end_of_text_where_a_known_tokenizer_uses_it(tmp_path: Path) -> None:
    """In Llama 3 the id after the ranks begins a text."""
    ranks = {bytes([value]): value for value in range(256)} | {b"the last": 127_999}
    path = write_rank_file(tmp_path / "tokenizer.model", ranks)
    with pytest.raises(ConfigError, match=r"as in the rank file of Llama 3, .*<\|end_of_text\|>=128001"):
        load_encoding(path, "cl100k_base")
    assert load_encoding(path, "cl100k_base", "<|end_of_text|>=128001").end_of_text == 128_001
    assert load_encoding(path, "cl100k_base", "128000").special_tokens == {END_OF_TEXT: 128_000}


def test_a_rank_file_of_any_name_is_recognised(encoding: Encoding, tmp_path: Path) -> None:
    path = write_rank_file(tmp_path / "tokenizer.model", encoding.ranks)
    assert load_encoding(path, encoding.pattern).fingerprint == encoding.fingerprint
    with pytest.raises(ConfigError, match="a rank file does not say how text is split"):
        load_encoding(path)


@pytest.mark.parametrize("rank", [-1, 2**24, 2**31 - 1, 2**32, 10**30])
def test_ranks_that_are_no_ids_are_refused(encoding: Encoding, tmp_path: Path, rank: int) -> None:
    path = write_rank_file(tmp_path / "mine.tiktoken", {**encoding.ranks, b"zzzzqq": rank})
    with pytest.raises(DataError, match=rf"mine\.tiktoken:4096: rank {rank} is outside 0 to 16777215"):
        load_encoding(path, "cl100k_base")
    content = json.loads(encoding.to_json())
    content["ranks"][base64.b64encode(b"zzzzqq").decode()] = rank
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"id {rank} is outside 0 to 16777215"):
        load_encoding(tmp_path / "mine.json")


def test_bytes_with_two_ranks_are_refused(encoding: Encoding, tmp_path: Path) -> None:
    path = write_rank_file(tmp_path / "mine.tiktoken", encoding.ranks)
    path.write_bytes(path.read_bytes() + base64.b64encode(b"a") + b" 5000\n")
    with pytest.raises(DataError, match=r"mine\.tiktoken:4096: the bytes b'a' have a rank already, 97"):
        load_encoding(path, "cl100k_base")


def test_a_special_token_with_the_id_of_bytes_is_refused(encoding: Encoding, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(Encoding("mine", encoding.pattern, encoding.ranks, {END_OF_TEXT: 97}).to_json())
    with pytest.raises(DataError, match="two tokens have the same id"):
        load_encoding(path)


@pytest.mark.parametrize("name", ["mine.tiktoken", "encoding.json", "tokenizer.model"])
def test_a_git_lfs_pointer_is_named_as_such(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 9\n")
    with pytest.raises(DataError, match=r"is a git-lfs pointer, not the file itself: .* `git lfs pull`"):
        load_encoding(path)
