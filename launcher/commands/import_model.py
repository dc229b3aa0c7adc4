"""`outlast import HF_DIR RUN_DIR`: a new run that starts from the weights of a transformers folder.

The [model] table comes from the folder's config.json, everything else from defaults and `--set`. All of it,
the list of tensors and the tokenizer are checked before a file is written. A child process reads the weights
themselves, because that needs torch.
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import click

from data_pipeline.config_file import validate
from data_pipeline.tokenizer.encoding import load_encoding
from gpt.config.model import ModelConfig
from gpt.huggingface.config_json import model_fields, read_config
from gpt.huggingface.stored_tensors import list_tensors, match_tensors, weight_files
from gpt.huggingface.tokenizer_check import check_tokenizer
from gpt.run.events import Event
from launcher.commands.launch import command_line
from launcher.commands.plan import show_plan, show_warnings
from launcher.paths import absolute
from launcher.preflight.check import examine
from launcher.runs.code_snapshot import python_module
from launcher.runs.recipes import with_settings
from launcher.runs.store import create_run

# Fields of [model] that do not change what the trained weights compute.
_OF_TRAINING = {"dropout", "z_loss", "attention", "recompute", "initialization", "vocab_multiple"}


def import_run(hf_dir: Path, run_dir: Path, data: str, cluster: str, overrides: Sequence[str]) -> int:
    """Create the run directory with a checkpoint of step 0, from which `outlast resume` starts."""
    fields = model_fields(read_config(hf_dir))
    tensors = list_tensors(weight_files(hf_dir))
    folder = absolute(run_dir)
    tables = {"name": folder.name, "model": fields, "data": {"path": data}}
    tables = with_settings(tables, overrides)
    request = examine(tables, "import", cluster, folder)
    match_tensors(tensors, request.config.model)
    check_tokenizer(hf_dir, load_encoding(request.config.data.sources[0].path))
    show_warnings(request)
    _warn_of_changes(validate(ModelConfig, fields, "config.json"), request.config.model)
    show_plan(request, err=True)
    begins_with = {Event.IMPORTED: {"step": 0, "source": str(hf_dir)}}
    run = create_run(folder, request, command_line(), begins_with)
    command = python_module("gpt.huggingface.importer", str(hf_dir.absolute()), str(run.path))
    code = None
    try:
        code = subprocess.run(command).returncode
    finally:
        if code != 0:  # also after Ctrl-C: the new run directory holds nothing that is worth keeping
            shutil.rmtree(run.path)
    if code != 0:
        return code
    click.echo(f"start training with: outlast resume {run_dir}", err=True)
    click.echo(run.path)
    return 0


def _warn_of_changes(stored: ModelConfig, chosen: ModelConfig) -> None:
    """Warn of each field that `--set` changed although the weights were trained with another value."""
    before, after = stored.model_dump(), chosen.model_dump()
    for name in sorted(before.keys() - _OF_TRAINING):
        if before[name] != after[name]:
            click.echo(
                f"warning: model.{name} = {after[name]!r}, but the weights were trained with "
                f"{before[name]!r} (config.json).",
                err=True,
            )
