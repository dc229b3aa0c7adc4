"""`outlast import HF_DIR RUN_DIR`: a run that begins with the weights of a transformers folder.

The [model] table comes from the folder's config.json, all else from defaults and `--set`. Everything is
checked before a file is written; the weights are read by a child, since that needs torch.
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import click

from data_pipeline.config_file import with_overrides
from data_pipeline.errors import ConfigError
from gpt.huggingface.architectures import model_fields
from gpt.run.json_file import read_json
from launcher.commands.launch import command_line, show_warnings
from launcher.paths import absolute
from launcher.preflight.check import examine
from launcher.runs.code_snapshot import python_module
from launcher.runs.recipes import with_absolute_paths
from launcher.runs.store import create_run


def import_run(hf_dir: Path, run_dir: Path, data: str, cluster: str, overrides: Sequence[str]) -> int:
    """Make the run directory with its step 0, for `outlast resume` to start; the exit code."""
    config = read_json(hf_dir / "config.json")
    if config is None:
        raise ConfigError(
            f"{hf_dir} has no config.json; name a folder that transformers' save_pretrained wrote."
        )
    folder = absolute(run_dir)
    tables = {"name": folder.name, "model": model_fields(config), "data": {"path": data}}
    tables = with_absolute_paths(with_overrides(tables, overrides))
    request = examine(tables, "import", cluster, folder)
    show_warnings(request)
    run = create_run(folder, request, command_line())
    command = python_module("gpt.huggingface.importer", str(hf_dir.absolute()), str(run.path))
    code = subprocess.run(command).returncode
    if code != 0:  # nothing has trained here yet
        shutil.rmtree(run.path)
        return code
    click.echo(f"`outlast resume {run_dir}` starts it", err=True)
    click.echo(run.path)
    return 0
