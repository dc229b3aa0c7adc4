"""Trains a byte-level BPE on a user's text.

Only this module of the tokenizer imports the readers of raw text.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources.documents import BadDocument, DocumentReader
from data_pipeline.sources.files import find_files
from data_pipeline.sources.held_out import is_held_out
from data_pipeline.sources.spans import Span
from data_pipeline.tokenizer.encoding import END_OF_TEXT, TRAINING_PATTERN, Encoding


def train_tokenizer(
    sources: Sequence[str | Path],
    vocab_size: int,
    out: Path,
    *,
    text_field: str = "text",
    val_fraction: float = 0.0,
    seed: int = 0,
) -> Encoding:
    """A byte-level BPE of `vocab_size` ids, including end-of-text, trained on `sources` and written to `out`.

    The encoding's name is that of the file `out` without its suffix. Documents that `prepare` holds out with
    the same `val_fraction` and `seed` are not read. Raises ConfigError if the sources do not support a
    vocabulary of that size, DataError at the first broken document.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size <= 257:
        raise ConfigError(f"vocab_size = {vocab_size}: must be above 257, the 256 bytes and end-of-text")
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
    bpe.train_from_iterator(_training_texts(sources, text_field, val_fraction, seed), trainer)
    ranks = _ranks_from_merges(json.loads(bpe.to_str())["model"]["merges"])
    if len(ranks) != vocab_size - 1:
        raise ConfigError(
            f"vocab_size = {vocab_size}: the sources contain too few repetitions and support at most "
            f"{len(ranks) + 1} ids"
        )
    encoding = Encoding(out.stem, TRAINING_PATTERN, ranks, {END_OF_TEXT: vocab_size - 1})
    out.write_bytes(encoding.to_json())
    return encoding


def _training_texts(
    sources: Sequence[str | Path], text_field: str, val_fraction: float, seed: int
) -> Iterator[str]:
    for file in find_files(sources)[0]:
        for document in DocumentReader(Span(file, 0, file.size_bytes), text_field):
            if isinstance(document, BadDocument):
                raise DataError(f"{file.location}:{document.line}: {document.reason}")
            if not is_held_out(document, val_fraction, seed):
                yield document.decode()


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
