"""Boosted highlights: lamps get light back, everything else stays as it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bokehdiff.images import linear_to_srgb, srgb_to_linear
from bokehdiff.rendering import Aperture, depth_ordered_scatter
from bokehdiff.rendering.highlights import HighlightBoost, recover_highlights
from evaluation.metrics import psnr

HEIGHT, WIDTH = 120, 200
DARK = 0.3
"""Display-encoded level of the surroundings."""


def picture(level: float = DARK, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    return torch.full((1, 3, height, width), level)


def factor(photo: torch.Tensor, boost: HighlightBoost | None = None) -> torch.Tensor:
    """(H, W) by which the light of a picture without black was multiplied."""
    light = recover_highlights(photo, boost or HighlightBoost())
    return (light / srgb_to_linear(photo))[0].mean(0)


def test_what_is_not_clipped_is_only_decoded():
    photo = 0.97 * torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(recover_highlights(photo, HighlightBoost()), srgb_to_linear(photo))


def test_a_gain_of_one_only_decodes():
    photo = torch.rand(1, 3, 40, 50, generator=torch.Generator().manual_seed(0)).round()
    assert torch.equal(recover_highlights(photo, HighlightBoost(gain=1)), srgb_to_linear(photo))


def test_a_lamp_gets_what_the_formula_says():
    photo = picture()
    photo[..., 60:63, 100:103] = 1.0
    # 2 % of 200 px: the neighbourhood is 9 x 9, and 9 of its 81 pixels are clipped. All that is
    # bright is clipped.
    wanted = 1 + 23 * (1 - 9 / 81 / 0.5)
    found = factor(photo)
    assert found[60:63, 100:103] == pytest.approx(torch.full((3, 3), wanted), rel=1e-5)
    found[60:63, 100:103] = 1
    assert torch.equal(found, torch.ones(HEIGHT, WIDTH))


def test_a_pixel_counts_in_full_halfway_from_the_threshold_to_white():
    boost = HighlightBoost(threshold=0.9, gain=11)
    whole, half = picture(), picture()
    whole[..., 60, 100], half[..., 60, 100] = 0.95, 0.925
    assert float(factor(whole, boost)[60, 100]) == pytest.approx(1 + 10 * (1 - 1 / 81 / 0.5))
    # Half a clipped pixel in a bright one: half of what is bright is clipped, which is no lamp.
    assert float(factor(half, boost)[60, 100]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "what",
    ["wall", "sky", "paper with lines", "snow", "red paint", "lamp on a white wall"],
)
def test_other_white_things_are_left_alone(what):
    photo = picture()
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    if what == "wall":
        photo[..., 30:90, 50:150] = 1.0
    elif what == "sky":
        photo[..., :50, :] = 1.0
    elif what == "paper with lines":
        photo[..., 30:90, 50:150] = 1.0
        photo[..., 34:86:6, 54:146] = 0.2
    elif what == "snow":  # a small clipped patch that fades into its shaded surroundings
        distance = ((x - 100) ** 2 + (y - 60) ** 2).sqrt()
        photo[:] = (1.1 - 0.05 * distance).clamp(DARK, 1)
    elif what == "red paint":
        photo[:, 0, 58:62, 98:102] = 1.0
    else:
        photo[:] = 0.93
        photo[..., 58:62, 98:102] = 1.0
    assert factor(photo) == pytest.approx(torch.ones(HEIGHT, WIDTH), abs=1e-5)


def test_a_lamp_keeps_its_colour():
    photo = picture()
    photo[0, :, 60:63, 100:103] = torch.tensor([1.0, 1.0, 0.6])[:, None, None]
    lamp = recover_highlights(photo, HighlightBoost())[0, :, 61, 101]
    plain = srgb_to_linear(photo)[0, :, 61, 101]
    assert lamp.min() > 5
    assert torch.allclose(lamp / lamp.max(), plain / plain.max())


def test_the_resolution_hardly_matters():
    small = picture()
    small[..., 60:64, 100:104] = 1.0
    small[..., 20:40, :60] = 1.0
    large = F.interpolate(small, scale_factor=2.0, mode="nearest")
    wanted = F.interpolate(factor(small)[None, None], scale_factor=2.0, mode="nearest")[0, 0]
    # The neighbourhood has an odd side, so twice the picture has not quite twice the side:
    # 9 and 17 pixels; 16 / 81 and 64 / 289 of them are clipped.
    assert float((factor(large) - wanted).abs().max()) < 23 * 2 * abs(16 / 81 - 64 / 289) + 1e-3


def test_pictures_of_a_batch_do_not_touch():
    lit = picture()
    lit[..., 60:63, 100:103] = 1.0
    both = torch.cat([lit, picture(0.9)])
    together = recover_highlights(both, HighlightBoost())
    for index, alone in enumerate(both.split(1)):
        assert torch.equal(together[index], recover_highlights(alone, HighlightBoost())[0])


def test_the_gradient_is_that_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    photo = 0.2 + 0.3 * torch.rand(1, 3, 12, 14, generator=generator, dtype=torch.float64)
    photo[..., 5:7, 6:8] = 0.91 + 0.03 * torch.rand(1, 3, 2, 2, generator=generator)
    boost = HighlightBoost(threshold=0.9, gain=5)
    photo.requires_grad_()
    assert (recover_highlights(photo, boost) > 1).any(), "something is boosted"
    assert torch.autograd.gradcheck(lambda given: recover_highlights(given, boost), photo)


def test_a_blurred_lamp_is_the_disc_that_the_lens_would_have_shown():
    """Lamps of known light: cut off, recovered, blurred, and compared with the truth."""
    generator = torch.Generator().manual_seed(0)
    light = 0.1 * torch.rand(1, 3, HEIGHT, WIDTH, generator=generator)
    for row, column, brightness in [(20, 30, 10.0), (70, 60, 24.0), (50, 150, 50.0)]:
        light[..., row : row + 3, column : column + 3] = brightness
    kernel = Aperture().kernel(-9.0)[None, None].expand(3, 1, -1, -1)

    def shown(given: torch.Tensor) -> torch.Tensor:
        blurred = F.conv2d(given, kernel, padding=kernel.shape[-1] // 2, groups=3)
        return linear_to_srgb(blurred.clamp(0, 1))

    photo = linear_to_srgb(light.clamp(0, 1))
    truth = shown(light)
    plain = psnr(float((shown(srgb_to_linear(photo)) - truth).square().mean()))
    boosted = shown(recover_highlights(photo, HighlightBoost()))
    assert psnr(float((boosted - truth).square().mean())) > plain + 6


@pytest.mark.parametrize(
    ("scene", "smallest_gain"), [("s01", 6.0), ("s06", -0.05)], ids=["lamps", "snow, no lamps"]
)
def test_on_the_ray_traced_benchmark(shared_root, scene, smallest_gain):
    """PSNR over all pixels that the boost gains with the scatter."""
    from evaluation.datasets import open_dataset

    data = shared_root / "bench" / "raytraced" / "data"
    if not data.is_dir():
        pytest.skip(f"no ray-traced benchmark at {data}")
    (photograph,) = (
        given
        for given in open_dataset("raytraced", data, [scene]).photographs()
        if given.setting == "f0_r14"
    )
    photo = torch.from_numpy(photograph.image.copy()).permute(2, 0, 1)[None] / 255
    truth = torch.from_numpy(photograph.truth.copy()).permute(2, 0, 1)[None] / 255
    defocus = photograph.K * (torch.from_numpy(photograph.disparity) - photograph.df)[None, None]
    figures = []
    for light in (srgb_to_linear(photo), recover_highlights(photo, HighlightBoost())):
        blurred = linear_to_srgb(depth_ordered_scatter(light, defocus)).clamp(0, 1)
        figures.append(psnr(float((blurred - truth).square().mean())))
    assert figures[1] - figures[0] >= smallest_gain


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"threshold": 0.0}, r"threshold is 0\.0; wanted .* between 0 and 1, for instance 0\.985"),
        ({"threshold": 1.0}, r"threshold is 1\.0"),
        ({"threshold": float("nan")}, r"threshold is nan"),
        ({"gain": 0.5}, r"gain is 0\.5; wanted .* 1 or more, for instance 24"),
        ({"gain": float("inf")}, r"gain is inf"),
    ],
)
def test_mistakes(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        HighlightBoost(**settings)


def test_another_shape():
    with pytest.raises(ValueError, match=r"photo has shape \(3, 4, 5\); wanted \(B, 3, H, W\)"):
        recover_highlights(torch.rand(3, 4, 5), HighlightBoost())
