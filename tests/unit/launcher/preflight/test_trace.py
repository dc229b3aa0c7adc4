"""What a dry step means on a cluster: times of collectives, and what is printed."""

import pytest

from data_pipeline.errors import ConfigError
from gpt.config.run import RunConfig
from gpt.run.dry_step import Collective, DryStep, HostWait
from launcher.cluster import ClusterConfig
from launcher.preflight.trace import compute_seconds, links_of, request_of, trace_json, trace_lines
from launcher.runs.recipes import run_tables

STEP = DryStep(
    weights=1 << 30,
    optimizer=2 << 30,
    kept=3 << 30,
    activations=1 << 30,
    peak=5 << 30,
    peak_phase="forward",
    kernels=100,
    collectives=(Collective("all-gather", 8, 8_000_000_000, 2), Collective("all-reduce", 32, 32_000_000_000)),
    host_waits=(HostWait("deepspeed/a.py:1 f", "reads a number", False, 4),),
)


def cluster(**fields: object) -> ClusterConfig:
    shape = {"kind": "slurm", "nodes": 4, "gpus_per_node": 8, "accelerator": "h100-80gb"}
    return ClusterConfig.model_validate({**shape, **fields})


@pytest.fixture(scope="module")
def run() -> RunConfig:
    tables, _ = run_tables("llama-7b", ("data.path=none",))
    return RunConfig.model_validate(tables)


def test_collectives_of_one_node_take_the_links_and_others_the_network() -> None:
    links = links_of(cluster())
    assert links is not None and (links.link_gb_per_s, links.network_gb_per_s) == (450.0, 400.0)
    inside, outside = STEP.collectives
    assert links.seconds(inside, 8) == pytest.approx(2 * 7 / 450)
    assert links.seconds(outside, 8) == pytest.approx(2 * 31 / 400)


def test_speeds_of_the_cluster_file_replace_the_defaults() -> None:
    links = links_of(cluster(network_gb_per_s=25.0))
    assert links is not None and (links.link_gb_per_s, links.network_gb_per_s) == (450.0, 25.0)
    assert links.source == "of the cluster file and of NVIDIA's servers with h100-80gb"
    assert links_of(cluster(accelerator=None, network_gb_per_s=25.0)) is None
    own = links_of(cluster(accelerator=None, network_gb_per_s=25.0, link_gb_per_s=64.0))
    assert own is not None and own.source == "of the cluster file"


def test_compute_time_is_flops_over_peak(run: RunConfig) -> None:
    seconds = compute_seconds(run, cluster(), 0.5)
    assert seconds is not None
    # 6N FLOPs a token and a little more, at half of 989 TFLOP/s on 32 GPUs
    least = 6 * 6.6e9 * run.batch.global_batch_tokens / (0.5 * 989e12 * 32)
    assert least < seconds < 1.3 * least
    assert compute_seconds(run, cluster(accelerator=None), 0.5) is None


def test_everything_is_printed_and_in_the_json(run: RunConfig) -> None:
    text = "\n".join(trace_lines(STEP, run, cluster(), 0.4))
    assert "one step of the last of 32 ranks, run without GPUs (all layers)" in text
    assert "4 x deepspeed/a.py:1 f (reads a number)" in text
    assert "communication: 0.186 s a step at 450 GB/s in a node and 400 GB/s between nodes" in text
    assert "peak                               5.0 GiB" in text
    content = trace_json(STEP, run, cluster(), 0.4)
    assert content["communication_seconds"] == pytest.approx(2 * 7 / 450 + 2 * 31 / 400)
    assert DryStep.from_json({name: content[name] for name in STEP.as_json()}) == STEP


def test_without_known_links_the_times_are_left_out(run: RunConfig) -> None:
    text = "\n".join(trace_lines(STEP, run, cluster(accelerator=None), 0.4))
    assert "set link_gb_per_s and network_gb_per_s in the cluster file" in text


def test_cluster_without_gpus_is_refused(run: RunConfig) -> None:
    with pytest.raises(ConfigError, match="the cluster has gpus_per_node = 0"):
        request_of(run, ClusterConfig(kind="local"))
