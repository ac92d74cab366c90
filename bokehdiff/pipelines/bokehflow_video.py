"""Lens blur for films, frame by frame: ``BokehFlowVideoPipeline`` and ``VideoBlur``.

What one frame leaves to the next has the size of a few frames, however long the film is: where the
picture stands still, depth and blur keep most of what they were, so that noise does not flicker.
Where something moves, or after a cut, the frame speaks for itself. A film may be stopped after any
frame, its state stored, and continued elsewhere: the frames are the same to the bit.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import PIL.Image
import torch

from ..camera import Camera
from ..images import ImageInput, as_disparity_batch, as_image_batch
from ..lens import check_lens_arguments, choose_lens
from ..models.bidirectional_recurrence import BlockMemory
from ..models.bokehflow import BokehFlowModel, BokehFlowOutput, Observation
from ..models.bokehflow_heads import PIXELS_PER_TOKEN
from ..models.temporal_state import PIXELS_PER_CELL, BokehFlowState
from ..rendering import Aperture
from .bokehflow_loading import (
    PipelineWithBokehFlow,
    bring_in,
    check_aperture,
    tell_of_clamping,
)

__all__ = ["BokehFlowVideoPipeline", "VideoBlur"]

STATE = "state."
"""With what the names of tensors of the network's state begin in :meth:`VideoBlur.state_dict`."""


class VideoBlur:
    """One clip on its way through the network, frame after frame.

        blur = pipe.start()
        for frame in frames:
            seen = blur.observe(frame)
            blurred = blur.blur(seen, df=0.5, K=40).bokeh

    Each frame is observed, then blurred, which advances the clip. The lens may change from frame to
    frame, as in a focus pull: what depends on it is not carried then, depth still is.

    Args:
        model: the network, in evaluation mode.
        device: where frames are brought to.

    Attributes:
        frame_number: of the frame that comes next, from 0.
        cuts: numbers of the frames with which a new scene begins, found by comparing them with the
            frame before; nothing is carried into them. The first frame is none. Only networks with
            ``temporal="feature"`` look for cuts.
    """

    def __init__(self, model: BokehFlowModel, device: torch.device | str) -> None:
        self._model = model
        self._device = torch.device(device)
        self.reset()

    def reset(self) -> None:
        """Forgets the clip; the next frame is the first of another, of any size."""
        self._state: BokehFlowState | None = None
        self._size: tuple[int, int] | None = None
        self._observed: Observation | None = None
        self.frame_number = 0
        self.cuts: list[int] = []

    @torch.no_grad()
    def observe(self, frame: ImageInput) -> Observation:
        """What the next frame shows before a lens is chosen.

        Args:
            frame: one frame, (1, 3, H, W) display-encoded sRGB in [0, 1], or anything
                :func:`bokehdiff.images.as_image_batch` takes; sides of at least 16 pixels.

        Returns:
            For :meth:`blur`. Its ``inverse_depth`` (1, 1, H, W), 1/metres, is the network's own,
            carried from frame to frame; None of networks whose depth depends on the camera.

        Raises:
            ValueError: no frame, several of them, NaN, or another size than the frames before.
        """
        picture = as_image_batch(frame).detach()
        if len(picture) != 1:
            raise ValueError(
                f"observe got {len(picture)} frames; wanted one, since each leaves something to "
                "the next. Give them one by one, in their order, or call stream."
            )
        size = (picture.shape[-2], picture.shape[-1])
        if self._size is not None and size != self._size:
            raise ValueError(
                f"Frame {self.frame_number} is {size[1]} x {size[0]} pixels (width x height), the "
                f"frames before it {self._size[1]} x {self._size[0]}; wanted one size per clip. "
                "Call reset() before the first frame of another clip."
            )
        bring_in(self._model)
        self._observed = self._model.observe(picture.to(self._device), state=self._state)
        return self._observed

    @torch.no_grad()
    def blur(
        self,
        observation: Observation,
        df: float | torch.Tensor,
        K: float | torch.Tensor,
        *,
        disparity: ImageInput | None = None,
        metric: bool = False,
        aperture: Aperture | None = None,
    ) -> BokehFlowOutput:
        """The frame with lens blur; the clip advances to the next one.

        Args:
            observation: what :meth:`observe` returned last.
            df: disparity of the plane in focus, one number.
            K: pixels of circle-of-confusion radius per unit of disparity, one number.
            disparity: (1, 1, H, W), larger is nearer, in [0, 1], or 1/metres with `metric`, or
                anything :func:`bokehdiff.images.as_disparity_batch` takes. None: the network's own,
                and then df and K are metric.
            metric: disparity, df and K are in 1/metres.
            aperture: the shape of the opening, for networks whose renderer knows shapes.

        Returns:
            :class:`bokehdiff.models.bokehflow.BokehFlowOutput` of one frame.

        Raises:
            ValueError: an observation of another frame, or what does not fit.
        """
        if observation is not self._observed or self._observed is None:
            raise ValueError(
                "blur takes what observe(frame) returned last, once; observe the next frame first."
            )
        check_aperture(self._model, aperture)
        height, width = observation.size
        if disparity is None:
            disparity, metric = observation.inverse_depth, True
        else:
            disparity = as_disparity_batch(disparity, 1, height, width, metric).to(self._device)
        bring_in(self._model)
        blurred = self._model.blur(
            observation,
            df,
            K,
            disparity=disparity,
            metric=metric,
            # The long side, so that turning the camera changes nothing.
            photo_width_px=max(height, width),
            aperture=aperture,
        )
        assert blurred.state is not None
        if observation.begins_scene:
            self.cuts.append(self.frame_number)
        # In one order in memory, so that a stored state rounds as the one that was kept.
        self._state = blurred.state.to(memory_format=torch.contiguous_format)
        self._size, self._observed = (height, width), None
        self.frame_number += 1
        return blurred

    # -- Stopping and continuing -----------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that the frames so far leave to the next, tensors on the CPU, as
        ``safetensors.torch.save_file`` takes them; a few frames large, whatever the clip."""
        state = {} if self._state is None else self._state.tensors()
        return {
            "frame_number": torch.tensor(self.frame_number),
            "cuts": torch.tensor(self.cuts, dtype=torch.int64),
            "size": torch.tensor(self._size or (0, 0)),
            **{STATE + name: tensor.to("cpu", copy=True) for name, tensor in state.items()},
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continues a clip where :meth:`state_dict` was called; nothing changes on an error.

        Args:
            state: of the same network, in the same dtype.

        Raises:
            ValueError: something else.
        """
        carried = {name: one for name, one in state.items() if name.startswith(STATE)}
        lacking = {"frame_number", "cuts", "size"} - set(state)
        if lacking or len(carried) + 3 != len(state):
            raise ValueError(
                f"The state of a clip has frame_number, cuts, size and {STATE}*; this one has "
                f"{', '.join(sorted(state)) or 'nothing'}. Give what state_dict() returned."
            )
        height, width = (int(side) for side in state["size"])
        tensors = {name.removeprefix(STATE): one for name, one in carried.items()}
        restored = self._restored(tensors, height, width) if int(state["frame_number"]) else None
        self.reset()
        self._state = restored
        self._size = (height, width) if restored is not None else None
        self.frame_number = int(state["frame_number"])
        self.cuts = [int(number) for number in state["cuts"]]

    def _restored(
        self, tensors: Mapping[str, torch.Tensor], height: int, width: int
    ) -> BokehFlowState:
        """The network's state from its tensors by name; copies, which lie in memory as kept ones do
        and round alike."""
        channels, carry = self._model.config.channels, self._model.config.temporal
        rows, columns = -(-height // PIXELS_PER_TOKEN), -(-width // PIXELS_PER_TOKEN)

        def of_cells(side: int) -> tuple[int, ...]:
            per_token = PIXELS_PER_TOKEN // side
            return (1, 3, rows * per_token, columns * per_token)

        wanted = {"picture": of_cells(PIXELS_PER_CELL)}
        if carry == "feature":
            wanted |= {
                "depth_features": (1, channels, rows, columns),
                "bokeh_features": (1, channels, rows, columns),
                "bokeh": of_cells(1),
                "lens": (1, 5),
            }
        memories = [
            f"memories.{stream}_{number}"
            for stream in ("depth", "bokeh")
            for number in range(self._model.config.blocks if carry in ("final", "chunk") else 0)
        ]
        names = {
            *wanted,
            *(f"{memory}.{one}" for memory in memories for one in BlockMemory._fields),
        }
        differing = sorted(names ^ set(tensors)) + [
            name
            for name, shape in wanted.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ]
        if differing:
            raise ValueError(
                f"The state does not fit this network and frames of {width} x {height} pixels: "
                f"{', '.join(differing[:3])} {'differ' if len(differing) > 1 else 'differs'}. "
                "Continue a clip with the network that began it."
            )
        copies = {name: tensor.to(self._device, copy=True) for name, tensor in tensors.items()}
        return BokehFlowState(
            **{name: copies[name] for name in wanted},
            memories={
                memory.removeprefix("memories."): BlockMemory(
                    *(copies[f"{memory}.{one}"] for one in BlockMemory._fields)
                )
                for memory in memories
            },
        )


class BokehFlowVideoPipeline(PipelineWithBokehFlow):
    """Adds the blur of a real lens to films, frame by frame, in constant memory.

        pipe = BokehFlowVideoPipeline.from_pretrained(bokehdiff.FLOW_NANO)
        for blurred in pipe.stream(frames, focus="auto", camera=Camera(1.8, 50)):
            show(blurred.bokeh)

    Load with ``BokehFlowVideoPipeline.from_pretrained(folder_or_hub_id)``, of the same folders as
    :class:`~bokehdiff.pipelines.bokehflow.BokehFlowPipeline`. Whole files, with their sound, are
    read and written by ``bokehdiff video``.

    Args:
        model: the network; any variant, mixer and renderer. ``temporal`` of its configuration says
            what is carried from frame to frame.

    Raises:
        ValueError: something else than a network of BokehFlow.
    """

    def start(self) -> VideoBlur:
        """A clip before its first frame, for callers that bring their frames one by one."""
        return VideoBlur(self.model, self._execution_device)

    def stream(
        self,
        frames: Iterable[ImageInput],
        disparities: Iterable[ImageInput] | None = None,
        *,
        df: Any = None,
        K: Any = None,
        focus: Any = None,
        focus_range: Any = None,
        whole_subject: bool = False,
        camera: Camera | None = None,
        focus_distance_m: float | None = None,
        farthest_distance_m: float = math.inf,
        metric: bool = False,
        aperture: Aperture | None = None,
    ) -> Iterator[BokehFlowOutput]:
        """The frames of one clip with lens blur, each as soon as it has come.

        ``df``, ``K``, ``focus`` and ``focus_range`` are one value for all frames, or an iterable (a
        list, a generator; for df and K a tensor or array too) with one for each, as in a focus
        pull. A point, box or range is a tuple, so it is one value.

        Args:
            frames: of one size, in their order: a tensor (T, 3, H, W) or (T, 1, 3, H, W), an array
                (T, H, W, 3), or an iterable of anything
                :func:`bokehdiff.images.as_image_batch` takes.
            disparities: a map for each frame, of its size; larger is nearer, in [0, 1] unless
                ``metric``. None: the network's own, in 1/metres, carried from frame to frame;
                networks that find depth together with the blur (``fusion="both"``) then take
                ``df`` alone.
            df: disparity of the plane in focus.
            K: pixels of circle-of-confusion radius per unit of disparity; 20 without a camera.
            focus: as of :func:`bokehdiff.focus.find_focus`, found anew in each frame.
            focus_range: ``(from, to)``, disparities between which everything stays sharp.
            whole_subject: keep all that the box or mask of ``focus`` holds sharp, not one plane.
            camera: gives K instead.
            focus_distance_m, farthest_distance_m: what relative disparity means in metres, for
                ``camera``.
            metric: disparities, df and focus_range are in 1/metres.
            aperture: the shape of the opening, for networks whose renderer knows shapes.

        Returns:
            An iterator over :class:`bokehdiff.models.bokehflow.BokehFlowOutput`, one per frame.

        Raises:
            ValueError: an input that cannot be meant: at once, or with the frame it belongs to.
        """
        if isinstance(frames, (str, bytes, os.PathLike, PIL.Image.Image)):
            raise ValueError(
                f"stream got a {type(frames).__name__}; wanted the frames of a film, one after the "
                "other. `bokehdiff video` reads films from files."
            )
        check_lens_arguments(df, K, focus, focus_range, whole_subject, camera, focus_distance_m)
        check_aperture(self.model, aperture)
        finds_depth_first = self.model.config.fusion == "depth_to_bokeh"
        if df is None and disparities is None and not finds_depth_first:
            raise ValueError(
                f"{'focus' if focus is not None else 'focus_range'} needs depth before the blur, "
                "and this network finds both at once (fusion 'both'). Give disparities, or df in "
                "1/metres, or take a network with fusion 'depth_to_bokeh', such as "
                "bokehdiff.FLOW_NANO."
            )
        per_frame = {
            "df": _of_each_frame(df, (torch.Tensor, np.ndarray)),
            "K": _of_each_frame(K, (torch.Tensor, np.ndarray)),
            "focus": _of_each_frame(focus),
            "focus_range": _of_each_frame(focus_range),
            "disparities": itertools.repeat(None) if disparities is None else iter(disparities),
        }
        settings = dict(
            whole_subject=whole_subject,
            camera=camera,
            focus_distance_m=focus_distance_m,
            farthest_distance_m=farthest_distance_m,
        )
        return self._stream(iter(frames), per_frame, settings, metric, aperture)

    def _stream(
        self,
        frames: Iterator[ImageInput],
        per_frame: Mapping[str, Iterator[Any]],
        settings: Mapping[str, Any],
        metric: bool,
        aperture: Aperture | None,
    ) -> Iterator[BokehFlowOutput]:
        clip = self.start()
        told_of_clamping = False
        for number, frame in enumerate(frames):
            of_frame = {name: _next(values, name, number) for name, values in per_frame.items()}
            given = of_frame.pop("disparities")
            observation = clip.observe(frame)
            height, width = observation.size
            picture = observation.photo[..., :height, :width]
            if given is None:
                disparity, in_metres = observation.inverse_depth, True
            else:
                disparity = as_disparity_batch(given, 1, height, width, metric).to(picture.device)
                in_metres = metric
            # Where depth comes with the blur there is none yet, and nothing that looks at it.
            seen = picture.new_zeros(1, 1, height, width) if disparity is None else disparity
            lens = choose_lens(seen, image=picture, metric=in_metres, **of_frame, **settings)
            blurred = clip.blur(
                observation,
                lens.df,
                lens.K,
                disparity=None if disparity is None else lens.in_one_plane(disparity),
                metric=in_metres,
                aperture=aperture,
            )
            if not told_of_clamping:  # once per clip
                told_of_clamping = tell_of_clamping(
                    self.model, blurred.clamped_share, max(height, width)
                )
            yield blurred


def _of_each_frame(value: Any, arrays: tuple[type, ...] = ()) -> Iterator[Any]:
    """One value for every frame, or one after the other from a list, an iterator or an array."""
    if isinstance(value, (list, Iterator)):
        return iter(value)
    if isinstance(value, arrays):
        array: Any = value
        return iter(array) if array.ndim else itertools.repeat(value)
    return itertools.repeat(value)


def _next(values: Iterator[Any], name: str, number: int) -> Any:
    """The value of a frame.

    Raises:
        ValueError: there are fewer than frames.
    """
    for value in values:
        return value
    raise ValueError(
        f"{name} has {number} values, and there is another frame; wanted one for each frame, or "
        "one for all."
    )
