"""What the commands have in common: options, and how their examples are shown."""

import click

RUN_HELP = "RUN is a recipe's name or a TOML file."
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="A.B=C",
    help="Set a field of the run config; may be repeated.",
)
cluster_option = click.option(
    "--cluster", default="local", show_default=True, metavar="C", help="A file, or a name in cluster_configs."
)
detach_option = click.option(
    "--follow/--detach", "attend", default=None, help="Stay until the job ends (default: local jobs only)."
)


def example(*lines: str) -> str:
    """An epilog that click does not rewrap."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)
