"""bad_nodes.jsonl: the nodes that failed their check. A user who has repaired one removes its line."""

from collections.abc import Iterator
from contextlib import suppress

from pydantic import ValidationError

from gpt.run import record
from gpt.run.records import BadNode
from gpt.run.run_dir import RunDir


def record_bad_node(run_dir: RunDir, bad: BadNode) -> None:
    """Append `bad` to bad_nodes.jsonl."""
    record.append(run_dir.bad_nodes, **bad.model_dump())


def read_bad_nodes(run_dir: RunDir) -> Iterator[BadNode]:
    """The nodes recorded so far, oldest first; a line that is not as BadNode describes it is ignored."""
    for line in record.read(run_dir.bad_nodes):
        with suppress(ValidationError):
            yield BadNode.model_validate(line)
