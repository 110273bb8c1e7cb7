"""From settings to the backend and its recipe."""

from __future__ import annotations

from fp4conv.qat.backend import Backend, Recipe, open_backend
from fp4conv.qat.settings import Settings


def backend_of(settings: Settings) -> Backend:
    return open_backend(settings.backend)


def recipe_of(settings: Settings) -> Recipe:
    assert settings.format is not None, "checked with the other words of the command"
    return Recipe(settings.format, settings.quant_cfg, settings.modules, settings.include, settings.exclude)
