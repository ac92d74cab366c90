"""`bokehdiff render`: photographs blurred as a lens would."""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import TINY
from .speech import Mistake, note, plain_speech, say_error

if TYPE_CHECKING:
    import torch

    from ..rendering import Aperture
    from ..rendering.highlights import HighlightBoost

RENDER_EXAMPLES = """\b
Examples:
  bokehdiff render photo.jpg --disparity photo.npy --df 0.7 --K 20 -o blurred.jpg
  bokehdiff render photo.jpg --disparity depth.pfm --normalise --focus 512,300 -o blurred.png
  bokehdiff render shots/*.jpg --disparity maps/ --focus 960,540 -o blurred/
  bokehdiff render shots/*.jpg --disparity 'maps/{stem}_16bit.png' --df 0.5 -o blurred/
  bokehdiff render photo.jpg --disparity photo.npy --df 0.7 --blades 7 --cat-eye 0.4 -o out.jpg
  bokehdiff render night.jpg --disparity n.npy --df 0.7 --highlights boost -o out.png
  bokehdiff render night.exr --disparity n.npy --df 0.7 -o out.exr
"""

DISPARITY_SUFFIXES = (".npy", ".npz", ".pfm", ".png", ".tif", ".tiff")


class Method(str, enum.Enum):
    """How the blur is made."""

    model = "model"
    layered = "layered"
    scatter = "scatter"
    pyramid = "pyramid"


class Highlights(str, enum.Enum):
    """What is done about highlights that are brighter than white."""

    none = "none"
    boost = "boost"
    hdr = "hdr"


CLASSICAL_METHODS = ", ".join(method.value for method in Method if method is not Method.model)


def render(
    photos: Annotated[
        list[Path],
        typer.Argument(metavar="PHOTO", help="One or more photographs.", show_default=False),
    ],
    disparity: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="The disparity map (larger is nearer): PNG, TIFF, npy, npz or PFM, as large as "
            "the photograph. For several photographs a folder with maps of the same names (or "
            "NAME_disp, NAME_disparity), or a pattern with {stem} in it.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="The file to write; for several photographs a folder, created if missing.",
            show_default=False,
        ),
    ],
    df: Annotated[
        float | None,
        typer.Option(
            "--df",
            help="Disparity of the plane in focus, in [0, 1]: 0 the farthest, 1 the nearest.",
            show_default=False,
        ),
    ] = None,
    focus: Annotated[
        str | None,
        typer.Option(
            metavar="X,Y",
            help="Focus on this pixel instead: column and row from the top left.",
            show_default=False,
        ),
    ] = None,
    strength: Annotated[
        float,
        typer.Option(
            "--K", help="Blur strength: pixels of blur radius per unit of disparity; 0 is none."
        ),
    ] = 20.0,
    method: Annotated[
        Method | None,
        typer.Option(
            help="model, the diffusion model; or a classical renderer: layered, the most faithful; "
            "scatter, without a guess of what is hidden; pyramid, a fast preview. Default: model, "
            "or layered if options of the lens or highlights or an .exr or .hdr photo ask for it.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Model folder or hub id. Default: the small model inside the package.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Adapters trained for that --model: folder or hub id.",
            show_default=False,
        ),
    ] = None,
    blades: Annotated[
        int | None,
        typer.Option(
            help="Number of aperture blades, 3 or more; 0 is a circle. This and the following "
            "options of the lens go with a classical method.",
            show_default=False,
        ),
    ] = None,
    rotation: Annotated[
        float | None,
        typer.Option(help="Turn the opening: degrees, clockwise.", show_default=False),
    ] = None,
    roundness: Annotated[
        float | None,
        typer.Option(
            help="Bend of the blades: 0 straight (default), 1 a circle.", show_default=False
        ),
    ] = None,
    squeeze: Annotated[
        float | None,
        typer.Option(
            help="Anamorphic lens: width of the opening divided by its height, 0.25 to 4.",
            show_default=False,
        ),
    ] = None,
    obstruction: Annotated[
        float | None,
        typer.Option(
            help="Mirror lens: radius of the central obstruction as a share of the opening's.",
            show_default=False,
        ),
    ] = None,
    cat_eye: Annotated[
        float | None,
        typer.Option(
            help="Optical vignetting, 0 (default) to 1: narrows the discs towards the corners.",
            show_default=False,
        ),
    ] = None,
    spherical: Annotated[
        float | None,
        typer.Option(
            help="Spherical aberration, -1 to 1: above 0 bright-rimmed discs behind the plane in "
            "focus and soft ones before it, below 0 the reverse.",
            show_default=False,
        ),
    ] = None,
    fringe: Annotated[
        float | None,
        typer.Option(
            help="Longitudinal chromatic aberration: red and blue are in focus at this much less "
            "disparity than green.",
            show_default=False,
        ),
    ] = None,
    aperture_picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The shape of the opening as a picture: white lets light through.",
            show_default=False,
        ),
    ] = None,
    highlights: Annotated[
        Highlights | None,
        typer.Option(
            help="boost: give clipped lamps their light back, so that they become discs. hdr: the "
            "photograph is linear light and is not cut off at white (.exr, .hdr, and .tif or .npy "
            "with floats). none: white is the brightest. Default: hdr for .exr and .hdr, else "
            "none. boost and hdr go with a classical method.",
            show_default=False,
        ),
    ] = None,
    highlight_threshold: Annotated[
        float | None,
        typer.Option(
            help="Level between 0 and 1 from which a pixel counts as clipped. Default: 0.985; 0.95 "
            "suits JPEG.",
            show_default=False,
        ),
    ] = None,
    highlight_gain: Annotated[
        float | None,
        typer.Option(
            help="How many times as bright as shown a clipped lamp is taken to be. Default: 24.",
            show_default=False,
        ),
    ] = None,
    normalise: Annotated[
        bool,
        typer.Option(
            "--normalise/--no-normalise",
            help="Stretch each disparity map to [0, 1] first: for stereo pixels, 1/metres and "
            "other units. --df, --K and --fringe then refer to the stretched map.",
        ),
    ] = False,
    invalid: Annotated[
        float | None,
        typer.Option(
            help="The number in the disparity file that marks unknown pixels (often 0); they are "
            "filled from the farther side, as NaN and infinity always are.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, ...  Default: cuda if there is one.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite results that exist.")] = False,
) -> None:
    """Blur photographs as a lens would.

    From a disparity map (which says how near each pixel is) and the plane in focus.
    """
    with plain_speech():
        focus_point = _check_focus_options(df, focus)
        _check_strength(df, strength)
        lens = {
            "blades": blades, "rotation": rotation, "roundness": roundness, "squeeze": squeeze,
            "obstruction": obstruction, "cat_eye": cat_eye, "spherical": spherical,
            "fringe": fringe, "aperture_picture": aperture_picture,
        }  # fmt: skip
        lens = {name: value for name, value in lens.items() if value is not None}
        if method is None:
            method = _suited_method(photos, model, lens, highlights)
        if model is not None and method is not Method.model:
            raise Mistake(f"--model goes with --method model, not with --method {method.value}.")
        if weights is not None and model is None:
            raise Mistake("--weights goes with --model, the model that they were trained for.")
        aperture = _aperture(method, lens)
        boost = _boost(method, highlights, highlight_threshold, highlight_gain)
        linear = [_is_linear(photo, method, highlights) for photo in photos]
        pairs = _pair(photos, disparity)
        targets = _plan_outputs(photos, linear, output, force)
        failures = _render_all(
            pairs, linear, targets, _renderer(method, model, weights, device, aperture, boost),
            df, focus_point, strength, normalise=normalise, invalid=invalid, force=force,
        )  # fmt: skip
        if failures:
            raise typer.Exit(1)


def _check_focus_options(df: float | None, focus: str | None) -> tuple[float, float] | None:
    if (df is None) == (focus is None):
        came = "Neither --df nor --focus was given" if df is None else "Both --df and --focus came"
        raise Mistake(f"{came}; wanted one of them, to say which plane is in focus.")
    if focus is None:
        return None
    try:
        x, y = (float(part) for part in focus.split(","))
    except ValueError:
        raise Mistake(
            f"--focus is {focus!r}; wanted column and row of a pixel, for instance --focus 512,300."
        ) from None
    return x, y


def _check_strength(df: float | None, strength: float) -> None:
    from ..optics import check_focus_and_strength

    check_focus_and_strength(0.0 if df is None else df, strength, batch_size=1)


def _suited_method(
    photos: list[Path], model: str | None, lens: dict[str, Any], highlights: Highlights | None
) -> Method:
    """The model, unless something is asked for that only the classical renderers can do."""
    from ..images import LINEAR_LIGHT_SUFFIXES

    bright = any(photo.suffix.lower() in LINEAR_LIGHT_SUFFIXES for photo in photos)
    if model is None and (lens or bright or highlights in (Highlights.boost, Highlights.hdr)):
        return Method.layered
    return Method.model


def _aperture(method: Method, lens: dict[str, Any]) -> Aperture | None:
    """The opening that the given options describe; None without any."""
    if not lens:
        return None
    if method is Method.model:
        option = "--" + next(iter(lens)).replace("_", "-")
        raise Mistake(
            f"{option} does not go with --method model, whose lens has a circular opening; wanted "
            f"--method {CLASSICAL_METHODS}."
        )
    from ..rendering import Aperture

    picture = lens.pop("aperture_picture", None)
    return Aperture(**lens) if picture is None else Aperture.from_picture(picture, **lens)


def _boost(
    method: Method, highlights: Highlights | None, threshold: float | None, gain: float | None
) -> HighlightBoost | None:
    """How clipped highlights are boosted; None if they are not."""
    if highlights in (Highlights.boost, Highlights.hdr) and method is Method.model:
        raise Mistake(
            f"--highlights {highlights.value} does not go with --method model, which takes "
            f"photographs cut off at white; wanted --method {CLASSICAL_METHODS}."
        )
    numbers = {"threshold": threshold, "gain": gain}
    given = {name: number for name, number in numbers.items() if number is not None}
    if highlights is not Highlights.boost:
        if given:
            raise Mistake(f"--highlight-{next(iter(given))} goes with --highlights boost.")
        return None
    from ..rendering.highlights import HighlightBoost

    return HighlightBoost(**given)


def _is_linear(photo: Path, method: Method, highlights: Highlights | None) -> bool:
    """Whether a photograph is read, rendered and kept as linear light beyond white."""
    from ..images import LINEAR_LIGHT_SUFFIXES

    holds_highlights = photo.suffix.lower() in LINEAR_LIGHT_SUFFIXES
    if holds_highlights and highlights is Highlights.boost:
        raise Mistake(
            f"{photo.name} holds its highlights, so there is nothing to boost; leave --highlights "
            "out."
        )
    if highlights is None:
        return holds_highlights and method is not Method.model
    return highlights is Highlights.hdr


def _pair(photos: list[Path], disparity: str) -> list[tuple[Path, Path]]:
    """Finds the disparity map of every photograph."""
    for photo in photos:
        if not photo.is_file():
            what = "is a folder" if photo.is_dir() else "does not exist"
            raise Mistake(f"{photo} {what}; wanted a photograph.")
    if "{stem}" in disparity:
        pairs = [(photo, Path(disparity.replace("{stem}", photo.stem))) for photo in photos]
        for photo, file in pairs:
            if not file.is_file():
                raise Mistake(f"{photo.name} has no disparity map: there is no file {file}.")
        return pairs
    source = Path(disparity)
    if source.is_dir():
        return [(photo, _find_disparity(source, photo)) for photo in photos]
    if not source.is_file():
        raise Mistake(f"There is no disparity map {source}; wanted a file, a folder or a pattern.")
    if len(photos) > 1:
        raise Mistake(
            f"There are {len(photos)} photographs but one disparity map, {source.name}; wanted a "
            "folder with a map of the same name for each, or a pattern such as 'maps/{stem}.png'."
        )
    return [(photos[0], source)]


def _find_disparity(folder: Path, photo: Path) -> Path:
    names = [f"{photo.stem}{ending}" for ending in ("", "_disp", "_disparity")]
    found = [
        file
        for file in sorted(folder.iterdir())
        if file.stem in names
        and file.suffix.lower() in DISPARITY_SUFFIXES
        and not file.samefile(photo)
    ]
    if not found:
        raise Mistake(
            f"{folder} has no disparity map for {photo.name}; wanted {', '.join(names)} with one "
            f"of the endings {' '.join(DISPARITY_SUFFIXES)}."
        )
    if len(found) > 1:
        raise Mistake(
            f"{folder} has several disparity maps for {photo.name}: "
            f"{', '.join(file.name for file in found)}; wanted one. Say which with a pattern, for "
            f"instance --disparity '{folder}/{{stem}}{found[0].suffix}'."
        )
    return found[0]


def _plan_outputs(photos: list[Path], linear: list[bool], output: Path, force: bool) -> list[Path]:
    """Decides every output file, and refuses before anything is rendered."""
    from ..images import (
        FLOAT_SUFFIXES,
        LINEAR_LIGHT_SUFFIXES,
        PICTURE_FORMATS,
        WRITABLE_SUFFIXES,
        open_image_io,
    )

    suffix = output.suffix.lower()
    into_folder = output.is_dir() or suffix == "" or len(photos) > 1
    if len(photos) > 1 and suffix in WRITABLE_SUFFIXES and not output.is_dir():
        raise Mistake(
            f"-o {output} is one file for {len(photos)} photographs; wanted a folder, for instance "
            f"-o {output.with_suffix('')}."
        )
    if not into_folder and suffix not in WRITABLE_SUFFIXES:
        raise Mistake(
            f"-o {output} ends in {suffix}; wanted a folder, or a file ending in one of "
            f"{' '.join(WRITABLE_SUFFIXES)}."
        )
    if into_folder and output.is_file():
        raise Mistake(f"-o {output} is a file; wanted a folder for the results.")
    if not into_folder and not output.parent.is_dir():
        raise Mistake(f"-o {output}: there is no folder {output.parent}; create it first.")
    targets = [output]
    if into_folder:
        targets = []
        for photo, is_linear in zip(photos, linear, strict=True):
            kept = photo.suffix.lower() in (FLOAT_SUFFIXES if is_linear else PICTURE_FORMATS)
            targets.append(output / (photo.name if kept else f"{photo.stem}.png"))
    seen: dict[Path, Path] = {}
    for photo, target in zip(photos, targets, strict=True):
        if target in seen:
            raise Mistake(
                f"{seen[target]} and {photo} would both be written to {target}; wanted different "
                "names. Render them in two calls with two folders."
            )
        seen[target] = photo
        if target.exists() and any(target.samefile(other) for other in photos):
            raise Mistake(f"{target} is the photograph itself; wanted another file or folder.")
    existing = [target for target in targets if target.exists()]
    if existing and not force:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise Mistake(
            f"{existing[0]}{more} exists already; nothing was rendered. Choose another -o, or add "
            "--force to overwrite."
        )
    for target, is_linear in zip(targets, linear, strict=True):
        holds_floats = is_linear and target.suffix.lower() in (".tif", ".tiff")
        if holds_floats or target.suffix.lower() in LINEAR_LIGHT_SUFFIXES:
            open_image_io(target.name)
    return targets


Renderer = Callable[["torch.Tensor", "torch.Tensor", float, float, bool], "torch.Tensor"]
"""render(image, disparity, df, K, linear): `linear` says whether image and result are linear light
(1, 3, H, W), else they are display-encoded in [0, 1]."""


def _renderer(
    method: Method,
    model: str | None,
    weights: str | None,
    device: str | None,
    aperture: Aperture | None,
    boost: HighlightBoost | None,
) -> Renderer:
    """Gives the function that renders one photograph, with the model loaded."""
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise Mistake(f"--device {device} cannot be used ({reason}); try --device cpu.") from None
    if method is not Method.model:
        from ..rendering import render_bokeh

        def classical(
            image: torch.Tensor, disparity: torch.Tensor, df: float, K: float, linear: bool
        ) -> torch.Tensor:
            return render_bokeh(
                image.to(device), disparity.to(device), df, K,
                aperture=aperture, method=method.value, highlights="hdr" if linear else boost,
            )  # fmt: skip

        return classical

    folder = TINY if model is None else os.path.expanduser(model)
    if os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, "model_index.json")):
        raise Mistake(
            f"{folder} is no model: it has no model_index.json; wanted a folder written by "
            "save_pretrained, or a hub id."
        )
    if model is None and not os.path.isdir(folder):
        raise Mistake(
            f"The model inside the package is missing ({folder}); reinstall bokehdiff, or use "
            "--model."
        )
    from diffusers.utils import logging

    from ..pipelines import BokehDiffPipeline

    if os.path.isdir(folder):  # a download has something to show, a folder loads at once
        logging.disable_progress_bar()
    pipe = BokehDiffPipeline.from_pretrained(folder)
    if weights is not None:
        pipe.load_bokeh_weights(weights)
    pipe.to(device)

    def diffuse(
        image: torch.Tensor, disparity: torch.Tensor, df: float, K: float, linear: bool
    ) -> torch.Tensor:
        scene = pipe.prepare(image, disparity)
        rendered: torch.Tensor = pipe.render(scene, df, K, output_type="pt")[0]
        return rendered

    return diffuse


def _render_all(
    pairs: list[tuple[Path, Path]],
    linear: list[bool],
    targets: list[Path],
    renderer: Renderer,
    df: float | None,
    focus_point: tuple[float, float] | None,
    strength: float,
    *,
    normalise: bool,
    invalid: float | None,
    force: bool,
) -> int:
    """Renders one by one, past any that fail; returns how many failed."""
    import torch
    from tqdm import tqdm

    from ..focus import focus_disparity_at
    from ..images import read_image, read_linear_image

    failures = 0
    bar = tqdm(total=len(pairs), unit="photo", file=sys.stderr)
    with bar, torch.inference_mode():
        for (photo, disparity_file), is_linear, target in zip(pairs, linear, targets, strict=True):
            bar.set_description(photo.name)
            try:
                image = read_linear_image(photo) if is_linear else read_image(photo)
                disparity = _read_matching_disparity(disparity_file, image, normalise, invalid)
                plane = df
                if focus_point is not None:
                    plane = focus_disparity_at(disparity, *focus_point)
                assert plane is not None
                result = renderer(image, disparity, plane, strength, is_linear)
                target.parent.mkdir(parents=True, exist_ok=True)
                _write(target, result, is_linear, force)
            except (ValueError, OSError) as mistake:
                failures += 1
                with bar.external_write_mode(file=sys.stderr):
                    say_error(f"{photo}: {mistake}")
            else:
                with bar.external_write_mode(file=sys.stderr):
                    typer.echo(f"{target} (df {plane:.4g}, K {strength:g})")
            bar.update()
    return failures


def _write(target: Path, result: torch.Tensor, linear: bool, force: bool) -> None:
    """Writes a result; linear light is kept where the file can hold it, else cut off at white."""
    from ..images import FLOAT_SUFFIXES, linear_to_srgb, write_image, write_linear_image

    if linear and target.suffix.lower() in FLOAT_SUFFIXES:
        write_linear_image(target, result.clamp(min=0), overwrite=force)
    else:
        shown = linear_to_srgb(result) if linear else result
        write_image(target, shown.clamp(0, 1), overwrite=force)


def _read_matching_disparity(
    file: Path, image: torch.Tensor, normalise: bool, invalid: float | None
) -> torch.Tensor:
    """Reads a disparity map and checks it against its photograph: (1, 1, H, W) in [0, 1]."""
    from ..images import as_disparity_batch, read_disparity
    from ..optics import normalise_disparity

    disparity = read_disparity(file, invalid=invalid)
    if normalise:
        disparity = normalise_disparity(disparity)[0]
    disparity = as_disparity_batch(disparity, 1, *image.shape[-2:])
    low, high = float(disparity.min()), float(disparity.max())
    if not normalise and 0 < high - low < 0.1:
        note(
            f"{file.name} spans only {low:.3g} to {high:.3g} of [0, 1], so there will be little "
            "blur. If it is in another unit, add --normalise."
        )
    return disparity
