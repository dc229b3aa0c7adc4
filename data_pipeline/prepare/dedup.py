"""Which documents are exact copies of an earlier one: by the hash of their text, before anything is encoded.

Two passes over the sources: the first leaves 16 bytes a document on disk, chunk by chunk, and the second
leaves out what they show to be a copy. The first document in the order of the sources stays, so neither the
number of workers nor a kill can be seen in what is left. Memory: a byte a document, and one bucket of hashes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.durable import write_durably
from data_pipeline.prepare.chunk import Chunk
from data_pipeline.sources.documents import BadDocument, DocumentReader

FOLDER = "hashes"
# Hashes that are compared at a time, 16 bytes each.
_BUCKET_BYTES = 64 << 20
_HASH = np.dtype([("high", ">u8"), ("low", ">u8")])


def is_hashed(work: Path, chunk: Chunk) -> bool:
    """Whether the documents of `chunk` have been hashed."""
    return _hash_file(work, chunk).exists()


def hash_chunk(work: Path, chunk: Chunk, text_field: str) -> Iterator[None]:
    """Leave the xxh3_128 of each document that is neither broken nor empty, in order; durable at the end."""
    hashes = bytearray()
    for span in chunk.spans:
        for document in DocumentReader(span, text_field):
            if document and not isinstance(document, BadDocument):
                hashes += xxhash.xxh3_128_digest(document)
        yield
    write_durably(_hash_file(work, chunk), bytes(hashes))


def mark_copies(work: Path, chunks: Sequence[Chunk]) -> dict[Chunk, str]:
    """Note for each chunk which of its documents are copies: each note's checksum, "" where none is."""
    sizes = [_hash_file(work, chunk).stat().st_size // _HASH.itemsize for chunk in chunks]
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    is_copy = np.zeros(int(starts[-1]), dtype=np.bool_)
    buckets = 1 + int(starts[-1]) * _HASH.itemsize // _BUCKET_BYTES
    for bucket in range(buckets):
        values, places = [], []
        for chunk, start in zip(chunks, starts[:-1].tolist(), strict=True):
            hashes = np.frombuffer(_hash_file(work, chunk).read_bytes(), _HASH)
            here = np.flatnonzero(hashes["high"] % buckets == bucket)
            values.append(hashes[here])
            places.append(here + start)
        _mark(np.concatenate(values), np.concatenate(places), is_copy)
    notes = {}
    for chunk, start, size in zip(chunks, starts[:-1].tolist(), sizes, strict=True):
        of_piece = is_copy[start : start + size]
        note = of_piece.tobytes() if of_piece.any() else b""
        write_durably(_note_file(work, chunk), note)
        notes[chunk] = xxhash.xxh3_128_hexdigest(note) if note else ""
    return notes


def _mark(values: NDArray[np.void], places: NDArray[np.int64], is_copy: NDArray[np.bool_]) -> None:
    order = np.lexsort((places, values["low"], values["high"]))
    ordered = values[order]
    is_same = (ordered["high"][1:] == ordered["high"][:-1]) & (ordered["low"][1:] == ordered["low"][:-1])
    is_copy[places[order][1:][is_same]] = True


def copies(work: Path, chunk: Chunk) -> bytes:
    """A byte for each document of `chunk` that was hashed, 1 for a copy; nothing where there is no copy."""
    return _note_file(work, chunk).read_bytes()


def _hash_file(work: Path, chunk: Chunk) -> Path:
    return work / FOLDER / f"{chunk.name}.xxh3"


def _note_file(work: Path, chunk: Chunk) -> Path:
    return work / FOLDER / f"{chunk.name}.copies"
