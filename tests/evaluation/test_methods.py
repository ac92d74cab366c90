"""Methods by name: what they render, what they are given, and what they refuse."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bokehdiff.images import linear_to_srgb, srgb_to_linear
from bokehdiff.models.bokehflow import BokehFlowModel
from evaluation.callables import is_callable_name
from evaluation.methods import method_by_name, predictions_in, split_name
from evaluation.metrics import quantise_to_8_bit
from evaluation.photographs import Photograph
from tests.evaluation.triples_folder import disparity, picture
from tests.trained_pipelines import base_pipeline


def photograph(**changes: object) -> Photograph:
    image = picture(seed=0)
    made = Photograph(
        scene="a", setting="f0", image=image, disparity=disparity(), disparity_range=(0.2, 0.8),
        df=0.8, K=10.0, truth=image,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def moved(one: Photograph, factor: float, offset: float) -> Photograph:
    """The same circles of confusion with disparity in another unit, or from another zero."""
    low, high = (factor * end + offset for end in one.disparity_range)
    return dataclasses.replace(
        one,
        disparity=(factor * one.disparity + offset).astype(np.float32),
        disparity_range=(low, high),
        df=factor * one.df + offset,
        K=one.K / factor,
    )


# --- Renderers and models -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scatter", "layered"])
@pytest.mark.parametrize(("factor", "offset"), [(5.0, 0.0), (2.0, -1.0), (1.0, -0.8)])
def test_classical_renderers_take_any_disparity(name: str, factor: float, offset: float) -> None:
    method = method_by_name(name)
    wanted = method.render(photograph())
    found = method.render(moved(photograph(), factor, offset))
    # float32 rounds the radii otherwise, which may tip a pixel into another layer or kernel.
    assert np.abs(found - wanted).mean() < 1e-4
    assert np.abs(wanted - photograph().image / 255).max() > 0.05, "there is blur"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small-model"
    base_pipeline().save_pretrained(folder)
    return folder


def test_a_model_folder_is_the_pipeline_in_it(model_folder: Path) -> None:
    method = method_by_name(str(model_folder))
    assert method.name == "small-model" and method.needs_K and method.timed
    assert "df and K" in method.description and "small-model" in method.description
    one = photograph()
    found = method.render(one)
    image = base_pipeline()(
        one.image, (one.disparity - 0.2) / 0.6, 1.0, 10.0 * 0.6, output_type="np"
    ).images[0]
    assert found.shape == one.image.shape
    # It maps the disparity in float32, as this does in another order.
    assert np.abs(found - image).max() < 1e-3
    again = method.render(moved(one, 2.0, -1.0))
    assert np.abs(again - found).max() < 1e-3


def test_a_model_takes_a_focus_beyond_the_scene_and_a_flat_scene(model_folder: Path) -> None:
    method = method_by_name(str(model_folder))
    beyond = method.render(photograph(df=1.5))
    assert np.isfinite(beyond).all()
    flat = np.full_like(disparity(), 0.5)
    in_focus = method.render(photograph(disparity=flat, disparity_range=(0.5, 0.5), df=0.5))
    assert np.abs(in_focus - photograph().image / 255).max() <= 1 / 255


def test_a_folder_with_a_bokehflow_is_the_network_and_its_physics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = BokehFlowModel(channels=8, stem_channels=8, head_channels=8, blocks=2).eval()
    with torch.no_grad():
        network.bokeh_head.answer.bias.fill_(0.05)
    network.save_pretrained(tmp_path / "network")
    whole = method_by_name(str(tmp_path / "network"))
    physics = method_by_name(f"{tmp_path / 'network'}-physics")
    assert (whole.name, physics.name) == ("network", "network-physics")
    assert "before it adds anything" in physics.description and "df and K" in whole.description
    one = photograph()
    found, rendered = whole.render(one), physics.render(one)
    assert found.shape == rendered.shape == one.image.shape
    assert np.abs(found - rendered).max() > 0.001, "the network adds something"
    image = torch.from_numpy(one.image / np.float32(255)).permute(2, 0, 1)[None]
    disparity = torch.from_numpy((one.disparity - 0.2) / 0.6)[None, None]
    wanted = network.blur(image, 1.0, 10.0 * 0.6, disparity=disparity, return_physics=True)
    for made, of_network in ((found, wanted.bokeh), (rendered, wanted.physics)):
        assert np.abs(made - of_network[0].permute(1, 2, 0).detach().numpy()).max() < 1e-5
    # The unit of the disparity, and where it begins, do not matter; the focus may lie beyond it.
    assert np.abs(whole.render(moved(one, 2.0, -1.0)) - found).max() < 1e-3
    assert np.isfinite(whole.render(photograph(df=1.5))).all()
    with pytest.raises(ValueError, match="cut off at white"):
        method_by_name(str(tmp_path / "network"), given="linear")
    with pytest.raises(ValueError, match="is neither one of tiny, flow, flow-physics"):
        method_by_name("physics")


def test_the_gaussian_is_the_best_of_its_widths() -> None:
    from scipy.ndimage import gaussian_filter

    light = srgb_to_linear(picture(0) / 255)
    blurred = linear_to_srgb(gaussian_filter(light, (2.2, 2.2, 0), truncate=3))
    truth = (quantise_to_8_bit(blurred) * 255).round().astype(np.uint8)
    method = method_by_name("gaussian")
    found = quantise_to_8_bit(method.render(photograph(truth=truth, K=None)))
    assert np.array_equal(found, truth / 255)
    sharp = method.render(photograph(K=None))
    assert np.abs(sharp - photograph().image / 255).max() < 1e-9, "no blur is among them"
    assert not method.needs_K and not method_by_name("identity").needs_K


def test_linear_light_has_to_be_there() -> None:
    light = np.float32(2) * srgb_to_linear(picture(0) / 255).astype(np.float32)
    bright = photograph(light=light)
    for name in ("identity", "gaussian", "scatter"):
        method = method_by_name(name, given="linear")
        assert "linear light" in method.description or "hdr" in method.description
        assert method.render(bright).mean() > photograph().image.mean() / 255 * 1.2
        with pytest.raises(ValueError, match="a_f0 has no linear light .*--input srgb8"):
            method.render(photograph())


# --- Python functions -----------------------------------------------------------------------------

FUNCTIONS = '''
import numpy as np
from beside import LEVELS

def greedy(image, disparity, df, K):
    """Changes what it is given."""
    result = image / LEVELS * (0.5 if (df, K) == (0.8, 10.0) else 1.0)
    image[:] = 0
    disparity[:] = 0
    return result

def as_bytes(image, disparity, df, K):
    assert image.dtype == np.uint8 and disparity.shape == image.shape[:2]
    return image // 2

def levels(image, disparity, df, K):
    return image.astype(float)

def flat(image, disparity, df, K):
    return image[..., 0]

def nothing(image, disparity, df, K):
    return None

CONSTANT = 3
'''


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("LEVELS = 255\n")
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    yield file
    for name in ("evaluated_mine", "beside"):
        sys.modules.pop(name, None)
    sys.path[:] = [folder for folder in sys.path if folder != str(tmp_path)]


def test_a_function_of_a_file_is_a_method(functions: Path) -> None:
    method = method_by_name(f"{functions}:greedy")
    assert method.name == "mine.py:greedy" and "disparity" in method.description
    one = photograph()
    before = one.image.copy(), one.disparity.copy()
    assert np.array_equal(method.render(one), before[0] / 255 / 2)
    assert np.array_equal(one.image, before[0]) and np.array_equal(one.disparity, before[1])
    rendered = method_by_name(f"{functions}:as_bytes").render(one)
    assert np.array_equal(rendered, (before[0] // 2) / 255)


def test_a_function_of_a_module_is_a_method() -> None:
    method = method_by_name("tests.evaluation.a_blur:darker")
    assert method.name == "tests.evaluation.a_blur:darker"
    assert np.array_equal(method.render(photograph()), photograph().image / 510)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("levels", r"returned float64 values up to 1\d\d; wanted .*floats in \[0, 1\]"),
        ("flat", r"shape \(90, 120\) and type uint8; wanted an array of shape \(90, 120, 3\)"),
        ("nothing", "returned a NoneType"),
    ],
)
def test_what_a_function_returns_is_checked(functions: Path, function: str, words: str) -> None:
    method = method_by_name(f"{functions}:{function}")
    with pytest.raises(ValueError, match=words):
        method.render(photograph())


def test_functions_that_are_not_there_are_named(functions: Path) -> None:
    with pytest.raises(ValueError, match=r"mine.py has no function blur; it has greedy, as_bytes"):
        method_by_name(f"{functions}:blur")
    with pytest.raises(ValueError, match="has no function CONSTANT"):
        method_by_name(f"{functions}:CONSTANT")
    with pytest.raises(ValueError, match="There is no file .*other.py"):
        method_by_name(f"{functions.parent}/other.py:blur")
    with pytest.raises(ValueError, match="no_such_module cannot be imported"):
        method_by_name("no_such_module:blur")
    broken = functions.with_name("broken.py")
    for text, words in [("import no_such_package", "no_such_package"), ("def f(:", "syntax")]:
        broken.write_text(text)
        with pytest.raises(ValueError, match=f"broken.py cannot be imported: .*{words}"):
            method_by_name(f"{broken}:f")
    assert "evaluated_broken" not in sys.modules
    with pytest.raises(ValueError, match="cut off at white"):
        method_by_name(f"{functions}:greedy", given="linear")


def test_names_of_functions() -> None:
    assert is_callable_name("package.module:function") and is_callable_name("a b/c.py:f")
    for name in ("scatter", ":f", "module:", "module:3", "C:\\model"):
        assert not is_callable_name(name)


# --- Finished pictures ----------------------------------------------------------------------------


def test_predictions_are_read_by_scene_and_setting(tmp_path: Path) -> None:
    one = photograph()
    Image.fromarray(one.image).save(tmp_path / "a_f0.png")
    method = predictions_in(tmp_path, "theirs")
    assert method.name == "theirs" and not method.timed and not method.needs_K
    assert np.array_equal(method.render(one), one.image / 255)
    with pytest.raises(ValueError, match="a_f1.png is missing"):
        method.render(photograph(setting="f1"))
    Image.fromarray(one.image).save(tmp_path / "a_f1.jpg", quality=95)
    assert np.abs(method.render(photograph(setting="f1")) - one.image / 255).mean() < 0.02
    Image.fromarray(one.image).save(tmp_path / "a_f0.jpeg")
    with pytest.raises(ValueError, match="a_f0.png and .*a_f0.jpeg; wanted one"):
        method.render(one)
    with pytest.raises(ValueError, match="no folder .*nowhere with predictions"):
        predictions_in(tmp_path / "nowhere")


def test_names_before_an_equals_sign(tmp_path: Path) -> None:
    assert split_name("theirs=pictures/of theirs") == ("theirs", "pictures/of theirs")
    assert split_name("pictures") == (None, "pictures")
    (tmp_path / "a=b").mkdir()
    assert split_name(str(tmp_path / "a=b")) == (None, str(tmp_path / "a=b"))
    for text in ("=pictures", "theirs=", "of/them=pictures", "..=pictures"):
        with pytest.raises(ValueError, match="no name that can be used; wanted NAME=WHAT"):
            split_name(text)
