from pathlib import Path

from gpt.run import record
from gpt.run.bad_nodes import read_bad_nodes, record_bad_node
from gpt.run.records import BadNode
from gpt.run.run_dir import RunDir


def test_recorded_nodes_are_read_back_in_order(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert list(read_bad_nodes(run_dir)) == []
    bad = [
        BadNode(node="node2", reason="its clock", attempt=1),
        BadNode(node="node1", reason="no GPU", attempt=3),
    ]
    for node in bad:
        record_bad_node(run_dir, node)
    assert list(read_bad_nodes(run_dir)) == bad
    [first, _] = record.read(run_dir.bad_nodes)
    assert [*first] == ["time", "node", "reason", "attempt"]


def test_a_line_that_is_no_bad_node_is_ignored(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.bad_nodes.write_text('{"reason": "its clock"}\n{"node": "node1"}\n', encoding="utf-8")
    assert list(read_bad_nodes(run_dir)) == [BadNode(node="node1")]
