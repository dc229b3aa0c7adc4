"""Finds documents that are exact copies of an earlier one, by the hash of their text.

This takes two passes over the sources. The first writes a 16-byte hash per document to disk, chunk by chunk.
The second encodes the documents without the copies. Of equal documents the first in the order of the sources
stays, so neither the number of workers nor a crash changes the result. Finding the copies needs one byte of
memory per document, and one bucket of hashes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.durable import write_durably
from data_pipeline.prepare.chunk import Chunk
from data_pipeline.sources.documents import BadDocument, DocumentReader

HASH_FOLDER = "hashes"
# The size of the hashes that are compared at a time.
BUCKET_BYTES = 64 << 20
_HASH = np.dtype([("high", ">u8"), ("low", ">u8")])


def is_hashed(work: Path, chunk: Chunk) -> bool:
    """Whether the documents of `chunk` have been hashed."""
    return _hash_file(work, chunk).exists()


def hash_chunk(
    work: Path, chunk: Chunk, text_field: str, document_separator: str | None = None
) -> Iterator[None]:
    """Write the xxh3_128 of each document that is neither broken nor empty, in order; durable at the end.

    Yields after each span.
    """
    hashes = bytearray()
    for span in chunk.spans:
        for document in DocumentReader(span, text_field, document_separator):
            if document and not isinstance(document, BadDocument):
                hashes += xxhash.xxh3_128_digest(document)
        yield
    write_durably(_hash_file(work, chunk), bytes(hashes))


def mark_copies(work: Path, chunks: Sequence[Chunk]) -> dict[Chunk, str]:
    """Write a note for each chunk that marks its copies.

    Returns the checksum of each note, or an empty string for a chunk without copies.
    """
    sizes = [_hash_file(work, chunk).stat().st_size // _HASH.itemsize for chunk in chunks]
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    is_copy = np.zeros(int(starts[-1]), dtype=np.bool_)
    buckets = 1 + int(starts[-1]) * _HASH.itemsize // BUCKET_BYTES
    for bucket in range(buckets):
        values, positions = [], []
        for chunk, start in zip(chunks, starts[:-1].tolist(), strict=True):
            hashes = np.frombuffer(_hash_file(work, chunk).read_bytes(), _HASH)
            in_bucket = np.flatnonzero(hashes["high"] % buckets == bucket)
            values.append(hashes[in_bucket])
            positions.append(in_bucket + start)
        _mark_bucket(np.concatenate(values), np.concatenate(positions), is_copy)
    notes = {}
    for chunk, start, size in zip(chunks, starts[:-1].tolist(), sizes, strict=True):
        marks = is_copy[start : start + size]
        note = marks.tobytes() if marks.any() else b""
        write_durably(_note_file(work, chunk), note)
        notes[chunk] = xxhash.xxh3_128_hexdigest(note) if note else ""
    return notes


def _mark_bucket(values: NDArray[np.void], positions: NDArray[np.int64], is_copy: NDArray[np.bool_]) -> None:
    order = np.lexsort((positions, values["low"], values["high"]))
    ordered = values[order]
    is_same = (ordered["high"][1:] == ordered["high"][:-1]) & (ordered["low"][1:] == ordered["low"][:-1])
    is_copy[positions[order][1:][is_same]] = True


def read_copies_note(work: Path, chunk: Chunk) -> bytes:
    """A byte for each hashed document of `chunk`, 1 for a copy; empty if the chunk has no copies."""
    return _note_file(work, chunk).read_bytes()


def _hash_file(work: Path, chunk: Chunk) -> Path:
    return work / HASH_FOLDER / f"{chunk.name}.xxh3"


def _note_file(work: Path, chunk: Chunk) -> Path:
    return work / HASH_FOLDER / f"{chunk.name}.copies"
