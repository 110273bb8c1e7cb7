"""What a run ran on, in words: a step at a time, for one that goes on may do so elsewhere, and with other releases."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterable, Mapping

import torch

from fp4conv.model import JSON
from fp4conv.sizes import format_size
from fp4conv.version import __version__

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "nvidia-modelopt")
ON = "on"  # its entry among the facts of a step


def machine() -> str:
    """The GPU, or the processor's cores and memory."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return f"{count} x {torch.cuda.get_device_name()}" if count > 1 else str(torch.cuda.get_device_name())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{platform.machine()} processor, {os.cpu_count()} cores, {format_size(memory)}"


def versions() -> dict[str, str]:
    found = {"fp4conv": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        if importlib.util.find_spec(name.removeprefix("nvidia-")) is not None:
            found[name] = importlib.metadata.version(name)
    return found


def noted(facts: Mapping[str, JSON]) -> dict[str, JSON]:
    """The facts of a step that was done here and now, and what it ran on."""
    return {**facts, ON: {"machine": machine(), "versions": dict(versions())}}


def over_steps(steps: Iterable[Mapping[str, JSON]]) -> tuple[str, dict[str, str]]:
    """(machines, package -> versions) of steps by their facts, each once, in the order in which they came."""
    machines: dict[str, None] = {}
    found: dict[str, dict[str, None]] = {}
    for facts in steps:
        match facts.get(ON):
            case {"machine": str(name), "versions": dict(packages)}:
                machines[name] = None
                for package, version in packages.items():
                    found.setdefault(package, {})[str(version)] = None
    return "; then ".join(machines), {package: ", then ".join(seen) for package, seen in found.items()}
