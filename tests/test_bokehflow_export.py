"""BokehFlow as a graph of plain tensors, and as an ONNX file that onnxruntime runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from bokehdiff.bokehflow_export import (
    CAMERA,
    STATE,
    BokehFlowGraph,
    export_bokehflow,
    first_state,
)
from bokehdiff.models.bokehflow import BokehFlowModel
from bokehdiff.onnx_files import (
    RunningModel,
    Value,
    check_differences,
    labelled,
    traced_to_onnx,
    write_onnx,
)
from tests.tiny_flow import tiny_flow

WIDEST = 96
LARGEST_RADIUS = 240 * 80 / 1280
"""Of the tiny network, in pixels of a photo 80 pixels wide."""

SIZES = ((64, 96), (128, 72), (67, 131), (256, 256), (16, 17))
LENSES = ((2.0, 50.0, 2.0, 36.0), (2.0, 50.0, 2.0, 36.0), (1.4, 85.0, 1.5, 24.0))


def film(height: int, width: int, frames: int = 3, batch: int = 1) -> list[torch.Tensor]:
    """Noisy frames (B, 3, H, W) of a scene that stands still, the last after a cut."""
    generator = torch.Generator().manual_seed(height)
    areas = torch.rand(2, batch, 3, 4, 5, generator=generator)
    scenes = [F.interpolate(one, (height, width), mode="nearest") for one in areas]
    noise = 0.02 * torch.randn(frames, batch, 3, height, width, generator=generator)
    return [
        (scenes[int(number == frames - 1)] + noise[number]).clamp(0, 1) for number in range(frames)
    ]


def depth_of(frame: torch.Tensor) -> torch.Tensor:
    """Some inverse depth (B, 1, H, W) from 0 to 2 1/m."""
    return 2 * frame[:, :1].contiguous()


def cameras(batch: int) -> list[torch.Tensor]:
    """(B, 5) for each frame; the lens changes with the last."""
    return [torch.tensor([[*lens, 80.0]]).repeat(batch, 1) for lens in LENSES]


def asked(
    model: BokehFlowModel, frames: list[torch.Tensor], carried: bool, given_depth: bool
) -> list[dict[str, torch.Tensor]]:
    """What the network itself says of the frames of a film, or of photos."""
    state, answers = None, []
    with torch.no_grad():
        for frame, camera in zip(frames, cameras(len(frames[0])), strict=True):
            output = model(
                frame,
                *camera[:, :4].unbind(1),
                state,
                photo_width_px=camera[:, 4],
                inverse_depth=depth_of(frame) if given_depth else None,
            )
            state = output.state if carried else None
            names = ("bokeh", "coc", "inverse_depth")
            answers.append({name: getattr(output, name) for name in names})
    return answers


def run_file(
    run: RunningModel, model: BokehFlowModel, frames: list[torch.Tensor]
) -> list[dict[str, np.ndarray]]:
    """What the file says of the frames, as a program without torch would ask it."""
    wanted = {value.name for value in run.session.get_inputs()}
    batch, _, height, width = frames[0].shape
    zeros = first_state(model, batch, height, width)
    state = {f"last_{name}": one.numpy() for name, one in zip(STATE, zeros, strict=True)}
    answers = []
    for frame, camera in zip(frames, cameras(batch), strict=True):
        inputs = {"image": frame.numpy(), "camera": camera.numpy()}
        inputs |= {"inverse_depth": depth_of(frame).numpy(), **state}
        outputs = run({name: one for name, one in inputs.items() if name in wanted})
        state = {f"last_{name}": outputs.get(f"next_{name}") for name in STATE}
        answers.append(outputs)
    return answers


# -- The graph, before it is a file ----------------------------------------------------------------


@pytest.mark.parametrize("given_depth", [False, True])
@pytest.mark.parametrize("fusion", ["depth_to_bokeh", "both"])
def test_films_through_plain_tensors_are_films_through_the_network(fusion, given_depth):
    model = tiny_flow(fusion=fusion, radius_tokens=False)
    graph = BokehFlowGraph(model, carried=True, given_depth=given_depth, widest_photo_px=WIDEST)
    names = [value.name for value in graph.outputs()]
    frames = film(35, 50)
    state = first_state(model, 1, 35, 50)
    answers = []
    with torch.no_grad():
        for frame, camera in zip(frames, cameras(1), strict=True):
            given = [frame, camera, *([depth_of(frame)] if given_depth else []), *state]
            assert len(given) == len(graph.inputs())
            outputs = dict(zip(names, graph(*given), strict=True))
            state = [outputs[f"next_{name}"] for name in STATE]
            answers.append(outputs)
    wanted = asked(model, frames, carried=True, given_depth=given_depth)
    alone = asked(model, frames, carried=False, given_depth=given_depth)
    for answer, frame_wanted in zip(answers, wanted, strict=True):
        for name in ("bokeh", "coc", *([] if given_depth else ["inverse_depth"])):
            torch.testing.assert_close(answer[name], frame_wanted[name], atol=1e-6, rtol=1e-5)
    # That something is carried at all, though not through a cut.
    assert float((wanted[1]["bokeh"] - alone[1]["bokeh"]).abs().max()) > 1e-3
    assert torch.equal(wanted[2]["bokeh"], alone[2]["bokeh"])


def test_levels_beyond_the_width_of_the_photo_change_nothing():
    model = tiny_flow()
    frame, camera = film(36, 52)[0], cameras(1)[0]
    with torch.no_grad():
        narrow, wide = (
            BokehFlowGraph(model, carried=False, given_depth=False, widest_photo_px=widest)
            for widest in (80, 2000)
        )
        assert wide.levels > narrow.levels
        for one, other in zip(narrow(frame, camera), wide(frame, camera), strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_the_state_has_the_sizes_that_the_file_tells():
    model = tiny_flow()
    with torch.no_grad():
        state = model(film(35, 50)[0], 2.0, 50.0, 2.0).state
    zeros = dict(zip(STATE, first_state(model, 1, 35, 50), strict=True))
    assert {name: one.shape for name, one in state.tensors().items()} == {
        name: one.shape for name, one in zeros.items()
    }
    graph = BokehFlowGraph(model, carried=True, given_depth=False)
    for value in graph.inputs()[2:]:
        size = value.meaning[1 : value.meaning.index(") ")].replace("batch", "1")
        size = size.replace("height", "35").replace("width", "50").replace("2 c", "2 * c")
        told = eval(f"({size.replace('4 c', '4 * c')},)", {"ceil": math.ceil})
        if value.name != "last_lens":
            assert told == tuple(zeros[value.name.removeprefix("last_")].shape)


# -- What is refused -------------------------------------------------------------------------------


def test_networks_that_cannot_be_exported(tmp_path: Path):
    file = tmp_path / "flow.onnx"
    bigdr = tiny_flow(mixer="bigdr", heads=2, key_channels=8, value_channels=8)
    with pytest.raises(ValueError, match="mixer 'bigdr'.*wanted a network with.*'gated_conv'"):
        export_bokehflow(bigdr, file, carried=False)
    with pytest.raises(ValueError, match="renderer 'layered'.*wanted.*'pyramid'"):
        export_bokehflow(tiny_flow(renderer="layered"), file, carried=False)
    with pytest.raises(ValueError, match="carries nothing.*'none'.*export it for photos"):
        export_bokehflow(tiny_flow(temporal="none"), file, carried=True)
    with pytest.raises(ValueError, match="widest_photo_px is 0; wanted pixels"):
        export_bokehflow(tiny_flow(), file, carried=False, widest_photo_px=0)
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_written(tmp_path: Path):
    with pytest.raises(ValueError, match="ends in .pt; wanted one of .onnx"):
        export_bokehflow(tiny_flow(), tmp_path / "flow.pt", carried=False)
    with pytest.raises(FileNotFoundError, match="create it first"):
        export_bokehflow(tiny_flow(), tmp_path / "no" / "flow.onnx", carried=False)
    (tmp_path / "flow.onnx").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="exists already"):
        export_bokehflow(tiny_flow(), tmp_path / "flow.onnx", carried=False)
    assert (tmp_path / "flow.onnx").read_bytes() == b"mine"


def test_what_answers_otherwise_is_refused():
    check_differences({"bokeh": 1e-4, "coc": 0.0}, 1e-4)
    with pytest.raises(ValueError, match="bokeh by 0.0002 of its range, more than 0.0001"):
        check_differences({"bokeh": 2e-4, "coc": 0.0}, 1e-4)
    with pytest.raises(ValueError, match="coc by nan"):
        check_differences({"coc": math.nan}, 1e-4)


# -- Files of any network --------------------------------------------------------------------------


class Halves(torch.nn.Module):
    """Half a picture, in either sense."""

    def forward(self, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return picture / 2, F.avg_pool2d(picture, 2)


def test_a_file_says_what_it_is_and_nothing_of_the_machine(tmp_path: Path):
    sides = {0: "batch", 2: "height", 3: "width"}
    picture = Value("picture", sides, "a picture, in candela")
    dimmed = Value("dimmed", sides, "half as bright")
    smaller = Value("smaller", {0: "batch", 2: "half_height", 3: "half_width"}, "half as large")
    traced = traced_to_onnx(Halves(), [torch.zeros(2, 1, 6, 10)], [picture], [dimmed, smaller])
    described = labelled(traced, "Halves.", [picture, dimmed, smaller], {"count": 2, "of": "all"})
    file = tmp_path / "halves.onnx"
    write_onnx(described, file, overwrite=False)

    run = RunningModel(str(file), threads=1)
    given = np.arange(48, dtype=np.float32).reshape(1, 1, 6, 8)
    outputs = run({"picture": given})
    np.testing.assert_array_equal(outputs["dimmed"], given / 2)
    assert outputs["smaller"].shape == (1, 1, 3, 4) and outputs["smaller"][0, 0, 0, 0] == 4.5
    assert run.metadata == {
        "description": "Halves.",
        "picture": "a picture, in candela",
        "dimmed": "half as bright",
        "smaller": "half as large",
        "count": "2",
        "of": "all",
    }
    model = onnx.load(str(file))
    assert model.producer_name == "bokehdiff"
    assert model.graph.input[0].doc_string == "a picture, in candela"
    shape = model.graph.output[1].type.tensor_type.shape
    assert [dim.dim_param or dim.dim_value for dim in shape.dim] == [
        *("batch", 1),
        *("half_height", "half_width"),
    ]
    data = file.read_bytes()
    assert not [word for word in (b".py", b"torch", str(Path.cwd()).encode()) if word in data]
    with pytest.raises(FileExistsError):
        write_onnx(described, file, overwrite=False)


# -- The file --------------------------------------------------------------------------------------


def exported(folder: Path, **settings: bool) -> tuple[RunningModel, dict[str, float]]:
    file = folder / "flow.onnx"
    differences = export_bokehflow(tiny_flow(), file, widest_photo_px=WIDEST, **settings)
    return RunningModel(str(file), threads=1), differences


def assert_close(name: str, answer: np.ndarray, wanted: torch.Tensor) -> None:
    """Within 1e-4 of the range."""
    allowed = 1e-4 * (LARGEST_RADIUS if name == "coc" else 1)
    np.testing.assert_allclose(answer, wanted.numpy(), atol=allowed, rtol=0)


@pytest.fixture(scope="module")
def film_file(tmp_path_factory: pytest.TempPathFactory):
    return exported(tmp_path_factory.mktemp("film"), carried=True)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_films_of_all_sizes_look_as_the_network_makes_them(film_file, size):
    model, (run, _) = tiny_flow(), film_file
    frames = film(*size, batch=2)
    answers = run_file(run, model, frames)
    wanted = asked(model, frames, carried=True, given_depth=False)
    for answer, frame_wanted in zip(answers, wanted, strict=True):
        for name, one in frame_wanted.items():
            assert_close(name, answer[name], one)


@pytest.mark.slow
def test_the_file_tells_how_it_is_used(film_file):
    run, differences = film_file
    metadata = run.metadata
    assert json.loads(metadata["largest_differences"]) == differences
    assert set(differences) == {"bokeh", "coc", "inverse_depth"}
    assert 0 < max(differences.values()) < 1e-5
    assert json.loads(metadata["config"])["channels"] == 16
    assert ", ".join(CAMERA) in metadata["camera"]
    for value in (*run.session.get_inputs(), *run.session.get_outputs()):
        assert metadata[value.name].startswith("(batch, ")
    sizes = {value.name: value.shape for value in run.session.get_inputs()}
    assert sizes["image"] == ["batch", 3, "height", "width"]
    assert sizes["last_lens"] == ["batch", 5]


@pytest.mark.slow
def test_depth_may_be_given(tmp_path):
    model = tiny_flow()
    run, differences = exported(tmp_path, carried=False, given_depth=True)
    assert run.outputs == ["bokeh", "coc"] and set(differences) == {"bokeh", "coc"}
    for size in SIZES:
        frames = film(*size)
        wanted = asked(model, frames, carried=False, given_depth=True)
        for answer, one in zip(run_file(run, model, frames), wanted, strict=True):
            for name in run.outputs:
                assert_close(name, answer[name], one[name])


@pytest.mark.slow
def test_a_network_too_large_for_half_precision_leaves_no_file(tmp_path):
    model = tiny_flow()
    with torch.no_grad():
        model.depth_blocks[0].contract.weight.mul_(1e6)
    with pytest.raises(ValueError, match="Run by onnxruntime.*inverse_depth.*Nothing was written"):
        export_bokehflow(
            model, tmp_path / "flow.onnx", carried=False, half=True, widest_photo_px=WIDEST
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_published_size_with_weights_everywhere(tmp_path):
    model = BokehFlowModel.from_variant("nano").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    differences = export_bokehflow(model, tmp_path / "nano.onnx", carried=False)
    assert max(differences.values()) < 1e-4
    assert (tmp_path / "nano.onnx").stat().st_size < 1.5e6
