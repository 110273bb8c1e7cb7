"""`python -m fp4conv`."""

from __future__ import annotations

from fp4conv.cli import main

main()
