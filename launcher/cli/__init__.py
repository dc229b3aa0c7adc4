"""The command tree: names, options, help, exit codes. What a command does is imported when it runs.

`outlast --help` must answer in under 0.3 s, so nothing here imports more than click; nothing anywhere in
`launcher` imports torch.
"""

import sys

import click

from data_pipeline.errors import OutlastError
from gpt.run.exit_codes import exit_code_of
from launcher.cli import data, inspecting, models, training


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="outlast")
def commands() -> None:
    """Pretraining runs that outlast their machines.

    \b
    First:   outlast demo
    Yours:   outlast prepare SOURCE… --tokenizer outlast-4k --out DATA
             outlast launch RUN.toml --cluster local --set data.path=DATA

    Exit codes: 0 done; 2 the input is wrong; 75 stopped with everything saved, start again to
    continue; 93 do not restart; 1 anything else.
    """


for _command in (
    training.demo,
    training.plan,
    training.launch,
    training.resume,
    training.rehearse,
    training.sweep,
    inspecting.status,
    inspecting.logs,
    inspecting.stop,
    inspecting.checkpoints,
    inspecting.ui,
    data.prepare,
    data.data,
    data.tokenizer,
    data.verify,
    data.schema,
    models.sample,
    models.export,
    models.import_,
):
    commands.add_command(_command)


def main() -> None:
    """The `outlast` command: runs it and exits with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit code of one command; errors meant for users are lines on standard error."""
    try:
        return int(commands.main(arguments, prog_name="outlast", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    except OutlastError as error:
        for line in str(error).splitlines():
            click.echo(f"error: {line}", err=True)
        return exit_code_of(error)
    except BrokenPipeError:
        sys.stderr.close()  # or the interpreter complains while it flushes
        return 1
    except (NotADirectoryError, IsADirectoryError, PermissionError) as error:  # what was named is not usable
        click.echo(f"error: {error.filename}: {error.strerror}", err=True)
        return 2
