"""The worker, which also writes the sequence numbers that it reads to files ATTEMPT-STEP-RANK in a folder."""

import os
import sys
from pathlib import Path

from data_pipeline.sampling.batch import Batch
from data_pipeline.sampling.batches import BatchReader
from gpt.run.run_dir import RunDir
from gpt.train import STOP, main

run_dir, trace = Path(sys.argv[1]), Path(sys.argv[2])
read = BatchReader.batch


def traced(self: BatchReader, step: int, rank: int, world_size: int) -> Batch:
    batch = read(self, step, rank, world_size)
    attempt = RunDir(run_dir).attempt_numbers()[-1]
    (trace / f"{attempt}-{step}-{rank}").write_text(" ".join(map(str, batch.sequence_numbers)))
    return batch


BatchReader.batch = traced  # type: ignore[method-assign]
STOP.install()
main(run_dir)
sys.stdout.flush()
os._exit(0)
