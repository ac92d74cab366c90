"""What a bokeh stack is worth to depth: ``python -m evaluation dsfa FOLDER --stack A --single B``.

Two networks trained alike, one with stacks and one without, on the same held-out scenes. The gain
has to come from the blur: it must go when the frames show none, or when their K is wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from bokehdiff.models.depth_anything_dsfa import DepthAnythingDSFAForDepthEstimation
from data_synthesis.stack_files import StoredStacks
from evaluation.bootstrap import PROTOCOL, difference_interval, mean_interval
from evaluation.depth_metrics import DEPTH_METRICS, depth_metrics
from evaluation.report import hardware
from evaluation.results import write_results
from training.dsfa_data import central_crop

__all__ = [
    "STACKS",
    "add_arguments",
    "best_factor",
    "local_contrast",
    "measure",
    "read_network",
    "run",
    "shuffled_strengths",
]

BATCH = 32
CONTRAST_WINDOW_PX = 9
TEXTURED_CONTRAST = 0.02
"""Local contrast of display-encoded luminance above which a pixel has texture: 5 8-bit steps."""

SINGLE, WITH_STACK, CONSTANT = "single", "stack", "constant"
STACKS = {
    WITH_STACK: "every frame as it is, with its K",
    "copies": "every frame replaced by the sharp picture, with the frames' K",
    "noise": "every frame replaced by noise, uniform in [0, 1], with the frames' K",
    "K_shuffled": "each frame with the K of the next one, the last with that of the first",
    "K_of_others": "the frames with the strengths of the next scene",
    "no_stack": "the network trained with stacks, given the sharp picture alone",
}
"""What the network trained with stacks is given, by name; ``single`` is the other network."""

Sample = Mapping[str, Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m evaluation dsfa``."""
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="held-out stacks written by python -m data_synthesis stacks; each has its own table",
    )
    parser.add_argument("--stack", required=True, help="folder of the network trained with stacks")
    parser.add_argument("--single", required=True, help="folder of the one trained without")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FOLDER",
        help="other stacks, on which each network gets the one factor of its depths that is best "
        "for AbsRel: the loss they were trained with leaves their scale half free",
    )
    parser.add_argument("--crop", type=int, help="pixels a side of the middle; default: all")
    parser.add_argument("--frames", type=int, help="only the first of each stack; default: all")
    parser.add_argument("--out", metavar="FILE", help="write the results as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints a table for each folder and writes the results; returns 0."""
    networks = {name: read_network(getattr(arguments, name)) for name in (WITH_STACK, SINGLE)}
    opened = {folder.name: StoredStacks(folder) for folder in arguments.folders}
    if len(opened) != len(arguments.folders):
        raise ValueError("Two folders have the same name; wanted names that tell tables apart.")
    pair = networks[WITH_STACK], networks[SINGLE]
    factors = None
    if arguments.calibration is not None:
        if arguments.calibration.resolve() in [folder.resolve() for folder in arguments.folders]:
            raise ValueError("--calibration is one of the folders measured; wanted another.")
        known = _scenes(StoredStacks(arguments.calibration), arguments.crop, arguments.frames)
        factors = calibrated(*pair, known)
    results: dict[str, Any] = {
        "kind": "dsfa",
        "title": "What a bokeh stack is worth to depth",
        "protocol": protocol(factors),
        "command": getattr(arguments, "command_line", ""),
        "hardware": hardware(),
        "metrics": {name: vars(metric) for name, metric in DEPTH_METRICS.items()},
        "factors": factors,
        "datasets": {},
    }
    for name, stacks in opened.items():
        scenes = _scenes(stacks, arguments.crop, arguments.frames)
        frames, size = len(scenes[0]["K"]), scenes[0]["image"].shape[-1]
        measured = measure(*pair, scenes, factors)
        results["datasets"][name] = {
            "settings": stacks.settings,
            "scenes": len(scenes),
            "crop": size,
            "frames": frames,
            "methods": measured,
        }
        print(f"{name}: {len(scenes)} scenes, {frames} frames, {size} x {size} pixels")
        print(table(measured), end="\n\n")
    print(results["protocol"])
    if arguments.out:
        write_results(arguments.out, results)
        print(f"Results: {arguments.out}")
    return 0


def _scenes(stacks: StoredStacks, crop: int | None, frames: int | None) -> list[dict[str, Tensor]]:
    """The middle of all stacks, with the first frames; ValueError if there are not so many."""
    count = stacks.settings["frames"] if frames is None else frames
    if not 2 <= count <= stacks.settings["frames"]:
        raise ValueError(
            f"--frames is {count} and the stacks of {stacks.folder.name} have "
            f"{stacks.settings['frames']}; wanted from 2, so that their K can be shuffled, to as "
            "many."
        )
    size = stacks.settings["size"] if crop is None else crop
    scenes = [central_crop(stacks[index], size) for index in range(len(stacks))]
    return [{**scene, "stack": scene["stack"][:count], "K": scene["K"][:count]} for scene in scenes]


def protocol(factors: Mapping[str, float] | None) -> str:
    """How the figures are made, in words; `factors` as of `calibrated`."""
    kinds = "; ".join(f"{name}: {what}" for name, what in STACKS.items())
    scale = ""
    if factors is not None:
        scale = (
            "Depths of each network are multiplied by the one factor that is best for AbsRel on "
            f"other scenes ({factors[WITH_STACK]:.2f} with stacks, {factors[SINGLE]:.2f} without); "
            f"{CONSTANT}: {factors[CONSTANT]:.2f} m everywhere, chosen in the same way. "
        )
    return (
        f"Metres against metres, mean over scenes. {scale}"
        f"single: the network trained without stacks; {kinds}. Textured are pixels whose local "
        f"contrast (standard deviation of luminance in {CONTRAST_WINDOW_PX} x "
        f"{CONTRAST_WINDOW_PX} pixels) is above {TEXTURED_CONTRAST}. {PROTOCOL}"
    )


def read_network(folder: str) -> DepthAnythingDSFAForDepthEstimation:
    """The network that training saved, on the CPU, ready to compute.

    Raises:
        ValueError: the folder holds none.
    """
    try:
        network = DepthAnythingDSFAForDepthEstimation.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds no depth network with DSFA ({error}). Train one with "
            "training/train_dsfa.py."
        ) from error
    return network.eval()


@torch.no_grad()
def calibrated(
    with_stack: torch.nn.Module, single: torch.nn.Module, scenes: Sequence[Sample]
) -> dict[str, float]:
    """`best_factor` of the two networks by name, and the ``constant`` best for these scenes (m).

    Args:
        with_stack, single, scenes: as of `measure`.
    """
    predicted: dict[str, list[np.ndarray]] = {SINGLE: [], WITH_STACK: [], CONSTANT: []}
    true = []
    for start in range(0, len(scenes), BATCH):
        image, depth, stack, K = (
            torch.stack([scene[name] for scene in scenes[start : start + BATCH]])
            for name in ("image", "depth", "stack", "K")
        )
        true.append(depth[:, 0].double().numpy())
        predicted[SINGLE].append(_depth(single, image))
        predicted[WITH_STACK].append(_depth(with_stack, image, stack, K))
        predicted[CONSTANT].append(np.ones_like(true[-1]))
    whole = np.concatenate(true)
    return {name: best_factor(np.concatenate(one), whole) for name, one in predicted.items()}


def best_factor(predicted: np.ndarray, depth: np.ndarray) -> float:
    """The f that makes the mean of |f predicted - depth| / depth smallest.

    It is the median of depth / predicted, each counted predicted / depth times.
    """
    ratio = (depth / predicted).reshape(-1)
    order = np.argsort(ratio)
    below = np.cumsum(1 / ratio[order])
    return float(ratio[order][np.searchsorted(below, below[-1] / 2)])


@torch.no_grad()
def measure(
    with_stack: torch.nn.Module,
    single: torch.nn.Module,
    scenes: Sequence[Sample],
    factors: Mapping[str, float] | None = None,
) -> dict[str, dict[str, Any]]:
    """Figures of the two networks, the first with all of `STACKS`, by method.

    Each has ``rows``, one per scene with the metrics of `DEPTH_METRICS` and ``abs_rel_textured``,
    ``abs_rel_textureless`` where the scene has such pixels; ``mean`` and ``interval`` by metric;
    and ``change``, of AbsRel from the single network's: ``mean``, its ``interval`` scene by scene,
    and ``relative``, the mean over the single network's AbsRel.

    Args:
        with_stack, single: networks called as ``DepthAnythingDSFAForDepthEstimation``.
        scenes: image (3, H, W), depth (1, H, W), stack (N, 3, H, W), K (N,) of each, all of one
            size; at least 2.
        factors: of `calibrated`, which the depths of the networks are multiplied by; there is a
            method ``constant`` then.
    """
    methods = (SINGLE, *STACKS, *((CONSTANT,) if factors else ()))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    for start in tqdm(range(0, len(scenes), BATCH), "batches", leave=False, disable=None):
        numbers = range(start, min(start + BATCH, len(scenes)))
        image, depth, stack, K = (
            torch.stack([scenes[number][name] for number in numbers])
            for name in ("image", "depth", "stack", "K")
        )
        others = torch.stack([scenes[(number + 1) % len(scenes)]["K"] for number in numbers])
        given = stacks_to_give(image, stack, K, others, start)
        depths = {SINGLE: _depth(single, image)}
        depths |= {name: _depth(with_stack, image, *frames) for name, frames in given.items()}
        textured = (local_contrast(image) > TEXTURED_CONTRAST)[:, 0].numpy()
        true = depth[:, 0].numpy()
        if factors:
            depths = {
                name: predicted * factors[SINGLE if name == SINGLE else WITH_STACK]
                for name, predicted in depths.items()
            }
            depths[CONSTANT] = np.full(true.shape, factors[CONSTANT])
        for name, predicted in depths.items():
            for place, number in enumerate(numbers):
                row = {
                    "scene": str(number),
                    "setting": "",
                    **depth_metrics(predicted[place], true[place]),
                }
                for region, inside in (
                    ("textured", textured[place]),
                    ("textureless", ~textured[place]),
                ):
                    if found := depth_metrics(predicted[place], true[place], inside):
                        row[f"abs_rel_{region}"] = found["abs_rel"]
                rows[name].append(row)
    metrics = (*DEPTH_METRICS, "abs_rel_textured", "abs_rel_textureless")
    base = float(np.mean([row["abs_rel"] for row in rows[SINGLE]]))
    descriptions = {
        SINGLE: "the network trained without stacks",
        **STACKS,
        CONSTANT: "one depth everywhere",
    }
    measured = {}
    for name, found in rows.items():
        values = {metric: [row[metric] for row in found if metric in row] for metric in metrics}
        mean = {metric: float(np.mean(one)) for metric, one in values.items() if one}
        measured[name] = {
            "description": descriptions[name],
            "mean": mean,
            "interval": {metric: mean_interval(found, metric) for metric in mean},
            "change": {
                "mean": mean["abs_rel"] - base,
                "relative": mean["abs_rel"] / base - 1,
                "interval": difference_interval(found, rows[SINGLE], "abs_rel"),
            },
            "rows": found,
        }
    return measured


def stacks_to_give(
    image: Tensor, stack: Tensor, K: Tensor, others: Tensor, seed: int
) -> dict[str, tuple[Tensor, Tensor] | tuple[()]]:
    """(frames (B, N, 3, H, W), K (B, N)) of each of `STACKS` by name; () is none.

    Args:
        image: (B, 3, H, W) in [0, 1].
        stack, K: as they are.
        others: (B, N), strengths of other scenes.
        seed: of the noise.
    """
    noise = torch.rand(stack.shape, generator=torch.Generator().manual_seed(seed))
    return {
        WITH_STACK: (stack, K),
        "copies": (image[:, None].expand_as(stack), K),
        "noise": (noise, K),
        "K_shuffled": (stack, shuffled_strengths(K)),
        "K_of_others": (stack, others),
        "no_stack": (),
    }


def shuffled_strengths(K: Tensor) -> Tensor:
    """K (B, N) of other frames of the same stack: no frame keeps its own if all differ, N >= 2."""
    return K.roll(-1, dims=1)


def local_contrast(image: Tensor) -> Tensor:
    """Standard deviation of luminance around each pixel, (B, 1, H, W), for image (B, 3, H, W).

    Luma of Rec. 709 on display-encoded values; the window ends at the border of the picture.
    """
    weights = torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64).view(1, 3, 1, 1)
    luminance = (image.double() * weights).sum(1, keepdim=True)
    settings = {
        "kernel_size": CONTRAST_WINDOW_PX,
        "stride": 1,
        "padding": CONTRAST_WINDOW_PX // 2,
        "count_include_pad": False,
    }
    pool: Callable[..., Tensor] = torch.nn.functional.avg_pool2d
    mean, squares = pool(luminance, **settings), pool(luminance.square(), **settings)
    return (squares - mean.square()).clamp_min(0).sqrt()


def table(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """AbsRel with its interval, its change, delta1 and AbsRel by region; a line per method."""
    lines = [
        f"{'':12s} {'AbsRel':>7s} {'95 %':>16s} {'change':>8s} {'95 % of change':>18s} "
        f"{'delta1':>7s} {'textured':>9s} {'textureless':>12s}"
    ]
    for name, about in measured.items():
        mean, interval, change = about["mean"], about["interval"]["abs_rel"], about["change"]
        changed = "" if name == SINGLE else f"{change['relative']:+.1%}"
        sure = "" if name == SINGLE else _span(change["interval"], signed=True)
        regions = [
            f"{mean[metric]:.4f}" if metric in mean else ""
            for metric in ("abs_rel_textured", "abs_rel_textureless")
        ]
        lines.append(
            f"{name:12s} {mean['abs_rel']:7.4f} {_span(interval):>16s} {changed:>8s} {sure:>18s} "
            f"{mean['delta1']:7.3f} {regions[0]:>9s} {regions[1]:>12s}"
        )
    return "\n".join(lines)


def _span(interval: Sequence[float] | None, signed: bool = False) -> str:
    if interval is None:
        return ""
    low, high = (f"{end:+.4f}" if signed else f"{end:.4f}" for end in interval)
    return f"{low} to {high}"


def _depth(network: torch.nn.Module, image: Tensor, *frames: Tensor) -> np.ndarray:
    """(B, H, W) metres, float64."""
    mean, deviation = (
        torch.tensor(values).view(3, 1, 1)
        for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    pixels = (image - mean) / deviation
    seen = ((frames[0] - mean) / deviation, frames[1]) if frames else ()
    return network(pixels, *seen).predicted_depth.clamp_min(1e-4).double().numpy()
