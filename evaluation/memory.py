"""Memory of this process, and of this machine."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path


def resident_bytes(peak: bool) -> int:
    """Resident memory of this process, now or at its peak."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux: ru_maxrss of a new process starts at the peak of the process that started it.
        field = "VmHWM" if peak else "VmRSS"
        return int(re.search(rf"{field}:\s+(\d+) kB", status.read_text())[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def restart_peak() -> bool:
    """Let the peak of resident memory start anew; False where the system cannot do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_bytes_of(work: Callable[[], object], device: str = "cpu") -> int | None:
    """The most memory that some work takes on top of what there is before it.

    On a GPU what torch holds there, else resident memory of the process, of which what earlier
    work freed is given back to the system first. None, and nothing is done, where the system
    cannot tell.
    """
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    _give_back_freed_memory()
    if device != "cpu" or not restart_peak():
        return None
    before = resident_bytes(peak=False)
    work()
    return max(resident_bytes(peak=True) - before, 0)


def _give_back_freed_memory() -> None:
    # glibc keeps what is freed, and the next work would seem to need none.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        gc.collect()
        trim(0)
