"""Lens blur for a film, one frame after the other: disparity, focus, lens and network together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .camera import Camera
from .depth import DepthEstimator
from .film_focus import FilmFocus
from .pipelines.bokehflow_loading import tell_of_clamping
from .pipelines.bokehflow_video import BokehFlowVideoPipeline, VideoBlur
from .steady_depth import SteadyDepth

__all__ = ["FilmBlur", "FilmLens", "as_photo"]


def as_photo(picture: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """(1, 3, H, W) float32 in [0, 1] of a frame, uint8 (H, W, 3)."""
    photo = torch.from_numpy(picture).to(device).permute(2, 0, 1)[None]
    return photo.to(torch.float32).contiguous() / 255


class FilmLens:
    """K of every frame of a film.

    Args:
        camera: None if the strengths of the frames are K themselves; else they are 1 over the
            f-number, in place of the camera's own.
        image_size: (height, width) of the frames.
        metric: disparity is in 1/metres, so that K follows the distance of the plane in focus.
            Else K per strength is that of the first frame throughout.
        focus_distance_m, farthest_distance_m: what relative disparity means in metres, for the
            camera; see :meth:`bokehdiff.camera.Camera.strength`.
    """

    def __init__(
        self,
        camera: Camera | None,
        image_size: Sequence[int],
        metric: bool,
        focus_distance_m: float | None = None,
        farthest_distance_m: float = math.inf,
    ) -> None:
        self._camera, self._image_size, self._metric = camera, image_size, metric
        self._distances = (focus_distance_m, farthest_distance_m)
        self._first: float | None = None

    def __repr__(self) -> str:
        return f"{self._camera} {self._image_size} {self._metric} {self._distances}"

    def __call__(self, df: float, strength: float) -> float:
        """K at a plane in focus."""
        if self._camera is None:
            return strength
        if self._first is None or self._metric:
            focus_distance_m, farthest_distance_m = self._distances
            self._first = self._camera.f_number * self._camera.strength(
                self._image_size,
                df,
                metric=self._metric,
                focus_distance_m=focus_distance_m,
                farthest_distance_m=farthest_distance_m,
            )
        return self._first * strength

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What the first frame leaves to the others."""
        first = math.nan if self._first is None else self._first
        return {"first": torch.tensor(first, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on where :meth:`state_dict` was called."""
        first = float(state["first"])
        self._first = None if math.isnan(first) else first


class FilmBlur:
    """A film on its way: each frame in, the frame with lens blur out, in their order.

    Args:
        pipe: the network.
        focus: what is in focus.
        lens: how strong the blur is.
        metric: whether disparity is in 1/metres.
        estimator: estimates the disparity of frames that come without a map; None: the network's
            own is taken, which is metric; of networks whose depth depends on the camera, only for
            a focus that is not looked for.
        device: where to compute.
    """

    def __init__(
        self,
        pipe: BokehFlowVideoPipeline,
        focus: FilmFocus,
        lens: FilmLens,
        metric: bool,
        estimator: DepthEstimator | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._model, self._blur = pipe.model, pipe.start()
        self._focus, self._lens, self._metric = focus, lens, metric
        self._estimator, self._device = estimator, device
        self._steady = SteadyDepth(metric, device)
        self._last_time = 0.0
        self._told_of_clamping = False

    def __call__(
        self, number: int, time: float, picture: np.ndarray, given: torch.Tensor | None = None
    ) -> np.ndarray:
        """The frame with lens blur, uint8 (H, W, 3).

        Args:
            number, time: of the frame; seconds after the first frame.
            picture: uint8 (H, W, 3) display-encoded.
            given: its map (1, 1, H, W), checked; None: it is estimated.
        """
        photo = as_photo(picture, self._device)
        seen = self._blur.observe(photo)
        cut = seen.begins_scene
        disparity = given
        if given is None and self._estimator is not None:
            if cut:
                self._steady.reset()
            estimate = self._estimator(photo).disparity
            disparity = self._steady(estimate, photo, time - self._last_time)
        elif given is None:
            disparity = seen.inverse_depth
        self._last_time = time
        # Where depth comes with the blur there is none yet, and nothing that looks at it.
        map_seen = (
            photo.new_zeros(1, 1, *photo.shape[2:]) if disparity is None else disparity.float()
        )
        df, strength = self._focus(number, time, photo, map_seen, cut)
        df = max(df, 0.0) if self._metric else min(max(df, 0.0), 1.0)
        blurred = self._blur.blur(
            seen, df, self._lens(df, strength), disparity=disparity, metric=self._metric
        )
        if not self._told_of_clamping:  # once per film
            self._told_of_clamping = tell_of_clamping(
                self._model, blurred.clamped_share, max(picture.shape[:2])
            )
        result = blurred.bokeh[0].float().permute(1, 2, 0).clamp(0, 1) * 255
        eight_bits: np.ndarray = result.round().to(torch.uint8).cpu().numpy()
        return eight_bits

    @property
    def _parts(self) -> dict[str, VideoBlur | FilmFocus | FilmLens | SteadyDepth]:
        return {
            "blur.": self._blur,
            "focus.": self._focus,
            "lens.": self._lens,
            "steady.": self._steady,
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that the frames so far leave to the next, on the CPU."""
        last_time = torch.tensor(self._last_time, dtype=torch.float64)
        state = {"last_time": last_time}
        for prefix, part in self._parts.items():
            state |= {prefix + name: value for name, value in part.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on where :meth:`state_dict` was called."""
        self._last_time = float(state["last_time"])
        for prefix, part in self._parts.items():
            part.load_state_dict(
                {
                    name.removeprefix(prefix): value
                    for name, value in state.items()
                    if name.startswith(prefix)
                }
            )
