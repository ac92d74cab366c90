"""LiteBokeh as a file for phones and for programs without Python.

An ONNX file takes photos of any size, channels first. A TFLite file takes photos of the one size
that it is made for, channels last, and has no operators but plain ones, which LiteRT runs on GPUs
too. Both take and give float32, whatever is inside, and in both the batch norms are folded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn as nn

from .models.litebokeh import PIXELS_PER_CELL, SMALLEST_SIDE, GlassEncNet, TinyUnet
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
from .tflite_files import (
    RunningTFLite,
    converted_to_tflite,
    labelled_tflite,
    tflite_file_to_write,
    with_half_weights,
    with_int8_weights,
    write_tflite,
)
from .whole_files import PathLike, file_to_write

if TYPE_CHECKING:
    import onnx

__all__ = ["PRECISIONS", "Agreement", "compact_file_to_write", "export_compact"]

PRECISIONS = ("float32", "float16", "int8")

LARGEST_DIFFERENCE = {"float32": 1e-5, "float16": 2e-3}
"""Between the pictures of file and network, whose range is 1."""
SMALLEST_PSNR_INT8 = 40.0
"""In dB, of the file's picture against the network's."""

PICTURE = {0: "batch", 2: "height", 3: "width"}
MEANINGS = {
    "image": "RGB, display-encoded sRGB in [0, 1], all in focus",
    "bokeh": "with lens blur, display-encoded sRGB in [0, 1]",
}

Network = TinyUnet | GlassEncNet
Answer = Callable[[torch.Tensor], torch.Tensor]
"""From a photo (1, 3, H, W) to what becomes of it."""


@dataclass(frozen=True)
class Agreement:
    """How near the pictures of a file are to those of the network in float32.

    Args:
        largest_difference: of a value, absolute, whose range is 1.
        psnr: in dB; 200 at most.
    """

    largest_difference: float
    psnr: float


class Casting(nn.Module):
    """A layer that computes in a dtype of its own, and gives another."""

    def __init__(self, layer: nn.Module, inside: torch.dtype, after: torch.dtype) -> None:
        super().__init__()
        self.layer, self.inside, self.after = layer, inside, after

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(values.to(self.inside))
        return result.to(self.after)


class Exact(Casting):
    """A layer that keeps float32, whatever the rest has; the names in a TFLite file tell it."""


def in_precision(folded: Network, half: bool) -> Network:
    """A copy that takes and gives float32 and computes in float16 if asked, but for what may not be
    rounded.

    The first convolution of a TinyUnet sees how sharp every place is, by differences that are as
    small as the rounding: in float16, or with weights in it, the picture changes by 3e-3, with it
    in float32 by 4e-4.
    """
    network = copy.deepcopy(folded)
    dtype = torch.float16 if half else torch.float32
    network.to(dtype)
    if isinstance(folded, TinyUnet) and isinstance(network, TinyUnet):
        first = copy.deepcopy(folded.down[0])
        network.down[0] = Exact(first, torch.float32, dtype)
        if half:
            # The photo, of which what is rendered holds a share, stays float32 as well.
            casting = Casting(network.enhancement, dtype, torch.float32)
            network.enhancement = casting
    return network


class AnySize(nn.Module):
    """``bokeh`` from ``image``, (B, 3, H, W) float32 of any size.

    Args:
        network: of :func:`in_precision`.
        enhance: go through the enhancement block.
    """

    def __init__(self, network: Network, enhance: bool) -> None:
        super().__init__()
        self.network, self.enhance = network, enhance
        self.taken = torch.float32 if isinstance(network, TinyUnet) else network.dtype

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        bokeh: torch.Tensor = self.network(image.to(self.taken), self.enhance).bokeh
        return (bokeh.float(),)


class OneSize(nn.Module):
    """``bokeh`` from ``image``, (1, H, W, 3) float32 whose sides are multiples of 8.

    Padding, which would leave its operators in the file even where there is nothing to pad, is left
    out. Arguments as of :class:`AnySize`.
    """

    def __init__(self, network: Network, enhance: bool) -> None:
        super().__init__()
        self.network, self.enhance = network, enhance

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        bokeh, _ = self.network.render(image.permute(0, 3, 1, 2))
        if self.enhance:
            bokeh = self.network.enhancement(bokeh)
        return {"bokeh": bokeh.permute(0, 2, 3, 1)}


def compact_file_to_write(
    path: PathLike, size: tuple[int, int] | None, precision: str, overwrite: bool
) -> Path:
    """Refuses, before any work, a file that could not be written; gives its path.

    Arguments and errors as of :func:`export_compact`.
    """
    file = file_to_write(path, (".onnx", ".tflite"), overwrite)
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; wanted one of {PRECISIONS}.")
    if file.suffix.lower() == ".onnx":
        if size is not None:
            raise ValueError(
                "A size was given, but an ONNX file takes photos of any size; leave it out, or "
                "write a .tflite file."
            )
        if precision == "int8":
            raise ValueError(
                "int8 was asked for, which is for TFLite files; wanted a .tflite file, or float16."
            )
        onnx_file_to_write(file, overwrite)
        return file
    if size is None:
        raise ValueError(
            "A TFLite file is made for one size of photo; wanted its width and height, for "
            "instance 1536x1024."
        )
    if min(size) < SMALLEST_SIDE or any(side % PIXELS_PER_CELL for side in size):
        raise ValueError(
            f"The size is {size[0]}x{size[1]}; wanted multiples of {PIXELS_PER_CELL} pixels of at "
            f"least {SMALLEST_SIDE}, for instance 1536x1024."
        )
    tflite_file_to_write(file, overwrite)
    return file


def export_compact(
    model: Network,
    path: PathLike,
    *,
    size: tuple[int, int] | None = None,
    precision: str = "float32",
    enhance: bool = True,
    overwrite: bool = False,
) -> Agreement:
    """Writes a network as a file, after the file's runtime has given the same picture with it.

    ======  ============================================  ==========================================
    file    ``image`` in, ``bokeh`` out, float32 sRGB     tried out with
    ======  ============================================  ==========================================
    ONNX    (batch, 3, height, width), sides of 16 or     onnxruntime, two photos of other sizes
            more                                          than the graph was traced with
    TFLite  (1, height, width, 3), of `size`              LiteRT, a photo of its size
    ======  ============================================  ==========================================

    The file says what it is, with the configuration of the network, in its metadata.

    Args:
        model: on any device.
        path: the file, ``.onnx`` or ``.tflite``.
        size: width and height of the photos of a TFLite file, multiples of 8.
        precision: ``"float32"``; ``"float16"``: the network computes in it (ONNX), or its weights
            are stored in it (TFLite: GPUs of phones may compute in it, the CPU does not);
            ``"int8"``, for TFLite: weights are stored with 8 bits. The first convolution of a
            TinyUnet keeps float32.
        enhance: with the enhancement block.
        overwrite: replace a file that exists.

    Returns:
        How near the file comes to the network in float32, measured on pictures with edges and
        texture. With ``"float16"`` in ONNX it is that of numbers rounded to float16 between
        operations in float32, as onnxruntime computes on the CPU.

    Raises:
        ValueError: something else than a network of LiteBokeh, sizes and precisions that this kind
            of file cannot have, or a file whose picture would be another one: by more than 1e-5
            (float16: 2e-3), or with less than 40 dB (int8). No file is written.
        FileNotFoundError, FileExistsError: there is no such folder; the file exists.
        ImportError: a package for this kind of file is missing; those for TFLite need an
            environment of their own.
    """
    if not isinstance(model, TinyUnet | GlassEncNet):
        raise ValueError(f"model is a {type(model).__name__}; wanted a TinyUnet or a GlassEncNet.")
    file = compact_file_to_write(path, size, precision, overwrite)
    network = copy.deepcopy(model).to("cpu").float().eval().requires_grad_(False)
    folded = network.fused().requires_grad_(False)

    def wanted(photo: torch.Tensor) -> torch.Tensor:
        bokeh: torch.Tensor = network(photo, enhance).bokeh
        return bokeh

    facts = {
        "network": type(model).__name__,
        "config": {key: one for key, one in model.config.items() if not key.startswith("_")},
        "precision": precision,
        "enhancement": enhance,
    }
    if size is None:
        values = [
            Value(name, PICTURE, f"(batch, 3, height, width) {meaning}; any sides of at least "
                  f"{SMALLEST_SIDE} pixels")
            for name, meaning in MEANINGS.items()
        ]  # fmt: skip
        traced = _traced(folded, enhance, precision, values)
        agreement = agreement_of(answer_of_onnx(traced), wanted, TRIED_SIZES)
        check_agreement(agreement, precision, "onnxruntime")
        facts[DIFFERENCES_KEY] = {"bokeh": agreement.largest_difference}
        write_onnx(labelled(traced, description_of(model), values, facts), file, overwrite)
        return agreement

    if isinstance(network, TinyUnet) and network.config.up_kernel != 4:
        raise ValueError(
            f"This network has transposed convolutions of {network.config.up_kernel} pixels a "
            "side, which no operator of TFLite computes; wanted one with up_kernel=4, or an .onnx "
            "file."
        )
    width, height = size
    facts |= {
        name: f"(1, {height}, {width}, 3) float32, {meaning}" for name, meaning in MEANINGS.items()
    }
    converted = converted_to_tflite(
        OneSize(in_precision(folded, half=False), enhance),
        {"image": torch.zeros(1, height, width, 3)},
    )
    if precision != "float32":
        smaller = with_half_weights if precision == "float16" else with_int8_weights
        converted = smaller(converted, Exact.__name__)
    finished = labelled_tflite(converted, description_of(model), facts)
    agreement = agreement_of(answer_of_tflite(finished), wanted, [(height, width)])
    check_agreement(agreement, precision, "LiteRT")
    write_tflite(finished, file, overwrite)
    return agreement


def description_of(model: Network) -> str:
    """What the file computes, in a sentence."""
    return (
        f"LiteBokeh ({type(model).__name__}): lens blur behind the subject of a photo. What is in "
        "focus and how strong the blur is, in pixels, is as in the photos it was trained with."
    )


TRACED_SIZE = (133, 211)
TRIED_SIZES = ((136, 88), (77, 131))
"""Heights and widths; with and without a border to be padded."""


def _traced(
    folded: Network, enhance: bool, precision: str, values: Sequence[Value]
) -> onnx.ModelProto:
    inside = in_precision(folded, precision == "float16")
    examples = [torch.zeros(2, 3, *TRACED_SIZE)]
    return traced_to_onnx(AnySize(inside, enhance), examples, values[:1], values[1:])


# -- File and network, asked the same --------------------------------------------------------------


def answer_of_onnx(file: onnx.ModelProto) -> Answer:
    """What onnxruntime makes of a photo with the file."""
    run = RunningModel(file.SerializeToString())
    return lambda photo: torch.from_numpy(run({"image": photo.numpy()})["bokeh"])


def answer_of_tflite(file: bytes) -> Answer:
    """What LiteRT makes of a photo with the file."""
    run = RunningTFLite(file)

    def answer(photo: torch.Tensor) -> torch.Tensor:
        image = np.ascontiguousarray(photo.permute(0, 2, 3, 1).numpy())
        return torch.from_numpy(run({"image": image})["bokeh"]).permute(0, 3, 1, 2)

    return answer


@torch.no_grad()
def agreement_of(answer: Answer, wanted: Answer, sizes: Sequence[tuple[int, int]]) -> Agreement:
    """The worst over pictures of these heights and widths."""
    photos = [detailed_picture(height, width) for height, width in sizes]
    differences = [answer(photo).double() - wanted(photo).double() for photo in photos]
    # Both of torch's keep NaN, as Python's own would not.
    largest = torch.stack([one.abs().max() for one in differences]).max()
    mean_square = torch.stack([one.square().mean() for one in differences]).max()
    return Agreement(float(largest), float(-10 * mean_square.clamp(min=1e-20).log10()))


def detailed_picture(height: int, width: int) -> torch.Tensor:
    """(1, 3, height, width) in [0, 1]: areas of several sizes in one another, down to single
    pixels, on a slope, so that there are edges, textures, flat parts, black and white."""
    generator = torch.Generator().manual_seed(0)
    slope = torch.linspace(-0.3, 0.3, width) + torch.linspace(-0.3, 0.3, height)[:, None]
    picture = (0.5 + slope).repeat(1, 3, 1, 1)
    for side, contrast in ((61, 0.6), (17, 0.4), (5, 0.3), (1, 0.05)):
        areas = torch.rand(1, 3, -(-height // side), -(-width // side), generator=generator) - 0.5
        areas = areas.repeat_interleave(side, 2).repeat_interleave(side, 3)
        picture += contrast * areas[..., :height, :width]
    return picture.clamp(0, 1)


def check_agreement(agreement: Agreement, precision: str, runtime: str) -> None:
    """Raises ``ValueError`` if the file's picture is another one than the network's."""
    if precision != "int8":
        difference = {"bokeh": agreement.largest_difference}
        check_differences(difference, LARGEST_DIFFERENCE[precision], runtime)
    # Written so that NaN, which compares as false, is refused too.
    elif not agreement.psnr >= SMALLEST_PSNR_INT8:
        raise ValueError(
            f"Run by {runtime}, the file's picture would have {agreement.psnr:.1f} dB against the "
            f"network's, less than {SMALLEST_PSNR_INT8:g}. Nothing was written. This network loses "
            "too much with 8 bits; float16 (--fp16) is closer."
        )
