"""Resident memory of this process."""

from __future__ import annotations

import re
import resource
import sys
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
