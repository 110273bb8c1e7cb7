"""Options that several commands have, each said once."""

from __future__ import annotations

import click

memory_option = click.option(
    "--max-memory", default="1GB", show_default=True, metavar="SIZE", help="Bound on resident memory."
)
workers_option = click.option("--workers", type=click.IntRange(1), metavar="N", help="Threads. Default: the cores.")
quiet_option = click.option("--quiet", is_flag=True, help="No progress.")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
