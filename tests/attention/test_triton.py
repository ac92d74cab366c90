"""The Triton kernels against the dense reference in float64: outputs, gradients, hazards.

Without a GPU the kernels run in Triton's interpreter, which has to be switched on before Triton is
imported for the first time. So this file runs itself in a second process, where the tests marked
`interpreted` are not skipped. That they compile is checked here, for GPUs that need not be present.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from bokehdiff.attention import PisaAttnProcessor, PisaConfig, PisaContext, PisaGeometry, backends
from bokehdiff.attention import triton as kernels
from bokehdiff.attention.reference import pisa_attention_reference
from tests import test_goldens_pisa as recordings
from tests.attention import test_backends as any_scene

pytest.importorskip("triton")

IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not IN_INTERPRETER, reason="runs in the second process that test_in_the_interpreter starts"
)
compiled = pytest.mark.skipif(IN_INTERPRETER, reason="the interpreter compiles nothing")

TOLERANCE = 2e-6
"""Logits of a few units are rounded to 2e-7 in float32, and gradients meet them several times."""


@compiled
def test_in_the_interpreter(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"]
    if request.config.getoption("--slow"):
        command.append("--slow")
    settings = {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        command, env=os.environ | settings, cwd=request.config.rootpath, capture_output=True
    )
    assert result.returncode == 0, result.stdout.decode()[-5000:]


def _scene(
    size: tuple[int, int],
    radius: float,
    images: int = 1,
    occlusion: bool = True,
    narrowest: float = 0.0,
    emitters: float | None = None,
    **config: Any,
) -> PisaGeometry:
    """Random circles, and near specks over a far ground."""
    height, width = size
    generator = torch.Generator().manual_seed(height * 100 + width)
    coc = torch.rand(images, 1, height, width, generator=generator, dtype=torch.float64)
    disparity = 0.4 * torch.rand(images, 1, 2 * height, 2 * width, generator=generator)
    disparity[:, :, ::7, ::5] = 1.0
    share = torch.rand(coc.shape, generator=generator)
    return PisaGeometry.build(
        (narrowest + (radius - narrowest) * coc).requires_grad_(),
        disparity if occlusion else None,
        config=PisaConfig.preset(config.pop("preset", "paper"), **config),
        emitters=None if emitters is None else share < emitters,
    )


def _inputs(
    geometry: PisaGeometry,
    batch: int = 1,
    heads: int = 1,
    channels: int = 20,
    value_channels: int = 12,
    dtype: torch.dtype = torch.float32,
    deviation: float = 1.0,
) -> list[Tensor]:
    """q, k, v and the gradient of the output, laid out as diffusers does: heads inside tokens."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(batch, geometry.token_count, heads, size, generator=generator)
        for size in (channels, channels, value_channels, value_channels)
    ]
    q, k, v, grad_out = (tensor.to(dtype).transpose(1, 2) for tensor in tensors)
    return [q * deviation, k, v, grad_out]


def _compare(
    geometry: PisaGeometry, inputs: list[Tensor], tolerance: float, gradients: float | None = None
) -> None:
    """Check output and gradients; the error may be so large beside the largest true value."""
    q, k, v, grad_out = inputs
    scale = q.shape[-1] ** -0.5
    out, log_normaliser = kernels.forward(q, k, v, geometry, scale)
    found = kernels.backward(grad_out, q, k, v, log_normaliser, geometry, scale, True)

    exact = [tensor.cpu().double().requires_grad_() for tensor in (q, k, v)]
    geometry = geometry.to("cpu")
    expected_out = pisa_attention_reference(*exact, geometry, scale)
    expected = torch.autograd.grad(
        expected_out, [*exact, geometry.radius], grad_out.cpu().double(), allow_unused=True
    )
    names = ("out", "grad_q", "grad_k", "grad_v", "grad_radius")
    for name, one, other in zip(names, (out, *found), (expected_out, *expected), strict=True):
        assert one is not None and other is not None and one.shape == other.shape
        assert one.dtype == torch.float32 and torch.isfinite(one).all()
        allowed = tolerance if name == "out" else gradients or tolerance
        error = (one.cpu() - other).abs().max()
        assert error <= allowed * max(1.0, float(other.detach().abs().max())), name


CASES: dict[str, dict[str, Any]] = {
    "whole tiles": {"size": (16, 16), "radius": 3.0},
    "ragged tiles": {"size": (13, 21), "radius": 2.5},
    "one row": {"size": (1, 30), "radius": 3.0},
    "single token": {"size": (1, 1), "radius": 1.0},
    "no occlusion": {"size": (9, 10), "radius": 2.0, "occlusion": False},
    "few emitters": {"size": (13, 21), "radius": 2.5, "emitters": 0.1},
    "no emitters": {"size": (9, 10), "radius": 2.5, "emitters": 0.0},
    "far inside the circles": {"size": (16, 16), "radius": 24.0, "narrowest": 20.0},
    "no edge": {"size": (9, 10), "radius": 2.0, "hardness": 1.0},
    "unequal axes": {
        "size": (8, 20),
        "radius": 3.0,
        "token_spacing": None,
        "resample_occlusion_map": True,
    },
    "official weights, still soft": {
        "size": (9, 10),
        "radius": 2.0,
        "preset": "official_weights",
        "hardness": 50.0,
    },
}


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str) -> None:
    geometry = _scene(**CASES[name])
    _compare(geometry, _inputs(geometry), TOLERANCE)


@interpreted
@pytest.mark.parametrize("images", [1, 2], ids=["one geometry for both", "a geometry for each"])
def test_batch_and_heads(images: int) -> None:
    geometry = _scene((5, 12), 2.0, images=images)
    _compare(geometry, _inputs(geometry, batch=2, heads=2), TOLERANCE)


@interpreted
def test_any_strides() -> None:
    geometry = _scene((9, 12), 2.0)
    inputs = _inputs(geometry)
    # Channels outermost, and every other channel of a wider tensor.
    inputs[0] = inputs[0].transpose(2, 3).contiguous().transpose(2, 3)
    inputs[2] = inputs[2].repeat_interleave(2, dim=3)[..., ::2]
    inputs[3] = inputs[3][..., :1].expand_as(inputs[3])
    _compare(geometry, inputs, TOLERANCE)


@interpreted
def test_only_the_gradients_asked_for() -> None:
    geometry = _scene((9, 12), 2.0)
    q, k, v, grad_out = _inputs(geometry)
    _, log_normaliser = kernels.forward(q, k, v, geometry, 0.2)
    with_radius = kernels.backward(grad_out, q, k, v, log_normaliser, geometry, 0.2, True)
    # Without the normaliser too: it is computed again.
    without = kernels.backward(grad_out, q, k, v, None, geometry, 0.2, False)
    assert without[3] is None
    for one, other in zip(with_radius[:3], without[:3], strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


@interpreted
def test_large_logits() -> None:
    # Logits reach 100 and more, and are rounded to 1e-5 there.
    geometry = _scene((13, 12), 2.0)
    _compare(geometry, _inputs(geometry, deviation=32.0), 2e-5, gradients=2e-4)


@interpreted
def test_half_precision() -> None:
    # Weights are rounded to 2^-11 before they meet values, and gradients of logits before keys.
    geometry = _scene((13, 12), 2.0)
    _compare(geometry, _inputs(geometry, dtype=torch.float16), 1e-3, gradients=2e-3)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = _scene((4, 4), 1.0)
    noisy = _scene((4, 4), 1.0, jitter="location_random")
    q, _, v, _ = _inputs(geometry)
    reason = kernels.supports(geometry, q, v)
    assert reason is None if IN_INTERPRETER else "CUDA" in str(reason)
    assert "location_random" in str(kernels.supports(noisy, q, v))
    assert "v is torch.float64" in str(kernels.supports(geometry, q, v.double()))
    monkeypatch.setattr(kernels, "triton", None)
    assert "pip install triton" in str(kernels.supports(geometry, q, v))


def test_import_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    name = "bokehdiff.attention.triton_that_is_missing"
    specification = importlib.util.spec_from_file_location(name, kernels.__file__)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    geometry = _scene((4, 4), 1.0)
    q, _, v, _ = _inputs(geometry)
    assert "pip install triton" in module.supports(geometry, q, v)


# -- ahead of time, for GPUs that need not be here -------------------------------------------------


class _AbsentGpu:
    """What Triton asks the driver of a GPU in order to compile for it, but not to run."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps the kernels of each device apart.

    def get_current_stream(self, device: int) -> int:
        return 0


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "channels", "value_channels", "optional"),
    [
        (torch.bfloat16, 40, 64, True),
        (torch.float32, 16, 16, False),
        pytest.param(torch.float16, 64, 64, False, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 128, 64, True, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 160, 160, True, marks=pytest.mark.slow),
        pytest.param(torch.float32, 64, 64, True, marks=pytest.mark.slow),
        pytest.param(torch.float32, 128, 128, True, marks=pytest.mark.slow),
    ],
)
def test_compiles_without_a_gpu(
    dtype: torch.dtype,
    channels: int,
    value_channels: int,
    optional: bool,
    capability: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import triton

    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    if not assembler.exists():
        pytest.skip("this build of Triton brings no assembler for NVIDIA GPUs")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = []

    def compile_only(kernel: Any, *arguments: Any, **options: Any) -> None:
        made.append(run(kernel, *arguments, **options | {"warmup": True}))

    run = triton.JITFunction.run
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", _AbsentGpu(capability))

    geometry = _scene((9, 12), 1.0, occlusion=optional)
    assert (kernels._plan_of(geometry).visible is not None) == optional
    q, k, v, grad_out = _inputs(geometry, 1, 2, channels, value_channels, dtype)
    _, log_normaliser = kernels.forward(q, k, v, geometry, 0.2)
    kernels.backward(grad_out, q, k, v, log_normaliser, geometry, 0.2, optional)
    assert len(made) == 4
    for result in made:
        assembly = result.asm["ptx"]
        assert result.asm["cubin"]
        # Exact products in float32, tensor cores otherwise, and a fixed order of additions.
        assert "tf32" not in assembly
        assert ("mma" in assembly) == (dtype != torch.float32)
        assert not re.search(r"^\s*(@\S+ )?(atom|red)\.", assembly, re.MULTILINE)
        # Every GPU of capability 8.0 or newer has 99 KiB; `supports` asks for more only beyond.
        assert result.metadata.shared <= max(99 << 10, kernels.shared_memory_bytes(q, v))


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
@compiled
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize(("channels", "value_channels"), [(64, 64), (40, 24), (160, 128)])
def test_agrees_with_the_reference_on_a_gpu(
    dtype: torch.dtype, tolerance: float, channels: int, value_channels: int
) -> None:
    geometry = _scene((27, 33), 3.0, images=2, occlusion=False)
    inputs = _inputs(geometry, 2, 2, channels, value_channels, dtype)
    geometry, inputs = geometry.to("cuda"), [tensor.cuda() for tensor in inputs]
    reason = kernels.supports(geometry, inputs[0], inputs[2])
    if reason is not None:
        pytest.skip(reason)
    _compare(geometry, inputs, tolerance)


@pytest.mark.gpu
@compiled
def test_occlusion_on_a_gpu() -> None:
    geometry = _scene((27, 33), 3.0).to("cuda")
    q, k, v, _ = (tensor.cuda() for tensor in _inputs(geometry, heads=2))
    out, _ = kernels.forward(q, k, v, geometry, 0.2)
    expected = pisa_attention_reference(q.double(), k.double(), v.double(), geometry, 0.2)
    # Rays on the edge of an occluder may fall to either side.
    assert ((out - expected).abs() > 1e-5).float().mean() < 1e-2


@pytest.mark.gpu
@compiled
def test_the_same_bits_every_time() -> None:
    geometry = _scene((64, 64), 5.0).to("cuda")
    q, k, v, grad_out = (
        tensor.cuda() for tensor in _inputs(geometry, 1, 4, 64, 64, torch.bfloat16)
    )
    results = []
    for _ in range(2):
        out, log_normaliser = kernels.forward(q, k, v, geometry, 0.125)
        results.append(
            (out, *kernels.backward(grad_out, q, k, v, log_normaliser, geometry, 0.125, True))
        )
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@compiled
def test_heads_too_wide_for_the_gpu() -> None:
    geometry = _scene((4, 4), 1.0).to("cuda")
    q = torch.zeros(1, 1, 16, 1024, device="cuda")
    assert "KiB of shared memory" in str(kernels.supports(geometry, q, q))


@interpreted
@pytest.mark.parametrize("name", recordings._names(jittered=False))
def test_golden_output(name: str) -> None:
    """The authors' recorded outputs, through a diffusers layer.

    The plan's log C comes from float64, so it lacks the roundings of the authors' distances, which
    the edge's slope multiplies by up to 16.
    """
    case = recordings.Case(name)
    context = PisaContext(case.config, backend="triton")
    case.attention.set_processor(PisaAttnProcessor(context))
    with torch.no_grad():
        output = case.attention(case.hidden_states, disp_coc=case.disp_coc)
    assert (output - case.recorded["output"]).abs().max() <= 1e-4


@interpreted
def test_the_kernels_prove_themselves_before_auto_takes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also in a process that runs without gradients; wrong kernels and broken ones are refused."""
    prove = backends.triton_failure.__wrapped__
    with torch.inference_mode():
        assert prove(torch.device("cpu")) is None

    right = kernels.forward

    def wrong(*arguments: Any) -> tuple[Tensor, Tensor]:
        out, log_normaliser = right(*arguments)
        return out * 1.01, log_normaliser

    def broken(*arguments: Any) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(kernels, "forward", wrong)
    assert "off by" in prove(torch.device("cpu"))
    monkeypatch.setattr(kernels, "forward", broken)
    assert "no such instruction" in prove(torch.device("cpu"))


@interpreted
@settings(any_scene.PROPERTIES, max_examples=12)
@given(scene=any_scene._scenes(largest_side=12))
def test_agrees_with_the_reference_for_any_scene(scene: dict[str, Any]) -> None:
    """In float32: float64 is refused, and half precision has tests of its own."""
    any_scene._check_any_scene(scene | {"dtype": torch.float32}, ("triton",))
