"""Reading, checking, padding and writing; the sRGB curve. What is refused: test_mistakes.py."""

from __future__ import annotations

import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from bokehdiff import images


@pytest.fixture
def photo() -> np.ndarray:
    """(6, 9, 3) uint8, every pixel different."""
    return (np.arange(6 * 9 * 3).reshape(6, 9, 3) * 37 % 256).astype(np.uint8)


def save_png16(path: Path, samples: np.ndarray) -> None:
    """Writes (H, W, C) uint16 as a 16-bit PNG, which Pillow itself cannot."""
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[samples.shape[2]]
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    with open(path, "wb") as stream:
        stream.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            checksum = zlib.crc32(kind + data)
            stream.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum))


def as_rows(image: torch.Tensor) -> np.ndarray:
    return image[0].permute(1, 2, 0).numpy()


# --- The sRGB curve ---


@pytest.mark.parametrize("kind", [torch.tensor, np.array], ids=["torch", "numpy"])
def test_srgb_curve_known_values(kind):
    display = kind([0.0, 0.04045, 0.5, 1.0, 2.0, -0.1])
    linear = images.srgb_to_linear(display)
    assert np.allclose(
        np.asarray(linear), [0, 0.0031308, 0.2140411, 1, 4.9538, -0.1 / 12.92], rtol=1e-4
    )
    assert np.allclose(np.asarray(images.linear_to_srgb(linear)), np.asarray(display), atol=1e-6)


def test_srgb_curve_round_trip_and_gradients():
    values = torch.linspace(0, 3, 3001, dtype=torch.float64, requires_grad=True)
    back = images.srgb_to_linear(images.linear_to_srgb(values))
    # The standard's two rounded thresholds leave a seam of a few 1e-8.
    assert (back - values).abs().max() < 1e-7
    back.sum().backward()
    assert torch.isfinite(values.grad).all()
    zero = torch.zeros(2, requires_grad=True)
    images.linear_to_srgb(zero).sum().backward()
    assert torch.allclose(zero.grad, torch.full((2,), 12.92))


def test_srgb_curve_keeps_dtype():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert images.srgb_to_linear(torch.rand(3).to(dtype)).dtype == dtype
    assert images.linear_to_srgb(np.ones(2, np.float32)).dtype == np.float32


# --- Reading photographs ---


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".bmp", ".npy"])
def test_read_image_is_exact(tmp_path, photo, suffix):
    path = tmp_path / f"photo{suffix}"
    if suffix == ".npy":
        np.save(path, photo)
    else:
        Image.fromarray(photo).save(path, **({"lossless": True} if suffix == ".webp" else {}))
    image = images.read_image(path)
    assert image.shape == (1, 3, 6, 9) and image.dtype == torch.float32
    assert np.array_equal(as_rows(image), photo.astype(np.float32) / 255)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_exif_orientation_is_applied_once(tmp_path, orientation, suffix):
    # Blocks of 16 pixels survive JPEG.
    upright = np.kron(np.array([[10, 80, 160], [200, 120, 250]], np.uint8), np.ones((16, 16)))
    upright = upright.astype(np.uint8)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: np.rot90(upright.T, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).convert("RGB").save(path, exif=exif)
    for image in (images.read_image(path), images.as_image_batch(Image.open(path))):
        assert image.shape == (1, 3, 32, 48)
        assert np.abs(as_rows(image)[:, :, 1] * 255 - upright).max() <= 3


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_png_keeps_all_bits(tmp_path, channels):
    samples = np.random.default_rng(0).integers(0, 65536, (7, 9, channels), dtype=np.uint16)
    save_png16(tmp_path / "photo.png", samples)
    image = images.read_image(tmp_path / "photo.png")
    wanted = np.repeat(samples, 3 // channels, axis=2).astype(np.float32) / 65535
    assert np.array_equal(as_rows(image), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byteorder": ">"},
        {"compression": "zlib", "predictor": True},
        {"rowsperstrip": 2},
        {"planarconfig": "separate"},
    ],
    ids=["plain", "big-endian", "deflate", "strips", "planes"],
)
def test_sixteen_bit_tiff_keeps_all_bits(tmp_path, options):
    tifffile = pytest.importorskip("tifffile")
    samples = np.random.default_rng(0).integers(0, 65536, (7, 9, 3), dtype=np.uint16)
    stored = samples.transpose(2, 0, 1) if options.get("planarconfig") else samples
    path = tmp_path / "photo.tif"
    tifffile.imwrite(path, np.ascontiguousarray(stored), photometric="rgb", **options)
    assert np.array_equal(as_rows(images.read_image(path)), samples.astype(np.float32) / 65535)


def test_float_tiff_linear_light(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    samples = np.random.default_rng(0).random((5, 4, 3), dtype=np.float32)
    tifffile.imwrite(tmp_path / "photo.tif", samples, photometric="rgb")
    assert np.array_equal(as_rows(images.read_image(tmp_path / "photo.tif")), samples)
    encoded = as_rows(images.read_image(tmp_path / "photo.tif", linear=True))
    assert np.allclose(encoded, images.linear_to_srgb(samples), atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "I;16", "F"])
def test_every_pillow_mode_becomes_rgb(mode):
    base = Image.new("RGB", (5, 4), (200, 200, 200))
    if mode == "I;16":
        picture = Image.fromarray(np.full((4, 5), 200 * 257, np.uint16))
    elif mode == "F":
        picture = Image.fromarray(np.full((4, 5), 200 / 255, np.float32))
    else:
        picture = base.convert(mode)
    assert picture.mode == mode
    image = images.as_image_batch(picture)
    assert image.shape == (1, 3, 4, 5)
    if mode == "1":
        assert set(image.unique().tolist()) <= {0.0, 1.0}
    else:
        assert (image - 200 / 255).abs().max() < 0.02


def test_colour_profile_is_converted(tmp_path, photo):
    """A picture stored with swapped primaries comes back in sRGB, 8 bits and alpha alike."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # Exchange the red and blue colorant tags: what is stored as red is seen as blue.
    data = data.replace(b"rXYZ", b"xxxx").replace(b"bXYZ", b"rXYZ").replace(b"xxxx", b"bXYZ")
    description = b"s\0R\0G\0B\0"
    data = data.replace(description, b"t\0S\0U\0C\0")
    Image.fromarray(photo).save(tmp_path / "photo.png", icc_profile=data)
    image = as_rows(images.read_image(tmp_path / "photo.png"))
    assert np.abs(image * 255 - photo[:, :, ::-1]).max() <= 2


def test_broken_colour_profile_is_ignored_with_a_warning(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "photo.png", icc_profile=b"not a profile")
    with pytest.warns(images.InputRepairedWarning, match="profile .* could not be used"):
        image = images.read_image(tmp_path / "photo.png")
    assert np.array_equal(as_rows(image), photo.astype(np.float32) / 255)


def test_opaque_alpha_is_dropped_silently(tmp_path, photo):
    Image.fromarray(photo).convert("RGBA").save(tmp_path / "photo.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = images.read_image(tmp_path / "photo.png")
    assert np.array_equal(as_rows(image), photo.astype(np.float32) / 255)


@pytest.mark.parametrize("kind", ["file", "palette", "pillow", "numpy", "torch"])
def test_transparency_is_laid_over_white_with_a_warning(tmp_path, kind):
    samples = np.zeros((4, 6, 4), np.uint8)
    samples[:, :3] = (40, 80, 120, 255)
    picture = Image.fromarray(samples)
    path = tmp_path / "photo.png"
    picture.save(path)
    if kind == "palette":
        picture.quantize(4).save(path)
    given = {
        "file": path,
        "palette": path,
        "pillow": picture,
        "numpy": samples,
        "torch": torch.from_numpy(samples).permute(2, 0, 1),
    }[kind]
    with pytest.warns(images.InputRepairedWarning, match="transparent in 50 %"):
        image = as_rows(images.as_image_batch(given))
    assert np.allclose(image[:, :3] * 255, (40, 80, 120)) and (image[:, 3:] == 1).all()


# --- Linear light ---


@pytest.fixture
def light() -> torch.Tensor:
    """(1, 3, 6, 9) linear light: black, dark, white, and lamps up to 5000 times white."""
    generator = torch.Generator().manual_seed(0)
    values = 10 ** torch.empty(1, 3, 6, 9).uniform_(-3, 3.7, generator=generator)
    values[..., 0, 0], values[..., 0, 1] = 0, 1
    return values


@pytest.mark.parametrize("suffix", images.FLOAT_SUFFIXES)
def test_linear_light_round_trip(tmp_path, light, suffix):
    if suffix != ".npy":
        pytest.importorskip("OpenImageIO", reason="pip install '.[hdr]'")
    path = images.write_linear_image(tmp_path / f"night{suffix}", light)
    assert path == tmp_path / f"night{suffix}" and list(tmp_path.iterdir()) == [path]
    back = images.read_linear_image(path)
    assert back.shape == light.shape and back.dtype == torch.float32
    if suffix == ".hdr":
        # Eight bits and a common exponent: half a step is at most 1/256 of the brightest channel;
        # encoders that cut instead of rounding lose twice that.
        assert ((back - light).abs() <= light.amax(1, keepdim=True) / 128).all()
    else:
        assert torch.equal(back, light)


@pytest.mark.parametrize("suffix", [".exr", ".tif"])
def test_files_made_by_other_programs(tmp_path, light, suffix):
    """Half floats, gray, channels in another order, and windows, written by the library itself."""
    image_io = pytest.importorskip("OpenImageIO", reason="pip install '.[hdr]'")
    pixels = as_rows(light)

    def save(name: str, channels: tuple[str, ...], samples: np.ndarray, **window: int) -> Path:
        path = tmp_path / f"{name}{suffix}"
        height, width, count = samples.shape
        kind = image_io.HALF if suffix == ".exr" else image_io.FLOAT
        description = image_io.ImageSpec(width, height, count, kind)
        description.channelnames = channels
        for key, value in window.items():
            setattr(description, key, value)
        output = image_io.ImageOutput.create(str(path))
        assert output.open(str(path), description)
        assert output.write_image(np.ascontiguousarray(samples)) and output.close()
        return path

    half = 2.0**-11 if suffix == ".exr" else 0
    colour = images.read_linear_image(save("colour", ("R", "G", "B"), pixels))
    assert ((colour - light).abs() <= half * light).all()
    gray = images.read_linear_image(save("gray", ("Y",), pixels[:, :, :1]))
    assert torch.equal(gray[:, 0], gray[:, 2])
    assert ((gray - light[:, :1]).abs() <= half * light[:, :1]).all()
    if suffix == ".exr":
        depth = np.dstack([pixels, pixels[:, :, :1]])
        with_depth = images.read_linear_image(save("depth", ("R", "G", "B", "Z"), depth))
        assert torch.equal(with_depth, colour)
        window = dict(x=-2, y=1, full_x=0, full_y=0, full_width=9, full_height=6)
        cut = images.read_linear_image(save("window", ("R", "G", "B"), pixels, **window))
        assert torch.equal(cut[..., 1:, :7], colour[..., :5, 2:])
        assert (cut[..., 0, :] == 0).all() and (cut[..., 7:] == 0).all()


def test_linear_light_of_a_turned_tiff(tmp_path, light):
    pytest.importorskip("OpenImageIO", reason="pip install '.[hdr]'")
    tifffile = pytest.importorskip("tifffile")
    quarter_turn = [(274, "H", 1, 6, True)]  # the EXIF orientation: stored 90 degrees to the left
    stored = np.ascontiguousarray(np.rot90(as_rows(light)))
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", extratags=quarter_turn)
    assert torch.equal(images.read_linear_image(tmp_path / "a.tif"), light)


def test_linear_light_of_numpy_files(tmp_path, light):
    np.save(tmp_path / "half.npy", as_rows(light).astype(np.float16))
    np.save(tmp_path / "gray.npy", as_rows(light)[:, :, 1].astype(">f8"))
    half = images.read_linear_image(tmp_path / "half.npy")
    assert torch.equal(half, light.half().float())
    gray = images.read_linear_image(tmp_path / "gray.npy")
    assert torch.equal(gray, light[:, 1:2].expand(1, 3, 6, 9))


def test_negative_light_becomes_black_with_a_warning(tmp_path, light):
    values = as_rows(light).copy()
    values[2, 3, 1] = -0.25
    np.save(tmp_path / "night.npy", values)
    with pytest.warns(images.InputRepairedWarning, match=r"negative in 1\.85 % .* became 0"):
        back = as_rows(images.read_linear_image(tmp_path / "night.npy"))
    values[2, 3, 1] = 0
    assert np.array_equal(back, values)


def test_transparent_linear_light_is_laid_over_black_with_a_warning(tmp_path, light):
    image_io = pytest.importorskip("OpenImageIO", reason="pip install '.[hdr]'")
    samples = np.ones((6, 9, 4), np.float32)
    samples[:, :, :3] = as_rows(light)
    samples[:3] *= 0.5
    description = image_io.ImageSpec(9, 6, 4, image_io.FLOAT)
    output = image_io.ImageOutput.create(str(tmp_path / "night.exr"))
    assert output.open(str(tmp_path / "night.exr"), description)
    assert output.write_image(samples) and output.close()
    with pytest.warns(images.InputRepairedWarning, match="transparent in 50 % .* over black"):
        back = images.read_linear_image(tmp_path / "night.exr")
    assert np.array_equal(as_rows(back), samples[:, :, :3])


@pytest.mark.parametrize("suffix", images.LINEAR_LIGHT_SUFFIXES)
def test_an_hdr_file_as_an_ordinary_photograph(tmp_path, photo, light, suffix):
    pytest.importorskip("OpenImageIO", reason="pip install '.[hdr]'")
    path = images.write_image(tmp_path / f"photo{suffix}", photo)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = as_rows(images.as_image_batch(path))
    decoded = images.srgb_to_linear(photo / np.float32(255))
    tolerance = decoded.max(2, keepdims=True) / 128 if suffix == ".hdr" else 1e-6
    assert (np.abs(images.srgb_to_linear(back) - decoded) <= tolerance).all()

    images.write_linear_image(path, light, overwrite=True)
    share = 100 * float((light > 1).any(1).float().mean())
    with pytest.warns(images.InputRepairedWarning, match=rf"white in {share:.3g} % .* cut off"):
        back = images.read_image(path)
    kept = images.read_linear_image(path)
    assert torch.equal(back, images.linear_to_srgb(kept).clamp(max=1)) and back.max() == 1


def test_linear_light_without_the_package(tmp_path, light, monkeypatch):
    images.write_linear_image(tmp_path / "night.npy", light)
    (tmp_path / "night.exr").write_bytes(b"v/1")
    monkeypatch.setitem(sys.modules, "OpenImageIO", None)
    wanted = r"needs the OpenImageIO package: pip install 'bokehdiff\[hdr\]'"
    with pytest.raises(ValueError, match="night.exr " + wanted):
        images.read_linear_image(tmp_path / "night.exr")
    with pytest.raises(ValueError, match="out.hdr " + wanted):
        images.write_linear_image(tmp_path / "out.hdr", light)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["night.exr", "night.npy"]
    assert torch.equal(images.read_linear_image(tmp_path / "night.npy"), light)


# --- Images in memory ---


def test_as_image_batch_layouts_agree(photo):
    wanted = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
    tensor = torch.from_numpy(photo).permute(2, 0, 1)
    for given in (
        photo,
        photo[None],
        photo.astype(np.float64) / 255,
        photo.astype(np.uint16) * 257,
        (photo.astype(np.uint16) * 257).astype(">u2"),
        Image.fromarray(photo),
        tensor,
        tensor[None],
        tensor.double() / 255,
        [photo],
        (tensor,),
    ):
        batch = images.as_image_batch(given)
        assert batch.shape == (1, 3, 6, 9) and batch.dtype == torch.float32
        assert torch.allclose(batch, wanted, atol=1e-6)
    assert images.as_image_batch([photo, tensor, photo[None]]).shape == (3, 3, 6, 9)
    assert images.as_image_batch(np.stack([photo] * 4)).shape == (4, 3, 6, 9)


def test_as_image_batch_gray_and_half(photo):
    gray = images.as_image_batch(photo[:, :, 0])
    assert torch.equal(gray[:, 0], gray[:, 2])
    half = images.as_image_batch(torch.rand(1, 6, 9).half())
    assert half.shape == (1, 3, 6, 9) and half.dtype == torch.float32


def test_as_image_batch_clamps_rounding_and_keeps_the_gradient():
    given = torch.tensor([-1e-5, 0.5, 1.0005]).repeat(3, 2, 1).requires_grad_()
    batch = images.as_image_batch(given)
    assert batch.min() == 0 and batch.max() == 1
    batch.sum().backward()
    assert given.grad is not None


# --- Reading disparity maps ---


def test_read_disparity_scales_whole_numbers_and_keeps_floats(tmp_path):
    levels = np.array([[0, 51, 255]], np.uint8)
    wanted = torch.tensor([[[[0, 0.2, 1]]]])
    Image.fromarray(levels).save(tmp_path / "a.png")
    Image.fromarray(levels.astype(np.uint16) * 257).save(tmp_path / "b.png")
    Image.fromarray(levels.astype(np.uint16) * 257).save(tmp_path / "c.tif")
    np.save(tmp_path / "d.npy", levels)
    np.save(tmp_path / "e.npy", (levels / 255)[None, None])
    np.savez(tmp_path / "f.npz", disparity=levels / 255, other=levels)
    np.savez(tmp_path / "g.npz", anything=levels / 255)
    Image.fromarray((levels / 255).astype(np.float32)).save(tmp_path / "h.tif")
    Image.fromarray(np.dstack([levels] * 3)).save(tmp_path / "i.png")
    Image.fromarray(levels).convert("P").save(tmp_path / "j.png")
    for path in sorted(tmp_path.iterdir()):
        disparity = images.read_disparity(path)
        assert disparity.dtype == torch.float32, path
        assert torch.allclose(disparity, wanted, atol=1e-6), path
    np.save(tmp_path / "raw.npy", np.array([[3.5, np.nan, np.inf]]))
    raw = images.read_disparity(tmp_path / "raw.npy")
    assert raw[0, 0, 0, 0] == 3.5 and raw[0, 0, 0, 1].isnan() and raw[0, 0, 0, 2].isinf()


@pytest.mark.parametrize("order", ["<", ">"])
def test_read_disparity_pfm_is_bottom_up(tmp_path, order):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    scale = b"-1.0" if order == "<" else b"1.0"
    data = values[::-1].astype(f"{order}f4").tobytes()
    (tmp_path / "map.pfm").write_bytes(b"Pf\n3 2\n" + scale + b"\n" + data)
    assert np.array_equal(images.read_disparity(tmp_path / "map.pfm")[0, 0].numpy(), values)


def test_read_disparity_invalid_marker_is_a_stored_value(tmp_path):
    Image.fromarray(np.array([[0, 512, 65535]], np.uint16)).save(tmp_path / "map.png")
    disparity = images.read_disparity(tmp_path / "map.png", invalid=512)[0, 0, 0]
    assert disparity[0] == 0 and disparity[1].isnan() and disparity[2] == 1


def test_as_disparity_batch_layouts_agree(tmp_path):
    values = np.linspace(0, 1, 12).reshape(3, 4)
    np.save(tmp_path / "map.npy", values)
    tensor = torch.from_numpy(values)
    for given in (
        values,
        values[None],
        values[:, :, None],
        values[None, None],
        values[None, :, :, None],
        tensor,
        tensor[None],
        tensor[None, None],
        [values],
        tmp_path / "map.npy",
        Image.fromarray(values.astype(np.float32)),
        np.round(values * 65535).astype(np.uint16),
    ):
        batch = images.as_disparity_batch(given, 1, 3, 4)
        assert batch.shape == (1, 1, 3, 4) and batch.dtype == torch.float32
        assert torch.allclose(batch[0, 0].double(), tensor, atol=1e-4)
    assert images.as_disparity_batch(values, 3, 3, 4).shape == (3, 1, 3, 4)
    assert images.as_disparity_batch([values, tensor], 2, 3, 4).shape == (2, 1, 3, 4)
    assert images.as_disparity_batch(values * 7, 1, 3, 4, metric=True).max() == 7


def test_masked_arrays_have_holes():
    masked = np.ma.masked_array(np.full((2, 3), 51, np.uint8), mask=[[0, 1, 0], [0, 0, 0]])
    with pytest.warns(images.InputRepairedWarning, match="16.7 %"):
        batch = images.as_disparity_batch(masked, 1, 2, 3)
    assert torch.allclose(batch, torch.full((1, 1, 2, 3), 0.2))


def test_holes_are_filled_from_the_farther_side():
    near, far, hole = 0.9, 0.2, float("nan")
    disparity = torch.full((1, 1, 7, 9), near)
    disparity[..., 5:] = far
    disparity[..., 2:5, 3:6] = hole  # across the edge of the near thing
    disparity[..., 0, 0] = float("inf")
    disparity[..., 6, 8] = -float("inf")
    with pytest.warns(
        images.InputRepairedWarning, match=r"17\.5 % .* filled from the farther side"
    ):
        filled = images.as_disparity_batch(disparity, 1, 7, 9)
    assert (filled[..., 2:5, 3:6] == far).all()
    assert filled[..., 0, 0] == near and filled[..., 6, 8] == far
    known = torch.isfinite(disparity)
    assert torch.equal(filled[known], disparity[known])


def test_fill_holes_reaches_everything_and_is_differentiable():
    disparity = torch.full((2, 1, 5, 6), float("nan"))
    disparity[0, 0, 2, 3] = 0.25
    disparity[1, 0, 0, 0] = 0.5
    disparity.requires_grad_()
    filled = images.fill_holes(disparity)
    assert (filled[0] == 0.25).all() and (filled[1] == 0.5).all()
    filled.sum().backward()
    assert disparity.grad[0, 0, 2, 3] == 30 and torch.isfinite(disparity.grad).all()


def test_whole_disparity_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images.as_disparity_batch(torch.rand(2, 1, 3, 4), 2, 3, 4)


# --- Padding ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool])
def test_pad_and_crop_round_trip(dtype):
    values = (torch.rand(2, 3, 13, 17) * 255).to(dtype)
    padded, size = images.pad_to_multiple(values, 8)
    assert padded.shape == (2, 3, 16, 24) and size == (13, 17)
    assert torch.equal(images.crop_to(padded, size), values)
    assert torch.equal(padded[..., 15, 23], values[..., 12, 16])
    assert torch.equal(padded[..., :13, 20], values[..., 16])


def test_pad_returns_the_same_tensor_when_nothing_is_missing():
    values = torch.rand(1, 1, 16, 8)
    assert images.pad_to_multiple(values, 8)[0] is values
    one = torch.ones(1, 1, 1, 1, requires_grad=True)
    images.pad_to_multiple(one, 4)[0].sum().backward()
    assert one.grad == 16


# --- Writing ---


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".npy"])
def test_write_then_read(tmp_path, photo, suffix):
    path = images.write_image(tmp_path / f"out{suffix}", photo)
    assert np.allclose(as_rows(images.read_image(path)), photo / 255, atol=1e-6)
    assert list(tmp_path.iterdir()) == [path]


def test_write_jpeg_is_close_and_same_bytes(tmp_path):
    ramp = torch.linspace(0, 1, 64).expand(3, 32, 64)
    first = images.write_image(tmp_path / "a.jpg", ramp).read_bytes()
    assert first == images.write_image(tmp_path / "b.JPEG", ramp).read_bytes()
    assert (images.read_image(tmp_path / "a.jpg")[0] - ramp).abs().max() < 0.02


def test_write_refuses_then_overwrites(tmp_path, photo):
    path = images.write_image(tmp_path / "out.png", photo)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        images.write_image(path, 255 - photo)
    assert path.read_bytes() == before
    images.write_image(path, 255 - photo, overwrite=True)
    assert path.read_bytes() != before
