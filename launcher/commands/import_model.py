"""`outlast import HF_DIR RUN_DIR`: a new run that starts from the weights of a transformers folder.

The [model] table comes from the folder's config.json, everything else from defaults and `--set`. All of it is
checked before a file is written. A child process reads the weights, because that needs torch.
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import click

from data_pipeline.errors import ConfigError
from gpt.huggingface.architectures import model_fields
from gpt.run.json_file import read_json
from launcher.commands.launch import command_line
from launcher.commands.plan import show_warnings
from launcher.paths import absolute
from launcher.preflight.check import examine
from launcher.runs.code_snapshot import python_module
from launcher.runs.recipes import with_settings
from launcher.runs.store import create_run


def import_run(hf_dir: Path, run_dir: Path, data: str, cluster: str, overrides: Sequence[str]) -> int:
    """Create the run directory with a checkpoint of step 0, from which `outlast resume` starts."""
    config = read_json(hf_dir / "config.json")
    if config is None:
        raise ConfigError(
            f"{hf_dir} has no config.json. Give a folder that transformers' save_pretrained wrote."
        )
    folder = absolute(run_dir)
    tables = {"name": folder.name, "model": model_fields(config), "data": {"path": data}}
    tables = with_settings(tables, overrides)
    request = examine(tables, "import", cluster, folder)
    show_warnings(request)
    run = create_run(folder, request, command_line())
    command = python_module("gpt.huggingface.importer", str(hf_dir.absolute()), str(run.path))
    code = subprocess.run(command).returncode
    if code != 0:  # the new run directory holds nothing that is worth keeping
        shutil.rmtree(run.path)
        return code
    click.echo(f"start training with: outlast resume {run_dir}", err=True)
    click.echo(run.path)
    return 0
