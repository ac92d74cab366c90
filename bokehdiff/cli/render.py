"""`bokehdiff render`: photographs blurred as a lens would."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .disparities import check_unit, depth_estimator, disparity_of, find_disparities
from .options import LensOptions, parse_focus, parse_range, parse_tiling
from .renderers import (
    CLASSICAL_METHODS,
    NETWORKS,
    Method,
    Prepare,
    load_renderer,
    usable_device,
)
from .results import one_by_one, overlay_file, plan_outputs
from .speech import Mistake, plain_speech

if TYPE_CHECKING:
    from ..depth import DepthEstimator
    from ..lens import LensSetting
    from ..rendering import Aperture
    from ..rendering.highlights import HighlightBoost

RENDER_EXAMPLES = """\b
Examples:
  bokehdiff render photo.jpg --focus auto -o blurred.jpg
  bokehdiff render photo.jpg --disparity photo.npy --df 0.7 --K 20 -o blurred.jpg
  bokehdiff render photo.jpg --focus 512,300 --f-number 1.4 --focal-length 85 -o blurred.jpg
  bokehdiff render photo.jpg --focus-mask face.png --whole-subject -o blurred.jpg
  bokehdiff render photo.jpg --disparity depth.pfm --normalise --focus 512,300 -o blurred.png
  bokehdiff render shots/*.jpg --disparity maps/ --focus 960,540 -o blurred/
  bokehdiff render shots/*.jpg --disparity 'maps/{stem}_16bit.png' --df 0.5 -o blurred/
  bokehdiff render photo.jpg --disparity photo.npy --df 0.7 --blades 7 --cat-eye 0.4 -o out.jpg
  bokehdiff render night.jpg --disparity n.npy --df 0.7 --highlights boost -o out.png
  bokehdiff render night.exr --disparity n.npy --df 0.7 -o out.exr
"""


class Highlights(str, enum.Enum):
    """What is done about highlights that are brighter than white."""

    none = "none"
    boost = "boost"
    hdr = "hdr"


def render(
    photos: options.Photos,
    output: options.PictureOrFolder,
    disparity: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The disparity map (larger is nearer): PNG, TIFF, npy, npz or PFM, as large as "
            "the photograph. For several photographs a folder with maps of the same names (or "
            "NAME_disp, NAME_disparity), or a pattern with {stem} in it. Default: estimated by "
            "--depth-model.",
            show_default=False,
        ),
    ] = None,
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
            metavar="WHERE",
            help="Focus on this pixel instead, X,Y: column and row from the top left; on the "
            "middle of a box, X0,Y0,X1,Y1; on the nearest large thing near the centre, auto; or "
            "where a photograph that is shallow already is sharp, sharpest.",
            show_default=False,
        ),
    ] = None,
    focus_mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Focus on what this picture, as large as the photograph, marks in white.",
            show_default=False,
        ),
    ] = None,
    focus_range: Annotated[
        str | None,
        typer.Option(
            metavar="FROM,TO",
            help="Keep everything between two disparities sharp instead.",
            show_default=False,
        ),
    ] = None,
    whole_subject: Annotated[
        bool,
        typer.Option(
            "--whole-subject", help="Keep all of the box or mask sharp, not one plane of it."
        ),
    ] = False,
    strength: options.Strength = None,
    f_number: options.FNumber = None,
    focal_length: options.FocalLength = None,
    focal_length_35mm: options.FocalLength35mm = None,
    sensor_width: options.SensorWidth = None,
    focus_distance: options.FocusDistance = None,
    farthest_distance: options.FarthestDistance = None,
    method: Annotated[
        Method | None,
        typer.Option(
            help="model, the diffusion model; flow, a small fast network around physics; or a "
            "classical renderer: layered, the most faithful; "
            "scatter, without a guess of what is hidden; pyramid, a fast preview. Default: model, "
            "or layered if options of the lens or highlights or an .exr or .hdr photo ask for it.",
            show_default=False,
        ),
    ] = None,
    model: options.Model = None,
    weights: options.Weights = None,
    tiling: options.Tiles = "auto",
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
    coc: Annotated[
        bool,
        typer.Option(
            "--coc",
            help="Also write the photograph with its circles of confusion painted over it (green "
            "in focus, blue in front, red behind), as OUT_coc.png.",
        ),
    ] = False,
    metric: options.Metric = False,
    normalise: options.Normalise = False,
    invalid: options.Invalid = None,
    depth_model: options.DepthModel = None,
    device: options.Device = None,
    force: options.Force = False,
) -> None:
    """Blur photographs as a lens would.

    From the plane in focus and a disparity map, which says how near each pixel is; without one, a
    depth model estimates it.
    """
    with plain_speech():
        if focus is not None and focus_mask is not None:
            raise Mistake("--focus and --focus-mask both came; wanted one of them.")
        where = None if focus is None else parse_focus(focus)
        check_unit(metric, normalise)
        settings = LensOptions(
            df=df,
            focus=where if focus_mask is None else focus_mask,
            focus_range=None if focus_range is None else parse_range(focus_range),
            whole_subject=whole_subject,
            strength=strength,
            f_number=f_number,
            focal_length_mm=focal_length,
            focal_length_35mm=focal_length_35mm,
            sensor_width_mm=sensor_width,
            focus_distance_m=focus_distance,
            farthest_distance_m=farthest_distance,
            metric=metric,
        )
        settings.check()
        lens = {
            "blades": blades, "rotation": rotation, "roundness": roundness, "squeeze": squeeze,
            "obstruction": obstruction, "cat_eye": cat_eye, "spherical": spherical,
            "fringe": fringe, "aperture_picture": aperture_picture,
        }  # fmt: skip
        lens = {name: value for name, value in lens.items() if value is not None}
        if method is None:
            method = _suited_method(photos, model, lens, highlights)
        aperture = _aperture(method, lens)
        boost = _boost(method, highlights, highlight_threshold, highlight_gain)
        linear = [_is_linear(photo, method, highlights) for photo in photos]
        maps = find_disparities(photos, disparity)
        targets = plan_outputs(photos, linear, output, force, coc)
        device = usable_device(device)
        prepare = load_renderer(
            method, device, model=model, weights=weights, tiling=parse_tiling(tiling),
            aperture=aperture, boost=boost,
        )  # fmt: skip
        estimator = depth_estimator(depth_model, device) if None in maps else None
        failures = _render_all(
            photos, maps, linear, targets, prepare, estimator, settings,
            normalise=normalise, invalid=invalid, coc=coc, force=force,
        )  # fmt: skip
        if failures:
            raise typer.Exit(1)


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
        return holds_highlights and method not in NETWORKS
    return highlights is Highlights.hdr


def _render_all(
    photos: list[Path],
    maps: list[Path | None],
    linear: list[bool],
    targets: list[Path],
    prepare: Prepare,
    estimator: DepthEstimator | None,
    settings: LensOptions,
    *,
    normalise: bool,
    invalid: float | None,
    coc: bool,
    force: bool,
) -> int:
    """Renders one by one, past any that fail; returns how many failed."""
    import torch

    from ..images import linear_to_srgb, write_image
    from ..overlay import coc_overlay
    from ..photographs import read_photograph, write_photograph

    def render_one(number: int) -> str:
        photo, is_linear, target = photos[number], linear[number], targets[number]
        read = read_photograph(photo, linear=is_linear or None)
        image = read.image if is_linear else read.display_encoded(photo.name)
        shown = linear_to_srgb(image).clamp(max=1) if is_linear else image
        disparity, metric = disparity_of(
            maps[number], shown, estimator,
            metric=settings.metric, normalise=normalise, invalid=invalid,
        )  # fmt: skip
        lens = settings.choose(photo, shown, disparity, metric)
        result = prepare(image, disparity, metric, is_linear)(lens)
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_linear:
            result = result.clamp(min=0)
        write_photograph(target, result, read, linear=is_linear, overwrite=force)
        if coc:
            overlay = coc_overlay(shown, lens.signed_defocus(disparity))
            write_image(overlay_file(target), overlay, overwrite=force)
        return f"{target} ({described(lens)})"

    with torch.inference_mode():
        return one_by_one(photos, render_one)


def described(lens: LensSetting) -> str:
    """Focus and blur of one picture in a few words."""
    plane, nearer = float(lens.df), float(lens.df_nearer)
    focus = f"df {plane:.4g}" if plane == nearer else f"df {plane:.4g} to {nearer:.4g}"
    return f"{focus}, K {float(lens.K):.4g}"
