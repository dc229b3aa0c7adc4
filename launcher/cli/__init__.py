"""The command tree: names, options, help texts, exit codes.

`outlast --help` must answer in under 0.3 s, so a command's implementation is imported only when it runs.
Nothing in `launcher` imports torch.
"""

import errno
import os
import stat
import sys

import click

from data_pipeline.errors import OutlastError
from data_pipeline.places import escaped
from gpt.run.exit_codes import ExitCode, exit_code_of
from launcher.cli import data, inspecting, models, training

_SHOWN_CODES = (
    ExitCode.FINISHED,
    ExitCode.BAD_INPUT,
    ExitCode.STOPPED,
    ExitCode.DO_NOT_RESTART,
    ExitCode.FAILED,
)
# The errors of the file system about a path that an argument names.
_UNUSABLE_PATH = (
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
_HELP = """Pretraining runs that outlast their machines.

\b
Try it:        outlast demo
Your own run:  outlast prepare SOURCE… --tokenizer outlast-4k --out DATA
               outlast launch RUN.toml --cluster local --set data.path=DATA

\b
Exit codes:
""" + "\n".join(f"{code:>4}  {code.meaning}" for code in _SHOWN_CODES)


@click.group(help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="outlast")
def commands() -> None:
    """The group of all commands."""


for _command in (
    training.demo,
    training.recipes,
    training.init,
    training.plan,
    training.simulate,
    training.launch,
    training.resume,
    training.rehearse,
    training.sweep,
    inspecting.status,
    inspecting.goodput,
    inspecting.replay,
    inspecting.logs,
    inspecting.stop,
    inspecting.checkpoints,
    inspecting.compare,
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
    """Run the `outlast` command and exit with its code.

    What it writes is never writable by everybody: files of a run are executed.
    """
    os.umask(os.umask(0) | stat.S_IWOTH)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; errors meant for users are lines on standard error."""
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
            click.echo(f"error: {escaped(line)}", err=True)
        return exit_code_of(error)
    except BrokenPipeError:
        sys.stderr.close()  # otherwise the interpreter prints an error when it flushes
        return 1
    except OSError as error:
        if error.errno not in _UNUSABLE_PATH:
            raise
        click.echo(escaped(f"error: {error.filename}: {error.strerror}"), err=True)
        return 2
