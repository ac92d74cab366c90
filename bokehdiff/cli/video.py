"""`bokehdiff video`: a film with lens blur."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from . import options
from .film_maps import FilmMaps
from .film_options import FilmOptions
from .renderers import usable_device
from .speech import Mistake, note, plain_speech

if TYPE_CHECKING:
    import torch

    from ..depth import DepthEstimator
    from ..film_blur import FilmBlur
    from ..focus_keyframes import FocusKeyframe
    from ..pipelines.bokehflow_video import BokehFlowVideoPipeline
    from ..unfinished_films import UnfinishedFilm
    from ..video_files import FilmFrame, VideoReader

VIDEO_EXAMPLES = """\b
Examples:
  bokehdiff video film.mp4 -o blurred.mp4 --f-number 1.4
  bokehdiff video film.mp4 -o blurred.mp4 --focus 640,300 --f-number 2 --focal-length 85
  bokehdiff video film.mp4 -o blurred.mp4 --focus keyframes.json --K 30 --resume
  bokehdiff video film.mp4 -o blurred.mp4 --depth-model depth-anything/Depth-Anything-V2-Small-hf
A file of keyframes is a list such as
  [{"time": 0, "focus": [640, 300]}, {"time": 2.5, "focus": "auto", "f_number": 2.8}]
"""

FRAMES_PER_STRETCH = 60


def video(
    film: Annotated[
        Path, typer.Argument(metavar="FILM", help="A film, all in focus.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="The film to write: .mp4, .mov or .mkv. Its sound, colours and times are those of "
            "FILM.",
            show_default=False,
        ),
    ],
    focus: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE",
            help="What is in focus: a pixel X,Y of the first frame, whose thing is followed; auto, "
            "the nearest large thing near the centre; or a JSON file of keyframes. Default: auto.",
            show_default=False,
        ),
    ] = None,
    df: Annotated[
        float | None,
        typer.Option(
            "--df",
            help="Disparity of the plane in focus throughout, instead of --focus.",
            show_default=False,
        ),
    ] = None,
    disparity: Annotated[
        Path | None,
        typer.Option(
            metavar="MAPS",
            help="Disparity maps (larger is nearer) as large as the frames: a folder with one for "
            "each frame, in the order of their names, or a film in gray. Default: the network's "
            "own, in 1/metres.",
            show_default=False,
        ),
    ] = None,
    depth_model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Model that estimates the disparity of each frame instead, steadied: folder or "
            "hub id, for instance depth-anything/Depth-Anything-V2-Small-hf.",
            show_default=False,
        ),
    ] = None,
    strength: options.Strength = None,
    f_number: Annotated[
        float | None,
        typer.Option(
            help="f-number of the lens, for instance 1.4. This and the following options of the "
            "camera take the place of --K.",
            show_default=False,
        ),
    ] = None,
    focal_length: Annotated[
        float | None,
        typer.Option(
            metavar="MM", help="Real focal length in mm. Default: 50.", show_default=False
        ),
    ] = None,
    focal_length_35mm: options.FocalLength35mm = None,
    sensor_width: options.SensorWidth = None,
    focus_distance: Annotated[
        float | None,
        typer.Option(
            metavar="M",
            help="Distance of what is in focus, in metres. It ties maps without a unit to the "
            "world; in place of --focus it says what is in focus of a film in metres.",
            show_default=False,
        ),
    ] = None,
    farthest_distance: options.FarthestDistance = None,
    metric: options.Metric = False,
    model: options.Model = None,
    device: options.Device = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with a run that was ended, from what it left in OUT.part; the film is the "
            "same as if it had not been.",
        ),
    ] = False,
    force: options.Force = False,
) -> None:
    """Blur a film as a lens would.

    Without --disparity or --depth-model a small network sees how far away everything is. An ended
    run leaves what it has done in OUT.part; --resume goes on with it.
    """
    with plain_speech():
        import torch

        from ..film_blur import FilmBlur
        from ..film_focus import FilmFocus
        from ..unfinished_films import UnfinishedFilm
        from ..video_files import check_sound_fits, check_video_file, join_stretches, open_video

        if disparity is not None and depth_model is not None:
            raise Mistake("--disparity and --depth-model both came; wanted one of them.")
        asked = FilmOptions(
            focus=focus,
            df=df,
            strength=strength,
            f_number=f_number,
            focal_length_mm=focal_length,
            focal_length_35mm=focal_length_35mm,
            sensor_width_mm=sensor_width,
            focus_distance_m=focus_distance,
            farthest_distance_m=farthest_distance,
        )
        asked.check(metric or disparity is None)
        source = open_video(film)
        if output.exists() and output.samefile(film):
            raise Mistake(f"{output} is the film itself; wanted another file.")
        check_video_file(output, overwrite=force)
        check_sound_fits(source, output)
        _check_unfinished(UnfinishedFilm.folder_of(output), resume, force)
        maps = None if disparity is None else FilmMaps(disparity, source, metric)
        device = usable_device(device)
        pipe = _load(model).to(device)
        estimator = None if depth_model is None else _estimator(depth_model, device)
        if maps is None:
            metric = _unit_of_estimates(estimator, metric)
        keyframes = asked.keyframes(metric)
        if maps is None and estimator is None:
            _check_seen(keyframes, pipe)
        lens, strengths = asked.lens(keyframes, source.format, metric)
        settings = {
            "film": _identity(source.path),
            "focus": [repr(one) for one in keyframes],
            "lens": repr(lens),
            "strength": strengths,
            "disparity": None if disparity is None else _identity(disparity),
            "unit of disparity": "1/metres" if metric else "none",
            "depth model": None if estimator is None else _weights(estimator.network),
            "network": _weights(pipe.model),
            "device": device,
            "version of bokehdiff": __version__,
        }
        with torch.inference_mode():
            frames, times = _moments(keyframes, source)
            planes = _planes(keyframes, frames, source, maps, pipe, estimator)
            in_focus = FilmFocus(keyframes, frames, times, planes, strengths)
            run = FilmBlur(pipe, in_focus, lens, metric, estimator, device)
            begin = UnfinishedFilm.resume if resume else UnfinishedFilm.begin
            unfinished = begin(output, settings)
            try:
                _blur_all(run, unfinished, source, maps, output.name)
            finally:
                if not unfinished.frames_done:
                    unfinished.remove()
        join_stretches(output, unfinished.stretches, source, overwrite=force)
        unfinished.remove()
        typer.echo(f"{output} ({unfinished.frames_done} frames)")


# --- Checks ---------------------------------------------------------------------------------------


def _check_unfinished(folder: Path, resume: bool, force: bool) -> None:
    if folder.exists() and not resume and not force:
        raise Mistake(
            f"{folder} holds an unfinished film; add --resume to go on with it, or --force to "
            "begin anew."
        )


def _unit_of_estimates(estimator: DepthEstimator | None, metric: bool) -> bool:
    """Whether disparity that is estimated is in 1/metres: the network's own is."""
    if estimator is None or estimator.metric:
        return True
    if metric:
        raise Mistake(
            "--metric goes with maps in 1/metres or a metric --depth-model, for instance "
            "depth-anything/Depth-Anything-V2-Metric-Outdoor-Small-hf; this one estimates "
            "disparity without a unit."
        )
    return False


def _check_seen(keyframes: list[FocusKeyframe], pipe: BokehFlowVideoPipeline) -> None:
    """Refuses to look for a focus in a depth that is known after the blur only."""
    if pipe.model.config.fusion == "both" and any(one.is_seen for one in keyframes):
        raise Mistake(
            "This network finds depth together with the blur, so it cannot look for what is in "
            "focus; wanted --focus-distance or --df, --disparity, --depth-model, or a network with "
            "fusion='depth_to_bokeh'."
        )


# --- What is used ---------------------------------------------------------------------------------


def _load(model: str | None) -> BokehFlowVideoPipeline:
    from ..pipelines.bokehflow_video import BokehFlowVideoPipeline

    if model is None:
        from .. import FLOW_NANO

        model = FLOW_NANO
    return BokehFlowVideoPipeline.from_pretrained(model)


def _estimator(name: str, device: str) -> DepthEstimator:
    """The depth model; its answers are not kept, of which a film has too many."""
    from transformers.utils import logging

    from ..depth import DepthEstimator

    if Path(name).is_dir():  # a download has something to show
        logging.disable_progress_bar()
    return DepthEstimator.from_pretrained(name, device=device, cache_folder=None)


def _identity(path: Path) -> str:
    """A name that changes when the file, or what is in the folder, does."""
    from ..depth_cache import digest

    files = sorted(path.iterdir()) if path.is_dir() else [path]
    states = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return f"{path.resolve()} ({digest(*states)[:12]})"


def _weights(network: Any) -> str:
    """A hash of a network, its settings and its weights."""
    from ..depth_cache import digest

    settings = network.config
    settings = dict(settings) if isinstance(settings, Mapping) else settings.to_dict()
    # Where it lies, and which version wrote it, change nothing.
    said = sorted(f"{name} {value}" for name, value in settings.items() if name[0] != "_")
    parts = [part for item in sorted(network.state_dict().items()) for part in item]
    return digest(*said, *parts)[:12]


# --- The focus, before the first frame ------------------------------------------------------------


def _moments(keyframes: list[FocusKeyframe], source: VideoReader) -> tuple[list[int], list[float]]:
    """Number and time of the frame of each keyframe."""
    from ..focus_keyframes import keyframes_at

    if len(keyframes) == 1 and 0 in (keyframes[0].frame, keyframes[0].time):
        return [0], [0.0]
    times = list(source.times())
    numbers = keyframes_at(keyframes, times)
    return numbers, [times[number] for number in numbers]


def _planes(
    keyframes: list[FocusKeyframe],
    frames: list[int],
    source: VideoReader,
    maps: FilmMaps | None,
    pipe: BokehFlowVideoPipeline,
    estimator: DepthEstimator | None,
) -> list[float]:
    """Disparity at each keyframe, where it has to be seen by a look at that frame alone; nan at the
    first frame, which will be seen in time."""
    from ..film_blur import as_photo
    from ..focus import find_focus

    planes = []
    for one in keyframes:
        known = one.df if one.distance_m is None else 1 / one.distance_m
        planes.append(math.nan if known is None else known)
    wanted = {
        frame: place
        for place, (frame, one) in enumerate(zip(frames, keyframes, strict=True))
        if one.is_seen and frame > 0
    }
    if not wanted:
        return planes
    all_frames = source.frames()
    for number, (frame, given) in enumerate(zip(all_frames, _maps_of(maps), strict=False)):
        if number in wanted:
            place = wanted.pop(number)
            photo = as_photo(frame.picture, pipe.device)
            if given is None and estimator is not None:
                given = estimator(photo).disparity
            elif given is None:
                given = pipe.start().observe(photo).inverse_depth
                assert given is not None  # else it was refused
            point = keyframes[place].point
            planes[place] = float(find_focus(given, "auto" if point is None else point)[0])
        if not wanted:
            break
    return planes


def _maps_of(maps: FilmMaps | None, first: int = 0) -> Iterator[torch.Tensor | None]:
    """The given map of each frame; None where none are given."""
    return itertools.repeat(None) if maps is None else maps.read(first)


# --- The work -------------------------------------------------------------------------------------


def _blur_all(
    run: FilmBlur,
    unfinished: UnfinishedFilm,
    source: VideoReader,
    maps: FilmMaps | None,
    name: str,
) -> None:
    """Makes the stretches that are not finished."""
    from tqdm import tqdm

    if unfinished.frames_done:
        run.load_state_dict(unfinished.state)
    begun_at = unfinished.frames_done
    given = _maps_of(maps, begun_at)
    with tqdm(
        total=source.frame_count, initial=begun_at, unit="frame", file=sys.stderr, desc=name
    ) as bar:

        def blurred() -> Iterator[FilmFrame]:
            for number, frame in enumerate(source.frames(begun_at), begun_at):
                time = float((frame.time_stamp - source.start) * source.format.time_base)
                picture = run(number, time, frame.picture, next(given))
                yield frame._replace(picture=picture)
                bar.update()

        coming = blurred()
        while count := unfinished.add_stretch(
            itertools.islice(coming, FRAMES_PER_STRETCH), source.format
        ):
            unfinished.keep(count, run.state_dict())
    promised = source.frame_count
    if promised is not None and unfinished.frames_done < 0.95 * promised:
        note(
            f"{source.path.name} ended after {unfinished.frames_done} frames, though it says it "
            f"has {promised}; it may have been cut off."
        )
