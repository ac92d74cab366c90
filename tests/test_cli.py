"""The command line, run in this process through the same entry as the installed command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import bokehdiff
from bokehdiff.cli import app, renderers
from tests.tiny_flow import tiny_flow
from tests.training.runs import save_tiny_sdxl, train


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """photo.png (48 x 32) and photo.npy: a near square before a far background, in `tmp_path`."""
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    disparity = np.full((32, 48), 0.1, np.float32)
    disparity[8:24, 12:30] = 0.8
    Image.fromarray(photo).save(tmp_path / "photo.png")
    np.save(tmp_path / "photo.npy", disparity)
    return tmp_path


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_help_and_version():
    result = run("--help")
    assert result.exit_code == 0 and "render" in result.output and "info" in result.output
    result = run("render", "--help")
    assert "bokehdiff render photo.jpg --disparity photo.npy --df 0.7 --K 20" in result.output
    assert run("--version").output == f"bokehdiff {bokehdiff.__version__}\n"


def test_no_arguments_shows_help():
    assert "Usage" in run().output


def test_usage_errors_are_exit_code_two():
    assert run("render").exit_code == 2
    assert run("rendre").exit_code == 2
    assert run("render", "a.png", "--disparity", "b", "-o", "c", "--K", "much").exit_code == 2


def test_scatter_renders_and_prints_where(scene):
    target = scene / "out.png"
    result = run(
        "render", scene / "photo.png", "--disparity", scene / "photo.npy", "--df", 0.8, "--K", 6,
        "--method", "scatter", "-o", target,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{target} (df 0.8, K 6)\n"
    photo, blurred = read(scene / "photo.png"), read(target)
    assert blurred.shape == photo.shape
    inside = (slice(14, 18), slice(18, 24))
    assert np.abs(blurred[inside] - photo[inside]).max() <= 1
    assert blurred[:, 36:].std() < 0.6 * photo[:, 36:].std()


def test_focus_point_takes_its_disparity(scene):
    by_point = run(
        "render", scene / "photo.png", "--disparity", scene / "photo.npy", "--focus", "20,15",
        "--method", "scatter", "-o", scene / "a.png",
    )  # fmt: skip
    assert by_point.exit_code == 0 and "df 0.8" in by_point.stdout
    run(
        "render", scene / "photo.png", "--disparity", scene / "photo.npy", "--df", 0.8,
        "--method", "scatter", "-o", scene / "b.png",
    )  # fmt: skip
    assert (scene / "a.png").read_bytes() == (scene / "b.png").read_bytes()


def test_several_photographs_into_a_folder(scene):
    maps = scene / "maps"
    maps.mkdir()
    photos = []
    for name in ("one", "two"):
        photos.append(scene / f"{name}.jpg")
        Image.open(scene / "photo.png").save(photos[-1])
        np.save(maps / f"{name}_disp.npy", np.load(scene / "photo.npy"))
    by_folder = run(
        "render", *photos, "--disparity", maps, "--df", 0.8, "--method", "scatter",
        "-o", scene / "out",
    )  # fmt: skip
    assert by_folder.exit_code == 0, by_folder.output
    assert sorted(file.name for file in (scene / "out").iterdir()) == ["one.jpg", "two.jpg"]
    assert "2/2" in by_folder.stderr
    by_pattern = run(
        "render", *photos, "--disparity", f"{maps}/{{stem}}_disp.npy", "--df", 0.8, "--method",
        "scatter", "-o", scene / "out2",
    )  # fmt: skip
    assert by_pattern.exit_code == 0, by_pattern.output
    assert (scene / "out2/two.jpg").read_bytes() == (scene / "out/two.jpg").read_bytes()


def test_one_bad_photograph_does_not_stop_the_rest(scene):
    (scene / "bad.png").write_bytes((scene / "photo.png").read_bytes()[:900])
    np.save(scene / "bad.npy", np.load(scene / "photo.npy"))
    result = run(
        "render", scene / "bad.png", scene / "photo.png", "--disparity", scene, "--df", 0.8,
        "--method", "scatter", "-o", scene / "out",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "bad.png is damaged or truncated" in result.stderr
    assert [file.name for file in (scene / "out").iterdir()] == ["photo.png"]


def test_never_overwrites_without_force(scene):
    target = scene / "out.png"
    target.write_bytes(b"mine")
    arguments = (
        "render", scene / "photo.png", "--disparity", scene / "photo.npy", "--df", 0.8,
        "--method", "scatter", "-o", target,
    )  # fmt: skip
    result = run(*arguments)
    assert result.exit_code == 1 and "exists already; nothing was rendered" in result.stderr
    assert target.read_bytes() == b"mine"
    assert run(*arguments, "--force").exit_code == 0
    assert read(target).shape == (32, 48, 3)


def test_refuses_before_rendering_anything(scene):
    """The second result exists: the first must not be written either."""
    for name in ("one", "two"):
        Image.open(scene / "photo.png").save(scene / f"{name}.png")
        np.save(scene / f"{name}_disp.npy", np.load(scene / "photo.npy"))
    (scene / "out").mkdir()
    (scene / "out/two.png").write_bytes(b"mine")
    result = run(
        "render", scene / "one.png", scene / "two.png", "--disparity", scene, "--df", 0.8,
        "--method", "scatter", "-o", scene / "out",
    )  # fmt: skip
    assert result.exit_code == 1
    assert [file.name for file in (scene / "out").iterdir()] == ["two.png"]


def test_normalise_and_invalid(scene):
    """Stereo disparity in 1/256 pixel with 0 for unknown, as data sets store it."""
    pixels = np.load(scene / "photo.npy") * 40 + 5
    stored = (pixels * 256).astype(np.uint16)
    stored[:, 0] = 0
    Image.fromarray(stored).save(scene / "stereo.png")
    result = run(
        "render", scene / "photo.png", "--disparity", scene / "stereo.png", "--normalise",
        "--invalid", 0, "--focus", "20,15", "--method", "scatter", "-o", scene / "out.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "df 1, " in result.stdout
    assert "note: 2.08 % of the disparity map is unknown" in result.stderr


def test_narrow_disparity_gets_a_note(scene):
    np.save(scene / "narrow.npy", np.load(scene / "photo.npy") * 0.05)
    result = run(
        "render", scene / "photo.png", "--disparity", scene / "narrow.npy", "--df", 0.04,
        "--method", "scatter", "-o", scene / "out.png",
    )  # fmt: skip
    assert result.exit_code == 0
    assert "note: narrow.npy spans only 0.005 to 0.04" in result.stderr


def test_info_names_versions_and_device():
    result = run("info")
    assert result.exit_code == 0, result.output
    for word in (bokehdiff.__version__, torch.__version__.split("+")[0], "diffusers", "cpu"):
        assert word in result.stdout


def test_errors_of_the_installed_command_have_no_traceback(tmp_path):
    command = [sys.executable, "-m", "bokehdiff", "render", "none.png", "--disparity", "x.npy"]
    result = subprocess.run(
        [*command, "--df", "0.5", "-o", "out.png"], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(Path(bokehdiff.__file__).parent.parent), "PATH": ""},
    )  # fmt: skip
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == "bokehdiff: none.png does not exist; wanted a photograph.\n"


def test_info_describes_the_embedded_model():
    result = run("info")
    assert "MB of safetensors" in result.stdout and "AutoencoderSpaceToDepth" in result.stdout
    assert "pisa." in result.stdout and "timestep" in result.stdout


@pytest.mark.parametrize("method", ["layered", "scatter", "pyramid"])
def test_classical_methods_render_like_the_function(scene, method):
    target = scene / "out.npy"
    result = run(
        "render", scene / "photo.png", "--disparity", scene / "photo.npy", "--df", 0.8, "--K", 6,
        "--method", method, "-o", target,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    wanted = bokehdiff.render_bokeh(
        scene / "photo.png", scene / "photo.npy", 0.8, 6.0, method=method
    )
    assert np.array_equal(np.load(target), wanted[0].permute(1, 2, 0).numpy())


def test_the_options_of_the_lens(scene):
    """All of them reach the aperture."""
    star = np.zeros((16, 16), np.uint8)
    star[4:12] = star[:, 4:12] = 255
    Image.fromarray(star).save(scene / "star.png")
    numbers = dict(
        blades=7, rotation=15.0, roundness=0.25, squeeze=0.75, obstruction=0.3, cat_eye=0.4,
        spherical=0.5, fringe=0.05,
    )  # fmt: skip
    options = [
        word for name, number in numbers.items() for word in ("--" + name.replace("_", "-"), number)
    ]
    arguments = ("render", scene / "photo.png", "--disparity", scene / "photo.npy", "--df", 0.5)
    for opening, given in (
        (bokehdiff.Aperture(**numbers), options),
        (
            bokehdiff.Aperture.from_picture(scene / "star.png", cat_eye=0.4),
            ["--aperture-picture", scene / "star.png", "--cat-eye", 0.4],
        ),
    ):
        target = scene / f"{len(given)}.npy"
        result = run(*arguments, "--K", 12, "--method", "scatter", *given, "-o", target)
        assert result.exit_code == 0, result.output
        wanted = bokehdiff.render_bokeh(
            scene / "photo.png", scene / "photo.npy", 0.5, 12.0, aperture=opening, method="scatter"
        )
        assert np.array_equal(np.load(target), wanted[0].permute(1, 2, 0).numpy())


@pytest.fixture
def night(scene: Path) -> Path:
    """night.png (48 x 32) and night.npy: a small clipped lamp before a dark far background."""
    photo = np.full((32, 48, 3), 40, np.uint8)
    photo[15:17, 36:38] = 255
    Image.fromarray(photo).save(scene / "night.png")
    np.save(scene / "night.npy", np.load(scene / "photo.npy"))
    return scene


def test_boosted_lamps_become_discs(night):
    def brightest(*options: object) -> int:
        target = night / "out.png"
        result = run(
            "render", night / "night.png", "--disparity", night / "night.npy", "--df", 0.8, "--K",
            8, "--method", "scatter", *options, "-o", target, "--force",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        return int(read(target)[:, 32:].max())

    plain = brightest("--highlights", "none")
    assert brightest() == plain < 100
    weak = brightest("--highlights", "boost", "--highlight-gain", 4)
    assert plain + 20 < weak
    assert weak + 20 < brightest("--highlights", "boost")


def save_linear(folder: Path, suffix: str) -> torch.Tensor:
    """Writes night{suffix}, a lamp 50 times as bright as white; returns what is in the file."""
    from bokehdiff.images import read_linear_image, write_linear_image

    if suffix != ".npy":
        pytest.importorskip("OpenImageIO", reason="pip install '.[hdr]'")
    light = torch.full((1, 3, 32, 48), 0.02)
    light[..., 15:17, 36:38] = 50.0
    name = "light" if suffix == ".npy" else "night"
    return read_linear_image(write_linear_image(folder / f"{name}{suffix}", light))


@pytest.mark.parametrize(
    ("photo", "options", "target"),
    [
        ("night.exr", [], "out.exr"),
        ("night.exr", [], "out.tif"),
        ("night.hdr", [], "out.npy"),
        ("night.tif", ["--highlights", "hdr"], "out.hdr"),
        ("light.npy", ["--highlights", "hdr"], "out.npy"),
    ],
)
def test_hdr_photographs_keep_their_highlights(night, photo, options, target):
    from bokehdiff.images import read_linear_image

    light = save_linear(night, Path(photo).suffix)
    result = run(
        "render", night / photo, "--disparity", night / "night.npy", "--df", 0.8, "--K", 6,
        "--method", "scatter", *options, "-o", night / target,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    wanted = bokehdiff.render_bokeh(
        light, np.load(night / "night.npy"), 0.8, 6.0, method="scatter", highlights="hdr"
    )
    assert wanted.max() > 2, "the disc of the lamp is brighter than white"
    found = read_linear_image(night / target)
    if target.endswith(".hdr"):
        assert ((found - wanted).abs() <= wanted.amax(1, keepdim=True) / 128).all()
    else:
        assert torch.equal(found, wanted)


def test_hdr_into_an_ordinary_picture(night):
    """The disc is cut off at white only after blurring; --highlights none cuts before."""
    save_linear(night, ".exr")
    arguments = (
        "render", night / "night.exr", "--disparity", night / "night.npy", "--df", 0.8, "--K", 6,
        "--method", "scatter",
    )  # fmt: skip
    result = run(*arguments, "-o", night / "after.png")
    assert result.exit_code == 0, result.output
    assert (read(night / "after.png")[14:18, 35:39] == 255).all()
    result = run(*arguments, "--highlights", "none", "-o", night / "before.png")
    assert result.exit_code == 0, result.output
    assert "night.exr is brighter than white in 0.26 % of its pixels" in result.stderr
    assert read(night / "before.png")[:, 32:].max() < 150


def test_hdr_by_the_installed_command(night):
    light = save_linear(night, ".exr")
    command = [sys.executable, "-m", "bokehdiff", "render", "night.exr", "--disparity", "night.npy"]
    command += ["--df", "0.8", "--K", "0", "--method", "layered", "-o", "out.exr"]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=night,
        env={"PYTHONPATH": str(Path(bokehdiff.__file__).parent.parent), "PATH": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "out.exr (df 0.8, K 0)\n"
    from bokehdiff.images import read_linear_image

    assert torch.equal(read_linear_image(night / "out.exr"), light), "no strength changes nothing"


def test_hdr_names_are_kept_in_a_folder(night):
    save_linear(night, ".exr")
    for name in ("night", "photo"):
        np.save(night / f"{name}_disp.npy", np.load(night / "photo.npy"))
    arguments = (
        "render", night / "night.exr", night / "photo.png", "--disparity",
        f"{night}/{{stem}}_disp.npy", "--df", 0.8,
    )  # fmt: skip
    result = run(*arguments, "--method", "scatter", "-o", night / "out")
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in (night / "out").iterdir()) == ["night.exr", "photo.png"]
    # The model takes photographs that are cut off at white, and says so.
    result = run(*arguments, "--method", "model", "-o", night / "model")
    assert result.exit_code == 0, result.output
    assert "night.exr is brighter than white" in result.stderr
    assert sorted(file.name for file in (night / "model").iterdir()) == ["night.png", "photo.png"]


def test_an_ordinary_photograph_into_an_hdr_file(scene):
    from bokehdiff.images import linear_to_srgb, read_linear_image

    pytest.importorskip("OpenImageIO", reason="pip install '.[hdr]'")
    for target in ("out.exr", "out.png"):
        result = run(
            "render", scene / "photo.png", "--disparity", scene / "photo.npy", "--df", 0.8,
            "--method", "scatter", "-o", scene / target,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
    shown = linear_to_srgb(read_linear_image(scene / "out.exr"))[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(shown - read(scene / "out.png")).max() <= 0.5 + 1e-3


def test_a_missing_package_is_noticed_before_rendering(scene, monkeypatch):
    monkeypatch.setitem(sys.modules, "OpenImageIO", None)
    result = run(
        "render", scene / "photo.png", "--disparity", scene / "photo.npy", "--df", 0.8,
        "--method", "scatter", "-o", scene / "out.exr",
    )  # fmt: skip
    assert result.exit_code == 1
    assert result.stderr == (
        "bokehdiff: out.exr needs the OpenImageIO package: pip install 'bokehdiff[hdr]'.\n"
    )


def test_model_renders_like_the_pipeline(scene):
    target = scene / "out.png"
    result = run(
        "render", scene / "photo.png", "--disparity", scene / "photo.npy", "--df", 0.8, "--K", 6,
        "-o", target,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    pipe = bokehdiff.BokehDiffPipeline.from_pretrained(bokehdiff.TINY)
    wanted = pipe(
        scene / "photo.png", scene / "photo.npy", 0.8, K=6.0, output_type="pt"
    ).images[0].permute(1, 2, 0).numpy()  # fmt: skip
    assert np.abs(read(target) - wanted * 255).max() <= 1
    photo = read(scene / "photo.png")
    assert read(target)[:, 36:].std() < 0.8 * photo[:, 36:].std()


def test_model_with_no_strength_returns_the_photograph(scene):
    result = run(
        "render", scene / "photo.png", "--disparity", scene / "photo.npy", "--df", 0.3, "--K", 0,
        "--model", bokehdiff.TINY, "-o", scene / "out.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert np.abs(read(scene / "out.png") - read(scene / "photo.png")).max() <= 1


def test_weights_that_were_trained(scene, tmp_path):
    base = save_tiny_sdxl(tmp_path / "base")
    model = ["--pretrained", base, "--mode", "lora", "--vae_mode", "full"]
    train(tmp_path / "trained", model=model, learning_rate=0.05, warmup_steps=0)
    result = run(
        "render", scene / "photo.png", "--disparity", scene / "photo.npy", "--df", 0.8, "--K", 6,
        "--model", base, "--weights", tmp_path / "trained", "-o", scene / "out.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    pipe = bokehdiff.BokehDiffPipeline.from_pretrained(base)
    pipe.load_bokeh_weights(tmp_path / "trained")
    wanted = pipe(scene / "photo.png", scene / "photo.npy", 0.8, K=6.0).images[0]
    assert np.abs(read(scene / "out.png") - np.asarray(wanted, float)).max() <= 1


def test_flow_renders_like_the_pipeline(scene, tmp_path, monkeypatch):
    from bokehdiff.pipelines.bokehflow import BokehFlowPipeline

    pipe = BokehFlowPipeline(tiny_flow())
    pipe.save_pretrained(tmp_path / "flow")
    photo, map_file = scene / "photo.png", scene / "photo.npy"
    arguments = ("render", photo, "--disparity", map_file, "--df", 0.8, "--method", "flow")
    model = ("--model", tmp_path / "flow")
    result = run(*arguments, "--K", 6, *model, "-o", scene / "out.npy")
    assert result.exit_code == 0, result.output
    wanted = pipe(photo, map_file, 0.8, 6.0, output_type="np").images[0]
    np.testing.assert_allclose(np.load(scene / "out.npy"), wanted, rtol=0, atol=1e-6)
    monkeypatch.setattr(renderers, "FLOW_NANO", str(tmp_path / "flow"))
    result = run(*arguments, "--K", 6, "-o", scene / "by_default.npy")
    assert result.exit_code == 0, result.output
    assert (scene / "by_default.npy").read_bytes() == (scene / "out.npy").read_bytes()
    result = run(*arguments, "--K", 200, *model, "-o", scene / "wide.png")
    assert result.exit_code == 0 and "note: " in result.stderr
    assert "blurred wider than the largest radius of this network, 9 px here" in result.stderr
    for option, sentence in (
        (("--blades", 6), "blurs with Gaussians"),
        (("--highlights", "boost"), "--highlights boost does not go with --method flow"),
        (("--weights", "trained"), "--weights goes with --method model"),
    ):
        result = run(*arguments, *option, *model, "-o", scene / "none.png")
        assert result.exit_code == 1 and sentence in result.stderr


def test_flow_cuts_hdr_off_at_white(night):
    light = save_linear(night, ".npy")
    tiny_flow().save_pretrained(night / "flow")
    result = run(
        "render", night / "light.npy", "--highlights", "hdr", "--disparity", night / "night.npy",
        "--df", 0.8, "--K", 0, "--method", "flow", "--model", night / "flow", "-o",
        night / "out.npy",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "brighter than white in 0.26 %" in result.stderr
    found = np.load(night / "out.npy")
    wanted = light[0].clamp(max=1).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_options_of_the_lens_choose_the_layered_renderer(scene):
    arguments = (
        "render", scene / "photo.png", "--disparity", scene / "photo.npy", "--df", 0.8, "--K", 6,
        "--blades", 6,
    )  # fmt: skip
    for name, method in (("by_itself.png", ()), ("named.png", ("--method", "layered"))):
        result = run(*arguments, *method, "-o", scene / name)
        assert result.exit_code == 0, result.output
    assert (scene / "by_itself.png").read_bytes() == (scene / "named.png").read_bytes()
