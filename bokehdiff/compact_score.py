"""The score of the challenge of lens blur on phones: how good the pictures are, for the time."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["compact_score"]


def compact_score(mean_opinion_score: float, runtimes_ms: Sequence[float]) -> float:
    """``2^(2 MOS) / t``, where t is the geometric mean of the runtimes.

    Half a point of opinion is worth as much as half the time. The geometric mean is what the
    published table of the challenge was computed with.

    Args:
        mean_opinion_score: what people gave the pictures; the challenge has marks from 1.1 to 6.7.
        runtimes_ms: milliseconds for a photo of 1024 x 1536 pixels, of each device.

    Raises:
        ValueError: no runtime, one that is not positive, or a number that is not finite.
    """
    if not math.isfinite(mean_opinion_score):
        raise ValueError(f"mean_opinion_score is {mean_opinion_score}; wanted a finite number.")
    if not runtimes_ms or not all(math.isfinite(one) and one > 0 for one in runtimes_ms):
        raise ValueError(
            f"runtimes_ms is {list(runtimes_ms)}; wanted the milliseconds of at least one device, "
            "all of them positive, for instance [19.7, 42.6]."
        )
    logarithms = [math.log2(one) for one in runtimes_ms]
    return 2 ** (2 * mean_opinion_score - math.fsum(logarithms) / len(logarithms))
