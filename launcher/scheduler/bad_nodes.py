"""Nodes that failed their check: later job runs and submissions of the run avoid them."""

from gpt.run.bad_nodes import read_bad_nodes
from gpt.run.run_dir import RunDir


def bad_nodes(run: RunDir) -> list[str]:
    """The names of the nodes in RUN/bad_nodes.jsonl."""
    return sorted({bad.node for bad in read_bad_nodes(run)})
