"""Options that several commands share, and the layout of their examples."""

from pathlib import Path
from typing import Any

import click

from launcher.paths import usable_path

RUN_HELP = "RUN is the name of a recipe or a TOML file."
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="A.B=C",
    help="Set a field of the run config; A.B= restores its default. Can be repeated.",
)
cluster_option = click.option(
    "--cluster",
    default="local",
    show_default=True,
    metavar="C",
    help="A TOML file, or a name in cluster_configs.",
)
mfu_option = click.option(
    "--mfu",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.4,
    show_default=True,
    help="The fraction of the accelerators' peak FLOPs that the estimated time assumes.",
)
nodes_option = click.option(
    "--nodes",
    type=click.IntRange(min=1),
    metavar="N",
    help="The number of nodes, instead of the file's.",
)
processes_option = click.option(
    "--processes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Training processes per node, instead of the cluster file's; with GPUs, each gets one.",
)
detach_option = click.option(
    "--follow/--detach",
    "attend",
    default=None,
    help="Show progress until the job ends, or return at once. Default: follow local jobs only.",
)


class UserPath(click.Path):
    """A path on the command line. Bytes that no path can have are bad input, whichever command gets them."""

    def __init__(self, **rules: Any) -> None:
        super().__init__(path_type=Path, **rules)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """`value` as a Path. Raises ConfigError for a path that no file can have."""
        named = param.opts[0] if isinstance(param, click.Option) else ""
        return super().convert(usable_path(value, named), param, ctx)


def example(*lines: str) -> str:
    """An epilog with examples, which click does not rewrap."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)
