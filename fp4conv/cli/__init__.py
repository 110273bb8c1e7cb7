"""The command line: parse, call the function of the same name, print, exit. A file a command.

Results go to stdout, progress and warnings to stderr. Exit 0: done. 1: the data or the run failed. 2: usage.
Commands are imported when they run, so that `--help` is quick.
"""

from __future__ import annotations

import click

from fp4conv.cli.calibrate import calibrate
from fp4conv.cli.convert import convert
from fp4conv.cli.demo import demo
from fp4conv.cli.diff import diff
from fp4conv.cli.group import Group
from fp4conv.cli.inspect import inspect
from fp4conv.cli.merge_lora import merge_lora
from fp4conv.cli.push import push
from fp4conv.cli.qat import qat
from fp4conv.cli.verify import verify
from fp4conv.version import __version__

__all__ = ["main"]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fp4conv")
def main() -> None:
    """Convert language-model checkpoints between BF16, MXFP4 and NVFP4: exact, streaming, resumable."""


for command in (convert, merge_lora, inspect, verify, diff, push, qat, calibrate, demo):
    main.add_command(command)
