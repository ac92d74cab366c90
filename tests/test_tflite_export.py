"""LiteBokeh as TFLite files that LiteRT runs, in the environment of `make tflite`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bokehdiff.cli import app
from bokehdiff.compact_export import detailed_picture, export_compact
from bokehdiff.models.litebokeh import VARIANTS, GlassEncNet
from bokehdiff.tflite_files import RunningTFLite
from tests.tiny_litebokeh import tiny_glass, tiny_unet

HERE = importlib.util.find_spec("litert_torch") is not None
needs_tflite = pytest.mark.skipif(
    not HERE, reason="no litert_torch here: make tflite, and .venv-tflite/bin/python -m pytest"
)

WIDTH, HEIGHT = 88, 64
PLAIN = {"PAD", "CONV_2D", "ADD", "TRANSPOSE_CONV", "LOGISTIC", "RELU_0_TO_1"}
OF_INSTANCE_NORM = {"MEAN", "SUB", "MUL", "RSQRT", "RESHAPE"}


def asked(file: Path, photo: torch.Tensor) -> torch.Tensor:
    """What the file makes of a photo (1, 3, H, W), asked as an app would ask it."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(file), num_threads=1)
    interpreter.allocate_tensors()
    (image,), (bokeh,) = interpreter.get_input_details(), interpreter.get_output_details()
    assert image["dtype"] == bokeh["dtype"] == np.float32
    interpreter.set_tensor(image["index"], photo.permute(0, 2, 3, 1).contiguous().numpy())
    interpreter.invoke()
    return torch.from_numpy(interpreter.get_tensor(bokeh["index"])).permute(0, 3, 1, 2)


def operators(file: Path) -> Counter[str]:
    """Names of the operators in the file, and how many there are of each."""
    from ai_edge_litert import schema_py_generated as schema

    names = {code: name for name, code in vars(schema.BuiltinOperator).items()}
    model = schema.ModelT.InitFromPackedBuf(file.read_bytes(), 0)
    assert all(code.customCode is None for code in model.operatorCodes)
    return Counter(
        names[model.operatorCodes[operator.opcodeIndex].builtinCode]
        for operator in model.subgraphs[0].operators
    )


def peak_signal_to_noise(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(-10 * (one - other).double().square().mean().log10())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tflite") / "compact.tflite"
    agreement = export_compact(tiny_unet(), file, size=(WIDTH, HEIGHT))
    assert 0 < agreement.largest_difference < 1e-5
    return file


@needs_tflite
def test_photos_look_as_the_network_makes_them(exported):
    for photo in (
        detailed_picture(HEIGHT, WIDTH).flip(-1),
        torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)),
    ):
        bokeh = asked(exported, photo)
        torch.testing.assert_close(bokeh, tiny_unet()(photo).bokeh, atol=1e-5, rtol=0)
        assert bokeh.std() > 0.05, "else any picture would do"


@needs_tflite
def test_operators_are_plain_and_batch_norm_is_one_addition(exported):
    found = operators(exported)
    assert set(found) == PLAIN
    # 3 down, 2 in each of 4 blocks, the last one, 2 of the enhancement.
    assert found["CONV_2D"] == 14 and found["TRANSPOSE_CONV"] == 3
    # The shift and the residual of each block, two skips, the enhancement.
    assert found["ADD"] == 4 + 4 + 2 + 1


@needs_tflite
def test_the_file_says_what_it_is_and_nothing_of_the_machine(exported):
    run = RunningTFLite(exported.read_bytes())
    assert run.interpreter.get_signature_list() == {
        "serving_default": {"inputs": ["image"], "outputs": ["bokeh"]}
    }
    assert run.input_sizes == {"image": (1, HEIGHT, WIDTH, 3)}
    facts = run.metadata
    assert facts["network"] == "TinyUnet" and facts["precision"] == "float32"
    assert facts["config"]["channels"] == [4, 6, 8] and facts["enhancement"] is True
    assert facts["image"].startswith(f"(1, {HEIGHT}, {WIDTH}, 3) float32, RGB, display-encoded")
    assert "strong the blur is" in facts["description"]
    data = exported.read_bytes()
    assert not [word for word in (b".py", str(Path.cwd()).encode()) if word in data]


@needs_tflite
def test_weights_of_fewer_bits(tmp_path):
    """Of the published size, whose large weights the quantizer lays elsewhere in the file."""
    network = tiny_unet(channels=VARIANTS["tiny"])
    photo = detailed_picture(HEIGHT, WIDTH)
    bokeh = network(photo).bokeh
    sizes = {}
    for precision in ("float32", "float16", "int8"):
        file = tmp_path / f"{precision}.tflite"
        agreement = export_compact(network, file, size=(WIDTH, HEIGHT), precision=precision)
        answer = asked(file, photo)
        assert float((answer - bokeh).abs().max()) == pytest.approx(
            agreement.largest_difference, rel=1e-3
        )
        assert peak_signal_to_noise(answer, bokeh) == pytest.approx(agreement.psnr, abs=0.01)
        sizes[precision] = file.stat().st_size
        assert RunningTFLite(file.read_bytes()).metadata["precision"] == precision
        assert set(operators(file)) <= PLAIN | {"DEQUANTIZE"}
        if precision == "float16":
            assert 1e-6 < agreement.largest_difference < 1e-3
        if precision == "int8":
            assert agreement.psnr > 40 and agreement.largest_difference > 1e-3
    assert sizes["float32"] < 1.55e6 and sizes["float16"] < 0.85e6 and sizes["int8"] < 0.45e6


@needs_tflite
def test_the_network_for_quality_and_instance_norms(tmp_path):
    torch.manual_seed(0)
    network = GlassEncNet(channels=4, residual_blocks=1).eval().requires_grad_(False)
    file = tmp_path / "glass.tflite"
    export_compact(network, file, size=(48, 32), enhance=False)
    photo = detailed_picture(32, 48)
    bokeh = network(photo, enhance=False).bokeh
    torch.testing.assert_close(asked(file, photo), bokeh, atol=1e-5, rtol=0)
    assert set(operators(file)) <= PLAIN | OF_INSTANCE_NORM | {"CONCATENATION"}
    assert RunningTFLite(file.read_bytes()).metadata["enhancement"] is False


@needs_tflite
def test_networks_that_come_out_otherwise_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match="Run by LiteRT.* dB against.*Nothing was written.*fp16"):
        export_compact(tiny_glass(), tmp_path / "a.tflite", size=(64, 40), precision="int8")
    with pytest.raises(ValueError, match="convolutions of 3 pixels.*wanted one with up_kernel=4"):
        export_compact(tiny_unet(up_kernel=3), tmp_path / "a.tflite", size=(64, 40))
    assert not list(tmp_path.iterdir())


@needs_tflite
def test_the_command_in_a_process_of_its_own(tmp_path):
    tiny_unet().save_pretrained(tmp_path / "network")
    file = tmp_path / "small.tflite"
    words = ["export", "compact", str(tmp_path / "network"), "-o", str(file), "--size", "64x40"]
    result = subprocess.run(
        [sys.executable, "-m", "bokehdiff", *words, "--format", "tflite", "--int8"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{file} (0.03 MB, ")
    assert result.stdout.endswith(" dB against the network)\n")
    photo = detailed_picture(40, 64)
    assert peak_signal_to_noise(asked(file, photo), tiny_unet()(photo).bokeh) > 40


@pytest.mark.skipif(HERE, reason="where the packages are, nothing is missing")
def test_without_the_packages_the_command_says_what_to_do(tmp_path):
    output = tmp_path / "a.tflite"
    words = ["export", "compact", str(tmp_path), "-o", str(output), "--size", "64x64"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1 and not output.exists()
    assert "`make tflite`" in result.stderr
    assert ".venv-tflite/bin/bokehdiff export compact" in result.stderr
