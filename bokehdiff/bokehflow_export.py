"""BokehFlow as an ONNX file, for programs without Python.

The file takes photos of any size and a camera, and gives the photos with lens blur. For films, what
is carried from frame to frame goes in and comes out as well: what came out as ``next_...`` goes in
as ``last_...`` with the next frame, zeros with the first one. Padding is done inside.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from .models.bokehflow import REFERENCE_WIDTH, SMALLEST_SIDE, BokehFlowModel
from .models.bokehflow_heads import PIXELS_PER_TOKEN
from .models.bokehflow_lens import camera_vector
from .models.temporal_state import PIXELS_PER_CELL, BokehFlowState
from .onnx_files import (
    DIFFERENCES_KEY,
    RunningModel,
    Value,
    check_differences,
    labelled,
    onnx_file_to_write,
    traced_to_onnx,
    write_onnx,
)
from .optics import lens_strength
from .rendering.gaussian_pyramid import levels_for
from .whole_files import PathLike

if TYPE_CHECKING:
    import onnx

__all__ = ["CAMERA", "STATE", "BokehFlowGraph", "export_bokehflow", "first_state"]

CAMERA = ("f_number", "focal_length_mm", "focus_distance_m", "sensor_width_mm", "photo_width_px")
"""Columns of the input ``camera``."""

STATE = ("picture", "depth_features", "bokeh_features", "bokeh", "lens")
"""What is carried: tensors of :class:`~bokehdiff.models.temporal_state.BokehFlowState`."""

WIDEST_PHOTO_PX = 1920

LARGEST_DIFFERENCE = 1e-4
LARGEST_DIFFERENCE_HALF = 2e-2
"""Between file and network, as a share of the range of each output."""

NO_PICTURE = 1e4
"""Of a picture so far from any other that nothing is carried over from it."""

PICTURE = {0: "batch", 2: "height", 3: "width"}
"""Names of the free axes of what has the size of the photo."""


class BokehFlowGraph(nn.Module):
    """The network with plain tensors around it, as the file has them.

    Args:
        model: with the mixer ``"gated_conv"`` and the renderer ``"pyramid"``.
        carried: for films; takes and gives the state, :data:`STATE`.
        given_depth: takes inverse depth, instead of giving its own.
        widest_photo_px: the largest ``photo_width_px``; the graph has levels of blur for the
            circles that go with it.
    """

    def __init__(
        self,
        model: BokehFlowModel,
        *,
        carried: bool,
        given_depth: bool,
        widest_photo_px: int = WIDEST_PHOTO_PX,
    ) -> None:
        super().__init__()
        self.model = model
        self.carried, self.given_depth = carried, given_depth
        self.widest_photo_px = widest_photo_px
        self.levels = levels_for(model.config.max_coc_radius * widest_photo_px / REFERENCE_WIDTH)

    def inputs(self) -> list[Value]:
        """What goes in, in this order."""
        radius = f"{self.model.config.max_coc_radius:g} photo_width_px / {REFERENCE_WIDTH}"
        values = [
            Value(
                "image",
                PICTURE,
                "(batch, 3, height, width) RGB, display-encoded sRGB in [0, 1]; any sides of at "
                f"least {SMALLEST_SIDE} pixels",
            ),
            Value(
                "camera",
                {0: "batch"},
                f"(batch, 5) {', '.join(CAMERA)}. The focus is beyond the focal length. "
                "photo_width_px is the width of the uncropped photo in pixels of image, at most "
                f"{self.widest_photo_px}, and sensor_width_mm what it covers. Circles of confusion "
                f"are at most {radius} pixels in radius",
            ),
        ]
        if self.given_depth:
            values.append(
                Value("inverse_depth", PICTURE, "(batch, 1, height, width) 1/metres, finite")
            )
        if self.carried:
            values += [
                Value(f"last_{name}", axes, f"{meaning}: of the frame before; zeros for the first")
                for name, axes, meaning in self._state()
            ]
        return values

    def outputs(self) -> list[Value]:
        """What comes out, in this order."""
        values = [
            Value(
                "bokeh",
                PICTURE,
                "(batch, 3, height, width) with lens blur, display-encoded sRGB in [0, 1]",
            ),
            Value(
                "coc",
                PICTURE,
                "(batch, 1, height, width) radius of the circle of confusion in pixels of image, "
                "positive in front of the plane in focus, negative behind it",
            ),
        ]
        if not self.given_depth:
            values.append(
                Value("inverse_depth", PICTURE, "(batch, 1, height, width) 1/metres, as estimated")
            )
        if self.carried:
            values += [
                Value(f"next_{name}", axes, f"{meaning}: for the next frame")
                for name, axes, meaning in self._state()
            ]
        return values

    def _state(self) -> list[tuple[str, dict[int, str], str]]:
        """Name, free axes and meaning of what is carried, in the order of :data:`STATE`."""
        tokens = f"(batch, {self.model.config.channels}, ceil(height / 4), ceil(width / 4))"
        meanings = (
            "(batch, 3, 2 ceil(height / 4), 2 ceil(width / 4)) what the frame looks like",
            f"{tokens} what is known of depth",
            f"{tokens} what is known of blur",
            "(batch, 3, 4 ceil(height / 4), 4 ceil(width / 4)) the frame with lens blur",
            "(batch, 5) the lens",
        )
        found = []
        for name, meaning in zip(STATE, meanings, strict=True):
            sides = {} if name == "lens" else {2: f"{name}_height", 3: f"{name}_width"}
            found.append((name, {0: "batch"} | sides, meaning))
        return found

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs, from the inputs in their order."""
        image, camera, *others = given
        inverse_depth = padded(others.pop(0)) if self.given_depth else None
        state = None
        if self.carried:
            picture, *_, lens_row = others
            begun = (lens_row[:, 0] > 0).view(-1, 1, 1, 1)  # no lens has a focal length of 0
            fields: dict[str, Any] = dict(zip(STATE, others, strict=True))
            fields["picture"] = torch.where(begun, picture, NO_PICTURE)
            state = BokehFlowState(**fields)
        seen = self.model.observe(padded(image), state=state)
        f_number, focal_length, focus_distance, sensor_width, photo_width = camera.unbind(1)
        lens = self.model._lens(
            1 / focus_distance,
            lens_strength(f_number, focal_length, focus_distance, sensor_width, photo_width),
            photo_width,
            camera_vector(f_number, focal_length, focus_distance),
            self.levels,
        )
        output = self.model._blur(seen, lens, inverse_depth, None, False)
        pictures = [output.bokeh, output.coc]
        if not self.given_depth:
            pictures.append(output.inverse_depth)
        height, width = image.shape[-2:]
        results = [picture[..., :height, :width] for picture in pictures]
        if self.carried:
            results += [getattr(output.state, name) for name in STATE]
        return tuple(results)


def padded(picture: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) with its border repeated up to whole tokens.

    The network would do it as well; but sizes that are written as a multiple are traced in a
    quarter of the time.
    """
    below, right = (
        (side + PIXELS_PER_TOKEN - 1) // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN - side
        for side in picture.shape[-2:]
    )
    return F.pad(picture, (0, right, 0, below), mode="replicate")


def first_state(model: BokehFlowModel, batch: int, height: int, width: int) -> list[torch.Tensor]:
    """Zeros, in the order of :data:`STATE`: what goes in with the first frame of this size."""
    rows, columns = (-(-side // PIXELS_PER_TOKEN) for side in (height, width))
    cells = PIXELS_PER_TOKEN // PIXELS_PER_CELL
    tokens = torch.zeros(batch, model.config.channels, rows, columns, dtype=model.dtype)
    return [
        torch.zeros(batch, 3, cells * rows, cells * columns),
        tokens,
        tokens.clone(),
        torch.zeros(batch, 3, PIXELS_PER_TOKEN * rows, PIXELS_PER_TOKEN * columns),
        torch.zeros(batch, 5),
    ]


def export_bokehflow(
    model: BokehFlowModel,
    path: PathLike,
    *,
    carried: bool,
    given_depth: bool = False,
    half: bool = False,
    widest_photo_px: int = WIDEST_PHOTO_PX,
    overwrite: bool = False,
) -> dict[str, float]:
    """Writes a network as an ONNX file, after onnxruntime has given the same pictures with it.

    Inputs and outputs are those of :class:`BokehFlowGraph`. The file tells them with their units,
    and the configuration of the network, in its metadata.

    Args:
        model: with the mixer ``"gated_conv"`` and the renderer ``"pyramid"``, on any device.
        path: the file, ``.onnx``.
        carried: for films: what is carried from frame to frame goes in and comes out.
        given_depth: inverse depth goes in; otherwise the network's own comes out.
        half: the network computes in float16; light, depth and lens stay float32.
        widest_photo_px: the largest ``photo_width_px`` that the file will be told. The wider, the
            more work, for narrow photos too.
        overwrite: replace a file that exists.

    Returns:
        By output the largest absolute difference between the file and the network in float32, as a
        share of its range: of 1 for ``bokeh``, of the largest radius for ``coc``, of 1 per metre
        for ``inverse_depth``. Measured on four frames of another size than the graph was traced
        with. With ``half`` it is that of numbers rounded to float16 between operations in float32,
        as onnxruntime computes on the CPU.

    Raises:
        ValueError: a network that cannot be exported, or a file that would answer otherwise by more
            than 1e-4 (float16: 2e-2); no file is written.
        FileNotFoundError, FileExistsError: there is no such folder; the file exists.
        ImportError: a package for ONNX is missing.
    """
    check_exportable(model, carried, widest_photo_px)
    onnx_file_to_write(path, overwrite)
    network = copy.deepcopy(model).to("cpu").float().eval().requires_grad_(False)
    exported = copy.deepcopy(network).half() if half else network
    graph = BokehFlowGraph(
        exported, carried=carried, given_depth=given_depth, widest_photo_px=widest_photo_px
    )
    inputs, outputs = graph.inputs(), graph.outputs()
    traced = traced_to_onnx(graph, examples_for(graph), inputs, outputs)

    differences = differences_from(network, traced, graph)
    check_differences(differences, LARGEST_DIFFERENCE_HALF if half else LARGEST_DIFFERENCE)

    work = "films, frame by frame" if carried else "photos"
    depth = "given" if given_depth else "estimated"
    facts = {
        "config": {key: one for key, one in model.config.items() if not key.startswith("_")},
        "precision": "float16" if half else "float32",
        "widest_photo_px": widest_photo_px,
        DIFFERENCES_KEY: differences,
    }
    description = f"BokehFlow: lens blur for {work}; depth is {depth}."
    write_onnx(labelled(traced, description, [*inputs, *outputs], facts), path, overwrite)
    return differences


def check_exportable(model: BokehFlowModel, carried: bool, widest_photo_px: int) -> None:
    """Raises ``ValueError`` for networks and sizes of which no graph can be made."""
    if model.config.mixer != "gated_conv":
        raise ValueError(
            f"This network has the mixer {model.config.mixer!r}, a recurrence, whose steps would "
            "all have to be written out for one size of picture; wanted a network with the mixer "
            "'gated_conv'."
        )
    if model.renderer != "pyramid":
        raise ValueError(
            f"This network has the renderer {model.renderer!r}, whose steps depend on the blur in "
            "the picture, so that no graph holds them; wanted a network with the renderer "
            "'pyramid'."
        )
    if carried and model.config.temporal != "feature":
        raise ValueError(
            "This network carries nothing from frame to frame (its temporal is "
            f"{model.config.temporal!r}); export it for photos, and show it every frame alone."
        )
    if widest_photo_px < SMALLEST_SIDE:
        raise ValueError(
            f"widest_photo_px is {widest_photo_px}; wanted pixels, for instance {WIDEST_PHOTO_PX}."
        )


def examples_for(graph: BokehFlowGraph) -> list[torch.Tensor]:
    """Inputs to trace with, of a size without special cases: of every level of the pyramid there
    are several cells, and they end beyond the picture."""
    coarsest = 2 ** (graph.levels - 1)
    height, width = 4 * coarsest + 6, 6 * coarsest + 5
    examples = [torch.zeros(2, 3, height, width), torch.ones(2, len(CAMERA))]
    if graph.given_depth:
        examples.append(torch.zeros(2, 1, height, width))
    if graph.carried:
        examples += first_state(graph.model, 2, height, width)
    return examples


# -- File and network, asked the same --------------------------------------------------------------

TRIED_HEIGHT, TRIED_WIDTH = 77, 102
TRIED_LENSES = ((2.0, 50.0, 2.0, 36.0),) * 3 + ((1.4, 85.0, 1.5, 36.0),)
"""Of each frame: the camera, but for the width of the photo. A film keeps its lens at first."""

Answer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, np.ndarray]]
"""From photo (1, 3, H, W), camera (1, 5) and inverse depth (1, 1, H, W) to outputs by name."""


def differences_from(
    network: BokehFlowModel, file: onnx.ModelProto, graph: BokehFlowGraph
) -> dict[str, float]:
    """By output the largest absolute difference as a share of its range, over some frames."""
    generator = torch.Generator().manual_seed(0)
    areas = torch.rand(1, 4, 5, 7, generator=generator)
    scene = F.interpolate(areas, (TRIED_HEIGHT, TRIED_WIDTH), mode="nearest")
    largest_radius = network.config.max_coc_radius * graph.widest_photo_px / REFERENCE_WIDTH
    ranges = {"bokeh": 1.0, "coc": largest_radius, "inverse_depth": 1.0}
    of_network, of_file = answers_of_network(network, graph), answers_of_file(file, graph)
    differences = {name: 0.0 for name in ranges if not (graph.given_depth and "depth" in name)}
    for lens in TRIED_LENSES:
        noise = torch.randn(1, 3, TRIED_HEIGHT, TRIED_WIDTH, generator=generator)
        image = (scene[:, :3] + 0.02 * noise).clamp(0, 1)
        camera = torch.tensor([[*lens, graph.widest_photo_px]])
        answers, wanted = (of(image, camera, 2 * scene[:, 3:]) for of in (of_file, of_network))
        for name, worst in differences.items():
            difference = np.abs(answers[name] - wanted[name]).max() / ranges[name]
            differences[name] = float(np.maximum(worst, difference))  # keeps NaN
    return differences


def answers_of_file(file: onnx.ModelProto, graph: BokehFlowGraph) -> Answer:
    """The outputs of the file for one frame after the other, run by onnxruntime."""
    run = RunningModel(file.SerializeToString())
    zeros = first_state(graph.model, 1, TRIED_HEIGHT, TRIED_WIDTH)
    state = dict(zip(STATE, (one.numpy() for one in zeros), strict=True))

    def answer(
        image: torch.Tensor, camera: torch.Tensor, depth: torch.Tensor
    ) -> dict[str, np.ndarray]:
        inputs = {"image": image.numpy(), "camera": camera.numpy()}
        if graph.given_depth:
            inputs["inverse_depth"] = depth.numpy()
        if graph.carried:
            inputs |= {f"last_{name}": one for name, one in state.items()}
        outputs = run(inputs)
        if graph.carried:
            state.update({name: outputs[f"next_{name}"] for name in STATE})
        return outputs

    return answer


def answers_of_network(network: BokehFlowModel, graph: BokehFlowGraph) -> Answer:
    """The same of the network itself, called as anyone calls it."""
    state: BokehFlowState | None = None

    @torch.no_grad()
    def answer(
        image: torch.Tensor, camera: torch.Tensor, depth: torch.Tensor
    ) -> dict[str, np.ndarray]:
        nonlocal state
        output = network(
            image,
            *camera[:, :4].unbind(1),
            state,
            photo_width_px=camera[:, 4],
            inverse_depth=depth if graph.given_depth else None,
        )
        if graph.carried:
            state = output.state
        return {name: getattr(output, name).numpy() for name in ("bokeh", "coc", "inverse_depth")}

    return answer
