"""How well a refiner mends maps with mistakes of known size, and whether it leaves others alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from bokehdiff.images import pad_to_multiple
from bokehdiff.models.disparity_refiner import DisparityRefiner, tolerance_px
from bokehdiff.optics import signed_defocus

MISTAKES_PX = (2, 4, 8)
"""By so many pixels near things are shrunk, and grown."""


@torch.no_grad()
def refiner_scores(
    refiner: DisparityRefiner, scenes: Sequence[dict[str, Tensor]], device: torch.device
) -> dict[str, float]:
    """Return shares of the pixels of all scenes, in [0, 1], by name.

    - ``mended_2px``, ``_4px``, ``_8px``: of the pixels that are wrong when near things have shrunk
      (half of the maps) or grown by so much, those that are right again. Absent where none is.
    - ``spoilt_2px``, ``_4px``, ``_8px``: of the pixels that are right in these maps, those that are
      wrong afterwards.
    - ``spoilt_exact``: the same for the true map.

    A pixel is wrong if its defocus differs from the true one by more than
    :func:`~bokehdiff.models.disparity_refiner.tolerance_px`.

    Args:
        refiner: what is scored, on `device`.
        scenes: image (3, H, W), the true disparity (1, H, W), df () and K () of each.
    """
    # Training on maps as they are needs nothing of what makes scenes.
    from data_synthesis.corruption import eroded

    counts: Counter[str] = Counter()
    for scene in scenes:
        image, true = scene["image"][None], scene["disparity"][None]
        df, K = scene["df"].reshape(1), scene["K"].reshape(1)
        true_defocus = signed_defocus(true, df, K)
        tolerance = tolerance_px(true_defocus)[0]
        for pixels in (0, *MISTAKES_PX, *(-pixels for pixels in MISTAKES_PX)):
            disparity = torch.from_numpy(eroded(true[0, 0].numpy(), pixels))[None, None]
            maps = torch.cat([disparity, signed_defocus(disparity, df, K)], 1)
            seen = (pad_to_multiple(one, refiner.size_multiple)[0] for one in (image, maps))
            refined = refiner(*(one.to(device) for one in seen)).cpu()
            refined = refined[..., : maps.shape[-2], : maps.shape[-1]]
            wrong, still_wrong = (
                (one[:, 1:] - true_defocus).abs() > tolerance for one in (maps, refined)
            )
            name = f"{abs(pixels)}px" if pixels else "exact"
            counts[f"wrong_{name}"] += int(wrong.sum())
            counts[f"right_{name}"] += int((~wrong).sum())
            counts[f"mended_{name}"] += int((wrong & ~still_wrong).sum())
            counts[f"spoilt_{name}"] += int((~wrong & still_wrong).sum())
    names = [f"{pixels}px" for pixels in MISTAKES_PX]
    wanted = [("mended", "wrong", name) for name in names]
    wanted += [("spoilt", "right", name) for name in (*names, "exact")]
    return {
        f"{found}_{name}": counts[f"{found}_{name}"] / counts[f"{among}_{name}"]
        for found, among, name in wanted
        if counts[f"{among}_{name}"]
    }
