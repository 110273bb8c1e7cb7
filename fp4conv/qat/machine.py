"""What a run ran on, in words."""

from __future__ import annotations

import os
import platform

import torch

from fp4conv.sizes import format_size


def machine() -> str:
    """The GPU, or the processor's cores and memory."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return f"{count} x {torch.cuda.get_device_name()}" if count > 1 else str(torch.cuda.get_device_name())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{platform.machine()} processor, {os.cpu_count()} cores, {format_size(memory)}"
