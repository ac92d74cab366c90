"""Disparity that flickers from frame to frame, steadied, on films whose depth is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bokehdiff.steady_depth import SteadyDepth

HEIGHT, WIDTH, RATE = 72, 96, 25.0


class FlickeringFilm:
    """A textured thing at 0.8 that moves before a bumpy wall, and maps as a network answers them.

    Args:
        move: pixels per frame.
        grain: standard deviation of the noise of photos.
        scale, noise: of the maps: how much their scale and offset change, and smooth noise.
    """

    def __init__(
        self, move: int, grain: float = 0.01, scale: float = 0.08, noise: float = 0.03
    ) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.move, self.grain, self.scale, self.noise = move, grain, scale, noise
        cells = torch.rand(1, 3, HEIGHT // 2, WIDTH // 2, generator=self.random)
        self.photo = F.interpolate(cells, (HEIGHT, WIDTH))
        bumps = torch.rand(1, 1, 4, 4, generator=self.random)
        bumps = F.interpolate(bumps, (HEIGHT, WIDTH), mode="bicubic").clamp(0, 1)
        self.wall = 0.1 + 0.4 * bumps
        thing = torch.rand(1, 3, 12, 12, generator=self.random)
        self.thing = F.interpolate(thing, (24, 24))

    def thing_at(self, number: int) -> tuple[slice, slice]:
        left = 10 + self.move * number % (WIDTH - 40)
        return slice(20, 44), slice(left, left + 24)

    def frame(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(photo, map as answered, true map)."""
        rows, columns = self.thing_at(number)
        photo, true = self.photo.clone(), self.wall.clone()
        photo[..., rows, columns], true[..., rows, columns] = self.thing, 0.8
        scale, offset = torch.randn(2, generator=self.random)
        blobs = torch.randn(1, 1, HEIGHT // 4, WIDTH // 4, generator=self.random)
        blobs = F.interpolate(blobs, (HEIGHT, WIDTH), mode="bilinear")
        answer = (1 + self.scale * scale) * true + self.scale / 2 * offset + self.noise * blobs
        grain = self.grain * torch.randn(photo.shape, generator=self.random)
        return (photo + grain).clamp(0, 1), answer.clamp(0, 1), true


def steadied(film: FlickeringFilm, frames: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(steady, answered, true) maps, (T, 1, H, W) each."""
    steady_depth = SteadyDepth()
    maps = []
    for number in range(frames):
        photo, answer, true = film.frame(number)
        maps.append((steady_depth(answer, photo, 1 / RATE), answer, true))
    steady, answers, trues = (torch.cat(one) for one in zip(*maps, strict=True))
    return steady, answers, trues


def flicker(maps: torch.Tensor, true: torch.Tensor) -> float:
    """Mean change between frames beyond that of the scene."""
    return float((maps.diff(dim=0) - true.diff(dim=0))[10:].abs().mean())


def error(maps: torch.Tensor, true: torch.Tensor) -> float:
    """Mean error after the best scale and offset of each frame."""
    errors = []
    for one, other in zip(maps[10:], true[10:], strict=True):
        columns = torch.stack([one.flatten(), torch.ones(one.numel())], dim=1)
        best = torch.linalg.lstsq(columns, other.flatten()[:, None]).solution
        errors.append((columns @ best - other.flatten()[:, None]).abs().mean())
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize(("move", "calmer"), [(0, 12), (1, 6), (2, 6)])
def test_flicker_falls_and_what_moves_keeps_its_depth(move: int, calmer: float) -> None:
    steady, answers, true = steadied(FlickeringFilm(move), 50)
    assert calmer * flicker(steady, true) < flicker(answers, true)
    assert 2 * error(steady, true) < error(answers, true)


def test_a_film_does_not_lose_its_depth() -> None:
    steady, _, true = steadied(FlickeringFilm(0), 300)
    for number in (100, 200, 299):
        assert 0.8 < float(steady[number].std() / true[number].std()) < 1.25


def test_what_moves_leaves_no_ghost() -> None:
    film = FlickeringFilm(2, grain=0.0, scale=0.0, noise=0.0)
    steady, _, true = steadied(film, 20)
    assert (steady - true).abs().max() < 1e-3


def test_what_does_not_change_stays_and_a_cut_starts_anew() -> None:
    film = FlickeringFilm(0)
    photo, answer, true = film.frame(0)
    steady_depth = SteadyDepth()
    first = steady_depth(answer, photo, 0.04)
    assert torch.equal(first, answer)
    assert (steady_depth(answer, photo, 0.04) - first).abs().max() < 1e-6
    steady_depth.reset()
    assert torch.equal(steady_depth(1 - true, 1 - photo, 0.04), 1 - true)


def test_a_moving_camera_loses_neither_scale_nor_detail() -> None:
    random = torch.Generator().manual_seed(0)
    wide = F.interpolate(torch.rand(1, 3, 36, 120, generator=random), (HEIGHT, 240))
    depth = F.interpolate(torch.rand(1, 1, 5, 14, generator=random), (HEIGHT, 240), mode="bilinear")
    steady_depth = SteadyDepth()
    answers, steady, true = [], [], []
    for number in range(40):
        view = slice(3 * number, 3 * number + WIDTH)
        scale = 1 - 0.1 * float(torch.rand((), generator=random))
        answers.append(scale * depth[..., view])
        steady.append(steady_depth(answers[-1], wide[..., view], 1 / RATE))
        true.append(depth[..., view])
    found, raw, exact = (torch.cat(one) for one in (steady, answers, true))
    assert 5 * flicker(found, exact) < flicker(raw, exact)
    assert error(found, exact) < 1e-3
    assert 0.9 < float(found[-1].std() / exact[-1].std()) < 1.02


def test_metric_maps_keep_their_unit() -> None:
    film = FlickeringFilm(0, scale=0.0, noise=0.0)
    photo, _, true = film.frame(0)
    steady_depth = SteadyDepth(metric=True)
    steady_depth(5 * true, photo, 0.04)
    steady = steady_depth(5.2 * true, film.frame(1)[0], 0.04)
    assert float(steady.max()) > 3.9 and (steady - 5 * true).abs().max() < 0.1


def test_it_goes_on_from_its_state() -> None:
    film = FlickeringFilm(1)
    frames = [film.frame(number) for number in range(12)]
    whole, first, second = SteadyDepth(), SteadyDepth(), SteadyDepth()
    expected = [whole(answer, photo, 0.04) for photo, answer, _ in frames]
    for photo, answer, _ in frames[:7]:
        first(answer, photo, 0.04)
    second.load_state_dict(first.state_dict())
    for number in range(7, 12):
        photo, answer, _ = frames[number]
        assert torch.equal(second(answer, photo, 0.04), expected[number])
    assert SteadyDepth().state_dict() == {}


def test_maps_and_photos_have_to_fit() -> None:
    photo, answer, _ = FlickeringFilm(0).frame(0)
    steady_depth = SteadyDepth()
    with pytest.raises(ValueError, match="wanted"):
        steady_depth(answer[..., 1:], photo, 0.04)
    steady_depth(answer, photo, 0.04)
    with pytest.raises(ValueError, match="one size"):
        steady_depth(answer[..., 1:], photo[..., 1:], 0.04)


def test_a_real_film_becomes_calmer(shared_root: Path) -> None:
    folder = shared_root / "data" / "video" / "a2b_couple"
    if not folder.is_dir():
        pytest.skip(f"no film at {folder}")
    from bokehdiff.images import read_disparity, read_image

    steady_depth = SteadyDepth()
    random = torch.Generator().manual_seed(0)
    answers, steady = [], []
    for file in sorted(folder.glob("???.jpg")):
        photo = F.interpolate(read_image(file), (180, 320), mode="area")
        disparity = read_disparity(folder / f"{file.stem}_disp.png").reshape(1, 1, *_size(file))
        true = F.interpolate(disparity, (180, 320), mode="area")
        low, high = torch.rand(2, generator=random) * 0.1
        answers.append(((1 - low - high) * true + low).clamp(0, 1))
        steady.append(steady_depth(answers[-1], photo, 1 / RATE))
    raw, found = torch.cat(answers), torch.cat(steady)
    assert found.diff(dim=0)[1:].abs().mean() < 0.5 * raw.diff(dim=0)[1:].abs().mean()


def _size(file: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(file) as picture:
        return picture.height, picture.width
