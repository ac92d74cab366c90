"""`bokehdiff depth --from-bokeh`: metric depth of one photograph and its bokeh stack."""

from __future__ import annotations

import enum
import io
import json
import math
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .disparities import check_photos
from .options import parse_numbers
from .renderers import usable_device
from .speech import Mistake
from .summaries import arguments_of, relative_to, versions

if TYPE_CHECKING:
    import torch

    from ..pipelines.depth_output import DepthFromBokehOutput

SUMMARY = "summary.json"
CONFIDENCE = "confidence.png"
RESULTS = ("depth.npy", "depth.png", "disparity.npy", "depth_color.png", CONFIDENCE, SUMMARY)


class Side(str, enum.Enum):
    """Of the plane in focus, on which everything lies."""

    nearer = "nearer"
    farther = "farther"
    both = "both"


class StackMethod(str, enum.Enum):
    """Classical renderers of a stack."""

    layered = "layered"
    scatter = "scatter"
    pyramid = "pyramid"


@dataclass(frozen=True)
class FromBokeh:
    """The options that go with --from-bokeh, as they were given."""

    stack: list[Path]
    strengths: str | None
    focus_distance: str | None
    side: Side | None
    stack_model: str | None
    stack_weights: str | None
    stack_method: StackMethod | None
    iterations: int | None
    seed: int | None

    def check_absent(self) -> None:
        """Refuses them where --from-bokeh was not given."""
        for option, value in (
            ("--stack", self.stack or None),
            ("--K", self.strengths),
            ("--focus-distance", self.focus_distance),
            ("--side", self.side),
            ("--stack-model", self.stack_model),
            ("--stack-weights", self.stack_weights),
            ("--stack-method", self.stack_method),
            ("--iterations", self.iterations),
            ("--seed", self.seed),
        ):
            if value is not None:
                raise Mistake(f"{option} goes with --from-bokeh, depth from a bokeh stack.")


def depth_from_bokeh(
    context: typer.Context,
    photos: list[Path],
    output: Path,
    model: str | None,
    device: str | None,
    force: bool,
    asked: FromBokeh,
) -> None:
    """Estimates depth and writes the folder."""
    if len(photos) != 1:
        raise Mistake(f"There are {len(photos)} photographs; --from-bokeh takes one at a time.")
    (photo,) = photos
    check_photos(photos)
    check_options(model, asked)
    check_output(output, [photo, *asked.stack], force)

    from ..images import read_image

    image = read_image(photo)
    device = usable_device(device)
    frames, strengths, df = read_stack(asked, image)
    summary: dict[str, Any] = {
        "photo": relative_to(photo, output),
        "size": [image.shape[-1], image.shape[-2]],
        "stack": [relative_to(file, output) for file in asked.stack] or None,
        "k": strengths,
    }
    if model is None:
        assert frames is not None
        found = sweep(image, frames, strengths, df, asked, device, summary)
    else:
        found = by_network(image, frames, strengths, model, asked, device, summary)
    summary |= {
        "device": device,
        "arguments": arguments_of(context, output, ("model", "stack_model", "stack_weights")),
        "versions": versions(),
    }
    files = encoded(found, summary)
    write_folder(output, files)
    nearest, farthest = (
        "infinity" if math.isinf(metres) else f"{metres:.4g} m" for metres in _range(found)
    )
    typer.echo(f"{output} ({summary['method']}, depth {nearest} to {farthest})")


# -- What was asked for --------------------------------------------------------------------------


def check_options(model: str | None, asked: FromBokeh) -> None:
    """Refuses options that do not go together, before anything is read."""
    makers = [
        option
        for option, value in (
            ("--stack", asked.stack or None),
            ("--stack-model", asked.stack_model),
            ("--stack-method", asked.stack_method),
        )
        if value is not None
    ]
    if len(makers) != 1:
        came = f"{' and '.join(makers)} were given" if makers else "none of them was given"
        raise Mistake(
            "Where the bokeh stack comes from is said by one of --stack (pictures, or a folder of "
            "`bokehdiff stack`), --stack-model (what paints it) and --stack-method (what renders "
            f"it); {came}."
        )
    if model is None and not asked.stack:
        raise Mistake(
            f"{makers[0]} makes a stack for a depth network; wanted --model too, a folder with "
            "Depth Anything and DSFA. Without a network only a real stack tells depth: --stack."
        )
    if asked.stack_weights is not None and asked.stack_model is None:
        raise Mistake("--stack-weights goes with --stack-model, what they were trained for.")
    if asked.seed is not None and asked.stack_model is None:
        raise Mistake("--seed goes with --stack-model; nothing else draws random numbers.")
    if asked.side is not None and model is not None:
        raise Mistake("--side is for a stack without --model, whose blur is measured.")
    for file in asked.stack:
        if not file.exists():
            raise Mistake(f"{file} does not exist; wanted a picture of the stack, or its folder.")
        if file.is_dir() and len(asked.stack) > 1:
            raise Mistake(f"{file} is a folder; wanted either one folder or the pictures.")
    if asked.stack and asked.stack[0].is_dir():
        if asked.strengths is not None:
            raise Mistake(f"--K was given, which the folder {asked.stack[0]} says itself.")
    elif asked.strengths is None:
        raise Mistake(
            "--K is missing; wanted the blur strength of each picture of the stack, pixels of blur "
            "radius in the photograph per 1/metre, for instance --K 10,20,30."
        )


def check_output(output: Path, given: list[Path], force: bool) -> None:
    """Refuses, before any work, to write over what was given or what is there."""
    from ..photographs import PHOTOGRAPH_SUFFIXES

    named_like_a_file = output.suffix.lower() in PHOTOGRAPH_SUFFIXES and not output.is_dir()
    if output.is_file() or named_like_a_file:
        raise Mistake(
            f"-o {output} is a file or named like one; wanted a folder, for instance -o "
            f"{output.with_suffix('')}_depth: --from-bokeh writes {', '.join(RESULTS)}."
        )
    existing = [output / name for name in RESULTS if (output / name).exists()]
    for source in given:
        if output.is_dir() and source.is_dir() and source.samefile(output):
            raise Mistake(f"-o {output} is the folder of the stack; wanted another folder.")
        if any(file.samefile(source) for file in existing):
            raise Mistake(f"{source} would be written over; wanted another folder.")
    if existing and not force:
        others = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise Mistake(
            f"{existing[0]}{others} exists already; nothing was estimated. Choose another -o, or "
            "add --force to replace an earlier result."
        )


def read_stack(
    asked: FromBokeh, image: torch.Tensor
) -> tuple[torch.Tensor | None, list[float], Any]:
    """Frames (1, N, 3, H, W) if they are given, strengths, and disparities in focus as known."""
    from ..pipelines.depth_inputs import as_stack_batch, strengths_per_photo

    if asked.stack and asked.stack[0].is_dir():
        from ..stack_folder import read_stack_folder

        folder = read_stack_folder(asked.stack[0])
        return as_stack_batch(folder.stack, image), folder.K, folder.df
    assert asked.strengths is not None
    strengths = parse_numbers(asked.strengths, "--K", "10,20,30")
    frames = as_stack_batch(list(asked.stack), image) if asked.stack else None
    strengths_per_photo(strengths, 1, None if frames is None else frames.shape[1])
    return frames, strengths, None


def _focus_distances(asked: FromBokeh, df: Any) -> float | list[float] | None:
    """Metres in focus, from the option, else from the folder of the stack."""
    if asked.focus_distance is not None:
        distances = parse_numbers(asked.focus_distance, "--focus-distance", "1.5")
        return distances[0] if len(distances) == 1 else distances
    if df is None:
        return None
    if isinstance(df, list):
        return [1 / one if one > 0 else math.inf for one in df]
    return 1 / df if df > 0 else math.inf


# -- The two ways --------------------------------------------------------------------------------


def sweep(
    image: torch.Tensor,
    frames: torch.Tensor,
    strengths: list[float],
    df: Any,
    asked: FromBokeh,
    device: str,
    summary: dict[str, Any],
) -> DepthFromBokehOutput:
    """Depth by measuring blur."""
    from ..pipelines.depth_from_sweep import chosen_side, depth_from_sweep

    if asked.iterations is not None:
        raise Mistake("--iterations goes with --stack-method, a stack rendered for --model.")
    distances = _focus_distances(asked, df)
    if distances is None:
        raise Mistake(
            "--focus-distance is missing; wanted the metres at which the stack is in focus, for "
            "instance --focus-distance 1.5, or one for each picture, 0.8,1.5,3. Blur tells only "
            "how far from there a place lies. Or give --model, a depth network, which needs none."
        )
    side = chosen_side(distances, None if asked.side is None else asked.side.value)
    found = depth_from_sweep(image.to(device), frames.to(device), strengths, distances, side=side)
    summary |= {"method": "sweep", "focus_distance_m": _json_number(distances), "side": side}
    return found


def by_network(
    image: torch.Tensor,
    frames: torch.Tensor | None,
    strengths: list[float],
    model: str,
    asked: FromBokeh,
    device: str,
    summary: dict[str, Any],
) -> DepthFromBokehOutput:
    """Depth by a network, with a stack that is given or made."""
    import torch
    from transformers.utils import logging

    from ..pipelines.depth_from_bokeh import DepthFromBokehPipeline

    if Path(model).expanduser().is_dir():  # a download has something to show
        logging.disable_progress_bar()
    pipe = DepthFromBokehPipeline.from_pretrained(model)
    pipe.to(device)
    options: dict[str, Any] = {}
    if asked.focus_distance is not None:
        options["focus_distance_m"] = _focus_distances(asked, None)
    if asked.iterations is not None:
        options["iterations"] = asked.iterations
    seed = None
    if asked.stack_method is not None:
        options["stack_from"] = asked.stack_method.value
    elif asked.stack_model is not None:
        seed = 42 if asked.seed is None else asked.seed
        options["stack_from"] = load_stack_model(asked.stack_model, asked.stack_weights, device)
        options["generator"] = torch.Generator().manual_seed(seed)
    given = None if frames is None else frames.to(device)
    found: Any = pipe(image.to(device), given, strengths, **options)
    height, width = found.network_size
    summary |= {
        "method": "network",
        "focus_distance_m": options.get("focus_distance_m"),
        "network": {"k": found.network_K[0].tolist(), "size": [width, height]},
        "seed": seed,
    }
    if found.changes is not None:
        summary["changes"] = found.changes[:, 0].tolist()
    result: DepthFromBokehOutput = found
    return result


def load_stack_model(name: str, weights: str | None, device: str) -> Any:
    """The pipeline that paints or renders a stack: FLUX.1-Kontext, or that of BokehDiff."""
    import torch
    from diffusers.utils import logging

    folder = Path(name).expanduser()
    index: dict[str, Any] = {}
    if folder.is_dir():
        logging.disable_progress_bar()
        try:
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise Mistake(
                f"--stack-model {name} holds no pipeline, with a model_index.json that can be read."
            ) from None
    if "unet" in index:
        from ..pipelines import BokehDiffPipeline

        renderer = BokehDiffPipeline.from_pretrained(folder)
        if weights is not None:
            renderer.load_bokeh_weights(weights)
        return renderer.to(device)
    from ..pipelines.bokeh_stack import BokehStackPipeline

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    painter = BokehStackPipeline.from_pretrained(str(folder) if index else name, dtype=dtype)
    if weights is not None:
        painter.load_bokeh_adapter(weights)
    return painter.to(device)


# -- The folder ----------------------------------------------------------------------------------


def encoded(found: DepthFromBokehOutput, summary: dict[str, Any]) -> dict[str, bytes]:
    """The files by name; the summary, which describes them, is the last."""
    import numpy as np

    from ..depth_pictures import (
        UNIT_KEY,
        colour_picture,
        confidence_picture,
        depth_picture,
        encode_picture_with_unit,
    )

    depth, disparity = _plain(found.depth), _plain(found.disparity)
    gray = depth_picture(depth)
    unit = gray.info[UNIT_KEY]
    described = {
        "depth.npy": "float32, metres; infinite where the disparity is 0",
        "depth.png": f"16 bits, levels of {unit}; 0 unknown, 65535 that far or farther",
        "disparity.npy": "float32, 1/metres; for `bokehdiff render --disparity` with --metric",
        "depth_color.png": "disparity from its 2nd to its 98th percentile, near is light",
    }
    files = {
        "depth.npy": _npy(depth),
        "depth.png": encode_picture_with_unit(gray),
        "disparity.npy": _npy(disparity),
        "depth_color.png": _png(colour_picture(disparity)),
    }
    if found.confidence is not None:
        files[CONFIDENCE] = encode_picture_with_unit(confidence_picture(_plain(found.confidence)))
        described[CONFIDENCE] = "16 bits, 65535 is 1: reliability of what was measured"
    nearest, farthest = _range(found)
    summary |= {
        "depth_m": {
            "nearest": _json_number(nearest),
            "farthest": _json_number(farthest),
            "median": _json_number(float(np.median(depth))),
        },
        "depth_png_unit": unit,
        "files": described,
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    files[SUMMARY] = text.encode()
    return files


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Writes all files, or none: the folder appears with all of them in it. In one that is there,
    they take the place of an earlier result."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{uuid.uuid4().hex}.unfinished"
    unfinished.mkdir()
    try:
        for name, data in files.items():
            (unfinished / name).write_bytes(data)
        if not folder.exists():
            os.rename(unfinished, folder)
            return
        # While files are replaced no summary speaks of them.
        for name in RESULTS:
            if name == SUMMARY or name not in files:
                (folder / name).unlink(missing_ok=True)
        for name in files:
            os.replace(unfinished / name, folder / name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _plain(maps: Any) -> Any:
    """(H, W) float32 array of maps (1, 1, H, W)."""
    return maps[0, 0].cpu().numpy()


def _range(found: DepthFromBokehOutput) -> tuple[float, float]:
    """Metres of the nearest and the farthest place."""
    depth = _plain(found.depth)
    return float(depth.min()), float(depth.max())


def _npy(values: Any) -> bytes:
    import numpy as np

    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def _png(picture: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


def _json_number(value: Any) -> Any:
    """A number or list of them; infinity, which JSON lacks, as a word."""
    if isinstance(value, list):
        return [_json_number(one) for one in value]
    return "infinity" if math.isinf(value) else value
