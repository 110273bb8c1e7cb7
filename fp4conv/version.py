"""The version of the package: on the ground floor, because what a layout writes names its producer."""

from __future__ import annotations

__version__ = "0.1.0"
