"""`bokehdiff focus-pull`: one photograph as a film in which the focus moves."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..easing import eased as gently
from . import options
from .disparities import check_unit, depth_estimator, disparity_of, find_disparities
from .options import LensOptions, parse_focus, parse_tiling
from .renderers import Method, load_renderer, usable_device
from .speech import Mistake, plain_speech

if TYPE_CHECKING:
    import numpy as np
    import torch

FOCUS_PULL_EXAMPLES = """\b
Examples:
  bokehdiff focus-pull photo.jpg --from 512,300 --to 900,420 --seconds 3 -o pull.mp4
  bokehdiff focus-pull photo.jpg --disparity photo.npy --from 0.9 --to 0.2 -o pull.mp4
  bokehdiff focus-pull photo.jpg --from auto --to 40,60 --f-number 1.4 --focal-length 85 -o pull.mp4
"""


class Easing(str, enum.Enum):
    """How the focus moves."""

    smooth = "smooth"
    linear = "linear"


def focus_pull(
    photo: Annotated[
        Path, typer.Argument(metavar="PHOTO", help="A photograph.", show_default=False)
    ],
    start: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="WHERE",
            help="What is in focus first: a pixel X,Y, a box X0,Y0,X1,Y1, auto, or a disparity.",
            show_default=False,
        ),
    ],
    end: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="WHERE",
            help="What is in focus last, said in the same way.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="The video to write: .mp4, .mov or .mkv.",
            show_default=False,
        ),
    ],
    disparity: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The disparity map (larger is nearer), as large as the photograph. Default: "
            "estimated by --depth-model.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long the focus moves.")] = 3.0,
    frames_per_second: Annotated[
        float, typer.Option("--fps", help="Frames in each second.")
    ] = 24.0,
    easing: Annotated[
        Easing,
        typer.Option(help="smooth starts and stops gently; linear moves evenly."),
    ] = Easing.smooth,
    strength: options.Strength = None,
    f_number: options.FNumber = None,
    focal_length: options.FocalLength = None,
    focal_length_35mm: options.FocalLength35mm = None,
    sensor_width: options.SensorWidth = None,
    focus_distance: options.FocusDistance = None,
    farthest_distance: options.FarthestDistance = None,
    method: Annotated[
        Method,
        typer.Option(help="model, the diffusion model; flow; or layered, scatter, pyramid."),
    ] = Method.model,
    model: options.Model = None,
    weights: options.Weights = None,
    tiling: options.Tiles = "auto",
    metric: options.Metric = False,
    normalise: options.Normalise = False,
    invalid: options.Invalid = None,
    depth_model: options.DepthModel = None,
    device: options.Device = None,
    force: options.Force = False,
) -> None:
    """Pull the focus of a photograph from one thing to another, as a film.

    The photograph is encoded once; each frame costs one refocus. A camera's blur is that of the
    first frame throughout.
    """
    from tqdm import tqdm

    with plain_speech():
        count = _frame_count(seconds, frames_per_second)
        first, last = (
            LensOptions(
                **_where(text, option),
                strength=strength,
                f_number=f_number,
                focal_length_mm=focal_length,
                focal_length_35mm=focal_length_35mm,
                sensor_width_mm=sensor_width,
                focus_distance_m=focus_distance,
                farthest_distance_m=farthest_distance,
                metric=metric,
            )
            for text, option in ((start, "--from"), (end, "--to"))
        )
        for settings in (first, last):
            settings.check()
        check_unit(metric, normalise)
        (map_file,) = find_disparities([photo], disparity)
        from ..images import read_image
        from ..video_files import check_video_file, write_video

        check_video_file(output, overwrite=force)
        device = usable_device(device)
        image = read_image(photo)
        estimator = depth_estimator(depth_model, device) if map_file is None else None
        found, is_metric = disparity_of(
            map_file, image, estimator, metric=metric, normalise=normalise, invalid=invalid
        )
        ends = [settings.choose(photo, image, found, is_metric) for settings in (first, last)]
        prepare = load_renderer(
            method, device, model=model, weights=weights, tiling=parse_tiling(tiling)
        )

        def frames() -> Iterator[np.ndarray]:
            import torch

            from ..lens import LensSetting

            with torch.inference_mode():
                refocus = prepare(image, found, is_metric, False)
                bar = tqdm(range(count), unit="frame", file=sys.stderr, desc=output.name)
                for number in bar:
                    along = eased(number / max(count - 1, 1), easing)
                    plane = torch.lerp(ends[0].df, ends[1].df, along)
                    yield _eight_bits(refocus(LensSetting(plane, plane, ends[0].K)))

        write_video(output, frames(), frames_per_second, overwrite=force)
        planes = " to ".join(f"{float(one.df):.4g}" for one in ends)
        typer.echo(f"{output} ({count} frames, df {planes}, K {float(ends[0].K):.4g})")


def eased(time: float, easing: Easing) -> float:
    """How far the focus has moved, 0 to 1, at a time from 0 to 1."""
    return gently(time) if easing is Easing.smooth else time


def _frame_count(seconds: float, frames_per_second: float) -> int:
    if not (0 < seconds < 3600 and 0 < frames_per_second <= 240):
        raise Mistake(
            f"--seconds is {seconds:g} and --fps {frames_per_second:g}; wanted more than 0, at "
            "most an hour and 240 frames per second."
        )
    return max(round(seconds * frames_per_second), 2)


def _where(text: str, option: str) -> dict[str, Any]:
    """The setting that --from or --to stands for."""
    try:
        return {"df": float(text)}
    except ValueError:
        return {"focus": parse_focus(text, option)}


def _eight_bits(picture: torch.Tensor) -> np.ndarray:
    return (picture[0].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().cpu().numpy()
