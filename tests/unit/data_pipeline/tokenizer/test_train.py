import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from data_pipeline.corpus import packaged_corpus
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources.held_out import is_held_out
from data_pipeline.tokenizer.encoding import TRAINING_PATTERN, Encoding, load_encoding
from data_pipeline.tokenizer.train import train_tokenizer
from launcher.cli import commands
from tests.unit.data_pipeline.support import packaged_texts, write_jsonl


def test_training_again_gives_the_packaged_encoding_byte_for_byte(tmp_path: Path, encoding: Encoding) -> None:
    out = tmp_path / "outlast-4k.json"
    trained = train_tokenizer([packaged_corpus()], 4096, out, val_fraction=0.1)
    assert trained == encoding
    assert out.read_bytes() == encoding.to_json()
    assert load_encoding(out) == encoding
    assert encoding.vocab_size == 4096
    assert encoding.end_of_text == 4095


def test_ids_equal_those_of_the_tokenizer_that_was_trained(encoding: Encoding) -> None:
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
        ours = list(encoding.bpe.decode_tokens_bytes(encoding.encode(text).tolist()))
        assert ours == theirs


def _byte_characters() -> dict[int, str]:
    # transformers' table is an independent source of GPT-2's mapping of bytes to characters
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return dict(bytes_to_unicode())


def test_an_impossible_vocabulary_size_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["aaaa bbbb"] * 5)
    with pytest.raises(
        ConfigError, match="vocab_size = 257: must be above 257, the 256 bytes and end-of-text"
    ):
        train_tokenizer([source], 257, tmp_path / "t.json")
    with pytest.raises(
        ConfigError,
        match=r"vocab_size = 1000: the sources contain too few repetitions and support at most \d+ ids",
    ):
        train_tokenizer([source], 1000, tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()


def test_training_stops_at_a_broken_document(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["fine", 5])
    with pytest.raises(DataError, match=r"a\.jsonl:2: 'text' is int, not a string"):
        train_tokenizer([source], 300, tmp_path / "t.json")


@pytest.mark.parametrize("run", ["ACGT" * 100_000, " " * 500_000, "=-" * 200_000, "\u5b57" * 300_000])
def test_an_unbroken_run_is_trained_on_in_linear_time(tmp_path: Path, run: str) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [run, "some ordinary words"])
    started = time.process_time()
    train_tokenizer([source], 260, tmp_path / "t.json")
    assert time.process_time() - started < 10


def test_the_command_says_what_it_read_and_refuses_to_overwrite(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "raw" / "a.jsonl", packaged_texts()[:100])
    (tmp_path / "raw" / "notes.pdf").touch()
    out = tmp_path / "t.json"
    arguments = ["tokenizer", "train", str(source.parent), "--vocab-size", "500", "--out", str(out)]
    done = CliRunner().invoke(commands, arguments, standalone_mode=False)
    assert done.exception is None
    size_bytes = sum(len(text.encode()) for text in packaged_texts()[:100])
    assert f"read 100 documents of {size_bytes:,} bytes in 1 files; ignoring 1 files" in done.stderr
    encoding = load_encoding(out)
    tokens = len(encoding.encode("".join(packaged_texts()[:100])))
    assert f"{size_bytes / tokens:.2f} bytes a token, on the first {size_bytes:,} bytes" in done.stderr
    before = out.read_bytes()
    refused = CliRunner().invoke(commands, arguments, standalone_mode=False)
    assert "t.json exists already; remove it, or name another file" in str(refused.exception)
    assert out.read_bytes() == before
