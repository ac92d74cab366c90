"""How well the depth-from-bokeh sweep recovers disparity, on scenes whose disparity is known.

The estimator is given pictures, K and df, and never the disparity. Where it trusts itself is its
own word too (:attr:`bokehdiff.blur_sweep.SweepResult.reliability`).
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from bokehdiff.blur_sweep import SweepResult, disparity_from_regression, disparity_from_sweep
from bokehdiff.rendering import layered_blur
from bokehdiff.srgb import linear_to_srgb, srgb_to_linear
from evaluation.common_arguments import add_data_set, add_out, data_set_asked_for
from evaluation.photographs import Photograph
from evaluation.report import hardware, hardware_sentence
from evaluation.results import write_results

__all__ = ["Stack", "add_arguments", "evaluate", "figures_of", "filled", "run", "stacks_of"]

# Reliability from which on texture is said to allow a measurement.
RELIABLE = 0.5
# Largest radius of the stack rendered here, as a share of the shorter side of the picture.
RENDERED_BLUR = 1 / 12

PROTOCOLS = {
    "all": "every frame of the scene, focused at several distances; which side of them a place "
    "lies on is for the frames to tell",
    "nearest": "only the frames focused at the nearest of these planes; everything is taken to lie "
    "farther, which is wrong for what lies nearer",
    "farthest": "only the frames focused at the farthest of these planes; everything is taken to "
    "lie nearer",
    "rendered": "an aperture stack of evenly spaced K up to a radius of 1/12 of the shorter side, "
    "focused at the nearest thing of the scene, made by the layered renderer from the photograph "
    "and its true disparity, in 8 bits",
}
PROTOCOL = (
    "The sharp photograph and the frames are 8-bit sRGB, decoded to linear light; clipped lamps "
    "stay clipped. Error: |estimate - truth| / truth of the inverse depth, by pixel. Reliable: "
    "pixels whose reliability, which the estimator gives without knowing the truth, is at least "
    "0.5. Filled: all pixels, those that are not reliable with the estimate of the nearest that "
    "is. Regression: a radius measured in each frame and a line over K, instead of the sweep over "
    "disparity. All scenes: pixels of all scenes together."
)


@dataclass(frozen=True)
class Stack:
    """A sharp picture with frames of it, and what the estimator is told about them."""

    scene: str
    protocol: str
    image: torch.Tensor  # (1, 3, H, W) linear light
    frames: torch.Tensor  # (1, F, 3, H, W) linear light
    K: list[float]
    df: list[float]
    side: Literal["nearer", "farther", "both"]
    truth: np.ndarray = field(repr=False)  # (H, W) disparity

    def estimate(self, regression: bool) -> SweepResult:
        """By the sweep over disparity, or by a radius in each frame and a line over K."""
        if regression:
            assert self.side != "both", "a line over K needs a single plane in focus"
            return disparity_from_regression(
                self.image, self.frames, self.K, self.df, side=self.side
            )
        return disparity_from_sweep(self.image, self.frames, self.K, self.df, side=self.side)


def stacks_of(photographs: Sequence[Photograph], rendered_frames: int) -> Iterator[Stack]:
    """The stacks that the lens settings of one scene make, by the protocols of this module.

    rendered_frames: how many frames are rendered here; 0 for none.

    Raises:
        ValueError: nobody knows the K of a photograph.
    """
    first = photographs[0]
    if any(photograph.K is None for photograph in photographs):
        raise ValueError(
            f"Nobody knows the K of {first.scene}, without which blur says nothing about depth; "
            "wanted a data set that gives K."
        )
    planes = sorted({photograph.df for photograph in photographs})
    image = _light(first.image)
    chosen: list[tuple[str, Literal["nearer", "farther", "both"], list[Photograph]]] = [
        ("nearest", "farther", [p for p in photographs if p.df == planes[-1]]),
        ("farthest", "nearer", [p for p in photographs if p.df == planes[0]]),
    ]
    if len(planes) > 1:
        chosen.insert(0, ("all", "both", list(photographs)))
    for protocol, side, taken in chosen:
        frames = torch.stack([_light(photograph.truth) for photograph in taken], 1)
        strengths = [float(photograph.K or 0) for photograph in taken]
        focus = [photograph.df for photograph in taken]
        yield Stack(first.scene, protocol, image, frames, strengths, focus, side, first.disparity)
    if rendered_frames:
        disparity = torch.from_numpy(first.disparity)[None, None].to(torch.float32)
        nearest, farthest = float(disparity.max()), float(disparity.min())
        if nearest > farthest:
            largest = RENDERED_BLUR * min(disparity.shape[-2:]) / (nearest - farthest)
            strengths = [largest * (i + 1) / rendered_frames for i in range(rendered_frames)]
            light = image if first.light is None else _channels_first(first.light)
            rendered = [layered_blur(light, K * (disparity - nearest)) for K in strengths]
            frames = torch.stack([_in_8_bits(frame) for frame in rendered], 1)
            focus = [nearest] * rendered_frames
            yield Stack(
                first.scene, "rendered", image, frames, strengths, focus, "farther", first.disparity
            )


def _channels_first(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1)[None].contiguous()


def _light(picture: np.ndarray) -> torch.Tensor:
    """(1, 3, H, W) linear light of an (H, W, 3) 8-bit sRGB picture."""
    return srgb_to_linear(_channels_first(picture) / 255)


def _in_8_bits(light: torch.Tensor) -> torch.Tensor:
    return srgb_to_linear((linear_to_srgb(light.clamp(0, 1)) * 255).round() / 255)


def filled(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(H, W) with the value of the nearest known pixel where nothing is known."""
    from scipy.ndimage import distance_transform_edt

    if not known.any():
        return values
    rows, columns = distance_transform_edt(~known, return_distances=False, return_indices=True)
    return values[rows, columns]


def figures_of(
    errors: np.ndarray, reliable: np.ndarray, filled_errors: np.ndarray
) -> dict[str, Any]:
    """Figures of relative errors, all of one shape; None for those of no pixels."""
    trusted = errors[reliable]
    return {
        "reliable_share": float(reliable.mean()),
        "median": float(np.median(trusted)) if trusted.size else None,
        "within_5_percent": float((trusted <= 0.05).mean()) if trusted.size else None,
        "within_10_percent": float((trusted <= 0.1).mean()) if trusted.size else None,
        "median_everywhere": float(np.median(errors)),
        "median_filled": float(np.median(filled_errors)),
        "filled_within_5_percent": float((filled_errors <= 0.05).mean()),
        "filled_within_10_percent": float((filled_errors <= 0.1).mean()),
    }


def evaluate(
    photographs: Iterator[Photograph], rendered_frames: int, pictures: Path | None = None
) -> list[dict[str, Any]]:
    """A row of figures for each scene and protocol, and then for all scenes by protocol.

    pictures: folder for a picture of each row: truth, estimate, error and reliability.
    """
    rows: list[dict[str, Any]] = []
    pooled: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    for _, of_scene in itertools.groupby(photographs, key=lambda one: one.scene):
        stacks = stacks_of(list(of_scene), rendered_frames)
        for stack in tqdm(stacks, unit="stack", leave=False, disable=None):
            for regression in (False, True) if stack.side != "both" else (False,):
                name = f"{stack.protocol}, regression" if regression else stack.protocol
                begin = time.perf_counter()
                result = stack.estimate(regression)
                seconds = time.perf_counter() - begin
                estimate = result.disparity[0, 0].numpy()
                reliable = result.reliability[0, 0].numpy() >= RELIABLE
                # Of what is infinitely far no error is a share.
                finite = stack.truth > 0
                parts = tuple(
                    values[finite]
                    for values in (
                        _relative_error(estimate, stack.truth),
                        reliable,
                        _relative_error(filled(estimate, reliable), stack.truth),
                    )
                )
                errors, trusted, filled_errors = parts
                pooled.setdefault(name, []).append((errors, trusted, filled_errors))
                rows.append(
                    {
                        "scene": stack.scene,
                        "protocol": name,
                        "frames": len(stack.K),
                        "K": stack.K,
                        "df": stack.df,
                        **figures_of(errors, trusted, filled_errors),
                        "seconds": seconds,
                    }
                )
                if pictures:
                    _write_picture(pictures / f"{stack.scene}_{name.replace(', ', '_')}.png",
                                   stack, result)  # fmt: skip
    for name, of_all in pooled.items():
        joined = [np.concatenate(values) for values in zip(*of_all, strict=True)]
        errors, trusted, filled_errors = joined
        rows.append(
            {
                "scene": "all scenes",
                "protocol": name,
                **figures_of(errors, trusted, filled_errors),
            }
        )
    return rows


def _relative_error(estimate: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.abs(estimate - truth) / np.where(truth > 0, truth, 1)


def _write_picture(file: Path, stack: Stack, result: SweepResult) -> None:
    from matplotlib.figure import Figure

    from bokehdiff.whole_files import whole_or_not_at_all

    estimate = result.disparity[0, 0].numpy()
    error = (estimate - stack.truth) / np.where(stack.truth > 0, stack.truth, 1)
    low, high = float(stack.truth.min()), float(stack.truth.max())
    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    shown = [
        ("true disparity (1/m)", stack.truth, "magma", low, high),
        (f"estimate from {len(stack.K)} frames (1/m)", estimate, "magma", low, high),
        ("relative error", error, "RdBu_r", -0.2, 0.2),
        ("reliability", result.reliability[0, 0].numpy(), "viridis", 0.0, 1.0),
    ]
    for panel, (title, values, colours, lowest, highest) in zip(panels, shown, strict=True):
        drawn = panel.imshow(values, cmap=colours, vmin=lowest, vmax=highest)
        panel.set_title(title)
        panel.set_axis_off()
        figure.colorbar(drawn, ax=panel, shrink=0.8)
    with whole_or_not_at_all(file, file.suffix) as unfinished:
        figure.savefig(unfinished, dpi=80)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each row; figures in percent."""
    columns = {
        "reliable": "reliable_share",
        "median": "median",
        "<=5 %": "within_5_percent",
        "<=10 %": "within_10_percent",
        "| everywhere": "median_everywhere",
        "filled": "median_filled",
        "<=5 % ": "filled_within_5_percent",
        "<=10 % ": "filled_within_10_percent",
    }
    first = f"{'scene':<12}{'protocol':<22}{'frames':>6}"
    lines = [first + "".join(f"{name.strip():>14}" for name in columns) + f"{'seconds':>9}"]
    for row in rows:
        cells = [row[name] for name in columns.values()]
        numbers = "".join(f"{'-' if c is None else f'{100 * c:.2f}':>14}" for c in cells)
        seconds = f"{row['seconds']:9.1f}" if "seconds" in row else ""
        frames = row.get("frames", "")
        lines.append(f"{row['scene']:<12}{row['protocol']:<22}{frames:>6}{numbers}{seconds}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m evaluation sweep``."""
    add_data_set(parser)
    parser.add_argument(
        "--rendered-frames",
        type=int,
        default=6,
        metavar="N",
        help="frames of the aperture stack that is rendered here (default 6; 0 for none)",
    )
    parser.add_argument(
        "--pictures", metavar="DIR", help="folder for a picture of each estimate and its error"
    )
    add_out(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the table, writes JSON and pictures; returns 0. ValueError for mistakes."""
    if arguments.rendered_frames < 0:
        raise ValueError(
            f"--rendered-frames is {arguments.rendered_frames}; wanted a number of frames, or 0."
        )
    pictures = Path(arguments.pictures) if arguments.pictures else None
    if pictures and pictures.exists() and not pictures.is_dir():
        raise ValueError(f"--pictures is {pictures}, a file; wanted a folder.")
    dataset = data_set_asked_for(arguments)
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
    rows = evaluate(dataset.photographs(), arguments.rendered_frames, pictures)
    machine = hardware()
    print("Relative error of inverse depth, in percent; right of the bar without regard to it.")
    print(table(rows))
    print()
    for name, words in PROTOCOLS.items():
        print(f"{name}: {words}.")
    print(PROTOCOL)
    print(hardware_sentence(machine))
    if arguments.out:
        write_results(
            arguments.out,
            {
                "kind": "sweep",
                "protocol": PROTOCOL,
                "protocols": PROTOCOLS,
                "command": arguments.command_line,
                "dataset": {"name": dataset.name, "scenes": dataset.scenes},
                "hardware": machine,
                "rows": rows,
            },
        )
        print(f"All figures: {arguments.out}")
    return 0
