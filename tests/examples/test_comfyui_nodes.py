"""The nodes for ComfyUI, called as ComfyUI calls them, against the library called directly."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import stereo_motorcycle

import bokehdiff
from bokehdiff.depth import DEFAULT_DEPTH_MODEL, DepthEstimate
from tests.examples.comfyui_harness import (
    Executor,
    check,
    check_value,
    core_nodes,
    declared_inputs,
    is_widget,
    load_pack,
    prompt_of,
)
from tests.tiny_bokeh_stack import trained_adapter
from tests.tiny_depth import save_tiny_depth
from tests.tiny_depth_dsfa import save_tiny_dsfa
from tests.tiny_flux import tiny_kontext_components

REPOSITORY = Path(__file__).resolve().parents[2]
PACK = REPOSITORY / "examples" / "comfyui_bokehdiff"
MODULE = load_pack(PACK)
NODES, NAMES = MODULE.NODE_CLASS_MAPPINGS, MODULE.NODE_DISPLAY_NAME_MAPPINGS

HEIGHT, WIDTH = 48, 72


def call(name: str, **inputs: Any) -> tuple[Any, ...]:
    """What a node returns for these inputs and the defaults of its fields."""
    node = NODES[name]
    values = {}
    for key, (kind, options) in declared_inputs(node).items():
        if is_widget(kind):
            values[key] = options.get("default", kind[0] if isinstance(kind, list) else None)
    with torch.inference_mode():
        returned = getattr(node(), node.FUNCTION)(**{**values, **inputs})
    assert len(returned) == len(node.RETURN_TYPES)
    for value, declared in zip(returned, node.RETURN_TYPES, strict=True):
        check_value(value, declared)
    return returned


def refusal(name: str, **inputs: Any) -> str:
    with pytest.raises(ValueError) as error:
        call(name, **inputs)
    return str(error.value)


def near_and_far(height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """A disparity map (1, 1, H, W): 0.9 in the middle, around it 0.2."""
    disparity = torch.full((1, 1, height, width), 0.2)
    disparity[..., height // 4 : 3 * height // 4, width // 3 : 2 * width // 3] = 0.9
    return disparity


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """(2, H, W, 3) float32: two pieces of a photograph."""
    photo = stereo_motorcycle()[0].astype(np.float32) / 255
    return np.stack([photo[150 : 150 + HEIGHT, x : x + WIDTH] for x in (300, 500)])


@pytest.fixture(scope="module")
def images(pictures: np.ndarray) -> torch.Tensor:
    """Both as ComfyUI's IMAGE."""
    return torch.from_numpy(pictures)


@pytest.fixture(scope="module")
def disparity() -> DepthEstimate:
    return DepthEstimate(near_and_far(), False)


@pytest.fixture(scope="module")
def metric() -> DepthEstimate:
    return DepthEstimate(near_and_far(), True)


@pytest.fixture(scope="module")
def tiny() -> Any:
    """What the node loads."""
    return call("BokehDiffLoadModel")[0]


@functools.cache
def library_pipeline() -> bokehdiff.BokehDiffPipeline:
    return bokehdiff.BokehDiffPipeline.from_pretrained(bokehdiff.TINY)


def library_picture(pictures: np.ndarray, **settings: Any) -> torch.Tensor:
    """The same by the library: (B, H, W, 3)."""
    blurred = library_pipeline()(list(pictures), output_type="pt", **settings).images
    return blurred.movedim(1, -1)


# --- What the editor is told ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NODES)
def test_a_node_tells_the_editor_all_it_has_to(name):
    node = NODES[name]
    assert node.CATEGORY == "bokehdiff" and node.DESCRIPTION and NAMES[name]
    assert "\n" not in node.DESCRIPTION
    assert callable(getattr(node, node.FUNCTION))
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == len(node.OUTPUT_TOOLTIPS)
    for key, (kind, options) in declared_inputs(node).items():
        assert options["tooltip"].endswith("."), key
        if isinstance(kind, str) and is_widget(kind):
            assert options.get("min", options["default"]) <= options["default"]
            assert options["default"] <= options.get("max", options["default"])
    json.dumps(node.INPUT_TYPES())


def test_every_type_along_a_link_has_a_source_and_a_use():
    core = {"IMAGE", "MASK"}
    sources = {kind for node in NODES.values() for kind in node.RETURN_TYPES}
    uses = {
        kind
        for node in NODES.values()
        for kind, _ in declared_inputs(node).values()
        if not is_widget(kind)
    }
    assert uses - core <= sources
    assert {kind for kind in sources if not is_widget(kind)} - core <= uses
    assert set(NODES) == set(NAMES) and len(set(NAMES.values())) == len(NAMES)


def test_the_default_depth_model_is_that_of_the_library():
    inputs = declared_inputs(NODES["BokehDiffEstimateDisparity"])
    assert inputs["depth_model"][1]["default"] == DEFAULT_DEPTH_MODEL


def test_combo_boxes_hold_all_that_the_library_knows():
    from bokehdiff.rendering.render import METHODS

    inputs = declared_inputs(NODES["BokehDiffClassicalRenderer"])
    assert inputs["method"][0] == list(METHODS)


def test_numbers_survive_the_rounding_of_the_editor():
    """It keeps as many digits behind the point as the step has."""
    for name, node in NODES.items():
        for key, (kind, options) in declared_inputs(node).items():
            if kind == "FLOAT":
                digits = max(-math.floor(math.log10(options["step"])), 0)
                for value in (options["default"], options["min"]):
                    assert round(value, digits) == value, (name, key)


def test_the_pack_works_wherever_it_is_copied(tmp_path):
    folder = shutil.copytree(PACK, tmp_path / "custom_nodes" / "lens.blur")
    copied = load_pack(folder)
    assert copied.NODE_DISPLAY_NAME_MAPPINGS == NAMES
    for name, node in copied.NODE_CLASS_MAPPINGS.items():
        file = sys.modules[node.__module__].__file__
        assert Path(file).parent == folder and node is not NODES[name]
    focus = copied.NODE_CLASS_MAPPINGS["BokehDiffFocusPoint"]()
    assert focus.choose(3, 4) == ({"focus": (3, 4)},)


# --- The workflows --------------------------------------------------------------------------------


def test_the_workflow_renders_a_photo_as_the_library_does(pictures, tmp_path):
    Image.fromarray((pictures[0] * 255).round().astype(np.uint8)).save(tmp_path / "example.png")
    depth_model = save_tiny_depth(tmp_path.parent / "depth")
    workflow = json.loads((PACK / "workflow.json").read_text())
    classes = {**core_nodes(tmp_path), **NODES}
    prompt = prompt_of(workflow, classes)
    check(prompt, classes)  # as it is: a person only chooses the photo
    by_class = {node["class_type"]: key for key, node in prompt.items()}
    prompt[by_class["BokehDiffEstimateDisparity"]]["inputs"]["depth_model"] = str(depth_model)

    results = Executor(classes).run(prompt)

    (saved,) = results[by_class["SaveImage"]]
    pipe = bokehdiff.BokehDiffPipeline.from_pretrained(bokehdiff.TINY)
    pipe.depth_estimator = bokehdiff.DepthEstimator.from_pretrained(depth_model, cache_folder=None)
    wanted = pipe(tmp_path / "example.png", focus="auto", K=20, return_coc=True, output_type="pt")
    np.testing.assert_array_equal(saved, wanted.images[0].movedim(0, -1).numpy())
    assert np.abs(saved - pictures[0]).max() > 0.05  # and it is blurred
    shown = results[by_class["BokehDiffRender"]][1]
    torch.testing.assert_close(shown, wanted.coc.movedim(1, -1), atol=1e-6, rtol=0)


def test_the_focus_pull_workflow_is_a_film_of_a_camera(pictures, tmp_path):
    Image.fromarray((pictures[0] * 255).round().astype(np.uint8)).save(tmp_path / "example.png")
    depth_model = save_tiny_depth(tmp_path.parent / "depth")
    classes = {**core_nodes(tmp_path), **NODES}
    prompt = prompt_of(json.loads((PACK / "workflow_focus_pull.json").read_text()), classes)
    check(prompt, classes)
    by_class = {node["class_type"]: key for key, node in prompt.items()}
    prompt[by_class["BokehDiffEstimateDisparity"]]["inputs"]["depth_model"] = str(depth_model)
    prompt[by_class["BokehDiffFocusPull"]]["inputs"]["frames"] = 2
    first = Executor(classes).run(prompt)[by_class["SaveAnimatedWEBP"]][0]
    pipe = bokehdiff.BokehFlowPipeline.from_pretrained(bokehdiff.FLOW_NANO)
    pipe.depth_estimator = bokehdiff.DepthEstimator.from_pretrained(depth_model, cache_folder=None)
    wanted = pipe(
        tmp_path / "example.png", focus="auto", f_number=1.8, focal_length_mm=50,
        sensor_width_mm=36, focus_distance_m=2, output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(first, wanted[0].movedim(0, -1).numpy(), atol=1e-5, rtol=0)


def test_the_harness_refuses_a_wrong_workflow(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "example.png")
    classes = {**core_nodes(tmp_path), **NODES}
    workflow = (PACK / "workflow.json").read_text()
    prompt = prompt_of(json.loads(workflow), classes)
    render = next(node for node in prompt.values() if node["class_type"] == "BokehDiffRender")
    for change in ({"focus": ["1", 0]}, {"K": -1.0}, {"K": "20"}, {"typo": 1}):
        kept = dict(render["inputs"])
        render["inputs"].update(change)
        with pytest.raises(ValueError):
            check(prompt, classes)
        render["inputs"] = kept
    check(prompt, classes)
    with pytest.raises(AssertionError):
        prompt_of(json.loads(workflow.replace('"type": "IMAGE"', '"type": "LATENT"', 1)), classes)


# --- Rendering ------------------------------------------------------------------------------------


def test_a_batch_is_rendered_as_its_pictures_are(pictures, images, disparity, tiny):
    focus = call("BokehDiffFocusDisparity", df=0.2)[0]
    both = call("BokehDiffRender", image=images, disparity=disparity, focus=focus, renderer=tiny)[0]
    wanted = library_picture(pictures, disparity=disparity.disparity, df=0.2, K=20)
    torch.testing.assert_close(both, wanted, atol=2e-6, rtol=0)
    alone = call(
        "BokehDiffRender", image=images[1:], disparity=disparity, focus=focus, renderer=tiny
    )[0]
    assert torch.equal(alone, both[1:])


@pytest.mark.parametrize("point", [(WIDTH // 2, HEIGHT // 2), (2, 3)])
def test_focus_on_a_point(pictures, images, disparity, tiny, point):
    focus = call("BokehDiffFocusPoint", x=point[0], y=point[1])[0]
    blurred, circles = call(
        "BokehDiffRender", image=images[:1], disparity=disparity, focus=focus, renderer=tiny, K=9.0
    )
    wanted = library_picture(pictures[:1], disparity=disparity.disparity, focus=point, K=9)
    assert torch.equal(blurred, wanted)
    column, row = point
    around = np.s_[0, max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]
    torch.testing.assert_close(blurred[around], images[around], atol=1e-6, rtol=0)
    assert (circles[around].argmax(-1) == 1).all()  # green is in focus


def test_focus_on_a_mask(pictures, images, disparity, tiny):
    """One for all photographs, or one for each."""
    middle = (disparity.disparity[0] > 0.5).float()
    for masks in (middle, torch.cat([middle, 1 - middle])):
        focus = call("BokehDiffFocusMask", mask=masks)[0]
        blurred = call(
            "BokehDiffRender", image=images, disparity=disparity, focus=focus, renderer=tiny
        )[0]
        df = [0.9, 0.9] if len(masks) == 1 else [0.9, 0.2]
        wanted = library_picture(pictures, disparity=disparity.disparity, df=df, K=20)
        torch.testing.assert_close(blurred, wanted, atol=2e-6, rtol=0)


def test_a_whole_subject_is_sharp(images):
    slanted = torch.linspace(0, 1, WIDTH).expand(1, 1, HEIGHT, WIDTH)
    subject = torch.zeros(1, HEIGHT, WIDTH)
    subject[:, :, 20:32] = 1
    renderer = call("BokehDiffClassicalRenderer", method="pyramid")[0]
    sharp = {}
    for whole in (False, True):
        focus = call("BokehDiffFocusMask", mask=subject, whole_subject=whole)[0]
        circles = call(
            "BokehDiffRender",
            image=images[:1],
            disparity=DepthEstimate(slanted, False),
            focus=focus,
            renderer=renderer,
            K=60.0,
        )[1]
        green = (circles[0].argmax(-1) == 1) & (circles[0, ..., 1] > 0.4)
        sharp[whole] = int(green[0].sum())
    assert sharp[False] < 4 and 10 <= sharp[True] <= 14


def test_a_classical_renderer_and_its_opening(pictures, images, disparity):
    lens = dict(blades=6, rotation=15.0, roundness=0.25, cat_eye=0.5, squeeze=0.75)
    renderer = call("BokehDiffClassicalRenderer", method="scatter", boost_highlights=True, **lens)[
        0
    ]
    focus = call("BokehDiffFocusAuto")[0]
    blurred = call(
        "BokehDiffRender", image=images, disparity=disparity, focus=focus, renderer=renderer
    )[0]
    wanted = bokehdiff.render_bokeh(
        pictures, disparity.disparity, 0.9, 20, method="scatter", highlights="boost",
        aperture=bokehdiff.Aperture(**lens),
    )  # fmt: skip
    torch.testing.assert_close(blurred, wanted.movedim(1, -1), atol=2e-6, rtol=0)


def test_flow_nano(pictures, images, metric):
    renderer = call("BokehDiffLoadModel", model="FLOW_NANO")[0]
    focus = call("BokehDiffFocusDisparity", df=0.2)[0]
    blurred = call(
        "BokehDiffRender", image=images, disparity=metric, focus=focus, renderer=renderer, K=5.0
    )[0]
    pipe = bokehdiff.BokehFlowPipeline.from_pretrained(bokehdiff.FLOW_NANO)
    wanted = pipe(
        list(pictures), metric.disparity, df=0.2, K=5, metric=True, output_type="pt"
    ).images
    torch.testing.assert_close(blurred, wanted.movedim(1, -1), atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", ["BokehDiff or SDXL", "BokehFlow"])
def test_models_in_folders(kind):
    folder = bokehdiff.FLOW_NANO if kind == "BokehFlow" else bokehdiff.TINY
    (pipe,) = call("BokehDiffLoadModel", model=kind, folder_or_hub_id=folder)
    assert isinstance(pipe, (bokehdiff.BokehDiffPipeline, bokehdiff.BokehFlowPipeline))
    assert isinstance(pipe, bokehdiff.BokehFlowPipeline) == (kind == "BokehFlow")


# --- A camera -------------------------------------------------------------------------------------


def test_a_camera_takes_the_place_of_k(pictures, images, disparity, metric, tiny):
    """Relative disparity asks how far away things are; a map in 1/metres knows."""
    lens = dict(f_number=1.4, focal_length_mm=85.0, sensor_width_mm=23.5)
    room = dict(focus_distance_m=1.5, farthest_distance_m=4.0)
    (camera,) = call("BokehDiffCamera", **lens, **room)
    focus = call("BokehDiffFocusPoint", x=WIDTH // 2, y=HEIGHT // 2)[0]
    for found, distances in ((disparity, room), (metric, {"metric": True})):
        common = dict(image=images, disparity=found, focus=focus, renderer=tiny, camera=camera)
        blurred, circles = call("BokehDiffRender", K=3.0, **common)
        wanted = library_picture(
            pictures,
            disparity=found.disparity,
            focus=(WIDTH // 2, HEIGHT // 2),
            **lens,
            **distances,
        )
        torch.testing.assert_close(blurred, wanted, atol=2e-6, rtol=0)
        # K is not used, in neither of the pictures.
        again = call("BokehDiffRender", K=700.0, **common)
        assert torch.equal(again[0], blurred) and torch.equal(again[1], circles)


def test_a_smaller_aperture_and_infinity(images, disparity):
    renderer = call("BokehDiffClassicalRenderer", method="pyramid")[0]
    focus = call("BokehDiffFocusAuto")[0]
    common = dict(image=images[:1], disparity=disparity, focus=focus, renderer=renderer)
    change = []
    for f_number in (16.0, 4.0, 1.4):
        (camera,) = call("BokehDiffCamera", f_number=f_number)
        assert camera["farthest_distance_m"] == math.inf
        blurred = call("BokehDiffRender", camera=camera, **common)[0]
        change.append(float((blurred - images[:1]).abs().mean()))
    assert change[0] < change[1] < change[2]


def test_a_focus_pull_keeps_the_blur_of_its_first_frame(images, disparity):
    renderer = call("BokehDiffClassicalRenderer", method="pyramid")[0]
    near, far = (call("BokehDiffFocusPoint", x=x, y=HEIGHT // 2)[0] for x in (WIDTH // 2, 2))
    (camera,) = call("BokehDiffCamera")
    common = dict(image=images[:1], disparity=disparity, renderer=renderer)
    (frames,) = call(
        "BokehDiffFocusPull", focus_from=near, focus_to=far, frames=3, camera=camera, **common
    )
    K = bokehdiff.Camera(1.8, 50, 36).strength((HEIGHT, WIDTH), 0.9, focus_distance_m=2)
    for frame, focus in ((0, near), (2, far)):
        wanted = call("BokehDiffRender", focus=focus, K=K, **common)[0]
        torch.testing.assert_close(frames[frame : frame + 1], wanted, atol=1e-5, rtol=0)


# --- Focus pull -----------------------------------------------------------------------------------


@pytest.mark.parametrize("easing", ["smooth", "linear"])
def test_a_focus_pull_goes_from_one_picture_to_the_other(images, disparity, easing):
    renderer = call("BokehDiffClassicalRenderer", method="pyramid")[0]
    near, far = (call("BokehDiffFocusPoint", x=x, y=HEIGHT // 2)[0] for x in (WIDTH // 2, 2))
    common = dict(image=images[:1], disparity=disparity, renderer=renderer, K=10.0)
    (frames,) = call(
        "BokehDiffFocusPull", focus_from=near, focus_to=far, frames=5, easing=easing, **common
    )
    assert frames.shape == (5, HEIGHT, WIDTH, 3)
    assert torch.equal(frames[:1], call("BokehDiffRender", focus=near, **common)[0])
    assert torch.equal(frames[4:], call("BokehDiffRender", focus=far, **common)[0])
    along = 0.25 if easing == "linear" else 0.25**2 * 2.5
    between = call("BokehDiffFocusDisparity", df=0.9 - 0.7 * along)[0]
    wanted = call("BokehDiffRender", focus=between, **common)[0]
    torch.testing.assert_close(frames[1:2], wanted, atol=1e-5, rtol=0)


def test_a_focus_pull_by_the_model(pictures, images, disparity, tiny):
    ends = [call("BokehDiffFocusDisparity", df=df)[0] for df in (0.2, 0.9)]
    (frames,) = call(
        "BokehDiffFocusPull",
        image=images[:1],
        disparity=disparity,
        focus_from=ends[0],
        focus_to=ends[1],
        renderer=tiny,
        frames=2,
    )
    wanted = library_picture(pictures[:1], disparity=disparity.disparity, df=[0.2, 0.9], K=20)
    torch.testing.assert_close(frames, wanted, atol=2e-6, rtol=0)


class Interrupted(Exception):
    """What ComfyUI's bar raises when a person has stopped the run."""


def progress_bars(monkeypatch: pytest.MonkeyPatch, last: int | None = None) -> list[Any]:
    """ComfyUI's bars, as nodes make them; one of them is interrupted at the step `last`."""
    made: list[Any] = []

    class ProgressBar:
        def __init__(self, total: int) -> None:
            self.total, self.done = total, 0
            made.append(self)

        def update(self, value: int) -> None:
            self.done += value
            if self.done == last:
                raise Interrupted

    utils = types.ModuleType("comfy.utils")
    utils.ProgressBar = ProgressBar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy", types.ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.utils", utils)
    return made


def test_the_bar_of_comfyui_moves_and_lets_a_person_interrupt(images, disparity, monkeypatch):
    bars = progress_bars(monkeypatch, last=2)
    focus = call("BokehDiffFocusDisparity")[0]
    renderer = call("BokehDiffClassicalRenderer", method="pyramid")[0]
    common = dict(image=images[:1], disparity=disparity, renderer=renderer)
    call("BokehDiffRender", focus=focus, **common)
    with pytest.raises(Interrupted):
        call("BokehDiffFocusPull", focus_from=focus, focus_to=focus, frames=1000, **common)
    assert [bar.total for bar in bars] == [1, 1000]


# --- Disparity ------------------------------------------------------------------------------------


def test_disparity_is_estimated_and_the_model_kept(pictures, images, tmp_path):
    folder = save_tiny_depth(tmp_path, "metric")
    node = NODES["BokehDiffEstimateDisparity"]()
    (found,) = node.estimate(images, str(folder))
    wanted = bokehdiff.DepthEstimator.from_pretrained(folder, cache_folder=None)(list(pictures))
    assert found.metric and torch.equal(found.disparity, wanted.disparity)
    for file in folder.iterdir():
        file.unlink()
    assert torch.equal(node.estimate(images, str(folder))[0].disparity, found.disparity)


def test_disparity_from_an_image_and_back():
    gray = (
        torch.linspace(0.25, 0.75, WIDTH).expand(2, HEIGHT, WIDTH)[..., None].expand(-1, -1, -1, 3)
    )
    (found,) = call("BokehDiffDisparityFromImage", image=gray)
    assert not found.metric and torch.equal(found.disparity[:, 0], gray[..., 0])
    (found,) = call("BokehDiffDisparityFromImage", image=gray, white_per_metre=2.0)
    assert found.metric and torch.equal(found.disparity[:, 0], 2 * gray[..., 0])
    (found,) = call("BokehDiffDisparityFromImage", image=gray, normalise=True)
    assert not found.metric and (found.disparity.min(), found.disparity.max()) == (0, 1)
    shown, colours = call("BokehDiffDisparityToImage", disparity=found)
    torch.testing.assert_close(shown[..., 0], found.disparity[:, 0])
    assert colours.shape == (2, HEIGHT, WIDTH, 3)
    near, far = colours[0, 0, -1], colours[0, 0, 0]
    assert near.min() > 0.7 and far[2] == far.max()  # light, dark blue


# --- Stacks, and depth from them ------------------------------------------------------------------


def test_a_stack_and_depth_from_it(metric):
    """Noise is blurred behind a near plane in focus; what is measured goes back in as disparity."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 96, 96, 3, generator=generator)
    truth = torch.full((1, 1, 96, 96), 0.8)
    truth[..., 48:] = 0.4
    renderer = call("BokehDiffClassicalRenderer")[0]
    focus = call("BokehDiffFocusDisparity", df=1.0)[0]
    stack, strengths, distance = call(
        "BokehDiffStack",
        image=image,
        disparity=DepthEstimate(truth, True),
        focus=focus,
        renderer=renderer,
        K="4, 8",
    )
    wanted = [
        bokehdiff.render_bokeh(image.movedim(-1, 1), truth, 1.0, K, metric=True) for K in (4, 8)
    ]
    assert torch.equal(stack, torch.cat(wanted).movedim(1, -1))
    assert (strengths, distance) == ("4, 8", "1")
    found, confidence = call(
        "BokehDiffDepthFromSweep", image=image, stack=stack, K=strengths, focus_distance_m=distance
    )
    by_library = bokehdiff.depth_from_sweep(image.movedim(-1, 1), stack.movedim(-1, 1), [4, 8], 1)
    assert found.metric and torch.equal(found.disparity, by_library.disparity)
    assert torch.equal(confidence, by_library.confidence[:, 0])
    error = (found.disparity / truth - 1).abs()
    assert error.median() < 0.03


def test_a_stack_by_the_model(pictures, images, metric, tiny):
    focus = call("BokehDiffFocusPoint", x=2, y=2)[0]
    stack, _, distance = call(
        "BokehDiffStack", image=images[:1], disparity=metric, focus=focus, renderer=tiny, K="0 5"
    )
    wanted = library_picture(
        pictures[:1], disparity=metric.disparity, df=0.2, K=[0, 5], metric=True
    )
    torch.testing.assert_close(stack, wanted, atol=2e-6, rtol=0)
    assert torch.equal(stack[:1], images[:1])
    assert float(distance) == pytest.approx(5)


def test_a_stack_of_a_camera(images, metric):
    """A picture for each f-number; the strengths come out for the nodes that find depth."""
    renderer = call("BokehDiffClassicalRenderer", method="pyramid")[0]
    focus = call("BokehDiffFocusDisparity", df=0.9)[0]
    (camera,) = call("BokehDiffCamera", f_number=4.0, focal_length_mm=85.0)
    common = dict(image=images[:1], disparity=metric, focus=focus, renderer=renderer)
    stack, strengths, distance = call(
        "BokehDiffStack", camera=camera, f_numbers="2.8, 4", K="700", **common
    )
    numbers = [float(word) for word in strengths.split(",")]
    wanted = [
        bokehdiff.Camera(f_number, 85).strength((HEIGHT, WIDTH), 0.9, metric=True)
        for f_number in (2.8, 4)
    ]
    assert numbers == pytest.approx(wanted) and float(distance) == pytest.approx(1 / 0.9)
    by_strength = call("BokehDiffStack", K=strengths, **common)
    torch.testing.assert_close(stack, by_strength[0])
    own = call("BokehDiffStack", camera=camera, **common)
    assert len(own[0]) == 1 and float(own[1]) == pytest.approx(wanted[1])


# --- Painted stacks -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kontext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny FLUX.1-Kontext (kontext), its adapter (bokeh_lora.bin), and both in one
    (together)."""
    folder = tmp_path_factory.mktemp("kontext")
    parts = tiny_kontext_components(folder)
    pipe = bokehdiff.BokehStackPipeline(**parts, bokeh_adapter=trained_adapter())
    pipe.save_bokeh_adapter(folder / "bokeh_lora.bin")
    pipe.save_pretrained(folder / "together")
    pipe.unload_bokeh_adapter()
    pipe.save_pretrained(folder / "kontext")
    return folder


@pytest.fixture(scope="module")
def painter(kontext: Path) -> Any:
    """What the node loads."""
    file = str(kontext / "bokeh_lora.bin")
    return call("BokehDiffLoadStackPainter", model=str(kontext / "kontext"), adapter=file)[0]


def test_a_painted_stack_is_that_of_the_pipeline(kontext, painter, images, monkeypatch):
    bars = progress_bars(monkeypatch)
    common = dict(image=images[:1], K="0, 20", steps=2)
    stack, strengths = call("BokehDiffPaintStack", painter=painter, seed=7, **common)
    assert strengths == "0, 20" and stack.shape == (2, HEIGHT, WIDTH, 3)
    pipe = bokehdiff.BokehStackPipeline.from_pretrained(kontext / "kontext")
    pipe.load_bokeh_adapter(kontext / "bokeh_lora.bin")
    wanted = pipe(
        images[:1].movedim(-1, 1), [0, 20], generator=torch.Generator().manual_seed(7),
        num_inference_steps=2, output_type="pt",
    ).images.movedim(1, -1)  # fmt: skip
    torch.testing.assert_close(stack, wanted, atol=1e-2, rtol=0)  # colours are put back in 8 bits
    assert (stack - wanted).abs().mean() < 1e-4
    assert [(bar.total, bar.done) for bar in bars] == [(2, 2)]  # K = 0 is not painted
    other = call("BokehDiffPaintStack", painter=painter, seed=8, **common)[0]
    assert torch.equal(stack[0], images[0]) and not torch.equal(other[1:], stack[1:])


def test_a_painted_stack_of_a_camera(painter, images):
    (camera,) = call("BokehDiffCamera", f_number=4.0, focal_length_mm=85.0, focus_distance_m=3.0)
    paint = dict(image=images[:1], painter=painter, steps=1, camera=camera)
    stack, strengths = call("BokehDiffPaintStack", f_numbers="2, 4", **paint)
    wanted = [bokehdiff.strength_from_camera(f_number, 85, 3, 36, WIDTH) for f_number in (2, 4)]
    assert [float(word) for word in strengths.split(",")] == pytest.approx(wanted)
    assert len(stack) == 2


def test_the_adapter_may_lie_in_the_folder_of_the_model(kontext, painter):
    (pipe,) = call("BokehDiffLoadStackPainter", model=str(kontext / "together"), adapter="")
    for name, value in painter.bokeh_adapter.state_dict().items():
        assert torch.equal(value, pipe.bokeh_adapter.state_dict()[name])


def test_depth_by_a_network_that_sees_the_stack(pictures, images, tmp_path):
    folder = save_tiny_dsfa(tmp_path)
    stack = torch.cat([images[1:], images[:1]])
    (found,) = call(
        "BokehDiffDepthFromBokeh",
        image=images[:1],
        stack=stack,
        K="10, 20",
        depth_model=str(folder),
    )
    pipe = bokehdiff.DepthFromBokehPipeline.from_pretrained(folder)
    wanted = pipe(pictures[0], list(pictures[::-1]), [10, 20]).disparity
    assert found.metric and torch.equal(found.disparity, wanted)


# --- Mistakes -------------------------------------------------------------------------------------


def test_mistakes_are_answered_by_the_sentences_of_the_library(images, disparity, metric, tiny):
    one = images[:1]
    focus = call("BokehDiffFocusDisparity", df=0.2)[0]
    render = dict(image=one, disparity=disparity, focus=focus, renderer=tiny)
    outside = call("BokehDiffFocusPoint", x=WIDTH, y=0)[0]
    no_mask = call("BokehDiffFocusMask", mask=torch.zeros(1, 64, 64))[0]
    empty = call("BokehDiffFocusMask", mask=torch.zeros(1, HEIGHT, WIDTH))[0]
    small = DepthEstimate(near_and_far(HEIGHT // 2, WIDTH // 2), False)
    sentences = {
        "lies outside the picture": {**render, "focus": outside},
        r"mask has shape \(64, 64\); wanted that of the photograph": {**render, "focus": no_mask},
        "mask is empty": {**render, "focus": empty},
        "wanted the same size. Resize it": {**render, "disparity": small},
        "has values from .* wanted display-encoded": {**render, "image": one * 255},
    }
    for sentence, inputs in sentences.items():
        assert re.search(sentence, refusal("BokehDiffRender", **inputs)), sentence
    bad_aperture = refusal("BokehDiffClassicalRenderer", blades=2)
    assert "at least 3 blades" in bad_aperture
    assert "no folder" in refusal(
        "BokehDiffLoadModel", model="BokehFlow", folder_or_hub_id="/nowhere"
    )
    assert "no folder" in refusal("BokehDiffEstimateDisparity", image=one, depth_model="/nowhere")
    by_network = dict(image=one, stack=one, K="1")
    assert "no folder" in refusal("BokehDiffDepthFromBokeh", **by_network, depth_model="/nowhere")
    assert "colour picture" in refusal("BokehDiffDisparityFromImage", image=one)
    sweep = dict(image=one, stack=images, K="5, 10")
    assert "above 0" in refusal("BokehDiffDepthFromSweep", **sweep, focus_distance_m="0")
    assert "2 strengths K for 1 frames" in refusal(
        "BokehDiffDepthFromSweep", **{**sweep, "stack": one}
    )
    stack = dict(image=one, disparity=metric, focus=focus, renderer=tiny)
    assert "wanted one number or a list" in refusal("BokehDiffStack", **stack, K="")


def test_mistakes_that_only_nodes_can_make(images, disparity, metric, tiny):
    focus = call("BokehDiffFocusDisparity", df=0.2)[0]
    stack = dict(image=images[:1], disparity=metric, focus=focus, renderer=tiny)
    assert "no unit" in refusal("BokehDiffStack", **{**stack, "disparity": disparity})
    assert "batch of 2" in refusal("BokehDiffStack", **{**stack, "image": images})
    assert "wanted numbers separated by commas" in refusal("BokehDiffStack", **stack, K="ten")
    pull = {**stack, "focus_from": stack.pop("focus"), "focus_to": focus}
    del pull["focus"]
    assert "batch of 2" in refusal("BokehDiffFocusPull", **{**pull, "image": images})
    gray = images[..., :1].expand(-1, -1, -1, 3)
    assert "both came" in refusal(
        "BokehDiffDisparityFromImage", image=gray, normalise=True, white_per_metre=1.0
    )
    assert "is empty" in refusal("BokehDiffDepthFromBokeh", image=images, stack=images)
    stack["focus"] = focus
    assert "no camera is connected" in refusal("BokehDiffStack", **stack, f_numbers="2.8")
    load = "BokehDiffLoadModel"
    assert "inside bokehdiff" in refusal(load, folder_or_hub_id="mine")
    assert "is empty" in refusal(load, model="BokehFlow")
    assert "wanted none with FLOW_NANO" in refusal(load, model="FLOW_NANO", weights="mine")


def test_mistakes_with_a_camera(images, disparity, metric, tiny):
    assert "f_number is -1" in refusal("BokehDiffCamera", f_number=-1.0)
    (camera,) = call("BokehDiffCamera", focus_distance_m=3.0, farthest_distance_m=2.0)
    plane, farthest = (call("BokehDiffFocusDisparity", df=df)[0] for df in (0.2, 0.0))
    render = dict(image=images[:1], disparity=disparity, focus=plane, renderer=tiny, camera=camera)
    assert "wanted what is in focus nearer" in refusal("BokehDiffRender", **render)
    (camera,) = call("BokehDiffCamera")
    render |= {"camera": camera, "focus": farthest}
    assert "df is 0, which is the farthest thing" in refusal("BokehDiffRender", **render)
    stack = {**render, "disparity": metric, "f_numbers": "wide"}
    assert "f_numbers is 'wide'; wanted numbers" in refusal("BokehDiffStack", **stack)


def test_mistakes_with_a_painter(kontext, painter, images):
    load, model = "BokehDiffLoadStackPainter", str(kontext / "kontext")
    assert "no folder '/nowhere'" in refusal(load, model="/nowhere")
    assert "model is empty" in refusal(load, model="")
    assert "holds none" in refusal(load, model=model)
    assert "/nowhere" in refusal(load, model=model, adapter="/nowhere")
    if not torch.cuda.is_available():
        assert "there is no GPU" in refusal(load, model=model, offload=True)
    paint = dict(image=images[:1], painter=painter, steps=1)
    assert "batch of 2" in refusal("BokehDiffPaintStack", **{**paint, "image": images})
    assert "K is 700 for a photo of 72 x 48" in refusal("BokehDiffPaintStack", **paint, K="700")
    assert "no camera is connected" in refusal("BokehDiffPaintStack", **paint, f_numbers="2.8")
