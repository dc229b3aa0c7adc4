"""Checks everything that can be known before a job queues, and reports all problems at once with remedies.

Runs on a login node, without torch, GPU or network. Starts nothing and writes nothing.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.config_file import validate
from data_pipeline.dataset.integrity import check, verify
from data_pipeline.dataset.manifest import FILE_NAME, Manifest, read_manifest
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sampling.batches import windows_in
from gpt.checkpoint.format import committed
from gpt.config.data import DataConfig
from gpt.config.run import RunConfig
from gpt.run.run_dir import RunDir
from launcher.cluster import AS_THE_FILE_SAYS, ClusterConfig, ClusterSize
from launcher.cluster_file import load_cluster
from launcher.findings import Findings
from launcher.paths import nearest_existing
from launcher.preflight.mirror import check_mirror
from launcher.preflight.places import folder_problem, place_problems
from launcher.preflight.plan import (
    checkpoint_bytes,
    checkpoint_counts,
    disk_bytes,
    host_memory_problem,
    host_memory_warning,
    memory_problem,
    memory_warning,
    mixture_of,
    sequences,
)
from launcher.preflight.tracker import check_tracker
from launcher.request import Request
from launcher.runs.trust import foreign_writers
from launcher.scheduler.registry import scheduler_of
from launcher.units import size

READ_WHOLE_BYTES = 64 << 20  # data sets up to this size are verified byte by byte: 10 ms of xxh3
EPOCHS_WARNING = 4.0  # more epochs improve the loss little (Muennighoff et al., arXiv:2305.16264)
_ASSUMED_VOCABULARY = 50_257  # GPT-2's; for a plan without data
_UNSET = "/nowhere"  # replaces a missing data.path while everything else is checked


def examine(
    tables: dict[str, Any],
    source: str,
    cluster: str | ClusterConfig,
    folder: Path | None,
    *,
    is_new: bool = True,
    size: ClusterSize = AS_THE_FILE_SAYS,
) -> Request:
    """Check a launch of the config `tables`, which were read from `source`, into the run directory `folder`.

    `is_new` says whether the folder is yet to be created, or holds a run that continues; `size` replaces what
    the cluster says. Without a folder the request is only planned, and neither this machine nor the site is
    checked. Raises ConfigError with every problem of run config, cluster, data, machine, site and folder; a
    plan may leave the data out.
    """
    findings = Findings()
    has_data = _names_data(tables)
    run = _read_run(tables, source, findings, needs_data=folder is not None)
    cluster_config = _read_cluster(cluster, size, findings)
    data = _readable_data(tables) if has_data else None
    sources = [] if data is None else [source.path for source in data.sources]
    is_full = data is not None and data.verify == "full"
    manifests = [manifest for path in sources for manifest in _read_data(path, findings, is_full)]
    config = None
    if run is not None and 0 < len(sources) == len(manifests):
        config = run.resolve(max(manifest.encoding.vocab_size for manifest in manifests))
        check_data(config, manifests, findings)
    elif run is not None and folder is None and not has_data:
        if run.model.vocab_size is None:
            findings.warn(f"model.vocab_size is not set; the plan assumes {_ASSUMED_VOCABULARY} token ids.")
        config = run.resolve(_ASSUMED_VOCABULARY)
    unusable = place_problems(run, cluster_config, folder) if run is not None else []
    if folder is not None and (problem := folder_problem(folder, is_new=is_new)) is not None:
        unusable.append(problem)
    elif folder is not None and is_new:
        _check_new_folder(folder, findings)
    findings.problems += unusable
    if run is not None and cluster_config is not None:
        findings.problem(run.batch_problem(cluster_config.world_size))
        has_gpu = cluster_config.gpus_per_node > 0
        findings.problem(run.zero_problem(cluster_config.processes, has_gpu=has_gpu))
    if config is not None and cluster_config is not None:
        # A plan shows what a run needs, also where it does not fit.
        report = findings.problem if folder is not None else findings.warn
        report(memory_problem(config, cluster_config))
        report(host_memory_problem(config, cluster_config))
        findings.warn(memory_warning(config, cluster_config))
        findings.warn(host_memory_warning(config, cluster_config))
    if folder is not None:
        if config is not None and not unusable:  # a store or a server is asked at a sound address only
            check_disk(config, folder, findings)
            in_container = cluster_config is not None and cluster_config.container is not None
            check_tracker(config, findings, is_in_container=in_container)
            check_mirror(RunDir(folder), config, findings, is_new=is_new)
        if cluster_config is not None:
            scheduler = scheduler_of(cluster_config.kind)
            has_site = scheduler.check_machine(cluster_config, findings)
            if has_site and config is not None and not unusable:
                state = checkpoint_bytes(config)
                scheduler.check_site(RunDir(folder), config, cluster_config, state, findings)
    if findings.problems:
        raise ConfigError(findings.problems)
    assert config is not None and cluster_config is not None
    return Request(config, cluster_config, tuple(manifests), tuple(findings.warnings))


def check_data(config: RunConfig, manifests: Sequence[Manifest], findings: Findings) -> None:
    """Check a resolved `config` against the data that it reads."""
    if len({manifest.encoding.fingerprint for manifest in manifests}) > 1:
        findings.problem(
            "the sources of data.mixture have different tokenizers. Prepare all of them with the same one."
        )
    too_short = False
    for source, manifest in zip(config.data.sources, manifests, strict=True):
        vocabulary, train = manifest.encoding.vocab_size, manifest.train_tokens
        if config.model.vocabulary < vocabulary:
            findings.problem(
                f"model.vocab_size = {config.model.vocabulary} is smaller than the {vocabulary} token ids of "
                f"{source.path}. A new model gets a fitting vocabulary when model.vocab_size is left out. A "
                "trained one, as in an import, needs data that were prepared with its own tokenizer."
            )
        if train <= config.model.context:
            findings.problem(
                f"{source.path} has {train} training tokens, too few for one sequence of model.context = "
                f"{config.model.context} (+ 1 target). Prepare more text, or use a shorter context."
            )
            too_short = True
            continue
        if manifest.val_tokens <= config.model.context:
            findings.problem(
                f"{source.path} has {manifest.val_tokens} validation tokens, too few for one sequence of "
                f"model.context = {config.model.context} (+ 1 target). "
                "Prepare it with --val-fraction 0.01 or more."
            )
        elif manifest.val_tokens < config.evaluation.tokens:
            findings.warnings.append(
                f"evaluation.tokens = {config.evaluation.tokens} is more than the {manifest.val_tokens} "
                f"validation tokens of {source.path}; each evaluation uses all of them."
            )
    if not too_short:
        _check_epochs(config, manifests, findings)


def _check_epochs(config: RunConfig, manifests: Sequence[Manifest], findings: Findings) -> None:
    """Check how many epochs of each source the run reads, counted in its actual order."""
    train = [manifest.train_tokens for manifest in manifests]
    mixture = mixture_of(config, train)
    numbers = sequences(config)
    if mixture.end is not None and numbers > mixture.end:
        findings.problem(
            f"the run reads {numbers:,} sequences, but after {mixture.end:,} all sources with a weight have "
            "reached their max_epochs. Train on fewer tokens, prepare more, raise a max_epochs, or "
            "give another source a weight."
        )
        return
    limit = config.data.max_epochs
    counts = mixture.counts(numbers)
    _warn_of_repeated_sources(config, manifests, counts, findings)
    for source, of_source, count in zip(config.data.sources, train, counts, strict=True):
        tokens = count * config.model.context
        epochs = tokens / of_source
        if limit is not None and count > int(limit * windows_in(of_source, config.model.context)):
            findings.problem(
                f"the run reads {epochs:,.2f} epochs of {source.path} ({tokens:,} tokens, the source has "
                f"{of_source:,}), but data.max_epochs = {limit:g}. Train on fewer tokens, prepare more, or "
                "raise data.max_epochs."
            )
        elif epochs > EPOCHS_WARNING:
            findings.warnings.append(
                f"the run reads {epochs:,.1f} epochs of {source.path}; after {EPOCHS_WARNING:.0f} epochs, "
                "repeated data improves the model little."
            )


def _warn_of_repeated_sources(
    config: RunConfig, manifests: Sequence[Manifest], counts: Sequence[int], findings: Findings
) -> None:
    """Warn of data that the mixture names more than once, under one path or several."""
    sources = config.data.sources
    numbers: dict[str, list[int]] = {}
    for number, manifest in enumerate(manifests):
        numbers.setdefault(manifest.fingerprint, []).append(number)
    for same in numbers.values():
        if len(same) == 1:
            continue
        names = " and ".join(f"data.mixture.{number} ({sources[number].path})" for number in same)
        weight = sum(sources[number].weight for number in same)
        tokens = sum(counts[number] for number in same) * config.model.context
        findings.warnings.append(
            f"{names} are the same data. Together they have the weight {weight:g} of "
            f"{sum(source.weight for source in sources):g}, and the run reads "
            f"{tokens / manifests[same[0]].train_tokens:.2f} epochs of them; every limit of epochs counts "
            "each by itself. Keep one of them, with the sum of the weights."
        )


def check_disk(config: RunConfig, folder: Path, findings: Findings) -> None:
    """Check that the checkpoints that `config` keeps, and one being written, fit on the disk of `folder`."""
    parent = nearest_existing(folder)
    # Pruning frees the space of the checkpoints that the run has already saved.
    checkpoints = committed(RunDir(folder).checkpoints)
    saved = sum(file.stat().st_size for _, checkpoint in checkpoints for file in checkpoint.iterdir())
    free = shutil.disk_usage(parent).free + saved
    needed = disk_bytes(config)
    kept = " + ".join(f"{name} {count}" for name, count in checkpoint_counts(config).items())
    sentence = (
        f"checkpoints need {size(needed)} ({size(checkpoint_bytes(config))} each × "
        f"(checkpoint.{kept} + 1)); {parent} has {size(free)} free."
    )
    if free < needed:
        findings.problem(f"{sentence} Use another --run-dir, or keep fewer checkpoints.")
    elif free < 2 * needed:
        findings.warnings.append(sentence)


def _names_data(tables: dict[str, Any]) -> bool:
    data = tables.get("data", {})
    return not isinstance(data, dict) or "path" in data or "mixture" in data


def _read_run(
    tables: dict[str, Any], source: str, findings: Findings, *, needs_data: bool
) -> RunConfig | None:
    if not _names_data(tables):
        if needs_data:
            findings.problem(
                f"{source}: data.path is not set. Give the folder that `outlast prepare` created, "
                "for example --set data.path=data/mine"
            )
        tables = {**tables, "data": {**tables.get("data", {}), "path": _UNSET}}
    try:
        return validate(RunConfig, tables, source)
    except ConfigError as error:
        findings.problems += error.problems
        return None


def _read_cluster(
    cluster: str | ClusterConfig, size: ClusterSize, findings: Findings
) -> ClusterConfig | None:
    try:
        return (load_cluster(cluster) if isinstance(cluster, str) else cluster).in_size(size)
    except ConfigError as error:
        findings.problems += error.problems
        return None


def _readable_data(tables: dict[str, Any]) -> DataConfig | None:
    """The [data] table, also when other tables of the run config are invalid; None when it is invalid."""
    try:
        return validate(DataConfig, tables.get("data", {}), "data")
    except ConfigError:
        return None


def _read_data(path: Path, findings: Findings, is_full: bool) -> list[Manifest]:
    try:
        manifest = read_manifest(path)
    except (DataError, ConfigError) as error:
        findings.problem(f"{error}{_data_hint(path)}")
        return []
    found = check(path, manifest)
    size_bytes = sum(shard.bin.size_bytes for shard in (*manifest.train, *manifest.val))
    if not found and (is_full or size_bytes <= READ_WHOLE_BYTES):
        found = [f"{bad.path}: byte {bad.offset}: {bad.reason}" for bad in verify(path)]
    findings.problems += found
    return [manifest]


def _data_hint(path: Path) -> str:
    """What to do about a data directory that is not there, or that is none."""
    if not path.exists():
        return ". If it was moved, give its folder with --set data.path=DIR"
    if path.is_file() or not (path / FILE_NAME).exists():
        return f". From raw text, `outlast prepare {path} --tokenizer NAME --out DIR` makes a data set"
    return ""


def _check_new_folder(folder: Path, findings: Findings) -> None:
    if RunDir(folder).config.exists():
        findings.problem(f"{folder} already is a run directory. `outlast resume {folder}` continues it.")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        findings.problem(f"{folder} exists and is not empty. Give another --run-dir.")
    elif (reason := foreign_writers(RunDir(folder))) is not None:
        findings.problem(
            f"{reason}, and what lies in a run directory is executed. Take that permission away, or give "
            "another --run-dir."
        )
