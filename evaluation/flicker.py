"""Does a film flicker less when BokehFlow carries what it saw, and does anything lag behind?

Every film goes through the same network twice: with the state of one frame handed to the next, and
frame by frame, each as if it were the first. What is told is the one over the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bokehdiff.losses import warping_loss
from bokehdiff.models.bokehflow import REFERENCE_WIDTH, BokehFlowModel
from bokehdiff.optics import signed_defocus, strength_from_camera
from data_synthesis.clip_scenes import MOTIONS, ClipScenes
from evaluation.common_arguments import add_device, add_out
from evaluation.flow_networks import add_networks, described, networks_asked_for
from evaluation.pipeline_speed import in_words, markdown
from evaluation.pisa_speed import numbers
from evaluation.report import hardware, hardware_sentence, write_json

__all__ = [
    "Film",
    "add_arguments",
    "frame_difference",
    "ghosting",
    "largest_change",
    "run",
    "seed_spread",
    "static_flicker",
    "warping_errors",
]

QUANTITIES = {
    "inverse_depth": "inverse depth, 1/m",
    "coc": "signed radius, px",
    "bokeh": "blurred picture",
}
"""What flickers, by the names of BokehFlow's output."""

BLURRED_PX = 4.0
"""Radius above which the picture is looked at; in focus it has to keep the noise of the film."""
SQUARE_RADIUS_PX = 8.0
"""Of the circles of confusion of the moving square, and of what is behind it."""
SMALLEST_BLURRED_SHARE = 0.1
"""Of the pixels: clips with less blur than that say nothing of it."""

Film = Callable[[Tensor, int, Any], tuple[dict[str, Tensor], Any]]
"""``film(frame (B, 3, H, W), number of the frame, state)`` gives what it makes of it, (B, C, H, W)
by names of `QUANTITIES`, and the state for the next frame. The state of a first frame is None."""

EXAMPLES = """examples:
  python -m evaluation flicker --model flow --out flicker.json
  python -m evaluation flicker --model FOLDER --depth own --noise 0.02,0.03,0.05 --size 256
  python -m evaluation flicker --variant nano --mixer bigdr --option temporal=final
"""

PROTOCOL = (
    "Still films: {static_clips} procedural scenes of {size} x {size} px, {frames} frames, the "
    "first {dropped} dropped; Gaussian noise in display-encoded sRGB, new in every frame, {seeds} "
    "times. Difference: mean |q_t - q_(t-1)|. Spread: standard deviation over the {seeds} noises "
    "at the last frame, mean over pixels. Blurred picture: where the radius is above "
    f"{BLURRED_PX:g} px; what is in focus has to keep its noise. Ratios: carried over frame by "
    "frame, both summed over the scenes; 1 says that carrying does nothing. Change without noise: "
    "the largest of any pixel in {frames} frames. Moving films: {moving_clips} procedural clips of "
    "{moving_frames} frames, where the true radius is above that. Warping error: mean "
    "|y_t - warp(y_(t-1))| by the true motion where the point was seen before, less that of the "
    "true film. Error: mean |y_t - truth|. Square: one "
    "that moves without noise; mean |carried - frame by frame| where it is or was, beside what a "
    "constant exponential mean of the finished frames, of the same strength, would do."
)


# -- the metric ------------------------------------------------------------------------------------


def frame_difference(now: Tensor, before: Tensor, where: Tensor | None = None) -> float:
    """Mean of ``|q_t - q_(t-1)|`` of films (S, C, H, W), over `where` (1, 1, H, W) if given."""
    return _mean((now - before).abs(), where)


def seed_spread(films: Tensor, where: Tensor | None = None) -> float:
    """Standard deviation over S films (S, C, H, W) of one frame, mean over `where` (1, 1, H, W).

    A standard deviation over time would be too small for frames that resemble the last one.
    """
    return _mean(films.std(0, keepdim=True), where)


def _mean(values: Tensor, where: Tensor | None) -> float:
    values = values.double()
    if where is not None:
        values = values.masked_select(where.expand_as(values))
    return float(values.mean())


@torch.inference_mode()
def static_flicker(
    film: Film,
    still: Tensor,
    *,
    noise: float,
    seeds: int = 8,
    frames: int = 16,
    dropped: int = 6,
    seed: int = 0,
    where: dict[str, Tensor] | None = None,
) -> dict[str, dict[str, float]]:
    """How much noise on a picture that stands still flickers, by quantity.

    Args:
        film: what is measured.
        still: (1, 3, H, W) the picture without noise.
        noise: standard deviation in display-encoded sRGB; noisy frames are cut off at 0 and 1.
        seeds: independent films, which go through together.
        frames, dropped: of each film, and of these the first ones that do not count.
        seed: of the noise.
        where: (1, 1, H, W) bool by quantity; others count everywhere.

    Returns:
        By quantity ``difference`` and ``spread``, carried, and ``difference_alone`` and
        ``spread_alone``, frame by frame.

    Raises:
        ValueError: no two frames count, or there are no two films.
    """
    if frames - dropped < 2 or seeds < 2:
        raise ValueError(
            f"There are {seeds} films of {frames} frames, {dropped} of them dropped; wanted at "
            "least 2 films and 2 frames that count."
        )
    generator = torch.Generator(still.device).manual_seed(seed)
    where, state = where or {}, None
    last: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
    differences: dict[str, list[tuple[float, float]]] = {}
    for number in range(frames):
        shape = (seeds, *still.shape[1:])
        noisy = torch.randn(shape, generator=generator, device=still.device, dtype=still.dtype)
        frame = (still + noise * noisy).clamp(0, 1)
        carried, state = film(frame, number, state)
        if number < dropped:
            continue
        alone, _ = film(frame, number, None)
        for name in carried if last is not None else ():
            differences.setdefault(name, []).append(
                (
                    frame_difference(carried[name], last[0][name], where.get(name)),
                    frame_difference(alone[name], last[1][name], where.get(name)),
                )
            )
        last = carried, alone
    assert last is not None
    found = {}
    for name, pairs in differences.items():
        of_carried, of_alone = (sum(values) / len(values) for values in zip(*pairs, strict=True))
        found[name] = {
            "difference": of_carried,
            "difference_alone": of_alone,
            "spread": seed_spread(last[0][name], where.get(name)),
            "spread_alone": seed_spread(last[1][name], where.get(name)),
        }
    return found


@torch.inference_mode()
def largest_change(film: Film, still: Tensor, frames: int) -> dict[str, float]:
    """By quantity, how far any pixel of a still film without noise gets from its first frame."""
    first, state = film(still, 0, None)
    largest = dict.fromkeys(first, 0.0)
    for number in range(1, frames):
        now, state = film(still, number, state)
        for name in largest:
            change = float((now[name] - first[name]).abs().max())
            largest[name] = max(largest[name], change)
    return largest


@torch.inference_mode()
def warping_errors(
    film: Film,
    frames: Tensor,
    truth: Tensor,
    motion: Tensor,
    visible: Tensor,
    where: Tensor | None = None,
) -> dict[str, float]:
    """How much the blurred picture of a moving film changes beyond what moves, and how right it is.

    Args:
        film: what is measured; only ``bokeh`` is looked at.
        frames, truth: (T, 3, H, W) what it sees, and what a lens would take.
        motion, visible: (T, 2, H, W) and (T, 1, H, W) of :class:`ClipScenes`.
        where: (T, 1, H, W) bool, what counts; None: everything.

    Returns:
        ``warping`` and ``error`` of the carried film, ``warping_alone`` and ``error_alone`` frame
        by frame, and ``warping_truth``; means over all frames but the first.
    """
    where = torch.ones_like(visible, dtype=torch.bool) if where is None else where
    sums = dict.fromkeys(("warping", "warping_alone", "warping_truth", "error", "error_alone"), 0.0)
    state, last = None, None
    for number in range(len(frames)):
        one = slice(number, number + 1)
        made, state = film(frames[one], number, state)
        alone = made if last is None else film(frames[one], number, None)[0]
        pictures = {"": made["bokeh"], "_alone": alone["bokeh"], "_truth": truth[one]}
        if last is not None and bool(where[one].any()):
            moved = motion[one], visible[one] * where[one]
            for name, picture in pictures.items():
                sums[f"warping{name}"] += float(warping_loss(picture, last[name], *moved))
            for name in ("", "_alone"):
                sums[f"error{name}"] += frame_difference(pictures[name], truth[one], where[one])
        last = pictures
    return {name: total / (len(frames) - 1) for name, total in sums.items()}


@torch.inference_mode()
def ghosting(
    film: Film, frames: Tensor, swept: Tensor, constant_carry: float
) -> dict[str, dict[str, float]]:
    """By quantity, how far carrying is from each frame for itself where something moves.

    Args:
        film: what is measured.
        frames: (T, 3, H, W) without noise.
        swept: (T, 1, H, W) bool, where something moves or did in an earlier frame.
        constant_carry: of the exponential mean that it is compared with, in [0, 1).

    Returns:
        ``carried`` and ``constant``, mean absolute distances from the frame for itself: of what was
        carried, and of the mean ``m_t = carry m_(t-1) + (1 - carry) y_t`` of frames for themselves.
    """
    sums: dict[str, list[float]] = {}
    state, means = None, {}
    for number in range(len(frames)):
        frame, where = frames[number : number + 1], swept[number : number + 1]
        made, state = film(frame, number, state)
        if number == 0:
            means = made
            continue
        alone, _ = film(frame, number, None)
        for name, picture in alone.items():
            means[name] = torch.lerp(picture, means[name], constant_carry)
            found = sums.setdefault(name, [0.0, 0.0])
            found[0] += frame_difference(made[name], picture, where)
            found[1] += frame_difference(means[name], picture, where)
    return {
        name: {"carried": carried / (len(frames) - 1), "constant": constant / (len(frames) - 1)}
        for name, (carried, constant) in sums.items()
    }


# -- films -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lens:
    """df in 1/m, K in pixels of radius per 1/m, and the width of the uncropped photo in pixels."""

    df: float
    K: float
    photo_width_px: float

    @classmethod
    def of_clip(cls, clip: dict[str, Tensor]) -> Lens:
        """That of a clip of :class:`ClipScenes`."""
        camera = {
            name: float(clip[name])
            for name in ("f_number", "focal_length_mm", "focus_distance_m", "sensor_width_mm")
        }
        width = float(clip["photo_width_px"])
        K = strength_from_camera(**camera, image_width_px=width)
        return cls(1 / camera["focus_distance_m"], K, width)


def film_through(network: BokehFlowModel, lens: Lens, given: Tensor | None) -> Film:
    """The network with a lens.

    Args:
        network: on any device.
        lens: of all frames.
        given: (T, 1, H, W) inverse depth of each frame, or of a single one for all; None: the
            network's own.
    """

    def film(frame: Tensor, number: int, state: Any) -> tuple[dict[str, Tensor], Any]:
        disparity = None
        if given is not None:
            disparity = given[min(number, len(given) - 1)].expand(len(frame), -1, -1, -1)
        output = network.blur(
            frame,
            lens.df,
            lens.K,
            disparity=disparity,
            metric=True,
            state=state,
            photo_width_px=lens.photo_width_px,
        )
        return {name: output[name] for name in QUANTITIES}, output.state

    return film


def blurred_clips(scenes: ClipScenes, count: int) -> Iterator[dict[str, Tensor]]:
    """The first so many clips of which enough is blurred."""
    blurred = (
        clip
        for clip in (scenes[index] for index in itertools.count())
        if float(_is_blurred(clip).float().mean()) >= SMALLEST_BLURRED_SHARE
    )
    return itertools.islice(blurred, count)


def _is_blurred(clip: dict[str, Tensor]) -> Tensor:
    lens = Lens.of_clip(clip)
    return signed_defocus(clip["inverse_depth"], lens.df, lens.K).abs() > BLURRED_PX


@dataclass(frozen=True)
class MovingSquare:
    """A near square that moves to the right over a far ground, without noise.

    Attributes:
        frames: (T, 3, H, W) display-encoded sRGB.
        inverse_depth: (T, 1, H, W) 1/m.
        swept: (T, 1, H, W) bool, where the square is or was in an earlier frame.
        lens: focused between the two.
    """

    frames: Tensor
    inverse_depth: Tensor
    swept: Tensor
    lens: Lens

    @classmethod
    def of_size(cls, size: int, frames: int) -> MovingSquare:
        """On pictures of size x size pixels; it moves by a sixteenth of its side per frame."""
        generator = torch.Generator().manual_seed(0)
        side, step = size // 4, max(size // 64, 1)
        ground, square = (
            0.2 + 0.6 * F.interpolate(
                torch.rand(1, 3, cells, cells, generator=generator), size=pixels, mode="bicubic"
            ).clamp(0, 1)
            for cells, pixels in ((size // 8, size), (8, side))
        )  # fmt: skip
        pictures = ground.repeat(frames, 1, 1, 1)
        covered = torch.zeros(frames, 1, size, size, dtype=torch.bool)
        rows = slice((size - side) // 2, (size - side) // 2 + side)
        for number in range(frames):
            left = size // 8 + step * number
            columns = slice(left, left + side)
            room = pictures[number, :, rows, columns]
            room.copy_(square[0, :, :, : room.shape[-1]])
            covered[number, :, rows, columns] = True
        far, near, radius = 0.2, 1.0, SQUARE_RADIUS_PX
        return cls(
            frames=pictures,
            inverse_depth=torch.where(covered, near, far),
            swept=covered.cumsum(0) > 0,
            lens=Lens((far + near) / 2, 2 * radius / (near - far), REFERENCE_WIDTH),
        )


# -- the command -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What is measured, as the arguments of the command say it."""

    size: int
    static_clips: int
    moving_clips: int
    frames: int
    dropped: int
    moving_frames: int
    seeds: int
    noise: tuple[float, ...]
    seed: int

    @property
    def still_scenes(self) -> ClipScenes:
        """Without noise, all frames alike."""
        return ClipScenes(self.seed, self.size, frames=2, motions=("still",), noise=(0.0, 0.0))

    def moving_scenes(self, noise: float) -> ClipScenes:
        """Of films in which something moves."""
        motions = [motion for motion in MOTIONS if motion != "still"]
        return ClipScenes(
            self.seed, self.size, frames=self.moving_frames, motions=motions, noise=(noise, noise)
        )


def measure(network: BokehFlowModel, settings: Settings, given: bool) -> dict[str, Any]:
    """All figures of one network, with the true depth of the scenes given or its own.

    Returns:
        ``static``: rows of quantity and noise; ``unchanged``: by quantity, see `largest_change`;
        ``moving``: rows of noise; ``square``: by quantity. Ratios are None where nothing flickers.
    """
    device = network.device
    static: dict[tuple[float, str], dict[str, float]] = {}
    unchanged = dict.fromkeys(QUANTITIES, 0.0)
    counted = 0
    for clip in _progress(blurred_clips(settings.still_scenes, settings.static_clips), "still"):
        still, inverse_depth = (clip[name][:1].to(device) for name in ("frames", "inverse_depth"))
        film = film_through(network, Lens.of_clip(clip), inverse_depth if given else None)
        for name, change in largest_change(film, still, settings.frames).items():
            unchanged[name] = max(unchanged[name], change)
        with torch.inference_mode():
            blurred = film(still, 0, None)[0]["coc"].abs() > BLURRED_PX
        if not bool(blurred.any()):
            continue
        counted += 1
        for noise in settings.noise:
            figures = static_flicker(
                film, still, noise=noise, seeds=settings.seeds, frames=settings.frames,
                dropped=settings.dropped, seed=settings.seed, where={"bokeh": blurred},
            )  # fmt: skip
            for quantity, found in figures.items():
                _add(static.setdefault((noise, quantity), {}), found)
    rows = [
        {
            "noise": noise,
            "quantity": quantity,
            **{name: total / counted for name, total in sums.items()},
            "difference_ratio": _ratio(sums["difference"], sums["difference_alone"]),
            "spread_ratio": _ratio(sums["spread"], sums["spread_alone"]),
        }
        for (noise, quantity), sums in static.items()
    ]
    moving = []
    for noise in settings.noise:
        sums: dict[str, float] = {}
        scenes = settings.moving_scenes(noise)
        for clip in _progress(blurred_clips(scenes, settings.moving_clips), "moving"):
            clip = {name: value.to(device) for name, value in clip.items()}
            film = film_through(
                network, Lens.of_clip(clip), clip["inverse_depth"] if given else None
            )
            parts = [clip[name] for name in ("frames", "bokeh", "motion", "visible")]
            _add(sums, warping_errors(film, *parts, where=_is_blurred(clip)))
        if sums:
            means = {name: total / settings.moving_clips for name, total in sums.items()}
            moving.append({"noise": noise, **means})
    square = MovingSquare.of_size(settings.size, settings.frames)
    film = film_through(network, square.lens, square.inverse_depth.to(device) if given else None)
    ghosts = ghosting(
        film, square.frames.to(device), square.swept.to(device), network.config.largest_carry
    )
    if given:
        # What is given is not carried.
        ghosts = {"bokeh": ghosts["bokeh"]}
    return {"static": rows, "unchanged": unchanged, "moving": moving, "square": ghosts}


def _progress(clips: Iterator[dict[str, Tensor]], words: str) -> Iterator[dict[str, Tensor]]:
    return iter(tqdm(clips, unit="clip", desc=words, leave=False, disable=None))


def _add(sums: dict[str, float], values: dict[str, float]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value


def _ratio(carried: float, alone: float) -> float | None:
    return carried / alone if alone > 0 else None


def tables(results: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Tables for people, of the figures by network and depth."""
    static = [["network", "depth", "noise", "of", "difference", "ratio", "spread", "ratio",
               "change without noise"]]  # fmt: skip
    moving = [["network", "depth", "noise", "warping error carried", "frame by frame",
               "error carried", "frame by frame"]]  # fmt: skip
    square = [["network", "depth", "square, of", "carried", "constant mean", "ratio"]]
    for (network, depth), figures in results.items():
        for row in figures["static"]:
            if row["difference_ratio"] is None:
                continue
            static.append(
                [
                    network,
                    depth,
                    f"{row['noise']:g}",
                    QUANTITIES[row["quantity"]],
                    f"{row['difference']:.3g}",
                    in_words(row["difference_ratio"], ".3f"),
                    f"{row['spread']:.3g}",
                    in_words(row["spread_ratio"], ".3f"),
                    f"{figures['unchanged'][row['quantity']]:.1e}",
                ]
            )
        for row in figures["moving"]:
            beyond = [row[name] - row["warping_truth"] for name in ("warping", "warping_alone")]
            cells = [*beyond, row["error"], row["error_alone"]]
            moving.append(
                [network, depth, f"{row['noise']:g}", *(f"{value:.5f}" for value in cells)]
            )
        for quantity, row in figures["square"].items():
            ratio = _ratio(row["carried"], row["constant"])
            if ratio is not None:
                square.append(
                    [network, depth, QUANTITIES[quantity], f"{row['carried']:.3g}",
                     f"{row['constant']:.3g}", f"{ratio:.3f}"]
                )  # fmt: skip
    return "\n\n".join(markdown(lines) for lines in (static, moving, square) if len(lines) > 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``flicker``."""
    parser.epilog = EXAMPLES
    add_networks(parser, ["nano"], ["gated_conv"])
    parser.add_argument(
        "--depth",
        choices=["own", "given", "both"],
        default="both",
        help="the network's own depth, the true one, or one after the other (default)",
    )
    parser.add_argument("--noise", default="0.02,0.05", metavar="S,S", help="default %(default)s")
    for name, default, words in (
        ("size", 128, "side of the films in pixels"),
        ("static-clips", 4, "still scenes"),
        ("moving-clips", 4, "films in which something moves"),
        ("frames", 16, "of a still film"),
        ("dropped", 6, "of them, which do not count"),
        ("moving-frames", 8, "of a moving film"),
        ("seeds", 8, "noises on each still film"),
        ("seed", 10_000, "of the scenes; others than a network was trained on"),
        ("threads", 1, "CPU threads"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{words}, default %(default)s"
        )
    add_device(parser)
    add_out(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the tables and writes the JSON; returns 0. ValueError for mistakes."""
    noise = tuple(numbers(arguments.noise, "--noise"))
    if not all(0 < value <= 1 for value in noise):
        raise ValueError(f"--noise takes numbers above 0 and up to 1, got {arguments.noise}.")
    names = [field.name for field in dataclasses.fields(Settings) if field.name != "noise"]
    smallest = {"size": 32, "moving_frames": 2, "frames": 3, "dropped": 0, "seeds": 2, "seed": 0}
    for name in (*names, "threads"):
        if getattr(arguments, name) < smallest.get(name, 1):
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least {smallest.get(name, 1)}, got "
                f"{getattr(arguments, name)}."
            )
    settings = Settings(**{name: getattr(arguments, name) for name in names}, noise=noise)
    if settings.frames - settings.dropped < 2:
        raise ValueError(
            f"--dropped {settings.dropped} of --frames {settings.frames} leaves too few; wanted at "
            "least 2 that count."
        )
    torch.set_num_threads(arguments.threads)
    networks = networks_asked_for(arguments)
    depths = ("own", "given") if arguments.depth == "both" else (arguments.depth,)
    results = {
        (name, depth): measure(network, settings, depth == "given")
        for name, network in networks.items()
        for depth in depths
    }
    machine = hardware(arguments.device)
    protocol = PROTOCOL.format(**asdict(settings))
    print(tables(results))
    print()
    for name, network in networks.items():
        print(f"{name}: {described(network)}.")
    print(protocol)
    print(hardware_sentence(machine))
    if arguments.out:
        write_json(
            arguments.out,
            {
                "benchmark": "flicker",
                "protocol": protocol,
                "command": arguments.command_line,
                "hardware": machine,
                "settings": asdict(settings),
                "networks": {name: described(network) for name, network in networks.items()},
                "results": [
                    {"network": network, "depth": depth, **figures}
                    for (network, depth), figures in results.items()
                ],
            },
        )
        print(f"All figures: {arguments.out}")
    return 0
