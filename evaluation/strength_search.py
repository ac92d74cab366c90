"""The blur strength that suits a method best, where nobody knows the aperture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np

from evaluation.methods import Method
from evaluation.metrics import quantise_to_8_bit, structural_similarity_map
from evaluation.photographs import Photograph

__all__ = [
    "LARGEST_RADIUS_SHARE",
    "SMALLEST_RADIUS_PX",
    "TOLERANCE",
    "best_K",
    "best_common_range_px",
    "best_strength",
    "disparity_span",
    "largest_defocus",
    "number_of_evaluations",
    "strength_bounds",
]

SMALLEST_RADIUS_PX = 0.25
"""The weakest blur that is tried, but for none at all: less is not seen in 8 bits."""
LARGEST_RADIUS_SHARE = 0.1
"""The strongest blur that is tried, as a share of the width."""
TOLERANCE = 0.02
"""Of ln K: what is found is within 2 % of the maximum of a score with one peak."""

GOLDEN = (math.sqrt(5) - 1) / 2


def strength_bounds(largest_defocus: float, width: int) -> tuple[float, float]:
    """(low, high): K whose largest circle of confusion has 0.25 px, and 10 % of the width.

    largest_defocus: largest ``|disparity - df|``, not 0; width: of the photograph, pixels.
    ``high`` is at least ``low``, also of a photograph of two pixels.
    """
    low = SMALLEST_RADIUS_PX / largest_defocus
    return low, max(low, LARGEST_RADIUS_SHARE * width / largest_defocus)


def number_of_evaluations(low: float, high: float) -> int:
    """How often :func:`best_strength` asks for a score."""
    shrinkings = math.ceil(math.log(max(math.log(high / low) / TOLERANCE, 1)) / -math.log(GOLDEN))
    return 3 + shrinkings


def best_strength(score: Callable[[float], float], low: float, high: float) -> float:
    """The K of the highest score: golden-section search over ln K, and K = 0.

    The interval of ln K shrinks by the golden ratio with every score, until it is at most
    :data:`TOLERANCE` long. Of all K that were tried, 0 among them, the best one is returned; of
    equal ones the first, so K = 0 wins over a blur that changes nothing.

    Args:
        score: of a K, higher is better. It should have one peak over ln K in [low, high]; where it
            is the same for two K the peak is sought above them, as weak blur changes nothing.
        low, high: positive.
    """
    tried: dict[float, float] = {}

    def tried_score(log_K: float) -> float:
        K = math.exp(log_K)
        tried[K] = score(K)
        return tried[K]

    tried[0.0] = score(0.0)
    left, right = math.log(low), math.log(high)
    lower, upper = right - GOLDEN * (right - left), left + GOLDEN * (right - left)
    lower_score, upper_score = tried_score(lower), tried_score(upper)
    for _ in range(number_of_evaluations(low, high) - 3):
        if lower_score > upper_score:
            right, upper, upper_score = upper, lower, lower_score
            lower = right - GOLDEN * (right - left)
            lower_score = tried_score(lower)
        else:
            left, lower, lower_score = lower, upper, upper_score
            upper = left + GOLDEN * (right - left)
            upper_score = tried_score(upper)
    return max(tried, key=tried.__getitem__)


def best_K(method: Method, photograph: Photograph) -> float:
    """The K by which the picture of a method has the highest SSIM; 0 where all is in focus."""
    largest = largest_defocus(photograph)
    if largest == 0:
        return 0.0
    return best_strength(
        lambda K: _similarity(method, photograph, K),
        *strength_bounds(largest, photograph.image.shape[1]),
    )


def best_common_range_px(method: Method, photographs: Callable[[], Iterable[Photograph]]) -> float:
    """The blur strength, one for a whole data set, by which a method has the highest mean SSIM.

    Disparities of different photographs have different units, so it is the K per disparity range,
    ``K * (largest - smallest disparity)``, in pixels: the radius that a thing at one end of the
    range has when the other is in focus. See :func:`disparity_span`.

    Args:
        method: that needs K.
        photographs: gives all of them, once for the bounds and once for each strength tried.
    """
    largest_share, largest_width = 0.0, 0
    for photograph in photographs():
        share = largest_defocus(photograph) / disparity_span(photograph)
        largest_share = max(largest_share, share)
        largest_width = max(largest_width, photograph.image.shape[1])
    if largest_share == 0:
        return 0.0

    def mean_similarity(range_px: float) -> float:
        return float(
            np.mean([_similarity(method, p, range_px / disparity_span(p)) for p in photographs()])
        )

    return best_strength(mean_similarity, *strength_bounds(largest_share, largest_width))


def disparity_span(photograph: Photograph) -> float:
    """Largest minus smallest disparity of the scene; 1 if they are the same, as nothing blurs."""
    low, high = photograph.disparity_range
    return high - low or 1.0


def largest_defocus(photograph: Photograph) -> float:
    """The largest ``|disparity - df|``."""
    return float(np.abs(photograph.disparity - photograph.df).max())


def _similarity(method: Method, photograph: Photograph, K: float) -> float:
    """SSIM of the picture at this K."""
    picture = method.render(dataclasses.replace(photograph, K=K))
    return structural_similarity_map(quantise_to_8_bit(picture), photograph.truth / 255.0)[0]
