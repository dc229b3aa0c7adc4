"""Checks before a launch: every problem is reported at once, with its remedy and exit code 2."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config_file import validate, with_overrides
from data_pipeline.dataset.manifest import read_manifest
from data_pipeline.errors import ConfigError
from gpt.config.run import RunConfig
from gpt.run.exit_codes import exit_code_of
from gpt.run.json_file import read_json
from launcher.cluster import ClusterConfig
from launcher.findings import Findings
from launcher.preflight.check import check_disk, examine
from launcher.preflight.plan import host_memory_warning, plan
from launcher.request import Request
from launcher.runs.recipes import recipe_names, run_tables
from launcher.runs.store import create_run, next_run_folder, read_cluster, read_config
from launcher.scheduler.registry import scheduler_of
from tests.paths import ROOT
from tests.unit.launcher.support import make_data

LOCAL = ClusterConfig(kind="local", processes_per_node=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def ask(data: Path, folder: Path | None, *overrides: str, cluster: str | ClusterConfig = LOCAL) -> Request:
    tables, source = run_tables("tiny", [f"data.path={data}", *overrides])
    return examine(tables, source, cluster, folder)


def refused(ask: Callable[[], object]) -> Sequence[str]:
    with pytest.raises(ConfigError) as error:
        ask()
    assert exit_code_of(error.value) == 2
    return error.value.problems


def test_a_valid_request_takes_its_vocabulary_from_the_data(data: Path, tmp_path: Path) -> None:
    request = ask(data, tmp_path / "run")
    assert request.config.model.vocab_size == 4096
    assert request.config.model.d_ff == 192  # 8/3 × 64 = 170.7, rounded up to a multiple of 64
    assert request.train_tokens == (read_manifest(data).train_tokens,)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_needs_only_data(name: str, data: Path) -> None:
    # The data set is too small for the context of the large recipes.
    tables, source = run_tables(name, [f"data.path={data}", "model.context=64"])
    assert examine(tables, source, LOCAL, None).config.name == name


def test_an_unknown_key_suggests_the_nearest(data: Path, tmp_path: Path) -> None:
    found = refused(lambda: ask(data, tmp_path / "run", "model.n_layer=3"))
    assert found == ["tiny.toml: unknown key 'model.n_layer'; did you mean 'model.n_layers'?"]


def test_a_batch_that_does_not_divide_suggests_the_nearest_that_does(data: Path, tmp_path: Path) -> None:
    found = refused(lambda: ask(data, tmp_path / "run", "batch.global_batch_tokens=1000"))
    assert found == [
        "batch.global_batch_tokens = 1000 is not a multiple of micro_batch 2 × context 64 × 2 processes "
        "= 256. "
        "Nearest: 1024."
    ]


def test_an_invalid_sequence_parallelism_lists_the_valid_ones(data: Path, tmp_path: Path) -> None:
    [problem] = refused(lambda: ask(data, tmp_path / "run", "parallel.sequence=3"))
    assert problem.endswith(
        "parallel.sequence = 3 must divide model.n_heads = 4 and model.context = 64, and divide "
        "model.n_kv_heads = 4 or be a multiple of it. These do: 1, 2, 4."
    )
    assert refused(lambda: ask(data, tmp_path / "run", "parallel.sequence=4")) == [
        "parallel.sequence = 4 does not divide the 2 processes. Use a multiple of 4 processes, "
        "or another parallel.sequence."
    ]
    found = refused(
        lambda: ask(data, tmp_path / "run", "parallel.sequence=2", "batch.global_batch_tokens=1000")
    )
    assert found == [
        "batch.global_batch_tokens = 1000 is not a multiple of micro_batch 2 × context 64 × 2 processes / 2 "
        "that share sequences = 128. Nearest: 1024."
    ]


def test_a_batch_that_does_not_divide_suggests_processes_and_micro_batches(data: Path) -> None:
    tokens = "batch.global_batch_tokens=1536"  # 24 sequences of 64
    cluster = ClusterConfig(kind="local", processes_per_node=8)
    [problem] = refused(lambda: ask(data, None, tokens, cluster=cluster))
    assert problem.endswith(
        " × 8 processes = 1024. Nearest: 2048. "
        "This batch can be split with 6 or 12 processes, or batch.micro_batch = 1."
    )


def test_a_batch_warmup_is_checked_and_counted_step_by_step(data: Path, tmp_path: Path) -> None:
    def warmup(*sizes: int) -> str:
        stages = ", ".join(f"{{steps = 2, global_batch_tokens = {size}}}" for size in sizes)
        return f"batch.warmup=[{stages}]"

    found = refused(lambda: ask(data, tmp_path / "run", warmup(256, 300)))
    assert found == [
        "batch.warmup.1.global_batch_tokens = 300 is not a multiple of micro_batch 2 × context 64 × 2 "
        "processes = 256. Nearest: 256."
    ]
    [problem] = refused(lambda: ask(data, tmp_path / "run", warmup(2048)))
    assert problem.endswith(
        "batch.warmup.0.global_batch_tokens = 2048 is more than batch.global_batch_tokens = 1024, at which "
        "the warmup ends."
    )
    config = ask(data, tmp_path / "run", warmup(256, 512)).config
    assert plan(config, LOCAL, None).tokens == 2 * 256 + 2 * 512 + 16 * 1024
    tables, _ = run_tables("tiny", [warmup(256, 512), f"data.path={data}"])
    del tables["schedule"]["total_steps"]
    for tokens, steps in ((257, 2), (1536, 4), (1537, 5), (2560, 5), (2561, 6)):
        tables["schedule"]["total_tokens"] = tokens
        assert examine(tables, "t", LOCAL, None).config.total_steps == steps


def test_a_missing_data_path_is_explained(tmp_path: Path) -> None:
    tables, source = run_tables("tiny", [])
    assert refused(lambda: examine(tables, source, LOCAL, tmp_path / "run")) == [
        "tiny.toml: data.path is not set. Give the folder that `outlast prepare` created, for example "
        "--set data.path=data/mine"
    ]


def test_a_folder_without_a_manifest_is_not_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    [problem] = refused(lambda: ask(tmp_path / "raw", tmp_path / "run"))
    assert problem.startswith(f"{tmp_path / 'raw'} is not a data set")
    prepare = f"`outlast prepare {tmp_path / 'raw'} --tokenizer NAME --out DIR` makes a data set"
    assert problem.endswith(f". From raw text, {prepare}")
    (tmp_path / "text.jsonl").touch()
    [problem] = refused(lambda: ask(tmp_path / "text.jsonl", tmp_path / "run"))
    assert problem.endswith("makes a data set")


def test_a_flipped_byte_in_a_shard_is_reported_with_its_place(data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    shard = copy / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    [problem] = refused(lambda: ask(copy, tmp_path / "run"))
    assert problem.startswith(f"{shard}: byte 0: its bytes changed")


def test_large_data_sets_are_verified_only_when_data_verify_is_full(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.preflight.check.READ_WHOLE_BYTES", 0)
    copy = shutil.copytree(data, tmp_path / "copy")
    shard = copy / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    ask(copy, tmp_path / "run")
    [problem] = refused(lambda: ask(copy, tmp_path / "run", "data.verify=full"))
    assert problem.startswith(f"{shard}: byte 0: its bytes changed")


def test_a_truncated_shard_is_named(data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    shard = copy / "val-00000.bin"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-2])
    assert refused(lambda: ask(copy, tmp_path / "run")) == [f"{shard}: {size - 2} bytes, should be {size}"]


def test_a_foreign_encoding_is_named(data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    encoding = copy / "encoding.json"
    encoding.write_text(encoding.read_text().replace("outlast-4k", "outlast-9k", 1))
    [problem] = refused(lambda: ask(copy, tmp_path / "run"))
    assert problem.startswith(f"{encoding}: not the encoding that the shards were made with")


def test_a_mixture_of_two_tokenizers_is_refused(data: Path, tmp_path: Path) -> None:
    other = make_data(tmp_path / "other", tokenizer_of="wholly other words, another vocabulary ")
    tables = read_tables("mixture", data, other)
    found = refused(lambda: examine(tables, "mine.toml", LOCAL, tmp_path / "run"))
    assert found == [
        "the sources of data.mixture have different tokenizers. Prepare all of them with the same one."
    ]


def test_a_vocabulary_smaller_than_that_of_the_data_is_refused(data: Path, tmp_path: Path) -> None:
    assert refused(lambda: ask(data, tmp_path / "run", "model.vocab_size=4000")) == [
        f"model.vocab_size = 4000 is smaller than the 4096 token ids of {data}. A new model gets a "
        "fitting vocabulary when model.vocab_size is left out. A trained one, as in an import, needs data "
        "that were prepared with its own tokenizer."
    ]


def test_a_context_longer_than_the_data_is_refused(data: Path) -> None:
    found = refused(lambda: ask(data, None, "model.context=1048576", "batch.global_batch_tokens=4194304"))
    tokens = read_manifest(data).train_tokens
    assert found == [
        f"{data} has {tokens} training tokens, too few for one sequence of model.context = 1048576 (+ 1 "
        "target). Prepare more text, or use a shorter context."
    ]


def test_data_without_a_validation_split_is_refused(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", val_fraction=0.0)
    assert refused(lambda: ask(data, tmp_path / "run")) == [
        f"{data} has 0 validation tokens, too few for one sequence of model.context = 64 (+ 1 target). "
        "Prepare it with --val-fraction 0.01 or more."
    ]


def test_many_epochs_warn_and_more_than_max_epochs_are_refused(data: Path, tmp_path: Path) -> None:
    tokens = read_manifest(data).train_tokens
    steps = 10 * tokens // 1024
    epochs = steps * 1024 / tokens
    warnings = ask(data, tmp_path / "run", f"schedule.total_steps={steps}").warnings
    assert (
        f"the run reads {epochs:,.1f} epochs of {data}; after 4 epochs, repeated data improves the model "
        "little."
    ) in warnings
    assert ask(data, tmp_path / "run", "evaluation.tokens=1024").warnings == ()
    found = refused(
        lambda: ask(data, tmp_path / "run", f"schedule.total_steps={steps}", "data.max_epochs=2.5")
    )
    assert found == [
        f"the run reads {epochs:,.2f} epochs of {data} ({steps * 1024:,} tokens, the source has "
        f"{tokens:,}), but data.max_epochs = 2.5. Train on fewer tokens, prepare more, or raise "
        "data.max_epochs."
    ]


def test_a_mixture_with_a_schedule_is_counted_for_each_source(data: Path) -> None:
    assert (read_manifest(data).train_tokens - 1) // 64 == 170
    mixture = f"{{path = '{data}', weight = 1, max_epochs = 0.5}}, {{path = '{data}', weight = 3}}"
    tables, _ = run_tables("tiny", [f"data.mixture=[{mixture}]"])  # 320 sequences

    def with_last_weights(weights: list[int]) -> dict[str, Any]:
        schedule = [{"from_progress": 0.5, "weights": weights}]
        return {**tables, "data": {**tables["data"], "schedule": schedule}}

    request = examine(with_last_weights([3, 1]), "t", LOCAL, None)
    assert [stage.from_tokens for stage in request.config.data.schedule] == [10 * 1024]
    found = plan(request.config, LOCAL, request.train_tokens)
    # A quarter of the first 160, and from there three quarters, up to half an epoch.
    assert [share.sequences for share in found.sources] == [85, 320 - 85]
    assert [share.epochs for share in found.sources] == [85 / 170, 235 / 170]
    assert refused(lambda: examine(with_last_weights([1, 0]), "t", LOCAL, None)) == [
        "the run reads 320 sequences, but after 205 all sources with a weight have reached their max_epochs. "
        "Train on fewer tokens, prepare more, raise a max_epochs, or give another source a weight."
    ]


def test_data_that_a_mixture_names_twice_warn_with_the_sum(data: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(data)
    paths = {str(data): 1, f"{tmp_path / 'link'}": 2}
    mixture = ", ".join(f"{{path = '{path}', weight = {weight}}}" for path, weight in paths.items())
    tables, _ = run_tables("tiny", [f"data.mixture=[{mixture}]", "evaluation.tokens=64"])
    [warning] = examine(tables, "t", LOCAL, None).warnings
    epochs = 320 * 64 / read_manifest(data).train_tokens
    assert warning == (
        f"data.mixture.0 ({data}) and data.mixture.1 ({tmp_path / 'link'}) are the same data. Together they "
        f"have the weight 3 of 3, and the run reads {epochs:.2f} epochs of them; every limit of epochs "
        "counts each by itself. Keep one of them, with the sum of the weights."
    )


def test_more_evaluation_tokens_than_the_data_has_warn(data: Path, tmp_path: Path) -> None:
    tokens = read_manifest(data).val_tokens
    [warning] = ask(data, tmp_path / "run", "evaluation.tokens=99999999").warnings
    assert warning == (
        f"evaluation.tokens = 99999999 is more than the {tokens} validation tokens of {data}; each "
        "evaluation uses all of them."
    )


def test_too_little_host_memory_for_asynchronous_saves_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    tables, _ = run_tables("gpt2-124m", ["data.path=/nowhere"])
    config = RunConfig.model_validate(tables).resolve(50257)
    copies = plan(config, LOCAL, None).host_copy_bytes
    assert copies == 12 * plan(config, LOCAL, None).parameters
    nodes = ClusterConfig(kind="slurm", nodes=2, gpus_per_node=4, mem="2800M")
    assert plan(config, nodes, None).host_copy_bytes == copies // 2
    warning = host_memory_warning(config, nodes)  # 2800 MiB less four processes of half a GiB
    assert warning is not None
    assert "training state, but training leaves only 752.0 MiB (mem = 2800M)." in warning
    for mem in ("4G", "4096", "0", None):
        assert host_memory_warning(config, nodes.model_copy(update={"mem": mem})) is None
    checkpoint = config.checkpoint.model_copy(update={"asynchronous": False})
    assert host_memory_warning(config.model_copy(update={"checkpoint": checkpoint}), nodes) is None
    monkeypatch.setattr("launcher.scheduler.local.available_bytes", lambda: 10 << 30)
    warning = host_memory_warning(config, LOCAL)  # its CPU trains, so the host holds the whole state
    assert warning is not None
    assert "training leaves only" in warning and "(free on this machine)" in warning
    monkeypatch.setattr("launcher.scheduler.local.available_bytes", lambda: 6 << 30)
    warning = host_memory_warning(config, LOCAL)
    assert warning is not None
    assert warning.startswith(
        "a step needs about 9.2 GiB of host memory on each node, but there are only 6.0"
    )
    monkeypatch.setattr("launcher.scheduler.local.available_bytes", lambda: 600 << 30)
    assert host_memory_warning(config, LOCAL) is None


def test_a_run_that_does_not_fit_in_host_memory_is_refused_and_its_plan_is_shown(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = ["model.d_model=2048", "model.n_layers=32", "model.n_heads=16"]
    monkeypatch.setattr("launcher.scheduler.local.available_bytes", lambda: 23 << 30)
    problems = refused(lambda: ask(data, tmp_path / "run", *big))
    [problem] = [problem for problem in problems if "host memory" in problem]
    assert problem.startswith("the training state needs ")
    assert "(2 × " in problem and "but there are only 23.0 GiB (free on this machine). Use fewer" in problem
    assert any(warning == problem for warning in ask(data, None, *big).warnings)
    ask(data, None, cluster=ClusterConfig(kind="slurm", nodes=2, mem="8G"))
    monkeypatch.setattr("launcher.scheduler.local.available_bytes", lambda: 600 << 30)
    assert not any("host memory" in warning for warning in ask(data, None, *big).warnings)


def test_an_existing_run_directory_is_refused(data: Path, tmp_path: Path) -> None:
    create_run(tmp_path / "run", ask(data, tmp_path / "run"), ["outlast"])
    assert refused(lambda: ask(data, tmp_path / "run")) == [
        f"{tmp_path / 'run'} already is a run directory. `outlast resume {tmp_path / 'run'}` continues it."
    ]


def test_a_run_directory_with_other_files_is_refused(data: Path) -> None:
    assert refused(lambda: ask(data, data)) == [f"{data} exists and is not empty. Give another --run-dir."]


def test_an_empty_folder_that_everybody_can_write_to_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    [problem] = refused(lambda: ask(data, tmp_path / "run"))
    assert problem.startswith(f"everybody can write to {tmp_path / 'run'}, and what lies in a run directory")


def test_a_run_directory_below_a_file_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refused(lambda: ask(data, tmp_path / "file" / "run")) == [
        f"{tmp_path / 'file'} is a file, so nothing can be created below it. Give another --run-dir."
    ]


def test_a_run_directory_that_slurm_would_rename_is_refused(data: Path, tmp_path: Path) -> None:
    [problem] = refused(lambda: ask(data, tmp_path / "%j"))
    assert problem.endswith(
        "/%j: a run directory's path cannot have '%': Slurm and submitit replace it in the names of files. "
        "Give another --run-dir."
    )


def test_a_mirror_that_cannot_hold_files_is_refused(data: Path, tmp_path: Path) -> None:
    [problem] = refused(lambda: ask(data, tmp_path / "run", "checkpoint.mirror=/proc"))
    assert problem.startswith("checkpoint.mirror = /proc: /proc is on a file system that holds no files")


def test_a_name_that_is_too_long_for_a_run_directory_is_refused(data: Path) -> None:
    name = "x" * 300
    [of_name, of_folder] = refused(lambda: ask(data, next_run_folder(name), f"name={name}"))
    assert of_name.startswith("tiny.toml: name = 'xxx") and "at most 200 characters" in of_name
    assert "has 305 bytes; a file name has at most 255" in of_folder


def test_a_full_disk_is_refused_and_a_nearly_full_one_warns(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ask(data, None).config
    needed = 12 * parameters_by_hand() * (config.checkpoint.keep_last + 1)
    assert plan(config, LOCAL, None).disk_bytes == needed
    seen = []
    for free in (needed - 1, needed, 2 * needed - 1, 2 * needed):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr("shutil.disk_usage", lambda _path, usage=usage: usage)
        findings = Findings()
        check_disk(config, tmp_path / "run", findings)
        seen.append((len(findings.problems), len(findings.warnings)))
        kept = f"({needed / 4 / 2**20:.1f} MiB each × (checkpoint.keep_last 3 + 1))"
        for sentence in (*findings.problems, *findings.warnings):
            assert sentence.startswith(f"checkpoints need {needed / 2**20:.1f} MiB {kept}")
    assert seen == [(1, 0), (0, 1), (0, 1), (0, 0)]


def test_gpus_that_are_not_there_are_missed(data: Path, tmp_path: Path) -> None:
    cluster = ClusterConfig(kind="local", gpus_per_node=64, processes_per_node=2)
    [problem] = refused(lambda: ask(data, tmp_path / "run", cluster=cluster))
    assert problem.startswith("gpus_per_node = 64, but this machine has ")


def test_interface_that_this_machine_does_not_have_is_a_problem() -> None:
    findings = Findings()
    scheduler_of("local").check_machine(ClusterConfig(kind="local", interface="lo"), findings)
    assert findings.problems == []
    scheduler_of("local").check_machine(ClusterConfig(kind="local", interface="lo,ib9"), findings)
    [problem] = findings.problems
    assert problem.startswith("interface = 'lo,ib9': this machine has no network interface 'ib9'. It has: lo")


@pytest.mark.parametrize("name", ["hang_timeout_s", "start_timeout_s", "collective_timeout_s"])
def test_timeout_that_the_libraries_cannot_count_is_refused(name: str) -> None:
    tables = {"launch": {name: 1e14}, "data": {"path": "/nowhere"}, "schedule": {"total_steps": 1}}
    with pytest.raises(ConfigError, match=rf"launch\.{name}.*1000000"):
        validate(RunConfig, {"name": "x", **tables}, "x")


def test_slurm_without_slurm_says_where_to_launch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused(lambda: ask(data, tmp_path / "run", cluster=ClusterConfig(kind="slurm"))) == [
        "kind = 'slurm', but there is no sbatch here. Launch from a login node of the cluster."
    ]


def test_more_processes_than_cores_warn() -> None:
    findings = Findings()
    scheduler_of("local").check_machine(ClusterConfig(kind="local", processes_per_node=4096), findings)
    assert findings.problems == []
    [warning] = findings.warnings
    assert warning.startswith("4096 processes share ")


def test_a_training_state_that_does_not_fit_on_the_gpu_is_told(data: Path, tmp_path: Path) -> None:
    cluster = ClusterConfig(kind="slurm", gpus_per_node=1, accelerator="a100-40gb")
    big = ["model.n_layers=32", "model.d_model=4096", "model.n_heads=32", "precision=bf16"]
    problem = ask(data, None, *big, cluster=cluster).warnings[-1]  # only a launch is refused
    assert problem in refused(lambda: ask(data, tmp_path / "run", *big, cluster=cluster))
    # 18 bytes (2 weights, 4 sums of gradients, 12 AdamW) a parameter, and the largest gradient in bf16:
    # 32 × (4·4096² + 3·4096·10944) + 2·4096·4096 + 65·4096 parameters
    parameters = 32 * (4 * 4096**2 + 3 * 4096 * 10944) + 2 * 4096 * 4096 + 65 * 4096
    needed = 18 * parameters + 2 * 2 * 10944 * 4096
    assert problem == (
        f"the training state needs {needed / 2**30:.1f} GiB on each of 1 ranks (zero.stage = "
        "1), but a100-40gb has only 36.8 GiB for it. Use more GPUs, a higher zero.stage, or a smaller model."
    )


def test_all_problems_of_run_cluster_data_and_folder_are_reported_at_once(data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    (copy / "train-00000.idx").unlink()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("")
    tables, source = run_tables("tiny", [f"data.path={copy}", "model.n_layer=3", "optimizer.peak_lr=-1"])
    found = refused(lambda: examine(tables, source, "lcal", tmp_path / "run"))
    assert found == [
        "tiny.toml: unknown key 'model.n_layer'; did you mean 'model.n_layers'?",
        "tiny.toml: optimizer.peak_lr = -1: input should be greater than 0",
        "--cluster lcal: neither a file nor a known cluster; did you mean 'local'?",
        f"{copy / 'train-00000.idx'}: missing",
        f"{tmp_path / 'run'} exists and is not empty. Give another --run-dir.",
    ]


def test_setting_one_of_two_alternatives_replaces_that_of_the_recipe() -> None:
    assert "total_tokens" in run_tables("gpt2-124m", [])[0]["schedule"]
    schedule = run_tables("gpt2-124m", ["schedule.total_steps=20"])[0]["schedule"]
    assert schedule["total_steps"] == 20
    assert "total_tokens" not in schedule


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^tinny: neither a file nor a recipe; did you mean 'tiny'\?$"):
        run_tables("tinny", [])


def test_data_paths_are_relative_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_tables("tiny", ["data.path=d"])[0]["data"]["path"] == str(tmp_path / "d")
    mixture = run_tables("tiny", ['data.mixture=[{path="d", weight=1}]'])[0]["data"]["mixture"]
    assert mixture == [{"path": str(tmp_path / "d"), "weight": 1}]


def test_a_run_directory_holds_config_cluster_provenance_and_code_but_not_its_own_path(
    data: Path, tmp_path: Path
) -> None:
    request = ask(data, tmp_path / "run")
    run = create_run(tmp_path / "run", request, ["outlast", "launch", "tiny"])
    assert read_config(run) == request.config
    assert read_cluster(run) == request.cluster
    provenance = read_json(run.provenance)
    assert provenance is not None
    assert provenance["command"] == ["outlast", "launch", "tiny"]
    assert provenance["data_fingerprints"] == [read_manifest(data).fingerprint]
    assert provenance["versions"]["torch"].startswith("2.13")
    for module in ("launcher/node/task.py", "gpt/config/run.py", "data_pipeline/dataset/manifest.py"):
        assert (run.code / module).read_bytes() == (ROOT / module).read_bytes()
    for path in (run.config, run.cluster, run.provenance):
        assert str(run.path) not in path.read_text()


def test_run_directories_are_numbered_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTLAST_RUNS", str(tmp_path))
    assert next_run_folder("a") == tmp_path / "a-0001"
    for name in ("a-0001", "a-0009", "a-b-0011", "a-x"):
        (tmp_path / name).mkdir()
    assert next_run_folder("a") == tmp_path / "a-0010"


def read_tables(kind: str, *paths: Path) -> dict[str, Any]:
    tables, _ = run_tables("tiny", [])
    sources = [{"path": str(path), "weight": 1.0} for path in paths]
    return with_overrides({**tables, "data": {kind: sources}}, [])


def parameters_by_hand() -> int:
    """tiny's parameters, counted from its recipe: 2 layers, width 64, hidden 192, 4,096 ids, untied."""
    layer = 4 * 64 * 64 + 3 * 64 * 192 + 2 * 64
    return 2 * layer + 2 * 4096 * 64 + 64
