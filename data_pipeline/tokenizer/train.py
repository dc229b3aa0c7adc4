"""Trains a byte-level BPE on a user's text.

Only this module of the tokenizer imports the readers of raw text.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from data_pipeline.durable import write_durably
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources.documents import BadDocument, DocumentReader
from data_pipeline.sources.files import describe_ignored, find_files
from data_pipeline.sources.held_out import is_held_out
from data_pipeline.sources.spans import Span, locate_line
from data_pipeline.tokenizer.encoding import END_OF_TEXT, TRAINING_PATTERN, Encoding

# The trainer's time grows with the square of the length of a word. Longer runs of letters, whitespace or
# signs than this occur in no prose, so cutting them changes the merges of no ordinary text.
_LONGEST_RUN = 1000
_LONG_RUN = re.compile(
    rf"[^\W\d_]{{{_LONGEST_RUN + 1},}}|\s{{{_LONGEST_RUN + 1},}}|[^\w\s]{{{_LONGEST_RUN + 1},}}"
)
# Bytes a token are measured on the first texts of about this size.
_SAMPLE_BYTES = 1 << 20


def train_tokenizer(
    sources: Sequence[str | Path],
    vocab_size: int,
    out: Path,
    *,
    text_field: str = "text",
    val_fraction: float = 0.0,
    seed: int = 0,
    message: Callable[[str], None] = lambda _: None,
) -> Encoding:
    """A byte-level BPE of `vocab_size` ids, including end-of-text, trained on `sources` and written to `out`.

    The encoding's name is that of the file `out` without its suffix. Documents that `prepare` holds out with
    the same `val_fraction` and `seed` are not read. `message` is told what was read, and the bytes a token.
    Raises ConfigError if `out` exists or the sources do not support a vocabulary of that size, DataError at
    the first broken document.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size <= 257:
        raise ConfigError(f"vocab_size = {vocab_size}: must be above 257, the 256 bytes and end-of-text")
    if out.exists():
        raise ConfigError(f"{out} exists already; remove it, or name another file")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TRAINING_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    texts = _TrainingTexts(sources, text_field, val_fraction, seed)
    bpe.train_from_iterator(texts.cut(), trainer)
    message(texts.summary)
    ranks = _ranks_from_merges(json.loads(bpe.to_str())["model"]["merges"])
    if len(ranks) != vocab_size - 1:
        raise ConfigError(
            f"vocab_size = {vocab_size}: the sources contain too few repetitions and support at most "
            f"{len(ranks) + 1} ids"
        )
    encoding = Encoding(out.stem, TRAINING_PATTERN, ranks, {END_OF_TEXT: vocab_size - 1})
    write_durably(out, encoding.to_json())
    sample = "".join(texts.sample)
    if sample:
        message(
            f"{len(sample.encode()) / len(encoding.encode(sample)):.2f} bytes a token, on the first "
            f"{len(sample.encode()):,} bytes"
        )
    return encoding


class _TrainingTexts:
    """The texts to train on. `sample` contains the first ones, and `ignored` the files that are not read."""

    def __init__(
        self, sources: Sequence[str | Path], text_field: str, val_fraction: float, seed: int
    ) -> None:
        self._files, self.ignored = find_files(sources)
        self._text_field = text_field
        self._val_fraction = val_fraction
        self._seed = seed
        self.sample: list[str] = []
        self._documents = self._bytes = self._held_out = 0

    def cut(self) -> Iterator[str]:
        """The texts, with unbroken runs cut into parts, which the trainer reads in linear time."""
        for text in self._read():
            begin = 0
            for run in _LONG_RUN.finditer(text):
                for end in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN):
                    yield text[begin:end]
                    begin = end
            yield text[begin:]

    def _read(self) -> Iterator[str]:
        for file in self._files:
            span = Span(file, 0, file.size_bytes)
            for document in DocumentReader(span, self._text_field):
                if isinstance(document, BadDocument):
                    raise DataError(f"{locate_line(span, document.line)}: {document.reason}")
                if is_held_out(document, self._val_fraction, self._seed):
                    self._held_out += 1
                    continue
                text = document.decode()
                if self._bytes < _SAMPLE_BYTES:
                    self.sample.append(text[:_SAMPLE_BYTES])
                self._documents += 1
                self._bytes += len(document)
                yield text

    @property
    def summary(self) -> str:
        """A sentence about what was read."""
        held_out = f", without {self._held_out:,} held out for validation" if self._held_out else ""
        ignored = f"; {describe_ignored(self.ignored)}" if self.ignored else ""
        return (
            f"read {self._documents:,} documents of {self._bytes:,} bytes in {len(self._files):,} files"
            f"{held_out}{ignored}"
        )


def _ranks_from_merges(merges: Iterable[Sequence[str]]) -> dict[bytes, int]:
    """Ids by byte string: first the 256 bytes in order, then the merges in the order they were learned."""
    byte_of = _byte_of_character()
    ranks = {bytes([value]): value for value in range(256)}
    for merge in merges:
        token = bytes(byte_of[character] for character in "".join(merge))
        ranks.setdefault(token, len(ranks))
    return ranks


def _byte_of_character() -> dict[str, int]:
    # GPT-2's mapping of bytes to characters: printable Latin-1 bytes map to themselves, the others to the
    # characters from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {
        chr(0x100 + index): value for index, value in enumerate(others)
    }
