"""The output folder: it does not exist until it is complete, and a killed run goes on where it stopped.

Owns DST.partial, its journal and the renames that make it DST. It refuses to own what is written inside, beyond
small files, and which steps there are: the pipeline names them.

Everything is made in DST.partial and one rename makes it DST. With `overwrite` the old DST is moved to DST.replaced
just before and removed just after; the journal moves along with the folder and goes last, so whatever a kill leaves
says what to do next:

    DST.partial                         go on; or, when it is complete, rename it
    DST.partial, DST.replaced, no DST   the same command renames; any other first puts the old DST back
    DST with a journal                  it is whole: remove DST.replaced and the journal
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fp4conv.errors import Fp4convError, ValuesError
from fp4conv.staging.claim import check, claim, pins_of
from fp4conv.staging.journal import JOURNAL_NAME
from fp4conv.staging.output import Staging

__all__ = ["JOURNAL_NAME", "Staging", "check", "pins_of", "stage"]


@contextmanager
def stage(
    destination: Path,
    *,
    fingerprint: str,
    command: str,
    nbytes: int,
    pins: Mapping[str, str] | None = None,
    source_root: Path | None = None,
    overwrite: bool = False,
) -> Iterator[Staging]:
    """Claim DST.partial for the command with this `fingerprint`; `commit()` makes it `destination`.

    `command` is what a user would type to go on; `nbytes` is the size of the whole output; `pins` are the commits of
    repositories that it comes from, which `pins_of` tells a later run. Before anything is
    written, raises OutputError (the destination exists, overlaps the source, cannot be made, or does not fit the
    disk) or ResumeError (DST.partial belongs to another command or to a running process).

    An error inside removes DST.partial as long as `started` is false; later it stays, and the error's hint says so.
    """
    out = claim(
        destination,
        fingerprint=fingerprint,
        command=command,
        pins=pins or {},
        nbytes=nbytes,
        source_root=source_root,
        overwrite=overwrite,
    )
    try:
        yield out
    except Fp4convError as error:
        if out.leave():
            # What a value makes fail fails again, unless the source is mended or the options are others.
            others = "Other options begin anew, and need --overwrite.\n  " if isinstance(error, ValuesError) else ""
            way_on = others + out.resume_hint
            error.hint = f"{error.hint}\n  {way_on}" if error.hint else way_on
        raise
    except KeyboardInterrupt as error:
        if out.leave():
            error.args = (out.resume_hint,)
        raise
    finally:
        out.leave()
