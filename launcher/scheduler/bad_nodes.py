"""Nodes that failed their check: later submissions of the run exclude them."""

from gpt.run import record
from gpt.run.run_dir import RunDir
from launcher.cluster import ClusterConfig


def without_bad_nodes(run: RunDir, cluster: ClusterConfig) -> ClusterConfig:
    """`cluster` with the nodes of RUN/bad_nodes.jsonl excluded; who mends one takes its line out."""
    bad = sorted({str(line["node"]) for line in record.read(run.bad_nodes) if "node" in line})
    if not bad:
        return cluster
    return cluster.model_copy(update={"exclude": ",".join([*filter(None, [cluster.exclude]), *bad])})
