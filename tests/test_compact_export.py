"""LiteBokeh as an ONNX file that onnxruntime runs, and what both kinds of file refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from bokehdiff.compact_export import (
    Agreement,
    AnySize,
    OneSize,
    agreement_of,
    check_agreement,
    compact_file_to_write,
    detailed_picture,
    export_compact,
    in_precision,
)
from bokehdiff.models.litebokeh import GlassEncNet
from bokehdiff.onnx_files import RunningModel
from tests.tiny_litebokeh import tiny_glass, tiny_unet


def untrained_glass() -> GlassEncNet:
    torch.manual_seed(0)
    return GlassEncNet(channels=4, residual_blocks=1).eval()


def wanted(network: torch.nn.Module, photo: np.ndarray, **settings: bool) -> np.ndarray:
    with torch.no_grad():
        return network(torch.from_numpy(photo), **settings).bokeh.numpy()


# -- The graphs, before they are files -------------------------------------------------------------


@pytest.mark.parametrize("enhance", [True, False])
@pytest.mark.parametrize("network", [tiny_unet(), tiny_glass()], ids=["tiny", "glass"])
def test_both_graphs_are_the_network(network, enhance):
    photo = torch.rand(1, 3, 32, 56, generator=torch.Generator().manual_seed(0))
    bokeh = network(photo, enhance).bokeh
    channels_last = OneSize(network, enhance)(photo.permute(0, 2, 3, 1))["bokeh"]
    assert torch.equal(channels_last.permute(0, 3, 1, 2), bokeh)
    assert torch.equal(AnySize(network, enhance)(photo)[0], bokeh)


def test_in_half_precision_pictures_go_in_and_come_out_as_float32():
    photo = torch.rand(1, 3, 32, 56, generator=torch.Generator().manual_seed(0))
    (bokeh,) = AnySize(in_precision(tiny_unet(), half=True), True)(photo)
    assert bokeh.dtype == torch.float32
    difference = (bokeh - tiny_unet()(photo).bokeh).abs().max()
    assert 1e-6 < float(difference) < 2e-2


def test_the_first_convolution_is_never_rounded():
    """What it sees is as small as the rounding: of float16 alone the picture suffers more."""
    network = tiny_unet(output="blend")
    prepared = in_precision(network, half=True)
    assert prepared.down[0].layer.weight.dtype == torch.float32
    assert torch.equal(prepared.down[0].layer.weight, network.down[0].weight)
    assert prepared.down[1].weight.dtype == torch.float16
    assert network.dtype == torch.float32


# -- The file --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Agreement]:
    file = tmp_path_factory.mktemp("compact") / "compact.onnx"
    return file, export_compact(tiny_unet(), file)


@pytest.mark.parametrize("size", [(64, 96), (128, 72), (67, 131), (16, 17), (200, 300)])
def test_photos_of_all_sizes_look_as_the_network_makes_them(exported, size):
    run = RunningModel(str(exported[0]), threads=1)
    photo = np.random.default_rng(0).random((2, 3, *size), np.float32)
    bokeh = run({"image": photo})["bokeh"]
    np.testing.assert_allclose(bokeh, wanted(tiny_unet(), photo), atol=1e-5, rtol=0)
    assert bokeh.std() > 0.05, "else any picture would do"


def test_the_file_says_what_it_is_and_nothing_of_the_machine(exported):
    file, agreement = exported
    run = RunningModel(str(file), threads=1)
    facts = run.metadata
    assert facts["network"] == "TinyUnet" and facts["precision"] == "float32"
    assert json.loads(facts["config"])["channels"] == [4, 6, 8]
    assert json.loads(facts["enhancement"]) is True
    assert json.loads(facts["largest_differences"]) == {"bokeh": agreement.largest_difference}
    assert 0 < agreement.largest_difference < 1e-5 and agreement.psnr > 100
    assert "display-encoded sRGB in [0, 1]" in facts["image"]
    assert "strong the blur is" in facts["description"]
    (image,), (bokeh,) = run.session.get_inputs(), run.session.get_outputs()
    assert image.shape == bokeh.shape == ["batch", 3, "height", "width"]
    assert not [word for word in (b".py", b"torch", str(Path.cwd()).encode())
                if word in file.read_bytes()]  # fmt: skip


def test_no_batch_norm_is_left(exported):
    operators = {node.op_type for node in onnx.load(str(exported[0])).graph.node}
    assert "Conv" in operators and "BatchNormalization" not in operators


def test_half_precision_without_the_enhancement(tmp_path):
    file = tmp_path / "compact.onnx"
    network = tiny_unet().train()
    agreement = export_compact(network, file, precision="float16", enhance=False)
    assert network.dtype == torch.float32 and network.training, "it stays as it is"
    assert 1e-6 < agreement.largest_difference < 2e-3
    run = RunningModel(str(file), threads=1)
    assert run.session.get_inputs()[0].type == "tensor(float)"
    weights = onnx.load(str(file)).graph.initializer
    kinds = [one.data_type for one in weights if len(one.dims) == 4]
    # All but those of the first convolution.
    assert kinds.count(onnx.TensorProto.FLOAT) == 1
    assert set(kinds) == {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
    photo = detailed_picture(40, 56).numpy()
    bokeh = run({"image": photo})["bokeh"]
    assert bokeh.dtype == np.float32
    plain = wanted(tiny_unet(), photo, enhance=False)
    np.testing.assert_allclose(bokeh, plain, atol=2e-3, rtol=0)
    assert np.abs(bokeh - wanted(tiny_unet(), photo)).max() > 0.05
    assert json.loads(run.metadata["enhancement"]) is False


def test_the_network_for_quality_too(tmp_path):
    network = untrained_glass()
    agreement = export_compact(network, tmp_path / "glass.onnx")
    assert agreement.largest_difference < 1e-5
    run = RunningModel(str(tmp_path / "glass.onnx"), threads=1)
    photo = detailed_picture(41, 67).numpy()
    np.testing.assert_allclose(
        run({"image": photo})["bokeh"], wanted(network, photo), atol=1e-5, rtol=0
    )
    assert run.metadata["network"] == "GlassEncNet"


# -- What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "precision", "sentence"),
    [
        ("a.pt", None, "float32", "ends in .pt; wanted one of .onnx, .tflite"),
        ("a.onnx", (64, 64), "float32", "ONNX file takes photos of any size; leave it out"),
        ("a.onnx", None, "int8", "for TFLite files; wanted a .tflite file, or float16"),
        ("a.onnx", None, "bfloat16", "precision is 'bfloat16'; wanted one of"),
        ("a.tflite", None, "float32", "wanted its width and height, for instance 1536x1024"),
        ("a.tflite", (1500, 1000), "float32", "1500x1000; wanted multiples of 8"),
        ("a.tflite", (8, 64), "float32", "of at least 16"),
    ],
)
def test_files_that_cannot_be(tmp_path, name, size, precision, sentence):
    with pytest.raises(ValueError, match=sentence):
        compact_file_to_write(tmp_path / name, size, precision, False)


def test_files_and_networks_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="create it first"):
        export_compact(tiny_unet(), tmp_path / "no" / "a.onnx")
    (tmp_path / "a.onnx").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="exists already"):
        export_compact(tiny_unet(), tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == b"mine"
    with pytest.raises(ValueError, match="model is a Conv2d; wanted a TinyUnet or a GlassEncNet"):
        export_compact(torch.nn.Conv2d(3, 3, 1), tmp_path / "b.onnx")


def test_a_network_too_large_for_half_precision_leaves_no_file(tmp_path):
    network = tiny_unet()
    network.down[0].weight.data.mul_(1e7)
    network.down[1].weight.data.mul_(1e-7)
    with pytest.raises(ValueError, match="Run by onnxruntime.*bokeh by.*Nothing was written"):
        export_compact(network, tmp_path / "a.onnx", precision="float16")
    assert not list(tmp_path.iterdir())


def test_pictures_that_are_others_are_refused():
    check_agreement(Agreement(1e-5, 120.0), "float32", "LiteRT")
    check_agreement(Agreement(0.1, 40.0), "int8", "LiteRT")
    with pytest.raises(ValueError, match="Run by LiteRT.*bokeh by 2e-05.*more than 1e-05"):
        check_agreement(Agreement(2e-5, 120.0), "float32", "LiteRT")
    with pytest.raises(ValueError, match="39.9 dB against the network's, less than 40"):
        check_agreement(Agreement(0.0, 39.94), "int8", "LiteRT")
    for precision in ("float16", "int8"):
        with pytest.raises(ValueError, match="nan"):
            check_agreement(Agreement(math.nan, math.nan), precision, "LiteRT")


def test_agreement_is_that_of_the_worst_picture():
    def offset(photo: torch.Tensor) -> torch.Tensor:
        return photo + (0.1 if photo.shape[-1] == 24 else 0.01)

    agreement = agreement_of(offset, lambda photo: photo, [(16, 24), (16, 32)])
    assert agreement.largest_difference == pytest.approx(0.1, rel=1e-5)
    assert agreement.psnr == pytest.approx(20, abs=1e-4)
    same = agreement_of(offset, offset, [(16, 24)])
    assert same == Agreement(0.0, 200.0)
    broken = agreement_of(lambda photo: photo * math.nan, offset, [(16, 24), (16, 32)])
    assert math.isnan(broken.largest_difference) and math.isnan(broken.psnr)


def test_the_picture_that_files_are_tried_with_has_detail():
    picture = detailed_picture(136, 88)
    assert picture.shape == (1, 3, 136, 88) and picture.min() == 0 and picture.max() == 1
    steps = picture.diff(dim=-1).abs()
    # Mostly flat with edges: noise alone would have no such ratio.
    assert float(steps.quantile(0.99)) > 8 * float(steps.median()) > 0
