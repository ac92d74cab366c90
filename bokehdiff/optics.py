"""The physics of lens blur: units, signs, and the one formula for the circle of confusion.

Conventions, fixed for the whole library:

disparity
    A number per pixel, **larger is nearer**. Relative disparity lies in [0, 1] (0 the farthest, 1
    the nearest thing); metric disparity is 1/metres (0 is infinity). Depth in metres becomes metric
    disparity with :func:`depth_to_disparity`. Stereo disparity in pixels is proportional to metric
    disparity only for parallel cameras without offset; bring it to [0, 1] with
    :func:`normalise_disparity`.
df
    The disparity of the plane in focus, in the unit of the disparity map.
K
    Blur strength: **pixels of circle-of-confusion radius per unit of disparity**, never negative.
    The pixels are those of the image at hand: after resizing by a factor, K is multiplied by it
    (:func:`rescale_strength`); cropping leaves K as it is.
signed defocus
    ``K * (disparity - df)`` in pixels. **Positive in front of the plane in focus**, negative behind
    it.
circle of confusion
    ``r = K * |disparity - df|``, the **radius** (not the diameter) in pixels of the image at hand.

For a thin lens of focal length f and f-number N, focused at distance s, a point at distance z is
imaged as a disc of radius ``f^2 s / (2 N (s - f)) * |1/z - 1/s|`` on the sensor, so the formula
above is exact when disparity is 1/z, df is 1/s, and K is :func:`strength_from_camera`.

Functions take torch tensors, numpy arrays or plain numbers and give back the same kind. ``df`` and
``K`` may be one number, or one per image of a batch with shape (B,) or (B, 1, 1, 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch

Values = TypeVar("Values", torch.Tensor, np.ndarray, float)
"""A torch tensor, a numpy array or a number: what comes in is what goes out."""

Arrays = TypeVar("Arrays", torch.Tensor, np.ndarray)
"""A torch tensor or a numpy array: what comes in is what goes out."""

PerImage = float | Sequence[float] | np.ndarray | torch.Tensor
"""One number, or one number per image of a batch."""

# The diagonal of a 36 mm x 24 mm frame, to which "35 mm equivalent" focal lengths refer.
FULL_FRAME_DIAGONAL_MM = 43.27


def signed_defocus(disparity: Values, df: PerImage, K: PerImage) -> Values:
    """Returns ``K * (disparity - df)``: radius in pixels, positive nearer than the plane in focus.

    Args:
        disparity: (B, 1, H, W), any other shape, or a number; larger is nearer.
        df: disparity of the plane in focus, one number or one per image, (B,) or (B, 1, 1, 1).
        K: pixels of radius per unit of disparity, one number or one per image.

    Raises:
        ValueError: df or K has as many values as fit neither one image nor the batch.
    """
    focus = _along_batch(df, disparity, "df")
    strength = _along_batch(K, disparity, "K")
    return strength * (disparity - focus)


def circle_of_confusion(disparity: Values, df: PerImage, K: PerImage) -> Values:
    """Returns ``K * |disparity - df|``: the radius of the blur disc in pixels of the image at hand.

    Arguments and errors as in :func:`signed_defocus`, whose absolute value this is.
    """
    return abs(signed_defocus(disparity, df, K))


def collapse_focus_range(disparity: Arrays, low: PerImage, high: PerImage) -> Arrays:
    """Returns disparity in which all from `low` to `high` lies at `low`, to be rendered there.

    ``d - clamp(d, low, high) + low``: what is farther stays, what is nearer moves back by ``high -
    low``, so everything keeps its distance to the nearest end of what is in focus, and every
    renderer given ``df=low`` makes the signed defocus ``K * (d - clamp(d, low, high))``. The order
    of near and far stays, and so does the range [0, 1]; ``low == high`` changes nothing. NaN passes
    through. Differentiable.

    Args:
        disparity: (B, 1, H, W) or any other shape; larger is nearer.
        low, high: farther and nearer end of what is in focus, in the unit of `disparity`; one
            number, or one per image, (B,) or (B, 1, 1, 1).

    Raises:
        ValueError: `low` is larger than `high`, or their number fits neither one image nor the
            batch.
    """
    values: torch.Tensor = torch.as_tensor(disparity)
    if not values.is_floating_point():
        values = values.to(torch.float32)
    farther: torch.Tensor = torch.as_tensor(_along_batch(low, values, "low")).to(values)
    nearer: torch.Tensor = torch.as_tensor(_along_batch(high, values, "high")).to(values)
    if not bool((farther <= nearer).all()):
        raise ValueError(
            f"The range in focus goes from {_shown(farther)} to {_shown(nearer)}; wanted the "
            "farther end (the smaller disparity) first."
        )
    moved_back = torch.maximum(values - (nearer - farther), farther)
    in_focus_or_nearer = torch.where(values < nearer, farther, moved_back)
    collapsed: Any = torch.where(values <= farther, values, in_focus_or_nearer)
    return collapsed if isinstance(disparity, torch.Tensor) else collapsed.numpy()


def _along_batch(value: Any, disparity: Any, name: str) -> Any:
    """Gives `value` in a shape and dtype that broadcast over `disparity` (B, ...)."""
    if isinstance(value, (int, float)):
        return value
    if isinstance(disparity, torch.Tensor):
        value = torch.as_tensor(value, device=disparity.device)
        if disparity.is_floating_point():
            value = value.to(disparity.dtype)
    else:
        value = np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)
        if isinstance(disparity, np.ndarray) and disparity.dtype.kind == "f":
            value = value.astype(disparity.dtype)
    dimensions = getattr(disparity, "ndim", 0)
    if value.ndim == 1 and dimensions > 1:
        if value.shape[0] not in (1, disparity.shape[0]):
            raise ValueError(
                f"{name} has {value.shape[0]} values but the disparity {tuple(disparity.shape)} is "
                f"a batch of {disparity.shape[0]}: give one number, or one per image."
            )
        value = value.reshape(-1, *([1] * (dimensions - 1)))
    return value


def depth_to_disparity(depth: Values) -> Values:
    """Returns 1/depth: metric disparity (1/metres, larger is nearer) from depth in metres.

    Infinite depth gives 0. Depth of zero, below zero or NaN is unknown and gives NaN, which the
    readers of disparity maps fill as a hole.
    """
    if isinstance(depth, torch.Tensor):
        known = depth > 0
        return torch.where(known, 1.0 / torch.where(known, depth, 1.0), math.nan)
    if isinstance(depth, np.ndarray):
        values = depth.astype(np.result_type(depth.dtype, np.float32), copy=False)
        known = values > 0
        return np.where(known, 1.0 / np.where(known, values, 1), np.nan).astype(values.dtype)
    return 1.0 / depth if depth > 0 else math.nan


def disparity_to_depth(disparity: Values) -> Values:
    """Returns 1/disparity: depth in metres from metric disparity (1/metres); 0 becomes infinity.

    The map 1/x is its own inverse; disparity below zero or NaN is unknown and gives NaN.
    """
    if isinstance(disparity, torch.Tensor):
        known = disparity > 0
        depth = 1.0 / torch.where(known, disparity, 1.0)
        return torch.where(known, depth, torch.where(disparity == 0, math.inf, math.nan))
    if isinstance(disparity, np.ndarray):
        values = disparity.astype(np.result_type(disparity.dtype, np.float32), copy=False)
        known = values > 0
        unknown = np.where(values == 0, np.inf, np.nan)
        return np.where(known, 1.0 / np.where(known, values, 1), unknown).astype(values.dtype)
    if disparity == 0:
        return math.inf
    return 1.0 / disparity if disparity > 0 else math.nan


def normalise_disparity(
    disparity: Arrays, df: PerImage = 0.0, K: PerImage = 1.0
) -> tuple[Arrays, Any, Any]:
    """Returns (disparity01, df01, K01): disparity stretched to [0, 1], every blur radius kept.

    With lo and hi the smallest and largest finite disparity *of each image*, this is
    ``(disparity - lo) / (hi - lo)``, ``(df - lo) / (hi - lo)`` and ``K * (hi - lo)``, so
    ``K01 * |disparity01 - df01| == K * |disparity - df|``. Any unit with larger-is-nearer may come
    in (1/metres, stereo pixels). NaN and infinity pass through. df01 leaves [0, 1] when the plane
    in focus lies outside the scene. A disparity that is constant is only shifted to 0.

    Args:
        disparity: (B, 1, H, W) or any other shape whose first axis counts images when there are
            more than two axes; (H, W) and a single axis are one image.
        df, K: one number or one per image.

    Returns:
        disparity01 like `disparity`; df01 and K01 as plain numbers when one image and plain numbers
        came in, else with shape (B,).

    Raises:
        ValueError: an image has no finite disparity.
    """
    values: torch.Tensor = torch.as_tensor(disparity)
    if not values.is_floating_point():
        values = values.to(torch.float32)
    images: torch.Tensor = values if values.ndim > 2 else values[None]
    per_image = images.reshape(images.shape[0], -1)
    known = torch.isfinite(per_image)
    if not bool(known.any(dim=1).all()):
        raise ValueError(
            "This disparity has no known pixel at all (every value is NaN or infinite); wanted a "
            "map in which at least part of the picture is measured."
        )
    low = torch.where(known, per_image, math.inf).amin(dim=1)
    high = torch.where(known, per_image, -math.inf).amax(dim=1)
    span = torch.where(high > low, high - low, 1.0)
    along = (-1, *([1] * (images.ndim - 1)))
    stretched: Any = ((images - low.reshape(along)) / span.reshape(along)).reshape(values.shape)
    focus = (torch.as_tensor(df, dtype=low.dtype, device=low.device).reshape(-1) - low) / span
    strength = torch.as_tensor(K, dtype=low.dtype, device=low.device).reshape(-1) * span
    if not isinstance(disparity, torch.Tensor):
        stretched = stretched.numpy()
    if isinstance(df, (int, float)) and isinstance(K, (int, float)) and len(low) == 1:
        return stretched, float(focus), float(strength)
    if not isinstance(disparity, torch.Tensor):
        return stretched, focus.numpy(), strength.numpy()
    return stretched, focus, strength


def strength_from_camera(
    f_number: float,
    focal_length_mm: float,
    focus_distance_m: float,
    sensor_width_mm: float,
    image_width_px: float,
) -> float:
    """Returns K in pixels of radius per 1/metre of disparity, for a thin lens.

    ``K = f^2 s / (2 N (s - f)) * 1000 * W / sensor_width`` with f and s in metres: the radius of
    the blur disc on the sensor per unit of 1/z, then 1000 mm per metre and W / sensor_width pixels
    per mm.

    Args:
        f_number: N, for instance 1.8.
        focal_length_mm: the real focal length, not the 35 mm equivalent.
        focus_distance_m: s, from lens to the plane in focus; ``math.inf`` for infinity. The
            matching df is ``1 / focus_distance_m``.
        sensor_width_mm: width of the sensor area that `image_width_px` pixels cover; see
            :func:`sensor_width_from_equivalent` when only the 35 mm equivalent is known.
        image_width_px: width of the *uncropped* photograph, resized as the image at hand is.

    Raises:
        ValueError: a value is not positive, or the focus distance is not beyond the focal length.
    """
    for name, value, example in (
        ("f_number", f_number, "1.8"),
        ("focal_length_mm", focal_length_mm, "50"),
        ("focus_distance_m", focus_distance_m, "2.5"),
        ("sensor_width_mm", sensor_width_mm, "36"),
        ("image_width_px", image_width_px, "6000"),
    ):
        require_positive(name, value, example, infinity_allowed=name == "focus_distance_m")
    focal_length_m = focal_length_mm / 1000
    if focus_distance_m <= focal_length_m:
        raise ValueError(
            f"focus_distance_m is {focus_distance_m:g} m, within the focal length of "
            f"{focal_length_mm:g} mm, where no lens forms an image: give the distance in metres, "
            f"more than {focal_length_m:g}."
        )
    return lens_strength(
        f_number, focal_length_mm, focus_distance_m, sensor_width_mm, image_width_px
    )


def lens_strength(
    f_number: Values,
    focal_length_mm: Values,
    focus_distance_m: Values,
    sensor_width_mm: Values,
    image_width_px: Values,
) -> Values:
    """Returns K as :func:`strength_from_camera` does, unchecked: for tensors and their gradients.

    ``K = f^2 / (2 N (1 - f / s)) * 1000 * W / sensor_width`` with f and s in metres, which also
    holds for ``s = inf``.

    Args:
        f_number, focal_length_mm, focus_distance_m, sensor_width_mm, image_width_px: above zero,
            with the focus distance beyond the focal length; numbers, or tensors of one shape.
    """
    focal_length_m = focal_length_mm / 1000
    radius_m = focal_length_m**2 / (2 * f_number * (1 - focal_length_m / focus_distance_m))
    return radius_m * 1000 * image_width_px / sensor_width_mm


def sensor_width_from_equivalent(
    focal_length_mm: float,
    equivalent_focal_length_mm: float,
    image_width_px: float,
    image_height_px: float,
) -> float:
    """Returns the sensor width in mm, from the real and the 35 mm equivalent focal length.

    Both are in a photograph's EXIF data. ``(f / f35) * 43.27 / sqrt(1 + (H / W)^2)``: equal
    diagonal fields of view, and the sensor has the shape of the photograph.

    Raises:
        ValueError: a value is not positive.
    """
    require_positive("focal_length_mm", focal_length_mm, "5.7")
    require_positive("equivalent_focal_length_mm", equivalent_focal_length_mm, "26")
    require_positive("image_width_px", image_width_px, "4032")
    require_positive("image_height_px", image_height_px, "3024")
    crop = focal_length_mm / equivalent_focal_length_mm
    return crop * FULL_FRAME_DIAGONAL_MM / math.sqrt(1 + (image_height_px / image_width_px) ** 2)


def rescale_strength(K: Values, old_width_px: float, new_width_px: float) -> Values:
    """Returns K for a resized image: ``K * new_width_px / old_width_px``. A crop needs no change.

    Raises:
        ValueError: a width is not positive.
    """
    require_positive("old_width_px", old_width_px, "4000")
    require_positive("new_width_px", new_width_px, "1000")
    return K * (new_width_px / old_width_px)


def require_positive(name: str, value: float, example: str, infinity_allowed: bool = False) -> None:
    """Raises ``ValueError`` unless the value is a number above zero, and finite if it has to be."""
    try:
        positive = value > 0 and (infinity_allowed or math.isfinite(value))
    except TypeError:
        positive = False
    if not positive:
        raise ValueError(f"{name} is {value!r}; wanted a positive number, for instance {example}.")


def check_focus_and_strength(
    df: PerImage, K: PerImage, batch_size: int, metric: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (df, K), each of shape (B,), after checking that they mean something.

    float64 tensors stay float64, everything else becomes float32. Tensors keep their device and
    their gradient.

    Args:
        df: disparity of the plane in focus: one number, or one per image. In [0, 1], or with
            `metric` 1/metres, not negative.
        K: pixels of circle-of-confusion radius per unit of disparity: one number, or one per image.
        batch_size: B, the number of images.
        metric: disparity is in 1/metres.

    Raises:
        ValueError: not a number, NaN, out of range, negative strength, or as many values as fit
            neither one image nor the batch.
    """
    focus = _one_per_image(df, batch_size, "df", "the disparity of the plane in focus")
    strength = _one_per_image(K, batch_size, "K", "pixels of blur radius per unit of disparity")
    focus_low, focus_high = float(focus.detach().min()), float(focus.detach().max())
    if metric:
        if focus_low < 0:
            raise ValueError(
                f"df is {_shown(focus)}; metric disparity is 1/metres and never negative: to focus "
                "at 2 m give df=0.5, at infinity df=0."
            )
    elif focus_low < 0 or focus_high > 1:
        raise ValueError(
            f"df is {_shown(focus)}; wanted the disparity of the plane in focus, within [0, 1] (0 "
            "the farthest, 1 the nearest thing). If it is in another unit, scale it together with "
            "the disparity map (bokehdiff.normalise_disparity), or say metric=True when both are "
            "in 1/metres."
        )
    if float(strength.detach().min()) < 0:
        raise ValueError(
            f"K is {_shown(strength)}; wanted zero or more pixels of blur radius per unit of "
            "disparity. The side of the focus plane is decided by the disparity map, not by the "
            "sign of K."
        )
    return focus, strength


def _one_per_image(value: Any, batch_size: int, name: str, meaning: str) -> torch.Tensor:
    wanted = f"wanted {meaning}: one number, or one per image"
    if value is None or isinstance(value, (bool, str, bytes, dict)):
        raise ValueError(f"{name} is {value!r}; {wanted}.")
    try:
        tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is {value!r}; {wanted}.") from None
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} is of type {tensor.dtype}; {wanted}.")
    if tensor.dtype != torch.float64 or not isinstance(value, torch.Tensor):
        tensor = tensor.to(torch.float32)
    if tensor.numel() not in (1, batch_size) or tensor.numel() != max((1, *tensor.shape)):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, which fits neither one image nor this batch "
            f"of {batch_size}; {wanted}."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} is {_shown(tensor)}; {wanted}, and finite.")
    return tensor.reshape(-1).expand(batch_size)


def _shown(tensor: torch.Tensor) -> str:
    values = [f"{value:.6g}" for value in tensor.detach().reshape(-1).unique().tolist()]
    return values[0] if len(values) == 1 else "[" + ", ".join(values[:6]) + "]"
