"""Options that several commands share, and the layout of their examples."""

import click

RUN_HELP = "RUN is the name of a recipe or a TOML file."
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="A.B=C",
    help="Set a field of the run config. Can be repeated.",
)
cluster_option = click.option(
    "--cluster",
    default="local",
    show_default=True,
    metavar="C",
    help="A TOML file, or a name in cluster_configs.",
)
detach_option = click.option(
    "--follow/--detach",
    "attend",
    default=None,
    help="Show progress until the job ends, or return at once. Default: follow local jobs only.",
)


def example(*lines: str) -> str:
    """An epilog with examples, which click does not rewrap."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)
