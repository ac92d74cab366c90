"""Image metrics by name; each name fixes colour space, range, crop and which direction is better.

    metric = metric_by_name("psnr_edge")
    metric.measure(quantise_to_8_bit(prediction), photograph)       # dB, or None without edges

Several metrics of one prediction are measured faster together, by :func:`measure_all`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from evaluation.highlight_discs import disc_flatness, disc_radius_error
from evaluation.photographs import Photograph
from evaluation.regions import SMALLEST_REGION_PX, regions_of

__all__ = [
    "METRICS",
    "Comparison",
    "Metric",
    "measure_all",
    "metric_by_name",
    "metric_names",
    "psnr",
    "quantise_to_8_bit",
    "structural_similarity_map",
]

# Identical images would have infinite PSNR; a mean over images needs a number (100 dB).
SMALLEST_SQUARED_ERROR = 1e-10
# What five halvings leave an 11 x 11 window of.
SMALLEST_MS_SSIM_SIDE = 161


def quantise_to_8_bit(image: np.ndarray) -> np.ndarray:
    """The float64 image clipped to [0, 1] and rounded to multiples of 1/255, as a PNG stores it."""
    return np.round(np.clip(image.astype(np.float64), 0, 1) * 255) / 255


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB for a peak of 1; at most 100."""
    return -10 * math.log10(max(mean_squared_error, SMALLEST_SQUARED_ERROR))


def structural_similarity_map(
    prediction: np.ndarray, truth: np.ndarray
) -> tuple[float, np.ndarray]:
    """(mean SSIM, SSIM of each pixel (H, W)) of two float images (H, W, 3) in [0, 1].

    Gaussian window of sigma 1.5 (11 x 11), population covariance, mean over the colour channels:
    the settings of the original publication. The mean leaves out the 5 pixels at each border,
    where the window is incomplete; the map does not.
    """
    from skimage.metrics import structural_similarity

    mean, similarity = structural_similarity(
        truth,
        prediction,
        data_range=1.0,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    return float(mean), similarity.mean(axis=2)


class Comparison:
    """A prediction beside its photograph, and what several metrics need of them, computed once.

    Args:
        prediction: (H, W, 3) float, display-encoded sRGB in [0, 1], as :func:`quantise_to_8_bit`
            returns it.
        photograph: whose ``truth`` it is compared with.

    Raises:
        ValueError: the sizes differ, or the prediction is not finite or not in [0, 1].
    """

    def __init__(self, prediction: np.ndarray, photograph: Photograph) -> None:
        truth = photograph.truth
        if prediction.shape != truth.shape:
            raise ValueError(
                f"The prediction has shape {prediction.shape}, the truth {truth.shape}; wanted the "
                "same size, (height, width, 3)."
            )
        if not np.isfinite(prediction).all():
            raise ValueError("The prediction contains NaN or infinite values.")
        if prediction.min() < 0 or prediction.max() > 1:
            raise ValueError(
                f"The prediction goes from {prediction.min():g} to {prediction.max():g}; wanted "
                "display-encoded sRGB in [0, 1], as quantise_to_8_bit returns it."
            )
        self.prediction = prediction
        self.photograph = photograph
        self.truth = truth / 255.0

    @cached_property
    def squared_error(self) -> np.ndarray:
        """(H, W): mean over the colour channels."""
        return ((self.prediction - self.truth) ** 2).mean(axis=2)

    @cached_property
    def similarity(self) -> tuple[float, np.ndarray]:
        """As of :func:`structural_similarity_map`."""
        return structural_similarity_map(self.prediction, self.truth)


Measurement = Callable[[Comparison], float | None]


@dataclass(frozen=True)
class Metric:
    """A named way of telling how far a prediction is from the truth of its photograph."""

    name: str
    better: str  # "higher" or "lower"
    unit: str  # "" for a pure number
    description: str  # colour space, range, crop, window
    of: Measurement

    def measure(self, prediction: np.ndarray, photograph: Photograph) -> float | None:
        """The figure, or None where it is not defined for this photograph.

        Args:
            prediction: (H, W, 3) float, display-encoded sRGB, clipped and rounded by
                :func:`quantise_to_8_bit`.
            photograph: whose ``truth`` it is compared with.

        Raises:
            ValueError: the sizes differ, or the prediction is not finite or not in [0, 1].
        """
        return self.of(Comparison(prediction, photograph))


def measure_all(
    metrics: Iterable[Metric], prediction: np.ndarray, photograph: Photograph
) -> dict[str, float | None]:
    """The figures of :meth:`Metric.measure` by name; what metrics share is computed once."""
    comparison = Comparison(prediction, photograph)
    return {metric.name: metric.of(comparison) for metric in metrics}


@dataclass(frozen=True)
class Recipe:
    """What is known of a metric before its networks are read."""

    better: str
    unit: str
    description: str
    make: Callable[[str | Path | None, str], Measurement]  # of weights and device


def metric_names() -> list[str]:
    """The names that :func:`metric_by_name` knows."""
    return list(METRICS)


def metric_by_name(name: str, weights: str | Path | None = None, device: str = "cpu") -> Metric:
    """The metric of that name; ``python -m evaluation metrics`` lists them.

    Args:
        name: one of :func:`metric_names`.
        weights: for lpips, lpips_alex and dists: a folder with the published files, or the file of
            the backbone; see :mod:`evaluation.perceptual_metrics`. None: torchvision's cache, or a
            download. Other metrics need none.
        device: where networks run.

    Raises:
        ImportError: a package that the metric needs is missing.
        ValueError: an unknown name, or weights that cannot be had.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; wanted one of {', '.join(METRICS)}.")
    recipe = METRICS[name]
    return Metric(
        name, recipe.better, recipe.unit, recipe.description, recipe.make(weights, device)
    )


def _mean_psnr(comparison: Comparison) -> float:
    return psnr(float(comparison.squared_error.mean()))


def _region_psnr(comparison: Comparison, region: str) -> float | None:
    mask = _region(comparison, region)
    return None if mask is None else psnr(float(comparison.squared_error[mask].mean()))


def _region_ssim(comparison: Comparison, region: str) -> float | None:
    mask = _region(comparison, region)
    return None if mask is None else float(comparison.similarity[1][mask].mean())


def _region(comparison: Comparison, name: str) -> np.ndarray | None:
    """The mask, or None if the photograph has no such region or too small a one."""
    regions = regions_of(comparison.photograph)
    if name == "highlight":
        mask = ~regions["nohl"] if "nohl" in regions else None
    else:
        mask = regions.get(name)
    return mask if mask is not None and mask.sum() >= SMALLEST_REGION_PX else None


def _sharpness_in_focus(comparison: Comparison) -> float | None:
    """``|1 - sum(g_p g_t) / sum(g_t^2)|`` over the differences g of neighbours both in focus."""
    mask = _region(comparison, "infocus")
    if mask is None:
        return None
    common = energy = 0.0
    for axis in (0, 1):
        inside = np.take(mask, range(1, mask.shape[axis]), axis)
        inside = inside & np.take(mask, range(mask.shape[axis] - 1), axis)
        of_prediction = np.diff(comparison.prediction, axis=axis)[inside]
        of_truth = np.diff(comparison.truth, axis=axis)[inside]
        common += float((of_prediction * of_truth).sum())
        energy += float((of_truth**2).sum())
    return abs(1 - common / energy) if energy > 0 else None


def _multi_scale_ssim(weights: str | Path | None, device: str) -> Measurement:
    try:
        from piq import multi_scale_ssim
    except ImportError as missing:
        raise ImportError(
            "ms_ssim needs the piq package: pip install 'bokehdiff[train]'."
        ) from missing
    import torch

    def measure(comparison: Comparison) -> float | None:
        if min(comparison.truth.shape[:2]) < SMALLEST_MS_SSIM_SIDE:
            return None
        # Fifteen times as fast as in float64, and within 1e-4 of it.
        images = (
            torch.from_numpy(image).permute(2, 0, 1)[None].float()
            for image in (comparison.prediction, comparison.truth)
        )
        return float(multi_scale_ssim(*images))

    return measure


def _needs_nothing(measurement: Measurement) -> Callable[[str | Path | None, str], Measurement]:
    return lambda weights, device: measurement


def _lpips(backbone: str, weights: str | Path | None, device: str) -> Measurement:
    from evaluation.perceptual_metrics import lpips_distance

    distance = lpips_distance(backbone, weights, device)
    return lambda comparison: distance(comparison.prediction, comparison.truth)


def _dists(weights: str | Path | None, device: str) -> Measurement:
    from evaluation.perceptual_metrics import dists_distance

    distance = dists_distance(weights, device)
    return lambda comparison: distance(comparison.prediction, comparison.truth)


COLOURS = "display-encoded sRGB in [0, 1], rounded to 8 bits"

REGIONS = {
    "edge": "pixels within 6 px of a disparity step of more than 3 % of the scene's range",
    "infocus": "pixels whose circle of confusion is under 0.75 px, not near a depth edge",
    "blurred": "the pixels that are neither near a depth edge nor in focus",
    "nohl": "pixels that the disc of no highlight (linear light above 1.5) can reach",
    "edge_nohl": "the pixels of edge that the disc of no highlight can reach",
    "blurred_nohl": "the pixels of blurred that the disc of no highlight can reach",
}

DISCS = "mean over those that the truth shows alone, whole and not cut off at white"
HIGHLIGHT = "pixels that the disc of some highlight (linear light above 1.5) can reach"

METRICS: dict[str, Recipe] = {
    "psnr": Recipe(
        "higher",
        "dB",
        f"peak signal-to-noise ratio, {COLOURS}, all pixels and channels; at most 100",
        _needs_nothing(_mean_psnr),
    ),
    "ssim": Recipe(
        "higher",
        "",
        f"structural similarity, {COLOURS}, Gaussian window of 11 x 11 px (sigma 1.5), population "
        "covariance, mean over the channels and over all pixels but 5 at each border",
        _needs_nothing(lambda comparison: comparison.similarity[0]),
    ),
    "ms_ssim": Recipe(
        "higher",
        "",
        f"multi-scale structural similarity (piq), {COLOURS}, five scales, Gaussian window of "
        f"11 x 11 px (sigma 1.5); images of at least {SMALLEST_MS_SSIM_SIDE} px a side",
        _multi_scale_ssim,
    ),
    "lpips": Recipe(
        "lower",
        "",
        f"LPIPS 0.1 with VGG-16, {COLOURS}, given to it in [-1, 1] at full size",
        partial(_lpips, "vgg"),
    ),
    "lpips_alex": Recipe(
        "lower",
        "",
        f"LPIPS 0.1 with AlexNet, {COLOURS}, given to it in [-1, 1] at full size",
        partial(_lpips, "alex"),
    ),
    "dists": Recipe(
        "lower",
        "",
        f"DISTS (piq), {COLOURS}, the shorter side scaled down to 256 px if it is longer",
        _dists,
    ),
    **{
        f"psnr_{region}": Recipe(
            "higher",
            "dB",
            f"psnr of {pixels}",
            _needs_nothing(partial(_region_psnr, region=region)),
        )
        for region, pixels in {**REGIONS, "highlight": HIGHLIGHT}.items()
    },
    **{
        f"ssim_{region}": Recipe(
            "higher",
            "",
            f"mean over {pixels}, of the map of ssim",
            _needs_nothing(partial(_region_ssim, region=region)),
        )
        for region, pixels in REGIONS.items()
    },
    "sharpness_infocus": Recipe(
        "lower",
        "",
        f"share of the truth's detail in focus that is lost or added, {COLOURS}: |1 - slope| of "
        "the prediction's differences of neighbouring pixels against the truth's; deaf to noise "
        f"and to offsets; {REGIONS['infocus']}",
        _needs_nothing(_sharpness_in_focus),
    ),
    "disc_radius_error": Recipe(
        "lower",
        "",
        "relative error of the radius (square root of twice the second moment of linear light) of "
        f"the discs of lights, {DISCS}; 1 where no disc is seen",
        _needs_nothing(lambda seen: disc_radius_error(seen.prediction, seen.photograph)),
    ),
    "disc_flatness": Recipe(
        "higher",
        "",
        "evenness of linear light in the discs of lights, the darker of rim and middle over the "
        f"brighter, {DISCS}; 1 for a disc, 0.4 for a Gaussian, 0 where no disc is seen",
        _needs_nothing(lambda seen: disc_flatness(seen.prediction, seen.photograph)),
    ),
}
"""What there is, by name."""
