"""`bokehdiff stack`: one photograph with several strengths of lens blur."""

from __future__ import annotations

import enum
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .disparities import check_photos, depth_estimator, disparity_of, find_disparities
from .options import LensOptions, parse_focus, parse_numbers
from .renderers import CLASSICAL_METHODS, Method, load_renderer, usable_device
from .results import check_targets
from .speech import Mistake, plain_speech
from .summaries import arguments_of, versions

if TYPE_CHECKING:
    import torch

STACK_EXAMPLES = """\b
Examples:
  bokehdiff stack photo.jpg --K 10,20,30 --disparity metric.npy --focus-distance 2 -o stack
  bokehdiff stack photo.jpg --K 10,20,30 --focus 512,300 -o stack \\
    --depth-model depth-anything/Depth-Anything-V2-Metric-Outdoor-Small-hf
  bokehdiff stack photo.jpg --K 10,20,30 -o stack \\
    --model black-forest-labs/FLUX.1-Kontext-dev --weights weights/bokeh_lora.bin
  bokehdiff stack photo.jpg --f-numbers 2.8,4,8 --focal-length 85 --focus-distance 2 -o stack \\
    --model black-forest-labs/FLUX.1-Kontext-dev --weights weights/bokeh_lora.bin
"""


class Colours(str, enum.Enum):
    """What is done about the colours of what the model paints."""

    lab = "lab"
    lab_mean = "lab_mean"
    none = "none"


class Precision(str, enum.Enum):
    """In what numbers the model computes."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def stack(
    context: typer.Context,
    photo: Annotated[
        Path, typer.Argument(metavar="PHOTO", help="A photograph.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="The folder to write, created if missing: ref.png, 0.png, 1.png, ... and "
            "summary.json.",
            show_default=False,
        ),
    ],
    strengths: Annotated[
        str | None,
        typer.Option(
            "--K",
            metavar="K,K,...",
            help="Blur strengths: pixels of blur radius, of this photograph, per 1/metre of "
            "disparity; 0 is the photograph itself. Default: 10,20,30, or what the camera gives.",
            show_default=False,
        ),
    ] = None,
    f_numbers: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Apertures of the camera instead, for instance 2.8,4,8. This and the following "
            "options of the camera take the place of --K; what is not given is taken from the "
            "EXIF data of the photograph.",
            show_default=False,
        ),
    ] = None,
    focal_length: options.FocalLength = None,
    focal_length_35mm: options.FocalLength35mm = None,
    sensor_width: options.SensorWidth = None,
    focus_distance: Annotated[
        float | None,
        typer.Option(
            metavar="M", help="Distance of what is in focus, in metres.", show_default=False
        ),
    ] = None,
    focus: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE",
            help="For a classical method, focus on this pixel instead, X,Y; on the middle of a "
            "box, X0,Y0,X1,Y1; or on the nearest large thing near the centre, auto.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="FLUX.1-Kontext, folder or hub id, which paints the blur without a disparity map; "
            "or a folder in which the adapter is, too.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The adapter trained for that --model: bokeh_lora.bin, a .safetensors file, a "
            "folder or a hub id.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(
            help="model, which is the default with --model; or a classical renderer, which takes a "
            "disparity map: layered (the default without --model), scatter, pyramid.",
            show_default=False,
        ),
    ] = None,
    disparity: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="For a classical method, the disparity map in 1/metres, as large as the "
            "photograph: npy, npz, PFM or TIFF. Default: estimated by --depth-model.",
            show_default=False,
        ),
    ] = None,
    invalid: options.Invalid = None,
    depth_model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Model that estimates the disparity in 1/metres where --disparity is not given: "
            "folder or hub id, one with Metric in its name.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of denoising of --model.")] = 50,
    guidance: Annotated[float, typer.Option(help="Embedded guidance of --model.")] = 7.0,
    seed: Annotated[int, typer.Option(help="Of the noise, the same for every picture.")] = 42,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Text for --model; {K} in it becomes the K that the network is told. Default: "
            "that of the authors.",
            show_default=False,
        ),
    ] = None,
    colour_transfer: Annotated[
        Colours,
        typer.Option(
            help="Put the colours of the photograph back into what --model paints: lab, mean and "
            "deviation in LAB; lab_mean, the mean; none."
        ),
    ] = Colours.lab,
    lora_scale: Annotated[
        float, typer.Option(help="Times what the adapter adds to queries and keys.")
    ] = 1.0,
    bokeh_scale: Annotated[float, typer.Option(help="Times what K adds to attention.")] = 1.0,
    max_area: Annotated[
        int, typer.Option(min=1, help="Pixels on which --model works; results get the full size.")
    ] = 1024 * 1024,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Pictures painted at once. Default: all.", show_default=False),
    ] = None,
    dtype: Annotated[
        Precision | None,
        typer.Option(
            help="Numbers in which --model computes. Default: bfloat16, on a cpu float32.",
            show_default=False,
        ),
    ] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep parts of --model on the cpu until they run.")
    ] = False,
    device: options.Device = None,
    force: options.Force = False,
) -> None:
    """Blur one photograph with several strengths: a bokeh stack.

    With --model FLUX.1-Kontext paints it without knowing any depth; without, a classical renderer
    makes it from a disparity map in 1/metres.
    """
    with plain_speech():
        check_photos([photo])
        if method is None:
            method = Method.layered if model is None else Method.model
        _check_method(
            method, model, weights,
            {"--disparity": disparity, "--depth-model": depth_model, "--focus": focus},
        )  # fmt: skip
        asked = None if strengths is None else parse_numbers(strengths, "--K", "10,20,30")
        apertures = None
        if f_numbers is not None:
            apertures = parse_numbers(f_numbers, "--f-numbers", "2.8,4,8")
        camera_parts = (apertures, focal_length, focal_length_35mm, sensor_width)
        has_camera = any(part is not None for part in camera_parts)
        if has_camera and asked is not None:
            raise Mistake("--K and options of a camera both came; the blur is said by one of them.")
        if focus_distance is not None and not focus_distance > 0:
            raise Mistake(f"--focus-distance is {focus_distance:g}; wanted metres, more than 0.")

        from ..camera import Camera, subject_distance_m
        from ..images import read_image
        from ..stack_folder import check_stack_folder, stack_files, write_stack_folder
        from ..stack_strengths import check_strengths, strengths_of_camera

        image = read_image(photo)
        size = (image.shape[-2], image.shape[-1])
        if has_camera:
            camera = Camera.from_photo(
                photo,
                f_number=apertures[0] if apertures else None,
                focal_length_mm=focal_length,
                focal_length_35mm=focal_length_35mm,
                sensor_width_mm=sensor_width,
            )
            count = len(apertures) if apertures else 1
        else:
            count = len(check_strengths([10, 20, 30] if asked is None else asked))
        check_stack_folder(output, count, force)
        reference, *others = stack_files(output, count)
        check_targets([photo], [reference], True, do="Blur", done="blurred", more=others)
        device = usable_device(device)

        def choose(distance_m: float | None) -> list[float]:
            """K of each picture, if what is in focus is that far away."""
            if has_camera:
                return strengths_of_camera(photo, size, camera, apertures, distance_m)
            return check_strengths([10, 20, 30] if asked is None else asked)

        if method is Method.model:
            assert model is not None
            distance = focus_distance
            if distance is None and has_camera:
                distance = subject_distance_m(photo)
            df = None if distance is None else 1 / distance
            K = choose(distance)
            pictures, details = _painted(
                image, K, model, weights, device, dtype, offload, seed,
                prompt=prompt,
                num_inference_steps=steps,
                guidance_scale=guidance,
                colour_transfer=None if colour_transfer is Colours.none else colour_transfer.value,
                lora_scale=lora_scale,
                bokeh_scale=bokeh_scale,
                max_area=max_area,
                batch_size=batch_size,
            )  # fmt: skip
        else:
            found = _metric_disparity(photo, image, disparity, invalid, depth_model, device)
            df = _focus_disparity(photo, image, found, focus_distance, focus)
            K = choose(1 / df if df > 0 else math.inf)
            pictures, details = _rendered(image, found, df, K, method, device)
        details |= {
            "arguments": arguments_of(context, output, ("model", "weights", "depth_model")),
            "device": device,
            "versions": versions(),
        }
        write_stack_folder(output, image, pictures, K, df=df, details=details, overwrite=force)
        plane = "" if df is None else f", df {df:.4g} 1/m"
        typer.echo(f"{output} ({len(K)} pictures, K {', '.join(f'{k:.4g}' for k in K)}{plane})")


def _check_method(
    method: Method, model: str | None, weights: str | None, classical: dict[str, Any]
) -> None:
    """Refuses options of the other way to make the blur."""
    if method is Method.model:
        if model is None:
            raise Mistake(
                "--method model goes with --model, the folder or hub id of FLUX.1-Kontext; wanted "
                f"that, or --method {CLASSICAL_METHODS}."
            )
        for name, value in classical.items():
            if value is not None:
                raise Mistake(f"{name} does not go with --model, which paints without a map.")
        return
    if model is not None:
        raise Mistake(f"--model goes with --method model, not with --method {method.value}.")
    if weights is not None:
        raise Mistake("--weights goes with --model, the model that they were trained for.")
    if classical["--disparity"] is None and classical["--depth-model"] is None:
        raise Mistake(
            "A classical renderer needs a disparity map in 1/metres: wanted --disparity FILE, "
            "--depth-model with a metric model such as "
            "depth-anything/Depth-Anything-V2-Metric-Outdoor-Small-hf, or --model, which paints "
            "without a map."
        )


def _metric_disparity(
    photo: Path,
    image: torch.Tensor,
    disparity: str | None,
    invalid: float | None,
    depth_model: str | None,
    device: str,
) -> torch.Tensor:
    """The disparity (1, 1, H, W) of a photograph in 1/metres."""
    (map_file,) = find_disparities([photo], disparity)
    estimator = None if map_file is not None else depth_estimator(depth_model, device)
    found, metric = disparity_of(
        map_file, image, estimator, metric=True, normalise=False, invalid=invalid
    )
    assert metric
    return found


def _focus_disparity(
    photo: Path,
    image: torch.Tensor,
    disparity: torch.Tensor,
    focus_distance: float | None,
    focus: str | None,
) -> float:
    """The disparity of the plane in focus, 1/metres."""
    if (focus_distance is None) == (focus is None):
        raise Mistake(
            "Which plane is in focus is said by one of --focus-distance and --focus; "
            f"{'none of them was' if focus is None else 'both were'} given."
        )
    if focus is None:
        assert focus_distance is not None
        return 1 / focus_distance
    settings = LensOptions(focus=parse_focus(focus), strength=0.0, metric=True)
    return float(settings.choose(photo, image, disparity, metric=True).df)


def _rendered(
    image: torch.Tensor,
    disparity: torch.Tensor,
    df: float,
    K: list[float],
    method: Method,
    device: str,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """A stack (N, 3, H, W) by a classical renderer, and what the summary says of it."""
    import torch
    from tqdm import tqdm

    from ..lens import LensSetting

    with torch.inference_mode():
        refocus = load_renderer(method, device)(image, disparity, True, False)
        plane = torch.tensor([df])
        pictures = [
            refocus(LensSetting(plane, plane, torch.tensor([strength]))).clamp(0, 1).cpu()
            for strength in tqdm(K, unit="picture", file=sys.stderr)
        ]
    return torch.cat(pictures), {"method": method.value}


def _painted(
    image: torch.Tensor,
    K: list[float],
    model: str,
    weights: str | None,
    device: str,
    precision: Precision | None,
    offload: bool,
    seed: int,
    **settings: Any,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """A stack (N, 3, H, W) by FLUX.1-Kontext, and what the summary says of it."""
    import torch
    from diffusers.utils import logging

    from ..pipelines.bokeh_stack import BokehStackPipeline

    if offload and device == "cpu":
        raise Mistake("--offload came with --device cpu, where there is nothing to move away from.")
    folder = os.path.expanduser(model)
    if os.path.isdir(folder):  # a download has something to show, a folder loads at once
        logging.disable_progress_bar()
    if precision is None:
        precision = Precision.float32 if device == "cpu" else Precision.bfloat16
    pipe = BokehStackPipeline.from_pretrained(folder, dtype=getattr(torch, precision.value))
    if weights is not None:
        pipe.load_bokeh_adapter(weights)
    elif pipe.bokeh_adapter is None:
        raise Mistake(
            f"{model} holds no adapter, without which FLUX.1-Kontext knows nothing of K; wanted "
            "--weights, for instance --weights weights/bokeh_lora.bin."
        )
    if offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    painted: Any = pipe(
        image, K, generator=torch.Generator().manual_seed(seed), output_type="pt", **settings
    )
    height, width = painted.network_size
    network = {"k": painted.network_K, "size": [width, height], "prompts": painted.prompts}
    details = {"method": "model", "dtype": precision.value, "network": network}
    return painted.images.cpu(), details
