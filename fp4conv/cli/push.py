"""`fp4conv push`."""

from __future__ import annotations

import click

from fp4conv.cli.group import epilog
from fp4conv.cli.options import json_option
from fp4conv.cli.output import Meter, print_json, print_view, warn


@click.command(
    short_help="Publish a finished checkpoint on the Hub.",
    epilog=epilog("fp4conv push my-llama-fp4 my-org/my-llama-fp4 --private"),
)
@click.argument("directory", metavar="DIR")
@click.argument("repo", metavar="REPO")
@click.option("--private", is_flag=True, help="Make the repository private, where there is none yet.")
@click.option("--overwrite", is_flag=True, help="Replace the model in REPO; it stays until the new one is whole.")
@click.option("--quiet", is_flag=True, help="No progress and no warnings.")
@json_option
def push(directory: str, repo: str, *, private: bool, overwrite: bool, quiet: bool, as_json: bool) -> None:
    """Publish the checkpoint in folder DIR as REPO on the Hub, once verify has found no error in it.

    Files go to a draft pull request with a model card, and it is merged when all are there: main shows a whole model
    or what it showed before. A run that was stopped goes on when the same command is given again.
    """
    from fp4conv.commands.push import push as run

    with Meter(quiet) as meter:
        pushed = run(
            directory,
            repo,
            private=private,
            overwrite=overwrite,
            on_verify=lambda nbytes: meter.start(nbytes, "verify", compiled=False),
            on_bytes=meter.advance,
            on_upload=meter.uploaded,
            on_note=meter.note,
        )
    if as_json:
        print_json(pushed.to_json())
        return
    from fp4conv.report.terminal import pushed_view

    print_view(pushed_view(pushed.verified, pushed.published))
    warn(pushed.warnings, quiet)
