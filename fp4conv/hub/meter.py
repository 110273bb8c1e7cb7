"""A progress bar that shows nothing and tells a function: how huggingface_hub says what has come down."""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm


def meter_class(tell: Callable[[int], None]) -> type[tqdm]:
    """A class for the `tqdm_class` of a download; `tell` gets the bytes of the file, and may raise to stop it."""

    class Meter(tqdm):  # type: ignore[misc]  # tqdm has no types
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **{**options, "disable": True})
            tell(int(self.n))  # an earlier attempt may have left some

        def update(self, nbytes: float | None = 1) -> None:
            self.n += nbytes or 0
            tell(int(nbytes or 0))

        def update_transfer(self, nbytes: float) -> None:
            """Xet counts what travels apart from what is written; the file's bytes are counted by `update`."""

        def set_transfer_postfix_str(self, *args: object, **options: object) -> None:
            """Nothing is shown."""

    return Meter
