"""A node that fails its check is named, recorded and excluded, and the job continues on other nodes."""

from collections.abc import Callable

from gpt.run import record
from tests.slurm.conftest import SlurmRun

NewRun = Callable[..., SlurmRun]
# On one of the three nodes the clock is an hour ahead.
WRONG_CLOCK = """
import os, time
if os.environ.get("SLURMD_NODENAME") == "node2":
    _time = time.time
    time.time = lambda: _time() + 3600
"""


def test_node_that_fails_its_check_is_excluded(new_slurm_run: NewRun, reference: list[float]) -> None:
    run = new_slurm_run()
    run.launch()
    check = run.dir.code / "gpt" / "training" / "node_check.py"
    check.write_text(check.read_text() + WRONG_CLOCK)
    assert run.wait_for_end()["exit_code"] == 0
    [bad] = record.read(run.dir.bad_nodes)
    assert bad["node"] == "node2"
    assert "its clock differs" in bad["reason"]
    [requeued] = run.events("requeued")
    assert requeued["exclude"] == ["node2"]
    assert sorted(worker["host"] for worker in run.owner()["workers"]) == ["node1", "node3"]
    assert run.losses() == reference
    # A later submission excludes it too.
    run.dir.stop.unlink(missing_ok=True)
    assert run.cluster.field(run.job_id, "ExcNodeList") == "node2"
