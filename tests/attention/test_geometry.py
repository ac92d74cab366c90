"""PisaGeometry: masks, distances, visibility, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bokehdiff.attention import PisaConfig, PisaGeometry, visibility
from bokehdiff.attention.visibility import jitter_table


def _visibility_by_the_book(geometry: PisaGeometry) -> Tensor:
    """Eq. 7-8 with loops over pairs, samples and rays, and the division the paper prints."""
    height, width, config = geometry.height, geometry.width, geometry.config
    assert geometry.occlusion_map is not None and geometry.token_disparity is not None
    scene = geometry.occlusion_map[0, 0].double()
    offsets = jitter_table(config).double()
    rows, columns = scene.shape

    def look_up(y: float, x: float) -> float:
        y, x = y * rows / height - 0.5, x * columns / width - 0.5
        top, left, value = math.floor(y), math.floor(x), 0.0
        for row in (top, top + 1):
            for column in (left, left + 1):
                if 0 <= row < rows and 0 <= column < columns:
                    weight = (1 - abs(y - row)) * (1 - abs(x - column))
                    value += weight * float(scene[row, column])
        return value

    visible = torch.zeros(height * width, height * width)
    for key in range(height * width):
        disparity = float(geometry.token_disparity[0, key])
        for query in range(height * width):
            source_y, source_x = key // width + 0.5, key % width + 0.5
            query_y, query_x = query // width + 0.5, query % width + 0.5
            arriving = 0
            for offset_x, offset_y in offsets.tolist():
                free = True
                for share in torch.linspace(0.1, 0.9, config.segments).tolist():
                    depth = share * disparity + 1 - share
                    t = (1 - depth) * disparity / ((1 - disparity) * depth)
                    y = t * (source_y + offset_y - query_y) + query_y
                    x = t * (source_x + offset_x - query_x) + query_x
                    free &= not look_up(y, x) > depth
                arriving += free
            if key == query:
                arriving = config.supersampling
            visible[query, key] = arriving / config.supersampling
    return visible


def test_visibility_follows_the_printed_equations() -> None:
    generator = torch.Generator().manual_seed(0)
    disparity = 0.6 * torch.rand(1, 1, 12, 18, generator=generator)
    disparity[:, :, 3:8, 6:10] = 0.95
    geometry = PisaGeometry.build(
        torch.full((1, 1, 4, 6), 3.0), disparity, config=PisaConfig(supersampling=3, segments=4)
    )
    expected = _visibility_by_the_book(geometry)
    assert 0.2 < expected.mean() < 0.9
    assert (geometry.visibility()[0] != expected).float().mean() <= 0.002


@pytest.mark.parametrize("preset", ["paper", "official_weights"])
def test_skipping_harmless_samples_changes_nothing(preset: str) -> None:
    generator = torch.Generator().manual_seed(1)
    disparity = 0.3 * torch.rand(1, 1, 20, 30, generator=generator)
    disparity[:, :, ::7, ::6] = 1.0
    geometry = PisaGeometry.build(
        torch.ones(1, 1, 10, 15), disparity, config=PisaConfig.preset(preset)
    )
    coc_of_pairs = geometry.log_soft_mask().mT[0] > -math.inf
    number = torch.arange(150)
    rays = geometry.visible_rays_of_pairs(number[:, None], number)
    quick = geometry.visible_rays_of_pairs(number[:, None], number, wanted=coc_of_pairs)
    assert (rays[coc_of_pairs] < geometry.config.supersampling).any()
    assert torch.equal(rays[coc_of_pairs], quick[coc_of_pairs])
    assert torch.equal(geometry.visible_share(rays), geometry.visibility()[0].mT)


@pytest.mark.parametrize("preset", ["paper", "official_weights"])
@pytest.mark.parametrize("supersampling", [1, 4])
@pytest.mark.parametrize("samples_per_token", [1, 2, 3])
def test_skipping_samples_with_nothing_near_changes_nothing(
    preset: str, supersampling: int, samples_per_token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, columns = 9 * samples_per_token, 14 * samples_per_token
    generator = torch.Generator().manual_seed(samples_per_token)
    disparity = 0.5 * torch.rand(1, 1, rows, columns, generator=generator)
    disparity[:, :, ::5, ::4] = 0.95
    config = PisaConfig.preset(
        preset,
        supersampling=supersampling,
        occlusion_map_scale=samples_per_token,
        sample_depth="key",
        resample_occlusion_map=False,
    )
    coc = torch.ones(1, 1, 9, 14)
    quick = PisaGeometry.build(coc, disparity, config=config).visibility()
    monkeypatch.setattr(
        visibility,
        "nearest_around_samples",
        lambda geometry: torch.full_like(geometry.occlusion_map[:, 0], math.inf),
    )
    assert torch.equal(quick, PisaGeometry.build(coc, disparity, config=config).visibility())
    assert 0.05 < quick.mean() < 0.95


@pytest.mark.parametrize("hardness", [1.0, 3.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mask_of_pairs_is_the_soft_mask(hardness: float, dtype: torch.dtype) -> None:
    """The fast way in place, and the function that states the equation, to the last rounding."""
    coc = 9 * torch.rand(2, 1, 12, 17, generator=torch.Generator().manual_seed(2), dtype=dtype)
    geometry = PisaGeometry.build(coc, hardness=hardness)
    number = torch.arange(2 * 204).view(2, 204)
    mask = geometry.log_mask_of_pairs(number[:, None], number[..., None], dtype)
    expected = geometry.log_soft_mask(dtype)
    assert torch.equal(mask.isinf(), expected.isinf()) and (hardness == 1 or mask.isinf().any())
    tolerance = 8 * torch.finfo(dtype).eps
    assert torch.allclose(mask, expected, rtol=tolerance, atol=tolerance)


def test_distance_units_of_the_presets() -> None:
    coc = torch.ones(1, 1, 8, 16)
    paper = PisaGeometry.build(coc)
    assert paper.distances()[0, 1] == pytest.approx(1.6)
    assert paper.distances()[0, 16] == pytest.approx(1.6)
    assert paper.radius[0, 0] == pytest.approx(1.6)
    weights = PisaGeometry.build(coc, config=PisaConfig.preset("official_weights"))
    assert weights.distances()[0, 1] == pytest.approx(51.2 / 31)
    exact = PisaGeometry.build(coc, config=PisaConfig.preset("official_exact"))
    assert exact.distances()[0, 16] == pytest.approx(7.314, abs=1e-3)
    assert exact.distances()[0, 1] == pytest.approx(3.413, abs=1e-3)


def test_authors_conditioning_means_the_same_radius() -> None:
    """20 pixels of radius are 2 of the authors' units, and 1.25 tokens of 16 pixels."""
    disp_coc = torch.full((1, 2, 64, 96), 0.5)
    disp_coc[:, 1] = 2.0
    paper = PisaGeometry.from_disp_coc(disp_coc, 4, 6, config=PisaConfig())
    assert torch.allclose(paper.radius, torch.tensor(1.25 * 1.6))
    exact = PisaGeometry.from_disp_coc(disp_coc, 4, 6, config=PisaConfig.preset("official_exact"))
    assert torch.allclose(exact.radius, torch.tensor(2.0))
    fine = PisaGeometry.from_disp_coc(disp_coc, 8, 12, config=PisaConfig())
    assert torch.allclose(fine.radius, torch.tensor(2.5 * 1.6))


def test_soft_mask_is_half_at_the_radius_and_zero_beyond_the_margin() -> None:
    geometry = PisaGeometry.build(torch.full((1, 1, 1, 12), 3.0))
    mask = geometry.log_soft_mask(torch.float64)[0, :, 0].exp()
    assert mask[3] == pytest.approx(0.5, abs=1e-5)
    assert mask[2] == pytest.approx(1.0, abs=1e-9) and mask[0] == pytest.approx(1.0)
    beyond = math.floor(3 + geometry.margin / geometry.spacing[1]) + 1
    assert (mask[beyond:] == 0).all() and mask[beyond - 1] > 0


def test_jitter_is_stratified_and_repeatable() -> None:
    table = jitter_table(PisaConfig(supersampling=33))
    assert torch.equal(table, jitter_table(PisaConfig(supersampling=33)))
    assert not torch.equal(table, jitter_table(PisaConfig(supersampling=33, seed=1)))
    assert (table[0] == 0).all() and table.abs().max() <= 0.5
    # 32 points in 4 x 4 cells: even, unlike random ones, which leave cells empty.
    cells = ((table[1:] + 0.5) * 4).floor().clamp(max=3)
    counts = (cells[:, 0] * 4 + cells[:, 1]).long().bincount(minlength=16)
    assert counts.min() >= 1 and counts.max() <= 4


def test_soft_start_leaves_a_hundredth_of_hidden_light() -> None:
    disparity = torch.zeros(1, 1, 8, 8)
    disparity[..., 4] = 1.0
    config = PisaConfig.preset("official_weights")
    coc = torch.ones(1, 1, 8, 8)
    assert PisaGeometry.build(coc, disparity, config=config).visibility().min() == 0
    soft = PisaGeometry.build(coc, disparity, config=config, hardness=1000)
    assert soft.visibility().min() == pytest.approx(0.01)


def test_segments_zero_switches_occlusion_off() -> None:
    disparity = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    geometry = PisaGeometry.build(torch.ones(1, 1, 8, 8), disparity, config=PisaConfig(segments=0))
    assert (geometry.visibility() == 1).all()


def test_moves_to_a_device_and_keeps_its_meaning() -> None:
    geometry = PisaGeometry.build(torch.ones(1, 1, 4, 4), torch.rand(1, 1, 4, 4))
    assert geometry.to("cpu") is geometry
    assert geometry.to("meta").radius.device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coc_tokens": -torch.ones(1, 1, 4, 4)}, "at least 0"),
        ({"coc_tokens": torch.ones(4, 4)}, r"shape \(B, 1, H, W\)"),
        ({"coc_tokens": torch.ones(1, 3, 4, 4)}, r"shape \(B, 1, H, W\)"),
        ({"coc_tokens": torch.full((1, 1, 4, 4), math.nan)}, "NaN"),
        ({"disparity": torch.full((1, 1, 4, 4), 1000.0)}, r"\[0, 1\] with 1 nearest"),
        ({"disparity": torch.full((1, 1, 4, 4), math.inf)}, "infinite"),
        ({"disparity": torch.rand(3, 1, 4, 4)}, "batch 3"),
        ({"emitters": torch.ones(1, 1, 4, 4)}, "must be bool"),
        ({"emitters": torch.ones(1, 1, 2, 2, dtype=torch.bool)}, "must be bool"),
        ({"hardness": 0.5}, "at least 1"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PisaGeometry.build(**{"coc_tokens": torch.ones(1, 1, 4, 4), **arguments})
