"""A preparation in several jobs of a real Slurm."""

import subprocess
import sys
from pathlib import Path

from data_pipeline.prepare.pipeline import prepare
from tests.slurm.cluster import SlurmCluster
from tests.slurm.conftest import ROOT
from tests.unit.data_pipeline.support import config, files_of, packaged_texts, write_jsonl


def test_preparation_in_two_jobs_gives_the_same_bytes_and_survives_a_cancelled_job(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", packaged_texts()[:200])
    prepare(config(tmp_path / "alone", source, shard_tokens=5000))
    (tmp_path / "c.toml").write_text('kind = "slurm"\npartition = "high"')
    command = ["prepare", str(source), "--tokenizer", "outlast-4k", "--out", str(tmp_path / "spread")]
    command += ["--set", "shard_tokens=5000", "--cluster", str(tmp_path / "c.toml"), "--tasks", "2"]
    environment = {**cluster.environment, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    run = subprocess.Popen(
        [sys.executable, "-c", "from launcher.cli import main; main()", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.stdout is not None
    said = []
    for line in run.stdout:
        said.append(line)
        if line.startswith("task 2 of 2: slurm job "):
            subprocess.run(["scancel", line.split()[-1]], env=environment, check=True)
    assert run.wait(timeout=200) == 0, "".join(said)
    again = [line for line in said if "starts again" in line]
    assert len(again) == 1
    assert again[0].startswith("task 2 failed and starts again")
    # Slurm forgets a job of an array at once if it is cancelled before it starts.
    assert again[0].rstrip().endswith("its job ended without a result")
    assert files_of(tmp_path / "spread") == files_of(tmp_path / "alone")
