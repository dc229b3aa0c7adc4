import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.sources.documents import BadDocument, DocumentReader
from data_pipeline.sources.files import find_files
from data_pipeline.sources.spans import Span, locate_line
from tests.unit.data_pipeline.support import json_lines


@given(
    lines=st.lists(st.text(alphabet="ab\n\r é", max_size=12), min_size=1, max_size=20),
    cuts=st.lists(st.integers(0, 400), max_size=5),
    ends_with_newline=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_spans_of_a_file_contain_each_line_once_and_locate_it(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], cuts: list[int], ends_with_newline: bool
) -> None:
    path = tmp_path_factory.mktemp("spans") / "a.jsonl"
    raw = json_lines(*lines)
    path.write_bytes(raw if ends_with_newline else raw[:-1])
    (file,), _ = find_files([path])
    edges = sorted({0, file.size_bytes, *(cut for cut in cuts if cut < file.size_bytes)})
    found: list[bytes | BadDocument] = []
    for start, stop in itertools.pairwise(edges):
        span = Span(file, start, stop)
        reader = DocumentReader(span, "text")
        for document in reader:
            found.append(document)
            assert locate_line(span, reader.line) == f"{path}:{len(found)}"
    assert found == [line.encode() for line in lines]
