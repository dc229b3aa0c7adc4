"""What the training loop writes: metrics, a score for each source, and a trace on request."""

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from gpt.config.run import RunConfig
from tests.distributed.conftest import Run


def test_run_writes_its_profile_and_a_score_for_each_source(
    new_run: Callable[..., Run], data_dir: Path, tmp_path: Path
) -> None:
    """The sources have the same text, so that their scores and the mean are equal."""
    twin = tmp_path / "twin"
    twin.symlink_to(data_dir, target_is_directory=True)
    mixture = [{"path": str(data_dir), "weight": 0.7}, {"path": str(twin), "weight": 0.3}]
    run = new_run(data={"mixture": mixture}, profile="3:4", zero__stage=2)
    assert run.train(1)["exit_code"] == 0
    [trace] = (run.dir.path / "profile").iterdir()
    assert trace.name == "steps-3-4.json.gz"
    names = [
        event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    ]
    assert sum(name.startswith("Optimizer.step#AdamW") for name in names) == 2 * 2  # two groups a step

    line = run.metrics()[-1]
    scores = [line[f"val/0-{data_dir.name}/loss"], line["val/1-twin/loss"], line["val/loss"]]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-12)
    assert line["val/perplexity"] == pytest.approx(math.exp(scores[0]))
    assert line["val/0-kjv/bits_per_byte"] == pytest.approx(line["val/bits_per_byte"])
    assert 0 <= line["data/wait_seconds"] < line["train/step_seconds"]
    assert line["train/step_seconds_p50"] <= line["train/step_seconds_p99"]


def test_number_added_where_it_is_computed_reaches_the_record(new_run: Callable[..., Run]) -> None:
    """It costs no collective: one asynchronous all-reduce a step, and one to complete the last line."""
    run = new_run(schedule__total_steps=3)
    program = [str(Path(__file__).with_name("more_numbers.py"))]
    assert run.train(2, program=program)["exit_code"] == 0
    lines = run.metrics()
    assert [line["train/twice_grad_norm"] for line in lines] == [
        2 * line["train/grad_norm"] for line in lines
    ]
    assert [line["train/highest_rank"] for line in lines] == [1.0] * 3
    assert [(run.dir.path / f"started-{rank}").read_text() for rank in (0, 1)] == ["4", "4"]


def test_profile_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValidationError, match="ends before it starts"):
        RunConfig.model_validate(
            {"name": "x", "data": {"path": "none"}, "schedule": {"total_steps": 9}, "profile": "5:4"}
        )


def test_worker_loads_neither_the_compiler_nor_mlflow(new_run: Callable[..., Run], tmp_path: Path) -> None:
    """Each would add a second or two to every start. torch and DeepSpeed load them by default."""
    program = tmp_path / "worker.py"
    program.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from gpt.train import main\n"
        "main(Path(sys.argv[1]))\n"
        "Path(sys.argv[1], 'loaded').write_text(' '.join(sys.modules))\n"
    )
    run = new_run()
    assert run.train(processes=1, program=[str(program)], cold=True)["exit_code"] == 0
    loaded = (run.dir.path / "loaded").read_text().split()
    assert {"torch", "deepspeed", "gpt.distributed.zero.engine"} <= set(loaded)
    assert {"torch._dynamo", "sympy", "mlflow", "pandas", "transformers"} & set(loaded) == set()
