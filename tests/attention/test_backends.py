"""All backends of PISA against the dense reference in float64, and what is promised of each.

What one backend promises alone is checked in the file of its name, and Triton's kernels, which need
a GPU or an interpreter, in test_triton.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bokehdiff.attention import (
    PisaConfig,
    PisaContext,
    PisaGeometry,
    available_backends,
    explain,
    pisa_attention,
)
from bokehdiff.attention import local as local_module
from bokehdiff.attention import stream as stream_module
from bokehdiff.attention import triton as triton_module
from bokehdiff.attention.backends import NAMES, Backend
from bokehdiff.attention.tiles import TileGroup
from tests import test_goldens_pisa as recordings

BACKENDS: tuple[Backend, ...] = ("stream", "local", "flex")
"""The backends that compute on a CPU in this process, besides the reference."""
EXACT_BACKENDS: tuple[Backend, ...] = ("stream", "local")
"""Those with a backward pass of their own, for float32 and float64; flex takes that of local."""

NAMES_OF_RESULTS = ("output", "gradient of q", "gradient of k", "gradient of v",
                    "gradient of the radius")  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def _scene(
    height: int,
    width: int,
    radius: float,
    *,
    images: int = 1,
    occlusion: bool = True,
    emitters: float | None = None,
    config: PisaConfig | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> PisaGeometry:
    """Random circles up to a radius in tokens, and near specks over a far ground.

    Args:
        height, width: the token grid.
        radius: the largest; the first token of each image has it.
        images: of the geometry.
        occlusion: whether there is a disparity map.
        emitters: share of the tokens that emit; None for all.
        config: settings.
        dtype: of the circles, which ask for a gradient.
        seed: of everything random.
        options: of `PisaGeometry.build`.
    """
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(images, 1, height, width, generator=generator)
    share.flatten(1)[:, 0] = 1.0
    disparity = 0.4 * torch.rand(images, 1, 2 * height, 2 * width, generator=generator)
    disparity[:, :, ::7, ::5] = 1.0
    emits = torch.rand(share.shape, generator=generator)
    return PisaGeometry.build(
        (radius * share).to(dtype).requires_grad_(),
        disparity.to(dtype) if occlusion else None,
        emitters=None if emitters is None else emits < emitters,
        config=config,
        **options,
    )


def _inputs(
    geometry: PisaGeometry,
    *,
    batch: int | None = None,
    heads: int = 2,
    channels: int = 8,
    value_channels: int = 6,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> list[Tensor]:
    """q, k, v and the gradient of the output, of standard deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    shape = (geometry.batch if batch is None else batch, heads, geometry.token_count)
    return [
        torch.randn(*shape, size, generator=generator, dtype=torch.float64).to(dtype)
        for size in (channels, channels, value_channels, value_channels)
    ]


def _results(
    geometry: PisaGeometry, inputs: list[Tensor], backend: Backend, scale: float | None = None
) -> list[Tensor]:
    """Output, and gradients of q, k, v and radius, in the order of `NAMES_OF_RESULTS`."""
    *tensors, grad_out = inputs
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out = pisa_attention(*tensors, geometry, backend=backend, scale=scale)  # type: ignore
    gradients = torch.autograd.grad(out, [*tensors, geometry.radius], grad_out.to(out.dtype))
    return [out.detach(), *gradients]


def _exact(
    geometry: PisaGeometry, inputs: list[Tensor], scale: float | None = None
) -> list[Tensor]:
    """`_results` of the reference in float64."""
    return _results(geometry, [tensor.double() for tensor in inputs], "reference", scale)


def _errors(
    found: list[Tensor], expected: list[Tensor], sizes: dict[str, float] | None = None
) -> dict[str, float]:
    """The largest error of each result, relative to its largest value; NaN is infinitely wrong.

    `sizes`, of what the results are sums of, count in place of the largest value where larger.
    """
    errors = {}
    for name, one, other in zip(NAMES_OF_RESULTS, found, expected, strict=True):
        assert one.shape == other.shape, name
        error = float((one.double() - other.double()).abs().nan_to_num(nan=torch.inf).max())
        largest = max(float(other.double().abs().max()), (sizes or {}).get(name, 0.0))
        errors[name] = error / largest if error else 0.0
    return errors


def _sizes(geometry: PisaGeometry, inputs: list[Tensor], scale: float | None) -> dict[str, float]:
    """How large the terms are that the results are sums of.

    The gradients of q, k and radius are differences of such terms, and vanish where every token
    keeps its light.
    """
    q, k, v, grad_out = (tensor.double() for tensor in inputs)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    of_pairs = float((grad_out @ v.mT).abs().max())
    planes = q.shape[0] * q.shape[1] / geometry.batch
    sizes = (
        float(v.abs().max()),
        of_pairs * scale * float(k.abs().max()),
        of_pairs * scale * float(q.abs().max()),
        float(grad_out.abs().max()),
        of_pairs * geometry.slope * planes,
    )
    return dict(zip(NAMES_OF_RESULTS, sizes, strict=True))


# -- any scene -------------------------------------------------------------------------------------

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half of the last place, relative to the number: what is lost when a result is rounded."""

TOLERANCE_FLOAT64 = 1e-11
"""Inputs of order 1 lose 1e-15 in each of some hundred sums, and the circle's edge, a slope of 14
to 16 per unit of radius, multifold that; visibility is the same, for the same rays are traced."""
TOLERANCE_FLOAT32 = 2e-6
"""Logits of a few units and log C at the edge of a circle of 40 units are rounded to 4e-7 to 3e-5;
the latter for few of many tokens. Rays are those of the map's dtype, so visibility is the same."""
TOLERANCE_FLEX = {
    torch.float64: 1e-6,  # its table of log C and log M is float32
    torch.float32: 2e-6,
    torch.float16: 3e-3,  # weights, their mean, and the table are rounded to 11 bits
    torch.bfloat16: 2e-2,  # weights and their mean are rounded to 8 bits
}


@st.composite
def _scenes(draw: st.DrawFn, largest_side: int) -> dict[str, Any]:
    return {
        "height": draw(st.integers(1, largest_side)),
        "width": draw(st.integers(1, largest_side)),
        "images": draw(st.integers(1, 2)),
        "batch": draw(st.integers(1, 2)),
        "heads": draw(st.integers(1, 3)),
        "channels": draw(st.integers(1, 40)),
        "value_channels": draw(st.integers(1, 40)),
        "radius": draw(st.one_of(st.just(0.0), st.floats(0.0, 4.0), st.floats(0.0, 30.0))),
        "hardness": draw(st.one_of(st.sampled_from([1.0, 1e6]), st.floats(1.0, 100.0))),
        "occlusion": draw(st.booleans()),
        "emitters": draw(st.sampled_from([None, 0.0, 0.05, 0.5])),
        "supersampling": draw(st.integers(1, 3)),
        "dtype": draw(
            st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
        ),
        "scale": draw(st.sampled_from([None, 0.1, 1.0])),
        "preset": draw(st.sampled_from(["paper", "official_weights"])),
        "seed": draw(st.integers(0, 1000)),
    }


PROPERTIES = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def _check_any_scene(scene: dict[str, Any], backends: tuple[Backend, ...]) -> None:
    dtype, scale = scene["dtype"], scene["scale"]
    geometry = _scene(
        scene["height"],
        scene["width"],
        scene["radius"],
        images=scene["images"],
        occlusion=scene["occlusion"],
        emitters=scene["emitters"],
        config=PisaConfig.preset(scene["preset"], supersampling=scene["supersampling"]),
        hardness=scene["hardness"],
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        seed=scene["seed"],
    )
    inputs = _inputs(
        geometry,
        # A geometry of one image serves a batch of any size, one of two images only their own.
        batch=scene["batch"] if scene["images"] == 1 else None,
        heads=scene["heads"],
        channels=scene["channels"],
        value_channels=scene["value_channels"],
        dtype=dtype,
        seed=scene["seed"] + 1,
    )
    expected, sizes = _exact(geometry, inputs, scale), _sizes(geometry, inputs, scale)
    found = {backend: _results(geometry, inputs, backend, scale) for backend in backends}
    for backend, results in found.items():
        assert [result.dtype for result in results] == [*[dtype] * 4, geometry.radius.dtype]
        for name, error in _errors(results, expected, sizes).items():
            allowed = TOLERANCE_FLOAT64 if dtype == torch.float64 else TOLERANCE_FLOAT32
            if name != "gradient of the radius":
                allowed += ROUNDING.get(dtype, 0.0)
            if backend == "flex" and name == "output":
                allowed = TOLERANCE_FLEX[dtype]
            assert error <= allowed, (backend, name, error)
    if "flex" in found:  # it has no backward pass, and takes that of local
        assert all(map(torch.equal, found["flex"][1:], found["local"][1:]))


@settings(PROPERTIES, max_examples=150)
@given(scene=_scenes(largest_side=20))
def test_stream_and_local_agree_with_the_reference_for_any_scene(scene: dict[str, Any]) -> None:
    """Outputs and gradients, in every precision. No outlier is excused: the rays are the same."""
    _check_any_scene(scene, EXACT_BACKENDS)


@settings(PROPERTIES, max_examples=16)
@given(scene=_scenes(largest_side=12))
def test_flex_agrees_with_the_reference_for_any_scene(scene: dict[str, Any]) -> None:
    """Few scenes: every new shape is traced by the compiler, even where nothing is compiled."""
    torch._dynamo.reset()
    _check_any_scene(scene, ("local", "flex"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens_apart", [1, 2, 5, 8])
def test_tokens_on_the_very_edge_of_the_cutoff_do_not_matter(
    backend: Backend, tokens_apart: int
) -> None:
    """Circles whose cutoff falls on tokens: rounding decides whether C is 1e-12 or 0 there."""
    config = PisaConfig()
    assert config.hardness == 1e6 and config.cutoff == 1e-12  # two units beyond the radius
    radius = tokens_apart - 2 / 1.6
    coc = torch.full((1, 1, 13, 17), max(radius, 0.0), dtype=torch.float64)
    geometry = PisaGeometry.build(coc.requires_grad_())
    inputs = _inputs(geometry, dtype=torch.float64)
    sizes = _sizes(geometry, inputs, None)
    errors = _errors(_results(geometry, inputs, backend), _exact(geometry, inputs), sizes)
    # Logits here differ by less than 8, and a pair more or less weighs exp(8) of its C.
    allowed = TOLERANCE_FLEX[torch.float64] if backend == "flex" else 1e-12 * 3000 * 10
    assert max(errors.values()) <= allowed, errors


# -- accuracy --------------------------------------------------------------------------------------

ACCURACY = 1e-6
"""Of outputs and gradients, relative to the largest value; seen are 5e-7 and 7e-7."""


@pytest.mark.parametrize("size", [(32, 32), (16, 64)])
@pytest.mark.parametrize("radius", [2, 4, 8, 16, 32])
def test_float32_is_accurate_for_circles_of_any_size(size: tuple[int, int], radius: int) -> None:
    geometry = _scene(*size, radius, images=2)
    inputs = _inputs(geometry, channels=32, value_channels=32)
    expected = _exact(geometry, inputs)
    for backend in EXACT_BACKENDS:
        errors = _errors(_results(geometry, inputs, backend), expected)
        assert max(errors.values()) <= ACCURACY, (backend, errors)


@pytest.mark.slow
@pytest.mark.parametrize("radius", [4, 16])
def test_float32_is_accurate_for_4096_tokens(radius: int) -> None:
    geometry = _scene(64, 64, radius)
    inputs = _inputs(geometry, heads=1, channels=32, value_channels=32)
    expected = _exact(geometry, inputs)
    for backend in EXACT_BACKENDS:
        errors = _errors(_results(geometry, inputs, backend), expected)
        assert max(errors.values()) <= ACCURACY, (backend, errors)


def test_stream_and_local_agree_in_float32_for_4096_tokens() -> None:
    """Two ways to the same; the reference for so many tokens is for --slow."""
    geometry = _scene(64, 64, 6.0)
    inputs = _inputs(geometry, heads=1, channels=16, value_channels=16)
    exact = _results(geometry, [tensor.double() for tensor in inputs], "local")
    for backend in EXACT_BACKENDS:
        errors = _errors(_results(geometry, inputs, backend), exact)
        assert max(errors.values()) <= ACCURACY, (backend, errors)


@pytest.mark.parametrize("deviation", [1, 2, 4, 8, 16, 32, 64, 128])
def test_strong_logits_stay_accurate_in_float32(deviation: int) -> None:
    """Logits reach 4.5 times their standard deviation, and float32 rounds 576 to 3e-5."""
    geometry = _scene(16, 24, 4.0, images=2)
    q, k, v, grad_out = _inputs(geometry, channels=64, value_channels=16)
    inputs = [deviation * q, k, v, grad_out]
    logits = inputs[0] @ k.mT / 8
    assert float(logits.std()) == pytest.approx(deviation, rel=0.05)
    expected = _exact(geometry, inputs)
    for backend in BACKENDS:
        results = _results(geometry, inputs, backend)
        assert all(bool(result.isfinite().all()) for result in results), backend
        errors = _errors(results, expected)
        assert max(errors.values()) < 1e-4, (backend, errors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_strong_logits_stay_finite_in_half_precision(backend: Backend, dtype: torch.dtype) -> None:
    geometry = _scene(16, 24, 4.0, images=2)
    q, k, v, grad_out = _inputs(geometry, channels=64, value_channels=16)
    inputs = [tensor.to(dtype) for tensor in (32 * q, k, v, grad_out)]
    results = _results(geometry, inputs, backend)
    assert all(bool(result.isfinite().all()) for result in results)
    errors = _errors(results, _exact(geometry, inputs))
    # Gradients, and outputs of all but flex, are rounded once; logits of std 32 lose 1e-5 more.
    allowed = ROUNDING[dtype] + 2e-5
    output_allowed = allowed if backend != "flex" else 2e-2
    assert errors.pop("output") <= output_allowed
    assert max(errors.values()) <= allowed, errors


# -- recordings of the authors' code ---------------------------------------------------------------


GOLDEN_TOLERANCE_OF_FLEX = 1e-4
"""Its table is made in float64, so that it lacks the roundings of the authors' distances, which the
edge's slope multiplies by up to 16: the reference in float64 is as far from the recordings."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", recordings._names(jittered=False))
def test_golden_output(name: str, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded outputs of whole layers; those with noise per pair are for the reference alone."""
    case = recordings._case(name)
    monkeypatch.setattr(recordings, "PisaContext", functools.partial(PisaContext, backend=backend))
    error = (case.output() - case.recorded["output"]).abs().max()
    assert case.attention.processor.context.backend == backend
    tolerance = recordings.OUTPUT_TOLERANCE
    assert error <= (GOLDEN_TOLERANCE_OF_FLEX if backend == "flex" else tolerance)


# -- which backend, and why ------------------------------------------------------------------------


def test_names_a_backend_that_then_runs() -> None:
    noise = PisaConfig.preset("official_exact")
    expected = {
        "small circles": (_scene(40, 40, 1.5), "local"),
        "wide circles": (_scene(12, 10, 20.0), "stream"),
        "a constant mask": (_scene(12, 10, 1.0, hardness=1.0), "stream"),
        "noise for each pair": (_scene(6, 6, 1.0, config=noise), "reference"),
        "noise, but nothing occludes": (_scene(6, 6, 1.0, config=noise, occlusion=False), "stream"),
    }
    for name, (geometry, backend) in expected.items():
        choice = explain(geometry)
        assert choice.backend == backend, name
        q, k, v, _ = _inputs(geometry)
        out = pisa_attention(q, k, v, geometry)
        chosen = pisa_attention(q, k, v, geometry, backend=choice.backend)
        assert torch.equal(out, chosen), name
        assert bool(out.isfinite().all()), name


def test_says_in_words_why_a_backend_was_taken_and_others_not() -> None:
    geometry = _scene(40, 40, 1.5)
    choice = explain(geometry)
    share = choice.pair_share
    assert 0 < share < 0.2 and f"{share:.1%}" in choice.reason and "1600 tokens" in choice.reason
    assert "triton" in choice.refused and "local" not in choice.refused
    lines = str(choice).splitlines()
    assert lines[0] == f"local: {choice.reason}"
    assert lines[1:] == [f"not {name}: {reason}" for name, reason in choice.refused.items()]

    noisy = explain(_scene(6, 6, 1.0, config=PisaConfig.preset("official_exact")))
    assert set(noisy.refused) == {"stream", "local", "flex", "triton"} and noisy.pair_share == 1
    assert "location_random" in str(noisy) and "dense" in noisy.reason


def test_wide_circles_cost_all_pairs() -> None:
    shares = [explain(_scene(40, 40, radius)).pair_share for radius in (0.0, 3.0, 10.0, 60.0)]
    assert shares == sorted(shares) and shares[0] < 0.06 and shares[-1] == 1.0


def test_the_kernels_of_a_gpu_are_refused_on_a_cpu() -> None:
    if triton_module.triton is not None:
        kernel = triton_module._output_kernel
        if not isinstance(kernel, triton_module.triton.JITFunction):
            pytest.skip("Triton's interpreter serves the CPU")
    geometry = _scene(8, 8, 1.0)
    q, k, v, _ = _inputs(geometry)
    reason = available_backends(geometry)["triton"]
    assert reason is not None
    assert ("CUDA" in reason) == (triton_module.triton is not None)
    assert explain(geometry).refused["triton"] == reason
    with pytest.raises(ValueError) as problem:
        pisa_attention(q, k, v, geometry, backend="triton")
    assert reason in str(problem.value) and "backend='triton'" in str(problem.value)


@pytest.mark.skipif(triton_module.triton is None, reason="the Triton library is not installed")
def test_float64_is_refused_by_the_kernels_and_taken_by_all_others() -> None:
    geometry = _scene(8, 8, 1.0, dtype=torch.float64)
    q, k, v, _ = _inputs(geometry, dtype=torch.float64)
    available = available_backends(geometry, q, v)
    assert tuple(available) == NAMES
    assert "float64" in str(available.pop("triton"))
    assert set(available.values()) == {None}
    with pytest.raises(ValueError, match="float64"):
        pisa_attention(q, k, v, geometry, backend="triton")
    for backend in available:
        assert pisa_attention(q, k, v, geometry, backend=backend).dtype == torch.float64
    # Without v, it counts as like q.
    assert "float64" in str(available_backends(geometry, q)["triton"])


def test_backends_that_do_not_exist_are_refused() -> None:
    geometry = _scene(4, 4, 1.0)
    q, k, v, _ = _inputs(geometry)
    with pytest.raises(ValueError, match="backend must be 'auto' or one of .*'reference'.*'dense'"):
        pisa_attention(q, k, v, geometry, backend="dense")  # type: ignore[arg-type]


# -- the same every time ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
@pytest.mark.parametrize("images", [1, 2])
def test_same_bits_every_time(backend: Backend, images: int) -> None:
    """Outputs and gradients, for one geometry used twice and for one made anew."""
    first = _scene(21, 27, 4.0, images=images)
    inputs = _inputs(first, batch=2)
    expected = _results(first, inputs, backend)
    for geometry in (first, _scene(21, 27, 4.0, images=images)):
        assert all(map(torch.equal, _results(geometry, inputs, backend), expected))


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
def test_the_pieces_of_the_work_do_not_show(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = _scene(21, 27, 4.0, images=2, dtype=torch.float64)
    inputs = _inputs(geometry, heads=3, dtype=torch.float64)
    module = {"stream": stream_module, "local": local_module}[backend]
    whole = _results(geometry, inputs, backend)
    for scores in (1, 5000):
        monkeypatch.setattr(module, "SCORES_PER_CHUNK", scores)
        errors = _errors(_results(geometry, inputs, backend), whole)
        assert max(errors.values()) <= 1e-13, (scores, errors)


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
def test_checkpointing_gives_the_same_bits(backend: Backend) -> None:
    geometry = _scene(13, 18, 3.0)
    inputs = _inputs(geometry, batch=2)
    expected = _results(geometry, inputs, backend)
    q, k, v = (tensor.requires_grad_() for tensor in inputs[:3])
    calls = []

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(1)
        return pisa_attention(q, k, v, geometry, backend=backend)

    out = checkpoint(layer, q, k, v, use_reentrant=False)
    found = [out, *torch.autograd.grad(out, [q, k, v, geometry.radius], inputs[3])]
    assert len(calls) == 2
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_autocast_changes_nothing(backend: Backend) -> None:
    geometry = _scene(9, 14, 3.0)
    inputs = _inputs(geometry)
    q, k, v = (tensor.requires_grad_() for tensor in inputs[:3])
    expected = _results(geometry, inputs, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (q @ k.mT).dtype == torch.bfloat16
        out = pisa_attention(q, k, v, geometry, backend=backend)
    found = [out, *torch.autograd.grad(out, [q, k, v, geometry.radius], inputs[3])]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_around_the_backward_pass_changes_nothing(backend: Backend) -> None:
    geometry = _scene(9, 14, 3.0)
    inputs = _inputs(geometry)
    expected = _results(geometry, inputs, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _results(geometry, inputs, backend)
    assert all(map(torch.equal, found, expected))


# -- what is stored --------------------------------------------------------------------------------


def _largest_stored(geometry: PisaGeometry) -> int:
    """Elements of the largest float or byte table that the geometry keeps, at any depth."""
    found = [0]

    def look_into(value: object) -> None:
        if isinstance(value, Tensor):
            if value.dtype != torch.long:  # lists of tokens are no tables of pairs
                found.append(value.untyped_storage().nbytes() // value.element_size())
        elif isinstance(value, TileGroup):
            for inner in vars(value).values():
                look_into(inner)
        elif isinstance(value, dict):
            for inner in value.values():
                look_into(inner)
        elif isinstance(value, (tuple, list)):
            for inner in value:
                look_into(inner)

    look_into(geometry._derived)
    return max(found)


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
def test_the_byte_budget_changes_what_is_stored_and_not_one_bit_of_the_result(
    backend: Backend,
) -> None:
    settings = {"radius": 4.0, "emitters": 0.8, "images": 2}
    height, width = 21, 27
    results, stored = {}, {}
    for budget in (0, 200_000, 1 << 30):
        geometry = _scene(height, width, byte_budget=budget, **settings)
        inputs = _inputs(geometry)
        results[budget] = _results(geometry, inputs, backend)
        # A second time from the tables that the first left behind.
        again = _results(geometry, inputs, backend)
        assert all(map(torch.equal, results[budget], again)), budget
        stored[budget] = _largest_stored(geometry)
    for budget, result in results.items():
        for name, one, other in zip(NAMES_OF_RESULTS, result, results[0], strict=True):
            assert torch.equal(one, other), (budget, name)
    # What is kept without a budget is a few numbers for each token or sample of the scene.
    assert stored[0] <= 2 * 9 * height * width < stored[1 << 30]


# -- thin layers -----------------------------------------------------------------------------------


def test_one_geometry_serves_thin_and_thick_layers() -> None:
    """Thin layers are taken in smaller tiles."""
    geometry = _scene(21, 27, 3.0, dtype=torch.float64)
    tiles = {4: local_module.TILE_OF_THIN_LAYERS, 40: local_module.TILE}
    used: dict[int, set[str]] = {}
    for channels in (4, 40, 4):
        inputs = _inputs(geometry, channels=channels, value_channels=channels, dtype=torch.float64)
        planes = inputs[0].shape[1]
        assert (planes * 2 * channels <= local_module.THIN) == (channels == 4)
        before = set(geometry._derived)
        errors = _errors(_results(geometry, inputs, "local"), _exact(geometry, inputs))
        assert max(errors.values()) <= TOLERANCE_FLOAT64, (channels, errors)
        used.setdefault(channels, set(geometry._derived) - before)
    for channels, names in used.items():
        assert f"tiles_of_{tiles[channels]}_with_torch.float64" in names
    assert tiles[4] != tiles[40]


# -- torch.func ------------------------------------------------------------------------------------


def _loss(geometry: PisaGeometry, backend: Backend) -> Callable[..., Tensor]:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pisa_attention(q, k, v, geometry, backend=backend).square().sum()

    return loss


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
@pytest.mark.parametrize("images", [1, 2])
def test_grad_agrees_with_autograd(backend: Backend, images: int) -> None:
    geometry = _scene(7, 9, 2.0, images=images, dtype=torch.float64)
    q, k, v, _ = _inputs(geometry, batch=2, dtype=torch.float64)
    loss = _loss(geometry, backend)
    found = torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 0, 1), (4, 2, 0)])
def test_vmap_agrees_with_a_loop(
    backend: Backend, images: int, in_dims: tuple[int | None, ...]
) -> None:
    """Values and their gradients, whichever of q, k and v is mapped over, and in which place."""
    geometry = _scene(7, 9, 2.0, images=images, dtype=torch.float64)
    calls = [_inputs(geometry, batch=2, dtype=torch.float64, seed=seed)[:3] for seed in range(3)]
    mapped, singles = [], []
    for argument, dim in enumerate(in_dims):
        values = [call[argument] for call in calls]
        if dim is None:
            mapped.append(values[0])
            singles.append([values[0]] * 3)
        else:
            mapped.append(torch.stack(values, dim))
            singles.append(values)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pisa_attention(q, k, v, geometry, backend=backend)

    found = torch.func.vmap(attention, in_dims=in_dims)(*mapped)
    expected = torch.stack([attention(*single) for single in zip(*singles, strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)

    gradient = torch.func.grad(_loss(geometry, backend), argnums=(0, 1, 2))
    found = torch.func.vmap(gradient, in_dims=in_dims)(*mapped)
    loops = [gradient(*single) for single in zip(*singles, strict=True)]
    for one, others in zip(found, zip(*loops, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(others), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
def test_jacobian_agrees_with_that_of_the_reference(backend: Backend) -> None:
    geometry = _scene(3, 4, 1.5, images=2, dtype=torch.float64)
    q, k, v, _ = _inputs(geometry, channels=2, value_channels=2, dtype=torch.float64)

    def jacobian(name: Backend) -> tuple[Tensor, ...]:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return pisa_attention(q, k, v, geometry, backend=name)

        return torch.func.jacrev(attention, argnums=(0, 1, 2))(q, k, v)

    for found, expected in zip(jacobian(backend), jacobian("reference"), strict=True):
        assert found.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
def test_forward_mode_and_second_derivatives_are_refused_with_advice(backend: Backend) -> None:
    geometry = _scene(3, 4, 1.5, dtype=torch.float64)
    q, k, v, _ = _inputs(geometry, channels=2, value_channels=2, dtype=torch.float64)
    loss = _loss(geometry, backend)
    advice = "second derivatives.*backend='reference'"

    with pytest.raises(NotImplementedError, match=advice):
        torch.func.jvp(lambda q: loss(q, k, v), (q,), (q,))
    with pytest.raises(NotImplementedError, match=advice):
        torch.func.hessian(lambda q: loss(q, k, v))(q)
    leaf = q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, k, v), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=advice):
        torch.autograd.grad(gradient.sum(), leaf)


def test_the_reference_has_second_derivatives_as_the_advice_says() -> None:
    geometry = _scene(3, 4, 1.5, dtype=torch.float64)
    q, k, v, _ = _inputs(geometry, heads=1, channels=2, value_channels=2, dtype=torch.float64)
    loss = _loss(geometry, "reference")
    hessian = torch.func.hessian(lambda q: loss(q, k, v))(q).view(24, 24)
    assert hessian.abs().max() > 1e-3
    torch.testing.assert_close(hessian, hessian.mT)


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
def test_vmap_over_the_gradient_of_the_radius_is_refused_with_advice(backend: Backend) -> None:
    """Each of several losses has a gradient of the radius of its own."""
    geometry = _scene(3, 4, 1.5, dtype=torch.float64)
    q, k, v, _ = _inputs(geometry, channels=2, value_channels=2, dtype=torch.float64)
    out = pisa_attention(q, k, v, geometry, backend=backend)
    many = torch.stack([torch.ones_like(out), out.detach()])
    gradients = torch.func.vmap(
        lambda grad_out: torch.autograd.grad(out, geometry.radius, grad_out, retain_graph=True)[0]
    )
    with pytest.raises(NotImplementedError, match="vmap cannot map over the geometry"):
        gradients(many)


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
def test_vmap_over_the_circles_is_refused_with_advice(backend: Backend) -> None:
    """A geometry is made outside of vmap; a radius put into one inside is another scene each."""
    geometry = _scene(3, 4, 1.5, dtype=torch.float64)
    q, k, v, _ = _inputs(geometry, channels=2, value_channels=2, dtype=torch.float64)

    def attention(factor: Tensor) -> Tensor:
        blurred = geometry.radius.detach() * factor
        changed = PisaGeometry(
            radius=blurred, height=3, width=4, spacing=geometry.spacing, config=geometry.config
        )
        return pisa_attention(q, k, v, changed, backend=backend)

    with pytest.raises(NotImplementedError, match="vmap cannot map over the geometry"):
        torch.func.vmap(attention)(torch.tensor([0.5, 1.0], dtype=torch.float64))
