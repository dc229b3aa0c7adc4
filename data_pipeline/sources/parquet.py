"""Opens Parquet files and finds the row groups of a span."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from data_pipeline.sources.files import SourceFile


@contextmanager
def open_table(source: SourceFile) -> Iterator[Any]:
    """The `pyarrow.parquet.ParquetFile` of `source`. Arrow memory-maps a local file itself."""
    import pyarrow.parquet

    if not source.is_remote:
        with pyarrow.parquet.ParquetFile(source.location) as table:
            yield table
        return
    with source.open() as file, pyarrow.parquet.ParquetFile(file) as table:
        yield table


def row_groups_within(metadata: Any, start: int, stop: int) -> list[int]:
    """The row groups that begin in the bytes [start, stop); a group begins where its first column does."""
    found = []
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if group.num_rows == 0:  # it need not have any page
            continue
        column = group.column(0)
        pages = [offset for offset in (column.dictionary_page_offset, column.data_page_offset) if offset]
        if start <= min(pages, default=0) < stop:
            found.append(index)
    return found
