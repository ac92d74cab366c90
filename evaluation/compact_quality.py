"""What networks of LiteBokeh make of photographs with a subject, with and without enhancement."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from evaluation.common_arguments import add_device, add_out, finish
from evaluation.report import hardware
from evaluation.results import Results, add_differences, summary_of_rows
from training.validation import BLURRED_RADIUS, IN_FOCUS_RADIUS, neighbour_contrast, psnr

if TYPE_CHECKING:
    from bokehdiff.models.litebokeh import GlassEncNet, TinyUnet

__all__ = ["METRICS", "add_arguments", "compact_quality", "run", "scores"]

IDENTITY = "the photo itself"
SHIPPED = "compact"
WITHOUT = " without enhancement"

RIM_PX = 3
"""What of a region lies this near to anything else does not count for its contrast: there the other
region's blur, or sharp edge, begins."""

METRICS: dict[str, dict[str, str]] = {
    "psnr": {"better": "higher", "unit": "dB", "description": "PSNR, all pixels"},
    "psnr_subject": {
        "better": "higher",
        "unit": "dB",
        "description": f"PSNR where the circle of confusion is below {IN_FOCUS_RADIUS} px",
    },
    "psnr_background": {
        "better": "higher",
        "unit": "dB",
        "description": f"PSNR where it is above {BLURRED_RADIUS:g} px",
    },
    "background_error": {
        "better": "lower",
        "unit": "",
        "description": "mean difference in the background, as a share of that of the photo itself",
    },
    "ssim": {"better": "higher", "unit": "", "description": "SSIM of 11 pixels, all pixels"},
    "sharpness": {
        "better": "higher",
        "unit": "",
        "description": "contrast of neighbouring pixels (root mean square) in the subject without "
        f"a rim of {RIM_PX} px, as a share of the truth's; 1 is as sharp",
    },
    "background_contrast": {
        "better": "lower",
        "unit": "",
        "description": "the same in the background; 1 is blurred as much as the truth",
    },
}

PROTOCOL = (
    "Display-encoded sRGB in [0, 1]; the network sees the photo alone, taken with the lens stopped "
    "down. Differences are from the first network."
)

EXAMPLES = """examples:
  python -m data_synthesis layers --size 384 --count 96 --seed 2000 --focus foreground \\
      --layers 1 2 --radius 8 16 --stopped-down 0.1125 --out scenes
  python -m evaluation compact-quality scenes
  python -m evaluation compact-quality scenes --model weighted=FOLDER --model plain=FOLDER
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``compact-quality``."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "scenes",
        metavar="SCENES",
        help="shards of `python -m data_synthesis layers --focus foreground --stopped-down 0.1125`",
    )
    parser.add_argument(
        "--model",
        action="append",
        metavar="NAME=FOLDER",
        help="a trained LiteBokeh; may be given several times. The others are compared with the "
        f"first. Default: {SHIPPED}, the one inside the package",
    )
    parser.add_argument("--count", type=int, metavar="N", help="of the scenes; default: all")
    add_device(parser)
    add_out(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compares, prints the table and writes the JSON; returns 0. ValueError for mistakes."""
    from bokehdiff import COMPACT_TINY
    from bokehdiff.pipelines.litebokeh import read_litebokeh
    from data_synthesis.reader import ShardedScenes

    folders = {}
    for text in arguments.model or [f"{SHIPPED}={COMPACT_TINY}"]:
        name, equals, folder = text.partition("=")
        if not equals or not name or name in folders:
            raise ValueError(
                f"--model is {text!r}; wanted NAME=FOLDER, every name once, for instance "
                "mine=outputs/litebokeh/tiny."
            )
        folders[name] = folder
    if arguments.count is not None and arguments.count < 1:
        raise ValueError(f"--count is {arguments.count}; wanted at least 1.")
    networks = {
        name: read_litebokeh(folder).to(arguments.device) for name, folder in folders.items()
    }
    scenes = ShardedScenes(arguments.scenes)
    count = min(arguments.count or len(scenes), len(scenes))
    results = compact_quality(networks, [scenes[index] for index in range(count)])
    results["dataset"]["name"] = Path(arguments.scenes).name
    return finish(results, arguments)


@torch.inference_mode()
def compact_quality(
    networks: Mapping[str, TinyUnet | GlassEncNet], scenes: Sequence[Mapping[str, Tensor]]
) -> Results:
    """Results of kind ``comparison``: each network with its enhancement and without, and the photo.

    Args:
        networks: by name; the others are compared with the first, scene by scene.
        scenes: ``image``, ``target`` (3, H, W), ``disparity`` (1, H, W), ``df`` and ``K`` of each.

    Raises:
        ValueError: no network, or no scene.
    """
    if not networks or not scenes:
        raise ValueError("Wanted at least one network and one scene.")
    from evaluation.compact_speed import macs_of

    methods: dict[str, Callable[[Tensor], Tensor]] = {IDENTITY: lambda image: image}
    described = {IDENTITY: "nothing is done"}
    for name, network in networks.items():
        parameters = sum(one.numel() for one in network.parameters())
        about = (
            f"{type(network).__name__}, {parameters:,} parameters, "
            f"{macs_of(network, 1024, 1536) / 1e9:.1f} GMAC for 1536 x 1024 pixels, "
            "with its enhancement"
        )
        for suffix, enhance in (("", True), (WITHOUT, False)):
            methods[name + suffix] = _renderer(network, enhance)
            described[name + suffix] = about
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    for number, scene in enumerate(tqdm(scenes, unit="scene", disable=None)):
        for name, blur in methods.items():
            start = time.perf_counter()
            picture = blur(scene["image"][None]).cpu()
            seconds = time.perf_counter() - start
            row = {"scene": f"scene {number}", "setting": "wide", "K": float(scene["K"])}
            row |= {"seconds": seconds, "peak_memory_bytes": None}
            rows[name].append(row | scores(picture, scene))
    results = {
        "kind": "comparison",
        "title": "LiteBokeh on scenes with a subject",
        "protocol": PROTOCOL,
        "command": "",
        "dataset": {
            "name": "scenes",
            "scenes": [row["scene"] for row in rows[IDENTITY]],
            "images": len(scenes),
        },
        "hardware": hardware(str(next(iter(networks.values())).device)),
        "metrics": METRICS,
        "methods": {
            name: {
                "description": described[name],
                **summary_of_rows(rows[name], list(METRICS)),
                "rows": rows[name],
            }
            for name in methods
        },
    }
    add_differences(results, next(iter(networks)))
    return results


def _renderer(network: TinyUnet | GlassEncNet, enhance: bool) -> Callable[[Tensor], Tensor]:
    def blur(image: Tensor) -> Tensor:
        bokeh: Tensor = network(image.to(network.device), enhance=enhance).bokeh
        return bokeh

    return blur


def scores(picture: Tensor, scene: Mapping[str, Tensor]) -> dict[str, float]:
    """Scores by the names of :data:`METRICS`, without those of regions that the scene lacks.

    Args:
        picture: (1, 3, H, W) in [0, 1].
        scene: see :func:`compact_quality`.
    """
    from bokehdiff.losses import structural_similarity_loss

    target = scene["target"][None]
    radius = (scene["K"] * (scene["disparity"] - scene["df"]).abs())[None]
    subject, background = radius < IN_FOCUS_RADIUS, radius > BLURRED_RADIUS
    found = {
        "psnr": psnr(picture, target, torch.ones_like(subject)),
        "ssim": 1 - float(structural_similarity_loss(2 * picture - 1, 2 * target - 1)),
    }
    for name, region in (("subject", subject), ("background", background)):
        if region.any():
            found[f"psnr_{name}"] = psnr(picture, target, region)
    if background.any():
        error, photo_error = (
            float((one - target).abs().mean(1, keepdim=True)[background].mean())
            for one in (picture, scene["image"][None])
        )
        if photo_error > 0:
            found["background_error"] = error / photo_error
    for name, region in (("sharpness", subject), ("background_contrast", background)):
        region = inside(region)
        # NaN of a region without neighbours is no contrast either.
        contrast = neighbour_contrast(target, region)
        if contrast > 0:
            found[name] = (neighbour_contrast(picture, region) / contrast) ** 0.5
    return found


def inside(region: Tensor) -> Tensor:
    """A region (1, 1, H, W) without what is nearer than :data:`RIM_PX` to anything else."""
    outside = F.max_pool2d((~region).float(), 2 * RIM_PX + 1, 1, RIM_PX)
    return outside == 0
