"""How good the blur of BokehFlow is on held-out scenes: photographs, and films."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from bokehdiff.losses import SSIM_WINDOW, structural_similarity_loss, warping_loss
from bokehdiff.models.bokehflow import BokehFlowModel, BokehFlowOutput
from bokehdiff.models.temporal_state import BokehFlowState
from bokehdiff.optics import signed_defocus
from evaluation.depth_metrics import depth_metrics
from training.validation import (
    BLURRED_RADIUS,
    CONTROL_SHARES,
    Validation,
    as_picture,
    neighbour_contrast,
    picture_grid,
    psnr,
    spearman_correlation,
    without_border,
)

EDGE_STEP_PX = 1.0
"""Where the signed radius of neighbours differs by more than this, in pixels, is a depth edge."""

Render = Callable[[dict[str, Tensor], int, BokehFlowState | None], tuple[BokehFlowOutput, Tensor]]
"""See `training.bokehflow_task.BokehFlowTask.render`."""


def validate_flow(
    render: Render,
    network: BokehFlowModel,
    samples: Sequence[dict[str, Tensor]],
    border: int,
    device: torch.device,
    *,
    pictures: int = 0,
) -> Validation:
    """Render held-out samples and return their scores, and pictures of the first of them.

    Args:
        render: renders a frame of a batch.
        network: of which it is asked whether more K blurs more.
        samples: see `training.bokehflow_data`, without ``gives_depth``; they may differ in size.
        border: pixels at the border that count for nothing.
        device: where the network computes.
        pictures: how many samples the grid shows.

    Returns:
        Means over samples, on display-encoded sRGB in [0, 1], without the border. Samples with
        metric depth are rendered with it, the others with the network's own.

        - ``psnr``, ``psnr_edges`` in dB, everywhere, and near depth edges (`near_depth_edges`);
          ``ssim``; means over the frames,
        - the same with ``_physics`` added: of the lens formula alone; with ``_identity``: of the
          photograph left as it is; with ``_own_depth``: with the network's own depth,
        - ``abs_rel``, ``delta1``: of the network's own depth, where metres are known,
        - ``warping_error``, of clips: the change between frames of what the one before shows too;
          ``_single``: without a state, each frame for itself; ``_target``: of the ground truth,
        - ``control``, ``control_correlation``: as of `training.validation.validate`, of the first
          frame,
        - ``scenes``: the number of samples.

        A score that no sample has a region for is absent.
    """
    scores: dict[str, list[float]] = {}
    rows: list[dict[str, PIL.Image.Image]] = []
    for sample in samples:
        batch = {name: value[None].to(device) for name, value in sample.items()}
        metric = bool(sample["metric"])
        as_given, known_edges = _film(render, batch, gives_depth=metric), metric
        with_own = _film(render, batch, gives_depth=False) if metric else as_given
        target, frames = batch["bokeh"][0], batch["frames"][0]
        found: dict[str, float] = {}
        for suffix, film in (
            ("", as_given.bokeh),
            ("_physics", as_given.physics),
            ("_identity", frames),
            ("_own_depth", with_own.bokeh),
        ):
            found |= {
                name + suffix: value
                for name, value in _likeness(
                    film, target, as_given.coc if known_edges else None, border
                ).items()
            }
        if metric:
            found |= _depth_scores(with_own.own, batch["inverse_depth"][0])
        if "motion" in batch:
            alone = _film(render, batch, gives_depth=metric, carry=False)
            for suffix, film in (
                ("", as_given.bokeh),
                ("_single", alone.bokeh),
                ("_target", target),
            ):
                found["warping_error" + suffix] = _warping_error(film, batch, border)
        found |= _control(network, batch, as_given, border)
        for name, value in found.items():
            scores.setdefault(name, []).append(value)
        if len(rows) < pictures:
            rows.append(_pictures(frames, target, as_given, with_own, found))
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    return Validation({"scenes": len(samples), **means}, picture_grid(rows) if rows else None)


class _Film:
    """The frames of one sample, (T, ., H, W): bokeh, physics, coc, inverse_depth rendered with, and
    the network's own."""

    def __init__(self, outs: Sequence[BokehFlowOutput], owns: Sequence[Tensor]) -> None:
        self.bokeh = torch.cat([out.bokeh for out in outs]).float()
        self.physics = torch.cat([out.physics for out in outs]).float()
        self.coc = torch.cat([out.coc for out in outs]).float()
        self.inverse_depth = torch.cat([out.inverse_depth for out in outs]).float()
        self.own = torch.cat(list(owns)).float()


def _film(
    render: Render, batch: Mapping[str, Tensor], *, gives_depth: bool, carry: bool = True
) -> _Film:
    asked = {**batch, "gives_depth": torch.full_like(batch["metric"], gives_depth)}
    outs, owns = [], []
    state = None
    for number in range(batch["frames"].shape[1]):
        out, own = render(asked, number, state)
        state = out.state if carry else None
        outs.append(out)
        owns.append(own)
    return _Film(outs, owns)


def _likeness(film: Tensor, target: Tensor, coc: Tensor | None, border: int) -> dict[str, float]:
    """PSNR everywhere and near depth edges, if the signed radii are known, and SSIM."""
    scores: dict[str, list[float]] = {}
    for number in range(len(film)):
        picture, wanted = (
            without_border(one[number : number + 1], border) for one in (film, target)
        )
        regions = {"psnr": torch.ones_like(wanted[:, :1], dtype=torch.bool)}
        if coc is not None:
            edges = near_depth_edges(coc[number, 0])[None, None]
            regions["psnr_edges"] = without_border(edges, border)
        for name, region in regions.items():
            if region.any():
                scores.setdefault(name, []).append(psnr(picture, wanted, region))
        if min(picture.shape[-2:]) >= SSIM_WINDOW and not picture.isnan().any():
            loss = structural_similarity_loss(2 * picture - 1, 2 * wanted - 1)
            scores.setdefault("ssim", []).append(1 - float(loss))
    return {name: sum(values) / len(values) for name, values in scores.items()}


def near_depth_edges(radius: Tensor) -> Tensor:
    """Return what light from across a depth edge can reach, (H, W) bool.

    Depth edges are where the signed radii of neighbours differ by more than a pixel; near them is
    what lies within two radii, of the larger of the two neighbours, of the nearest one.

    Args:
        radius: (H, W) signed radius of the circle of confusion, in pixels.
    """
    from scipy.ndimage import distance_transform_edt

    reach = torch.zeros_like(radius)
    size = radius.abs()
    for axis in (0, 1):
        before = [slice(None), slice(None)]
        after = [slice(None), slice(None)]
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        larger = torch.maximum(size[tuple(before)], size[tuple(after)])
        step = (radius.diff(dim=axis).abs() > EDGE_STEP_PX) * larger
        for side in (tuple(before), tuple(after)):
            reach[side] = torch.maximum(reach[side], step)
    edge = (reach > 0).cpu().numpy()
    if not edge.any():
        return torch.zeros_like(radius, dtype=torch.bool)
    distance, nearest = distance_transform_edt(~edge, return_indices=True)
    near = distance <= 2 * reach.cpu().numpy()[tuple(nearest)]
    return torch.from_numpy(near).to(radius.device)


def _depth_scores(own: Tensor, true: Tensor) -> dict[str, float]:
    """AbsRel and delta1 of depths, from inverse depths (T, 1, H, W) in 1/m."""
    known = true.isfinite() & (true > 0)
    found = depth_metrics(
        *(one.cpu().numpy() for one in (1 / own, 1 / true.where(known, own), known))
    )
    return {name: found[name] for name in ("abs_rel", "delta1")} if found else {}


def _warping_error(film: Tensor, batch: Mapping[str, Tensor], border: int) -> float:
    """Mean over the frames but the first, in [0, 1]."""
    errors = [
        warping_loss(
            *(without_border(one, border) for one in (film[n : n + 1], film[n - 1 : n])),
            *(without_border(batch[name][:, n], border) for name in ("motion", "visible")),
        )
        for n in range(1, len(film))
    ]
    return float(torch.stack(errors).mean()) if errors else 0.0


def _control(
    network: BokehFlowModel, batch: Mapping[str, Tensor], film: _Film, border: int
) -> dict[str, float]:
    """Whether the blurred region of the first frame loses contrast each time K grows."""
    inverse_depth = film.inverse_depth[:1]
    radius = signed_defocus(inverse_depth, batch["df"], batch["K"]).abs()
    blurred = without_border(radius > BLURRED_RADIUS, border)
    if not blurred.any():
        return {}
    contrasts = []
    for share in CONTROL_SHARES:
        out = network.blur(
            *(batch["frames"][:, 0], batch["df"], batch["K"] * share),
            disparity=inverse_depth,
            metric=True,
            photo_width_px=batch["photo_width_px"],
        )
        contrasts.append(neighbour_contrast(without_border(out.bokeh.float(), border), blurred))
    falls = all(sharper > softer for sharper, softer in zip(contrasts, contrasts[1:], strict=False))
    blur = [-contrast for contrast in contrasts]
    return {
        "control": float(falls),
        "control_correlation": spearman_correlation(CONTROL_SHARES, blur),
    }


def _pictures(
    frames: Tensor, target: Tensor, film: _Film, with_own: _Film, found: Mapping[str, float]
) -> dict[str, PIL.Image.Image]:
    """A row for `picture_grid`: the last frame."""
    last = slice(-1, None)
    largest = float(film.coc[last].abs().max())
    nearest = film.inverse_depth[last].max()
    return {
        "all in focus": as_picture(frames[last]),
        f"blur radius, white is {largest:.1f} px": as_picture(
            film.coc[last].abs() / max(largest, 1e-6)
        ),
        f"physics, {found['psnr_physics']:.1f} dB": as_picture(film.physics[last]),
        f"rendered, {found['psnr']:.1f} dB": as_picture(film.bokeh[last]),
        "ground truth": as_picture(target[last]),
        "1/depth": as_picture(film.inverse_depth[last] / nearest),
        "the network's own": as_picture(with_own.own[last] / nearest),
    }


def validation_line(scores: Mapping[str, Any]) -> str:
    """Return a line about the `scores` of `validate_flow` for people who watch."""
    parts = [
        f"PSNR {scores['psnr']:.2f} dB (physics {scores['psnr_physics']:.2f}, photograph as it is "
        f"{scores['psnr_identity']:.2f}, own depth {scores['psnr_own_depth']:.2f})"
    ]
    if "psnr_edges" in scores:
        parts.append(
            f"near depth edges {scores['psnr_edges']:.2f} (physics "
            f"{scores['psnr_edges_physics']:.2f})"
        )
    if "abs_rel" in scores:
        parts.append(f"AbsRel of depth {scores['abs_rel']:.3f}")
    if "warping_error" in scores:
        parts.append(
            f"warping error {scores['warping_error']:.5f} (each frame for itself "
            f"{scores['warping_error_single']:.5f}, true {scores['warping_error_target']:.5f})"
        )
    parts.append(f"more K blurs more in {scores.get('control', math.nan):.0%} of scenes")
    return "; ".join(parts)
