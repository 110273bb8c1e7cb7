"""How every command ends: our errors become a message and an exit code."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from fp4conv.errors import Fp4convError
from fp4conv.report.visible import visible

INTERRUPTED = 130  # what shells report of a program that Ctrl-C ended


class Group(click.Group):
    """Turns our errors into a message and an exit code, whichever command raised them.

    --help lists the commands in the order in which they were added, that of the work, not of the alphabet.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except Fp4convError as error:
            fail(str(error), error.exit_code)
        except KeyboardInterrupt as stopped:
            fail("\n  ".join(["stopped", *map(str, stopped.args)]), INTERRUPTED)
        except BrokenPipeError:
            sys.stderr.close()  # the reader of our output is gone; so is the need to say more
            sys.exit(1)


def fail(message: str, code: int) -> NoReturn:
    click.echo(f"error: {visible(message)}", err=True)
    sys.exit(code)


def epilog(*examples: str) -> str:
    lines = "\n".join(f"  {example}" for example in examples)
    return f"\b\nExample{'s' * (len(examples) > 1)}:\n{lines}"
