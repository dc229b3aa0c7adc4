"""Nodes that failed their check: later job runs and submissions of the run avoid them."""

from gpt.run import record
from gpt.run.run_dir import RunDir


def bad_nodes(run: RunDir) -> list[str]:
    """The nodes in RUN/bad_nodes.jsonl. A user who has repaired one removes its line."""
    return sorted({str(line["node"]) for line in record.read(run.bad_nodes) if "node" in line})
