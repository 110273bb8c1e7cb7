"""What commands print: views and JSON on stdout, progress and warnings on stderr."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import click

from fp4conv.report.visible import visible

if TYPE_CHECKING:
    from rich.console import RenderableType
    from tqdm import tqdm

    from fp4conv.commands.fetching import Fetching
    from fp4conv.plan import Plan


def words(*without: str) -> str:
    """This command as it was typed."""
    return shlex.join(["fp4conv", *(word for word in sys.argv[1:] if word not in without)])


def print_view(view: RenderableType) -> None:
    from fp4conv.report.terminal import Shown, console

    console().print(Shown(view))


def print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def warn(warnings: tuple[str, ...], quiet: bool) -> None:
    for warning in () if quiet else warnings:
        click.echo(f"warning: {visible(warning)}", err=True)


def announce_kernels(quiet: bool) -> None:
    """Say so before the first compilation on this machine, which takes some seconds."""
    import fp4conv.kernels.compiled  # noqa: F401 -- until its kernels are known, all look cold
    from fp4conv.kernels.jit import cache_note, is_cold

    if quiet:
        return
    if note := cache_note():
        click.echo(f"warning: {note}", err=True)
    elif is_cold():
        click.echo("compiling kernels, once on this machine (some seconds) ...", err=True)


class Meter:
    """Progress on stderr, in bytes of the source; silent where stderr is no terminal, and with --quiet.

    One bar for what is converted and, where the source is on the Hub, one above it for what has come down.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._advance: Callable[[int], object] = lambda _: None
        self._start_at: Callable[[int], object] = lambda _: None
        self._fetch: Callable[[int], object] = lambda _: None
        self._close: Callable[[], None] = lambda: None
        self._download: tqdm[NoReturn] | None = None
        self._upload: tqdm[NoReturn] | None = None

    def plan(self, plan: Plan, fetching: Fetching) -> None:
        self.start(plan.bytes_read, f"to {plan.target}", download=fetching.total_bytes)

    def start(self, total: int, what: str, *, download: int = 0, compiled: bool = True) -> None:
        """Show the bar: `total` bytes are to be read; and above it one for `download` bytes from the Hub.

        `compiled`: they are read by kernels, which may have to be compiled first.
        """
        from tqdm import tqdm

        self._close()
        if compiled:
            announce_kernels(self._quiet)
        look = {"unit": "B", "unit_scale": True, "disable": True if self._quiet else None}
        above = tqdm(total=download, desc="download", position=0, **look) if download else None
        bar = tqdm(total=total, desc=what, position=1 if above is not None else 0, **look)

        def start_at(nbytes: int) -> None:
            bar.initial = bar.n = bar.lastprint_view_n = nbytes  # so that it is no part of the rate
            bar.refresh()

        def close() -> None:
            bar.close()
            if above is not None:
                above.close()

        self._advance, self._start_at, self._close = bar.update, start_at, close
        if above is not None:
            self._fetch = above.update

    def advance(self, nbytes: int) -> None:
        self._advance(nbytes)

    def fetched(self, nbytes: int) -> None:
        self._fetch(nbytes)

    def resume(self, nbytes: int) -> None:
        self._start_at(nbytes)

    def downloaded(self, nbytes: int, total: int) -> None:
        """A bar of its own, before anything is read: `nbytes` more of `total` have come."""
        if self._download is None:
            from tqdm import tqdm

            disable = True if self._quiet else None
            self._download = tqdm(total=total, unit="B", unit_scale=True, desc="download", disable=disable)
            self._close = self._download.close
        self._download.update(nbytes)

    def note(self, text: str) -> None:
        """A line on stderr, above the bars."""
        if not self._quiet:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)

    def uploaded(self, nbytes: int, total: int) -> None:
        """A second bar: `nbytes` of the result, of `total`, are on the Hub."""
        if self._upload is None:
            from tqdm import tqdm

            disable = True if self._quiet else None
            self._upload = tqdm(total=total, unit="B", unit_scale=True, desc="upload", initial=nbytes, disable=disable)
        self._upload.update(nbytes - self._upload.n)

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        if self._upload is not None:
            self._upload.close()
