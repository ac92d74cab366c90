"""How what is moved by a motor starts and stops."""

from __future__ import annotations

__all__ = ["eased"]


def eased(time: float) -> float:
    """How far something has moved that starts and stops gently, 0 to 1, at a time from 0 to 1:
    ``t^2 (3 - 2 t)``."""
    time = min(max(time, 0.0), 1.0)
    return time * time * (3 - 2 * time)
