"""Rows of whole documents instead of windows of a stream: best-fit packing, as a pure function of the row.

Best-fit-decreasing puts each document into the fullest row that still has room for it (Ding et al. 2024,
"Fewer Truncations Improve Language Modeling", arXiv:2404.10830); only documents longer than a row are cut,
into full rows and a rest. Done over a whole corpus that needs its index in memory and a table of rows. Here
the stream is taken in blocks of a fixed number of rows, each packed by itself when one of its rows is read:
nothing is kept on disk, and a row is found in the time that packing its block takes. A block of R rows holds
exactly R rows of tokens, so that the number of rows is known without packing; for that, the few documents
that find no room are cut over the gaps. Every token is an input exactly once, and no row is padded.
"""

from bisect import bisect_left, insort
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset.token_stream import TokenStream

# Documents a block holds on average: packing takes about a microsecond for each. Of log-normal lengths of
# mean 800 and rows of 2,048, 1% of the documents that fit into a row are cut then, and 26% without packing.
_DOCUMENTS = 1024
_LEAST_ROWS, _MOST_ROWS = 16, 1024
_KEPT_BLOCKS = 64  # small data sets are packed once; of large ones hardly a block is met again

Part = tuple[int, int]


class PackedRows:
    """The rows of `context` tokens of a stream, best-fit packed: as many as there are windows."""

    def __init__(self, stream: TokenStream, context: int) -> None:
        self._stream, self._context = stream, context
        self._rows = (stream.tokens - 1) // context
        self._of_block = rows_of_block(stream.tokens, stream.documents, context)
        self._pack = lru_cache(_KEPT_BLOCKS)(self._pack_block)

    def parts(self, row: int) -> list[Part]:
        """Which tokens [start, stop) of the stream make row `row`, one after the other."""
        return self._pack(row // self._of_block)[row % self._of_block]

    def _pack_block(self, block: int) -> list[list[Part]]:
        first, last = block * self._of_block, min((block + 1) * self._of_block, self._rows)
        begin, end = first * self._context, last * self._context
        starts = self._stream.document_starts(begin + 1, end)
        return pack(np.concatenate([[begin], starts, [end]]), self._context)


def rows_of_block(tokens: int, documents: int, context: int) -> int:
    """How many rows of `context` make a block of a stream of `tokens` in `documents`."""
    wanted = _DOCUMENTS * tokens // max(1, documents) // context
    return min(max(wanted, _LEAST_ROWS), _MOST_ROWS)


def pack(edges: NDArray[np.int64], context: int) -> list[list[Part]]:
    """The parts [start, stop) of each row of a block, `context` tokens each.

    `edges` are where the block begins, where documents begin in it, and where it ends: a multiple of
    `context` later. Where a document is cut, the part that goes on elsewhere is the last of its row, but for
    the one that the end of the block cuts.
    """
    starts, stops = edges[:-1], edges[1:]
    rows: list[list[Part]] = []
    for start, stop in _longer(starts, stops, context):
        rows += [[(at, at + context)] for at in range(start, stop, context)]
    lengths = (stops - starts) % context
    order = np.argsort(-lengths, kind="stable")
    order = order[: np.count_nonzero(lengths)]
    size = int(edges[-1] - edges[0]) // context
    # Room left and number of each row that has some, ascending.
    open_rows: list[tuple[int, int]] = []
    homeless: list[Part] = []
    for stop, length in zip(stops[order].tolist(), lengths[order].tolist(), strict=True):
        at = bisect_left(open_rows, (length, 0))
        if at < len(open_rows):
            room, row = open_rows.pop(at)
        elif len(rows) < size:
            room, row = context, len(rows)
            rows.append([])
        else:
            homeless.append((stop - length, stop))
            continue
        rows[row].append((stop - length, stop))
        if room > length:
            insort(open_rows, (room - length, row))
    _cut_over_gaps(homeless, open_rows, rows)
    return rows


def _longer(starts: NDArray[np.int64], stops: NDArray[np.int64], context: int) -> list[Part]:
    """What of each document makes full rows: all but the rest at its end."""
    long = np.flatnonzero(stops - starts >= context)
    wholes = (stops[long] - starts[long]) // context * context
    return list(zip(starts[long].tolist(), (starts[long] + wholes).tolist(), strict=True))


def _cut_over_gaps(homeless: list[Part], open_rows: list[tuple[int, int]], rows: list[list[Part]]) -> None:
    """Fill the rows with what found no room in one, the longest first into the largest gaps."""
    for start, stop in homeless:
        while start < stop:
            room, row = open_rows.pop()
            end = min(stop, start + room)
            rows[row].append((start, end))
            if room > end - start:
                insort(open_rows, (room - (end - start), row))
            start = end
