"""BokehFlow: sizes, physics, units, what is carried, files."""

from __future__ import annotations

import math

import pytest
import torch

from bokehdiff.models.bokehflow import VARIANTS, BokehFlowModel
from bokehdiff.models.bokehflow_lens import nominal_metres
from bokehdiff.optics import lens_strength, signed_defocus, strength_from_camera
from bokehdiff.rendering.gaussian_pyramid import gaussian_pyramid_blur, levels_for
from bokehdiff.srgb import linear_to_srgb, srgb_to_linear

PUBLISHED = {
    ("gated_conv", "nano"): 254_000,
    ("gated_conv", "small"): 1_160_000,
    ("gated_conv", "base"): 4_600_000,
    ("bigdr", "nano"): 1_200_000,
    ("bigdr", "small"): 4_800_000,
    ("bigdr", "base"): 12_300_000,
}
TINY = dict(channels=16, stem_channels=8, head_channels=8, camera_channels=8, blocks=2)
TINY_RECURRENT = dict(TINY, blocks=4, mixer="bigdr", heads=2, key_channels=4, value_channels=8)
KINDS = {
    "published": dict(TINY),
    "depth first": dict(TINY, fusion="depth_to_bokeh", radius_tokens=True),
    "recurrent": dict(TINY_RECURRENT),
    "recurrent, depth first": dict(TINY_RECURRENT, fusion="depth_to_bokeh"),
}
CAMERA = dict(f_number=2.0, focal_length_mm=50.0, focus_distance_m=2.0)


def photo(batch: int = 1, height: int = 40, width: int = 52, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def network(seed: int = 1, awake: bool = True, **options: object) -> BokehFlowModel:
    """A network; awake, nothing in it is zero any more."""
    torch.manual_seed(seed)
    model = BokehFlowModel(**options)
    if awake:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("mixer, variant", PUBLISHED)
def test_sizes_are_the_published_ones_within_three_percent(mixer: str, variant: str) -> None:
    with torch.device("meta"):
        model = BokehFlowModel.from_variant(variant, mixer)
    assert model.num_parameters() == pytest.approx(PUBLISHED[mixer, variant], rel=0.03)
    assert {name for sizes in VARIANTS.values() for name in sizes} == {"nano", "small", "base"}


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_it_is_the_physics_rendering(kind: str) -> None:
    model = network(awake=False, **KINDS[kind])
    image = photo(2)
    inverse_depth = torch.rand(2, 1, 40, 52, generator=torch.Generator().manual_seed(3))
    output = model(image, **CAMERA, inverse_depth=inverse_depth, return_physics=True)
    assert output.physics is not None
    assert (output.bokeh - output.physics).abs().max() == 0
    assert (output.bokeh - image).abs().max() > 0.05
    assert output.bokeh.shape == image.shape


def test_the_physics_is_the_renderer_with_the_radius_of_the_thin_lens() -> None:
    model = network(awake=False, **KINDS["published"], max_coc_radius=500.0)
    image, inverse_depth = photo(), torch.rand(1, 1, 40, 52)
    output = model(image, **CAMERA, inverse_depth=inverse_depth)
    K = strength_from_camera(**CAMERA, sensor_width_mm=36, image_width_px=52)
    radius = K * (inverse_depth - 0.5)
    assert (output.coc - radius).abs().max() < 1e-6
    levels = levels_for(500 * 52 / 1280)
    expected = linear_to_srgb(gaussian_pyramid_blur(srgb_to_linear(image), radius, levels=levels))
    assert (output.bokeh - expected).abs().max() < 1e-6
    assert (output.depth * output.inverse_depth - 1).abs().max() < 1e-5


def test_blur_and_forward_say_the_same() -> None:
    model = network(**KINDS["depth first"])
    image, inverse_depth = photo(), torch.rand(1, 1, 40, 52)
    by_camera = model(image, **CAMERA, inverse_depth=inverse_depth)
    K = strength_from_camera(**CAMERA, sensor_width_mm=36, image_width_px=52)
    by_strength = model.blur(image, 0.5, K, disparity=inverse_depth, metric=True)
    assert (by_camera.bokeh - by_strength.bokeh).abs().max() < 1e-5
    seen = model.observe(image)
    again = model.blur(seen, 0.5, K, disparity=inverse_depth, metric=True)
    assert torch.equal(again.bokeh, by_strength.bokeh)


def test_relative_disparity_keeps_its_radii() -> None:
    model = network(**KINDS["depth first"], max_coc_radius=500.0)
    image, disparity = photo(), torch.rand(1, 1, 40, 52)
    output = model.blur(image, 0.3, 12.0, disparity=disparity)
    assert (output.coc - 12 * (disparity - 0.3)).abs().max() < 1e-5
    rho, df, K = nominal_metres(disparity, torch.tensor(0.3), torch.tensor(12.0))
    assert torch.allclose(K * (rho - df), 12 * (disparity - 0.3), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_circle_reaches_stays_as_it_is(kind: str) -> None:
    model = network(**KINDS[kind])
    image = photo(1, 40, 128)
    same = model.blur(image, 0.5, 0.0, disparity=torch.rand(1, 1, 40, 128), metric=True)
    # Layers are blurred by transforms in float32, and near black sRGB is steep (12.92).
    rounding = 1e-6 if model.renderer == "pyramid" else 1e-5
    assert (same.bokeh - image).abs().max() < rounding
    # In focus on the left, blurred by 3 pixels on the right: circles reach 3 pixels, and reading
    # between tokens a token or two more.
    disparity = torch.full((1, 1, 40, 128), 0.5)
    disparity[..., 64:] = 0.2
    output = model.blur(image, 0.5, 10.0, disparity=disparity, metric=True, photo_width_px=1280)
    assert (output.bokeh - image)[..., :48].abs().max() < rounding
    assert (output.bokeh - image)[..., 70:].abs().max() > 0.02


def test_a_constant_picture_is_left_to_the_network_alone() -> None:
    """Whatever the depth, physics keeps a constant colour."""
    for renderer in ("pyramid", "binned", "layered"):
        model = network(awake=False, **KINDS["published"], renderer=renderer)
        inverse_depth = torch.rand(1, 1, 40, 52)
        output = model(torch.full((1, 3, 40, 52), 0.4), **CAMERA, inverse_depth=inverse_depth)
        assert (output.bokeh - 0.4).abs().max() < 1e-5, renderer


def test_large_circles_are_clamped_and_it_is_said() -> None:
    model = network(**KINDS["published"])
    inverse_depth = torch.full((2, 1, 40, 52), 0.5)
    inverse_depth[0, ..., :13] = 50.0
    output = model(photo(2), **CAMERA, inverse_depth=inverse_depth)
    largest = 31 * 52 / 1280
    assert output.coc[0].max() == pytest.approx(largest, rel=1e-6)
    assert output.clamped_share.tolist() == [0.25, 0.0]
    wider = model(photo(2), **CAMERA, inverse_depth=inverse_depth, photo_width_px=1280)
    assert wider.coc.max() == 31


def test_depth_lies_between_nearest_and_farthest_and_sees_no_lens() -> None:
    model = network(**KINDS["depth first"])
    image = photo()
    first, second = (model(image, f, 50.0, s) for f, s in ((1.4, 1.0), (8.0, math.inf)))
    assert torch.equal(first.depth, second.depth)
    assert float(first.depth.min()) >= 0.3 and float(first.depth.max()) <= 100.01
    published = network(**KINDS["published"])
    depths = [published(image, f, 50.0, 1.0).depth for f in (1.4, 16.0)]
    assert not torch.equal(*depths)
    assert published.observe(image).inverse_depth is None
    seen = model.observe(image)
    assert seen.inverse_depth is not None and torch.equal(seen.inverse_depth, first.inverse_depth)


@pytest.mark.parametrize("kind", KINDS)
def test_photos_of_a_batch_do_not_mix_and_any_size_is_kept(kind: str) -> None:
    model = network(**KINDS[kind])
    image = photo(2, 37, 45)
    together = model(image, 2.0, 50.0, [2.0, 5.0])
    alone = model(image[1:], 2.0, 50.0, 5.0)
    assert together.bokeh.shape == image.shape
    assert (together.bokeh[1:] - alone.bokeh).abs().max() < 1e-5
    assert (together.depth[1:] / alone.depth - 1).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_reached_by_a_gradient(kind: str) -> None:
    model = network(**KINDS[kind]).requires_grad_(True)
    image = photo(2)
    first = model(image, **CAMERA)
    second = model(image + 0.02 * photo(2, seed=5), **CAMERA, state=first.state)
    loss = second.bokeh.square().sum() + second.depth.log().sum()
    if second.coarse_inverse_depth is not None:
        loss = loss + second.coarse_inverse_depth.sum()
    loss.backward()
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not bool(parameter.grad.abs().sum() > 0)
    ]
    # Keys and queries of a recurrence may have no say yet; nothing else may be left out.
    assert not missing


def test_gradients_of_the_rendering_equal_differences() -> None:
    """With respect to depth, f-number, focal length and focus; float64, central differences."""
    image = photo(1, 24, 24).double()
    generator = torch.Generator().manual_seed(7)
    weight = torch.rand(1, 3, 24, 24, generator=generator, dtype=torch.float64)
    rho = torch.rand(1, 1, 24, 24, generator=generator, dtype=torch.float64)
    values = [torch.tensor([value], dtype=torch.float64) for value in (2.0, 50.0, 2.0)]

    def loss(rho: torch.Tensor, *camera: torch.Tensor) -> torch.Tensor:
        f_number, focal_length, focus = camera
        K = lens_strength(
            f_number, focal_length, focus, torch.full_like(focus, 36.0), torch.full_like(focus, 1e3)
        )
        light = gaussian_pyramid_blur(
            srgb_to_linear(image), signed_defocus(rho, 1 / focus, K), levels=5
        )
        return (linear_to_srgb(light) * weight).sum()

    inputs = [rho, *values]
    leaves = [one.clone().requires_grad_() for one in inputs]
    loss(*leaves).backward()
    for place, leaf in enumerate(leaves):
        direction = torch.rand(leaf.shape, generator=generator, dtype=torch.float64)
        step = 1e-6
        ends = []
        for sign in (1, -1):
            moved = list(inputs)
            moved[place] = inputs[place] + sign * step * direction
            ends.append(loss(*moved))
        difference = float(ends[0] - ends[1]) / (2 * step)
        assert leaf.grad is not None
        assert float((leaf.grad * direction).sum()) == pytest.approx(difference, rel=1e-4)


# -- Films ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_still_film_does_not_change(kind: str) -> None:
    model = network(**KINDS[kind])
    image = photo()
    first = model(image, **CAMERA)
    state = first.state
    for _ in range(3):
        output = model(image, **CAMERA, state=state)
        state = output.state
        assert (output.bokeh - first.bokeh).abs().max() <= 1e-6
        assert (output.inverse_depth - first.inverse_depth).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["published", "depth first"])
def test_noise_of_a_still_film_flickers_less(kind: str) -> None:
    model = network(**KINDS[kind])
    clean = 0.25 + 0.5 * photo(1, 40, 52, seed=2)
    noise = torch.Generator().manual_seed(11)
    frames = [clean + 0.03 * torch.randn(clean.shape, generator=noise) for _ in range(10)]
    alone = [model(frame, **CAMERA) for frame in frames]
    state, carried = None, []
    for frame in frames:
        output = model(frame, **CAMERA, state=state)
        state = output.state
        carried.append(output)
    for quantity in ("inverse_depth", "coc"):
        change = [
            sum(
                float((getattr(one, quantity) - getattr(other, quantity)).abs().mean())
                for one, other in zip(film[6:], film[5:], strict=False)
            )
            for film in (carried, alone)
        ]
        assert change[0] < 0.25 * change[1], quantity


def test_a_cut_and_another_lens_are_not_carried() -> None:
    model = network(**KINDS["depth first"])
    before, after = photo(seed=1), photo(seed=2) ** 3
    state = model(before, **CAMERA).state
    assert torch.equal(model(after, **CAMERA, state=state).bokeh, model(after, **CAMERA).bokeh)
    # Another focus: depth is carried, the blur is not.
    noisy = (before + 0.01 * photo(seed=5)).clamp(0, 1)
    other = dict(CAMERA, focus_distance_m=1.0)
    carried, alone = model(noisy, **other, state=state), model(noisy, **other)
    assert not torch.equal(carried.inverse_depth, alone.inverse_depth)
    assert torch.equal(
        model(noisy, **other, state=state, inverse_depth=alone.inverse_depth).bokeh,
        model(noisy, **other, inverse_depth=alone.inverse_depth).bokeh,
    )


def test_what_moves_is_not_carried_and_what_stands_is() -> None:
    model = network(**KINDS["depth first"])
    first = 0.3 + 0.2 * photo(1, 64, 128)
    second = first.clone()
    second[..., 16:48, 8:40] = photo(1, 32, 32, seed=9)
    state = model(first, **CAMERA).state
    seen = model.observe(second, state=state)
    assert seen.change is not None
    stillness = model.stillness(seen.change)[0, 0]
    assert float(stillness[6:10, 4:8].max()) < 0.1
    assert float(stillness[:, 24:].min()) > 0.8


def test_a_state_of_another_film_is_refused() -> None:
    model = network(**KINDS["published"])
    state = model(photo(), **CAMERA).state
    with pytest.raises(ValueError, match="begin with state=None"):
        model(photo(1, 48, 52), **CAMERA, state=state)
    with pytest.raises(ValueError, match="state goes with observe"):
        model.blur(model.observe(photo()), 0.5, 1.0, state=state)


def test_a_state_has_the_size_of_some_frames_and_no_graph() -> None:
    model = network(**KINDS["depth first"])
    state = model(photo(), **CAMERA).state
    sizes = {name: tuple(tensor.shape) for name, tensor in state.tensors().items()}
    assert sizes == {
        "picture": (1, 3, 20, 26),
        "depth_features": (1, 16, 10, 13),
        "bokeh_features": (1, 16, 10, 13),
        "bokeh": (1, 3, 40, 52),
        "lens": (1, 5),
    }
    assert all(not tensor.requires_grad for tensor in state.detach().tensors().values())
    assert state.to(torch.float64).picture.dtype == torch.float64


@pytest.mark.parametrize("temporal", ["final", "chunk"])
def test_states_of_a_recurrence_are_carried_when_asked(temporal: str) -> None:
    model = network(**TINY_RECURRENT, temporal=temporal)
    frames = [photo(seed=1), (photo(seed=1) + 0.05 * photo(seed=2)).clamp(0, 1)]
    first = model(frames[0], **CAMERA)
    assert first.state.memories
    second = model(frames[1], **CAMERA, state=first.state)
    assert not torch.equal(second.depth, model(frames[1], **CAMERA).depth)


# -- Files and mistakes ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(kind: str, tmp_path) -> None:
    model = network(**KINDS[kind])
    model.save_pretrained(tmp_path)
    loaded = BokehFlowModel.from_pretrained(tmp_path)
    assert loaded.config.items() >= KINDS[kind].items()
    for (name, one), other in zip(
        loaded.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    # Weights that lie elsewhere in memory may be summed in another order.
    change = loaded(photo(), **CAMERA).bokeh - model(photo(), **CAMERA).bokeh
    assert change.abs().max() < 1e-6


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(f_number=0.0), "f_number is"),
        (dict(focal_length_mm=-1.0), "focal_length_mm is"),
        (dict(focus_distance_m=0.05), "no lens forms an image"),
        (dict(focus_distance_m=float("nan")), "focus_distance_m is"),
        (dict(f_number=[1.0, 2.0, 3.0]), "3 values for 1 photos"),
        (dict(f_number="f/2"), "wanted a number"),
        (dict(inverse_depth=torch.zeros(1, 1, 4, 4)), "The inverse depth is"),
        (dict(image=torch.zeros(3, 40, 52)), "wanted \\(B, 3, H, W\\)"),
        (dict(image=torch.zeros(1, 3, 8, 52)), "at least 16"),
        (dict(image=torch.zeros(1, 3, 40, 52, dtype=torch.uint8)), "floats"),
    ],
)
def test_mistakes_are_refused(change: dict, sentence: str) -> None:
    model = network(**KINDS["published"])
    with pytest.raises(ValueError, match=sentence):
        model(**{"image": photo(), **CAMERA, **change})


def test_an_aperture_needs_a_renderer_that_has_one() -> None:
    from bokehdiff.rendering import Aperture

    hexagon = Aperture(blades=6)
    with pytest.raises(ValueError, match="no aperture"):
        network(**KINDS["published"])(photo(), **CAMERA, aperture=hexagon)
    layered = network(awake=False, **KINDS["published"], renderer="layered")
    inverse_depth = torch.full((1, 1, 40, 52), 0.0)
    round_, six = (
        layered(photo(), **CAMERA, inverse_depth=inverse_depth, photo_width_px=900, aperture=one)
        for one in (None, hexagon)
    )
    assert (round_.bokeh - six.bokeh).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(mixer="attention"), "mixer is"),
        (dict(fusion="none"), "fusion is"),
        (dict(renderer="gaussian"), "renderer is"),
        (dict(temporal="always"), "temporal is"),
        (dict(channels=20), "multiple of 8"),
        (dict(radius_tokens=True), "radius_tokens needs"),
        (dict(temporal="final"), "state of a recurrence"),
    ],
)
def test_options_that_do_not_exist_are_refused(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        BokehFlowModel(**{**TINY, **options})


def test_sizes_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="There is no 'large'"):
        BokehFlowModel.from_variant("large")


@pytest.mark.parametrize("field, value", [("df", -0.1), ("K", -2.0)])
def test_negative_focus_and_strength_are_refused(field: str, value: float) -> None:
    settings = {"df": 0.5, "K": 2.0, field: value}
    with pytest.raises(ValueError, match="neither below zero"):
        network(**KINDS["published"]).blur(photo(), **settings)
