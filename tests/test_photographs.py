"""Photographs there and back, with all they carry, and what other programs see in the files.

What is refused: test_mistakes.py.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms

from bokehdiff.colour_profiles import (
    LINEAR,
    SRGB_CURVE,
    ToneCurve,
    assemble_profile,
    build_profile,
    read_profile,
)
from bokehdiff.exif_blocks import ExifBlock
from bokehdiff.images import InputRepairedWarning, linear_to_srgb, srgb_to_linear
from bokehdiff.photographs import (
    PHOTOGRAPH_SUFFIXES,
    Photograph,
    read_photograph,
    write_photograph,
)
from bokehdiff.xmp_packets import fitted_packet

HEIGHT, WIDTH = 24, 40
D65 = (0.3127, 0.3290)
DISPLAY_P3 = (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, *D65)
ADOBE_RGB = (0.640, 0.330, 0.210, 0.710, 0.150, 0.060, *D65)
GAMMA = ToneCurve(parameters=(563 / 256, 1, 0, 0, 0, 0, 0))
PROFILES = {
    "none": None,
    "P3": build_profile(DISPLAY_P3, SRGB_CURVE, "Display P3"),
    "Adobe": build_profile(ADOBE_RGB, GAMMA, "Adobe RGB"),
}
GRAY_PROFILE = assemble_profile("GRAY", {b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, 461)})
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="1" dc:title="Lake">'
    b"<exif:PixelXDimension>1</exif:PixelXDimension></rdf:Description></x:xmpmeta>"
)
MAKER_NOTE = b"MAKER\0" + bytes(range(200))


def samples_of(bits: int, channels: int) -> np.ndarray:
    """(H, W, C); smooth colours, with the first values and the last, alpha from 0 to full."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    planes = [
        (columns / (WIDTH - 1) * (0.5 + 0.5 * c / 3) + rows / HEIGHT * 0.3) % 1.0 for c in range(3)
    ]
    planes = planes if channels >= 3 else planes[:1]
    if channels in (2, 4):
        planes.append(1 - ((rows - 10) ** 2 + (columns - 20) ** 2 < 64) * (columns / WIDTH))
    largest = 2**bits - 1
    return np.round(np.dstack(planes) * largest).astype(np.uint8 if bits == 8 else np.uint16)


def exif_block(order: str = "<", orientation: int = 1, thumbnail: bytes = b"") -> bytes:
    """An EXIF block written by hand: make, orientation, size, maker note, place and thumbnail."""
    body = bytearray((b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8))

    def folder(entries: list[tuple[int, int, int, bytes]], following: int = 0) -> int:
        """Appends a folder of (tag, kind, count, 4 bytes), and gives its place."""
        place = len(body)
        body.extend(struct.pack(order + "H", len(entries)))
        for tag, kind, count, value in entries:
            body.extend(struct.pack(order + "HHI", tag, kind, count) + value.ljust(4, b"\0"))
        body.extend(struct.pack(order + "I", following))
        return place

    def put(data: bytes) -> bytes:
        place = len(body)
        body.extend(data + b"\0" * (len(data) % 2))
        return struct.pack(order + "I", place)

    short = lambda n: struct.pack(order + "H", n)  # noqa: E731
    long = lambda n: struct.pack(order + "I", n)  # noqa: E731
    make = put(b"Kamera\0")
    exposure = put(struct.pack(order + "II", 1, 250))
    note = put(MAKER_NOTE)
    camera = folder(
        [
            (0x829A, 5, 1, exposure),
            (0x927C, 7, len(MAKER_NOTE), note),
            (0xA001, 3, 1, short(0xFFFF)),
            (0xA002, 4, 1, long(9999)),
            (0xA003, 3, 1, short(8888)),
        ]
    )
    degrees = put(struct.pack(order + "6I", 48, 1, 12, 1, 0, 1))
    place = folder([(1, 2, 2, b"N\0"), (2, 5, 3, degrees)])
    small = 0
    if thumbnail:
        start = put(thumbnail)
        small = folder([(0x0201, 4, 1, start), (0x0202, 4, 1, long(len(thumbnail)))])
    main = folder(
        [
            (0x010F, 2, 7, make),
            (0x0112, 3, 1, short(orientation)),
            (0x8769, 4, 1, long(camera)),
            (0x8825, 4, 1, long(place)),
        ],
        small,
    )
    body[4:8] = long(main)
    return b"Exif\0\0" + bytes(body)


def check_exif(exif: Image.Exif, width: int, height: int) -> None:
    """That all tags of `exif_block` are there, and say what the picture is now."""
    camera, place = exif.get_ifd(ExifTags.IFD.Exif), exif.get_ifd(ExifTags.IFD.GPSInfo)
    assert exif[0x010F] == "Kamera" and exif.get(0x0112) == 1
    assert camera[0x829A] == pytest.approx(1 / 250)
    assert bytes(camera[0x927C]) == MAKER_NOTE
    assert (camera[0xA002], camera[0xA003]) == (width, height)
    assert place[1] == "N" and tuple(map(float, place[2])) == (48, 12, 0)
    assert not exif.get_ifd(ExifTags.IFD.IFD1)


def save_source(path: Path, samples: np.ndarray, **carried: bytes | None) -> Path:
    """A file as other programs write it: Pillow for 8 bits, tifffile and raw chunks for 16."""
    carried = {key: value for key, value in carried.items() if value}
    if samples.dtype == np.uint8:
        picture = Image.fromarray(samples[:, :, 0] if samples.shape[2] == 1 else samples)
        options: dict[str, Any] = {
            ".jpg": {"quality": 100, "subsampling": 0},
            ".webp": {"lossless": True, "exact": True},
            ".avif": {"quality": 100, "subsampling": "4:4:4"},
        }.get(path.suffix, {})
        xmp = carried.pop("xmp", None)
        if xmp and path.suffix == ".png":
            from PIL.PngImagePlugin import PngInfo

            options["pnginfo"] = PngInfo()
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp.decode())
        elif xmp and path.suffix == ".tif":
            exif = Image.Exif()
            exif.load(carried.pop("exif", b""))
            exif[700] = xmp
            carried["exif"] = exif  # type: ignore[assignment]
        elif xmp:
            options["xmp"] = xmp
        picture.save(path, **carried, **options)
    elif path.suffix == ".png":
        height, width, channels = samples.shape
        kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
        chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))]
        if "icc_profile" in carried:
            chunks.append((b"iCCP", b"x\0\0" + zlib.compress(carried["icc_profile"])))
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
        chunks.append((b"IDAT", zlib.compress(rows)))
        if "exif" in carried:  # at the end, as some programs do
            chunks.append((b"eXIf", carried["exif"].removeprefix(b"Exif\0\0")))
        chunks.append((b"IEND", b""))
        data = b"\x89PNG\r\n\x1a\n"
        for name, body in chunks:
            data += struct.pack(">I", len(body)) + name + body
            data += struct.pack(">I", zlib.crc32(name + body))
        path.write_bytes(data)
    else:
        tifffile = pytest.importorskip("tifffile")
        tags = []
        if "icc_profile" in carried:
            tags.append((34675, 7, len(carried["icc_profile"]), carried["icc_profile"], True))
        tifffile.imwrite(
            path,
            samples.squeeze(),
            photometric="rgb" if samples.shape[2] >= 3 else "minisblack",
            extrasamples=["unassalpha"] if samples.shape[2] in (2, 4) else None,
            extratags=tags,
        )
    return path


def other_reader(path: Path, bits: int) -> np.ndarray:
    """(H, W, C) as a program of other people reads the file."""
    if path.suffix == ".png" and bits == 16:
        image_io = pytest.importorskip("OpenImageIO", reason="pip install '.[hdr]'")
        settings = image_io.ImageSpec()
        settings["oiio:UnassociatedAlpha"] = 1
        return image_io.ImageInput.open(str(path), settings).read_image("uint16")
    if path.suffix in (".tif", ".tiff"):
        samples = pytest.importorskip("tifffile").imread(path)
    else:
        samples = np.asarray(Image.open(path))
    return samples[:, :, None] if samples.ndim == 2 else samples


def visible(samples: np.ndarray) -> np.ndarray:
    """The samples, but 0 where they cannot be seen."""
    if samples.shape[2] in (2, 4):
        return samples * (samples[:, :, -1:] > 0)
    return samples


# --- Everything in every format -------------------------------------------------------------------


def lossless_cases() -> list[tuple[int, str, str, int, str]]:
    """(bits, source, target, channels, profile), where source and target hold them."""
    cases = []
    for bits, source, target, channels, profile in itertools.product(
        (8, 16), (".png", ".tif", ".webp"), (".png", ".tif", ".webp"), (1, 2, 3, 4), PROFILES
    ):
        as_webp = ".webp" in (source, target)
        held = not as_webp or (bits == 8 and channels >= 3)
        # Profiles of gray have a test of their own.
        if held and (channels >= 3 or profile == "none"):
            cases.append((bits, source, target, channels, profile))
    return cases


@pytest.mark.parametrize(("bits", "source", "target", "channels", "profile"), lossless_cases())
def test_the_same_samples_come_out(tmp_path, bits, source, target, channels, profile):
    samples = samples_of(bits, channels)
    path = save_source(tmp_path / f"in{source}", samples, icc_profile=PROFILES[profile])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        photo = read_photograph(path)
        out = write_photograph(tmp_path / f"out{target}", photo.image, like=photo)
    assert photo.image.shape == (1, 3, HEIGHT, WIDTH) and photo.image.dtype == torch.float32
    assert photo.bits == bits and photo.gray == (channels <= 2)
    assert photo.icc_profile == PROFILES[profile]
    assert np.array_equal(visible(other_reader(out, bits)), visible(samples))
    if not (bits == 16 and channels == 2 and target == ".tif"):  # unknown to Pillow
        with Image.open(out) as seen:
            assert seen.info.get("icc_profile") == PROFILES[profile]
    again = read_photograph(out)
    assert torch.equal(again.image, photo.image)
    assert (again.alpha is None) == (channels % 2 == 1)
    if again.alpha is not None:
        assert torch.equal(again.alpha, photo.alpha)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("target", [".png", ".tif", ".webp", ".jpg", ".avif", ".heic"])
@pytest.mark.parametrize("source", [".png", ".tif", ".webp", ".jpg", ".avif", ".heic"])
def test_exif_and_xmp_come_out(tmp_path, source, target, order):
    if ".avif" in (source, target):
        pytest.importorskip("PIL._avif")
    if ".heic" in (source, target):
        heif = pytest.importorskip("pillow_heif", reason="pip install '.[heic]'")
        heif.register_heif_opener()
    thumbnail = b"\xff\xd8the photograph as it was\xff\xd9"
    exif = exif_block(order, thumbnail=thumbnail)
    path = save_source(tmp_path / f"in{source}", samples_of(8, 3), exif=exif, xmp=XMP)
    photo = read_photograph(path)
    assert photo.xmp is not None and b"Lake" in photo.xmp
    out = write_photograph(tmp_path / f"out{target}", photo.image, like=photo)
    with Image.open(out) as seen:
        check_exif(seen.getexif(), WIDTH, HEIGHT)
        packet = seen.info.get("xmp") or seen.getexif()[700]
    assert b'tiff:Orientation="1"' in packet and b"Lake" in packet
    assert f"<exif:PixelXDimension>{WIDTH}<".encode() in packet
    assert b"as it was" not in out.read_bytes()
    if {source, target} <= {".png", ".tif", ".webp"}:
        assert np.array_equal(other_reader(out, 8), samples_of(8, 3))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("source", [".jpg", ".png", ".tif"])
def test_turned_once(tmp_path, source, orientation):
    """Pixels upright, EXIF and XMP say so, and the sizes are those of the upright picture."""
    from PIL import ImageOps

    exif = exif_block(orientation=orientation)
    path = save_source(tmp_path / f"in{source}", samples_of(8, 3), exif=exif)
    with Image.open(path) as stored:
        upright = np.asarray(ImageOps.exif_transpose(stored))
    photo = read_photograph(path)
    out = write_photograph(tmp_path / "out.png", photo.image, like=photo)
    with Image.open(out) as seen:
        assert np.array_equal(np.asarray(seen), upright)
        check_exif(seen.getexif(), *seen.size)
    assert torch.equal(read_photograph(out).image, photo.image)


def test_maker_notes_stay_where_they_are():
    """In place: only the numbers that no longer hold differ, byte by byte, also in a TIFF."""
    from bokehdiff.tiff_files import encode_tiff

    before = exif_block(orientation=6, thumbnail=b"small")
    block = ExifBlock(before)
    block.set_upright()
    block.set_size(70000, 12)
    after = block.tobytes()
    assert len(after) == len(before)
    changed = sum(a != b for a, b in zip(after, before, strict=True))
    assert 0 < changed <= 2 + 4 + 2
    tiff = encode_tiff(samples_of(8, 3), exif=after)
    assert tiff[8 : len(after) - 6] == after[6 + 8 :]
    assert tiff.index(MAKER_NOTE) == before.index(MAKER_NOTE) - 6


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_broken_exif_never_stops_a_rendering(tmp_path, suffix):
    whole = exif_block(thumbnail=b"small")
    path = save_source(tmp_path / f"in{suffix}", samples_of(8, 3), exif=whole)
    out = tmp_path / "out.jpg"
    data = path.read_bytes()
    if suffix == ".tif":
        # Its folders lie at the end, before them the samples; those of the picture itself stay.
        with Image.open(path) as picture:
            start = picture.tag_v2[0x8769]
    else:
        start = data.index(whole[6:30])
    generator = np.random.default_rng(0)
    count = 0
    for _ in range(40):
        damaged = bytearray(data)
        for place in generator.integers(start, min(start + len(whole) - 6, len(data)), 4):
            damaged[place] = generator.integers(256)
        if suffix == ".png":  # with a checksum that fits, or no reader takes the chunk
            place = data.index(b"eXIf")
            end = place + 4 + struct.unpack(">I", data[place - 4 : place])[0]
            damaged[end : end + 4] = struct.pack(">I", zlib.crc32(damaged[place:end]))
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read_photograph(path)
            except ValueError as error:
                # A TIFF's own tags may lie there too; a picture without them is none.
                assert suffix == ".tif" and "damaged" in str(error)
                continue
            photo = read_photograph(path)
            write_photograph(out, photo.image, photo, overwrite=True)
            Image.open(out).load()
            count += 1
    assert count > 30


def test_exif_that_cannot_be_read_is_left_out_with_a_note(tmp_path):
    path = save_source(tmp_path / "in.jpg", samples_of(8, 3), exif=b"Exif\0\0nonsense")
    with pytest.warns(InputRepairedWarning, match=r"EXIF data of in\.jpg are damaged \(.*left out"):
        photo = read_photograph(path)
    assert photo.exif is None
    photo = dataclasses.replace(photo, exif=b"nonsense")
    with pytest.warns(InputRepairedWarning, match=r"EXIF data of the photograph are damaged"):
        write_photograph(tmp_path / "out.jpg", photo.image, photo)


def test_what_is_too_large_for_jpeg_is_said(tmp_path):
    photo = Photograph(torch.rand(1, 3, 8, 8), exif=exif_block() + bytes(70000), xmp=XMP * 500)
    with pytest.warns(InputRepairedWarning) as notes:
        out = write_photograph(tmp_path / "out.jpg", photo.image, photo)
    assert len(notes) == 2 and all("left out of out.jpg" in str(n.message) for n in notes)
    with Image.open(out) as seen:
        assert "exif" not in seen.info and "xmp" not in seen.info
    for suffix in (".png", ".tif", ".webp"):
        out = write_photograph(tmp_path / f"out{suffix}", photo.image, photo)
        with Image.open(out) as seen:
            assert seen.getexif()[0x010F] == "Kamera"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'<a tiff:Orientation="6"/>', b'<a tiff:Orientation="1"/>'),
        (b"<tiff:Orientation>8</tiff:Orientation>", b"<tiff:Orientation>1</tiff:Orientation>"),
        (b"<a tiff:ImageWidth='4' tiff:ImageLength = '6'/>",
         b"<a tiff:ImageWidth='300' tiff:ImageLength = '200'/>"),
        (b'<a exif:PixelYDimension="4" b:Other="6"/>',
         b'<a exif:PixelYDimension="200" b:Other="6"/>'),
    ],
)  # fmt: skip
def test_xmp_says_what_the_picture_is_now(before, after):
    assert fitted_packet(before, 300, 200) == after


def test_iptc_is_said_to_be_left_out(tmp_path):
    caption = b"\x1c\x02\x78\x00\x04Lake"
    resource = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(caption)) + caption + b"\0"
    body = b"Photoshop 3.0\0" + resource
    segment = b"\xff\xed" + struct.pack(">H", len(body) + 2) + body
    path = save_source(tmp_path / "in.jpg", samples_of(8, 3))
    data = path.read_bytes()
    path.write_bytes(data[:2] + segment + data[2:])
    with pytest.warns(InputRepairedWarning, match=r"IPTC data of in\.jpg .* not carried over"):
        read_photograph(path)


def test_xmp_of_other_parts_is_left_out(tmp_path):
    packet = XMP.replace(b"dc:title", b'hdrgm:Version="1.0" dc:title')
    path = save_source(tmp_path / "in.jpg", samples_of(8, 3), xmp=packet)
    with pytest.warns(InputRepairedWarning, match=r"XMP data of in\.jpg describe .* left out"):
        assert read_photograph(path).xmp is None


# --- Formats with loss ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "profile"),
    [*itertools.product((".jpg", ".avif", ".heic"), PROFILES), (".jpg", "gray")],
)
def test_formats_with_loss_keep_colours_and_profile(tmp_path, suffix, profile):
    if suffix == ".avif":
        pytest.importorskip("PIL._avif")
    if suffix == ".heic":
        pytest.importorskip("pillow_heif", reason="pip install '.[heic]'").register_heif_opener()
    is_gray = profile == "gray"
    data = GRAY_PROFILE if is_gray else PROFILES[profile]
    samples = samples_of(8, 1 if is_gray else 3)
    source = save_source(tmp_path / "in.png", samples, icc_profile=data)
    photo = read_photograph(source)
    out = write_photograph(tmp_path / f"out{suffix}", photo.image, photo)
    with Image.open(out) as seen:
        assert seen.mode == ("L" if is_gray else "RGB")
        assert seen.info.get("icc_profile") == data
        pixels = np.asarray(seen).reshape(samples.shape).astype(int)
    assert np.abs(pixels - samples).mean() < 1.5
    again = read_photograph(out)
    assert (again.icc_profile, again.bits, again.gray) == (data, 8, is_gray)
    assert (again.image - photo.image).abs().mean() < 1.5 / 255


def test_heic_keeps_transparency(tmp_path):
    pytest.importorskip("pillow_heif", reason="pip install '.[heic]'")
    alpha = torch.zeros(1, 1, 64, 64)
    alpha[..., 32:] = 1
    photo = Photograph(torch.full((1, 3, 64, 64), 0.5), alpha)
    again = read_photograph(write_photograph(tmp_path / "out.heic", photo.image, photo))
    assert (again.alpha - alpha).abs().mean() < 0.01
    assert (again.image - 0.5).abs().max() < 0.02


def test_ten_bit_heic(tmp_path):
    """16 bits become 10, rounded; black stays black and white white."""
    pytest.importorskip("pillow_heif", reason="pip install '.[heic]'")
    steps = torch.tensor([0.0, 0.2, 0.5, 1.0]).repeat_interleave(16).expand(1, 3, 64, 64)
    photo = Photograph(steps.contiguous(), bits=16)
    with pytest.warns(InputRepairedWarning, match="holds 10 bits .* the 16 of the photograph"):
        out = write_photograph(tmp_path / "out.heic", photo.image, photo)
    again = read_photograph(out)
    assert again.bits == 16
    assert (again.image - steps).abs().max() < 3 / 1023
    assert again.image.min() == 0 and again.image.max() == 1


# --- Colours --------------------------------------------------------------------------------------


def seen_in_srgb(path: Path) -> np.ndarray:
    """What colour management (LittleCMS) shows on an sRGB screen, in floats as far as 8 bits go."""
    with Image.open(path) as picture:
        data = picture.info["icc_profile"]
        return np.asarray(
            ImageCms.profileToProfile(
                picture.convert("RGB"),
                ImageCms.ImageCmsProfile(io.BytesIO(data)),
                ImageCms.createProfile("sRGB"),
                renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            )
        )


def test_blur_adds_up_light_in_the_primaries_of_the_file(tmp_path):
    """Half Adobe RGB red, half green light: what comes out is their mean by LittleCMS too."""
    samples = np.zeros((8, 8, 3), np.uint8)
    samples[:, :4, 0] = samples[:, 4:, 1] = 200
    source = save_source(tmp_path / "in.png", samples, icc_profile=PROFILES["Adobe"])
    photo = read_photograph(source)
    mean = srgb_to_linear(photo.image).mean(dim=(2, 3), keepdim=True).expand(1, 3, 8, 8)
    out = write_photograph(tmp_path / "out.png", linear_to_srgb(mean), photo)
    # (200 / 255)^g / 2 = (v / 255)^g
    wanted = 200 * 0.5 ** (256 / 563)
    assert np.array_equal(np.asarray(Image.open(out))[0, 0], [round(wanted), round(wanted), 0])


def test_wide_colours_are_not_clipped(tmp_path):
    """The most saturated P3 colours are kept to the last bit, which sRGB cannot show."""
    samples = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8).repeat(4, axis=0)
    source = save_source(tmp_path / "in.png", samples, icc_profile=PROFILES["Adobe"])
    photo = read_photograph(source)
    out = write_photograph(tmp_path / "out.png", photo.image, photo)
    assert np.array_equal(np.asarray(Image.open(out)), samples)
    assert np.array_equal(seen_in_srgb(out), seen_in_srgb(source))
    with pytest.warns(InputRepairedWarning, match=r"holds sRGB only: 33\.3 % .* were clipped"):
        array = np.load(write_photograph(tmp_path / "out.npy", photo.image, photo))
    assert np.abs(array * 255 - seen_in_srgb(source)).max() < 1


def test_gray_with_a_profile(tmp_path):
    samples = samples_of(16, 1)
    source = save_source(tmp_path / "in.png", samples, icc_profile=GRAY_PROFILE)
    photo = read_photograph(source)
    assert photo.gray and photo.icc_profile == GRAY_PROFILE
    light = (samples[:, :, 0] / 65535) ** (461 / 256)
    assert np.allclose(photo.image[0, 1].numpy(), linear_to_srgb(light), atol=1e-6)
    out = write_photograph(tmp_path / "gray.png", photo.image, photo)
    assert np.array_equal(other_reader(out, 16), samples)
    # With colour it is no longer gray: sRGB, and the same light.
    coloured = photo.image.clone()
    coloured[:, 0, 0, 0] = 1
    out = write_photograph(tmp_path / "colour.png", coloured, photo)
    again = read_photograph(out)
    assert again.icc_profile is None and not again.gray
    assert (again.image - coloured).abs().max() < 0.51 / 65535


def test_gray_with_a_profile_for_colour(tmp_path):
    samples = samples_of(8, 1)
    source = save_source(tmp_path / "in.jpg", samples, icc_profile=PROFILES["Adobe"])
    photo = read_photograph(source)
    out = write_photograph(tmp_path / "out.png", photo.image, photo)
    with Image.open(out) as seen, Image.open(source) as stored:
        assert seen.info["icc_profile"] == PROFILES["Adobe"]
        assert np.array_equal(np.asarray(seen)[:, :, 1], np.asarray(stored))


@pytest.mark.parametrize("kind", ["CMYK", "table"])
def test_colours_without_curves_become_srgb_with_a_note(tmp_path, kind):
    picture = Image.fromarray(samples_of(8, 3))
    path = tmp_path / "in.tif"
    exif = Image.Exif()
    exif.load(exif_block())
    if kind == "CMYK":
        picture.convert("CMYK").save(path, exif=exif)
    else:
        picture.save(path, icc_profile=table_profile(), exif=exif)
    with pytest.warns(InputRepairedWarning, match="no curve for each channel: .* at 8 bits"):
        photo = read_photograph(path)
    assert photo.icc_profile is None and photo.bits == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = write_photograph(tmp_path / "out.png", photo.image, photo)
    with Image.open(out) as seen:
        assert "icc_profile" not in seen.info
        assert seen.getexif().get_ifd(ExifTags.IFD.Exif)[0xA001] == 1, "says sRGB"
        wanted = Image.open(path).convert("RGB") if kind == "CMYK" else seen_in_srgb(path)
        # With or without compensation of the black point, which this profile does not need.
        assert np.abs(np.asarray(seen).astype(int) - np.asarray(wanted)).max() <= 1


def table_profile() -> bytes:
    """RGB to Lab by a table of its eight corners (mft1), as printers' profiles are."""
    corners = []
    for red in (0, 255):
        for green in (0, 255):
            for blue in (0, 255):
                lightness = (red * 2 + green * 5 + blue) // 8
                corners += [lightness, 128 + (red - green) // 4, 128 + (green - blue) // 4]
    identity = struct.pack(">9i", *(65536 * (i in (0, 4, 8)) for i in range(9)))
    line = bytes(range(256)) * 3
    table = b"mft1\0\0\0\0" + bytes([3, 3, 2, 0]) + identity + line + bytes(corners) + line
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    data = bytearray(assemble_profile("RGB", {b"A2B0": table, b"wtpt": white}))
    data[20:24] = b"Lab "
    return bytes(data)


def test_a_broken_profile_is_left_out_with_a_note(tmp_path):
    path = save_source(tmp_path / "in.png", samples_of(8, 3), icc_profile=b"not a profile")
    with pytest.warns(InputRepairedWarning, match=r"profile of in\.png could not be used .* sRGB"):
        photo = read_photograph(path)
    assert photo.icc_profile is None
    assert np.array_equal(photo.image[0, 1].numpy(), samples_of(8, 3)[:, :, 1] / np.float32(255))


# --- Transparency ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_what_cannot_be_seen_takes_the_colours_around_it(tmp_path, suffix):
    samples = np.zeros((16, 24, 4), np.uint8)
    samples[:, :12] = (200, 100, 50, 255)
    samples[:, 12:14] = (200, 100, 50, 128)
    path = save_source(tmp_path / f"in{suffix}", samples)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        photo = read_photograph(path)
    wanted = torch.tensor([200, 100, 50]).reshape(1, 3, 1, 1) / 255
    assert (photo.image - wanted).abs().max() < 1e-5
    assert torch.equal(photo.alpha[0, 0] * 255, torch.from_numpy(samples[:, :, 3]).float())
    with pytest.warns(InputRepairedWarning, match="50 % of its pixels were laid over white"):
        out = write_photograph(tmp_path / "out.jpg", photo.image, photo)
    seen = np.asarray(Image.open(out)).astype(int)
    assert np.abs(seen[:, 18:] - 255).max() <= 2
    assert np.abs(seen[:, :10] - (200, 100, 50)).max() <= 4


def test_opaque_alpha_stays_and_is_no_note_for_jpeg(tmp_path):
    samples = samples_of(8, 4)
    samples[..., 3] = 255
    photo = read_photograph(save_source(tmp_path / "in.png", samples))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_photograph(tmp_path / "out.jpg", photo.image, photo)
        out = write_photograph(tmp_path / "out.png", photo.image, photo)
    assert np.array_equal(np.asarray(Image.open(out)), samples)


def test_premultiplied_tiff(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    straight = samples_of(16, 4)
    alpha = straight[:, :, 3:] / 65535
    stored = np.dstack([np.round(straight[:, :, :3] * alpha), straight[:, :, 3:]])
    tifffile.imwrite(
        tmp_path / "in.tif",
        stored.astype(np.uint16),
        photometric="rgb",
        extrasamples=["assocalpha"],
    )
    photo = read_photograph(tmp_path / "in.tif")
    expected = torch.from_numpy(straight[:, :, :3] / 65535).permute(2, 0, 1)
    opaque = photo.alpha > 0.5
    # Half a step of the stored samples, divided by an opacity of at least a half.
    assert ((photo.image - expected).abs() * opaque).max() < 1.6 / 65535
    assert torch.equal(photo.alpha[0, 0], torch.from_numpy(straight[..., 3] / np.float32(65535)))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour_of_sixteen_bit_png(tmp_path, channels):
    """The tRNS chunk names one colour that is transparent."""
    samples = samples_of(16, channels)
    path = save_source(tmp_path / "in.png", samples)
    data = path.read_bytes()
    key = samples[0, 0].astype(">u2").tobytes()
    chunk = (
        struct.pack(">I", len(key)) + b"tRNS" + key + struct.pack(">I", zlib.crc32(b"tRNS" + key))
    )
    place = data.index(b"IDAT") - 4
    path.write_bytes(data[:place] + chunk + data[place:])
    alpha = read_photograph(path).alpha
    wanted = (samples != samples[0, 0]).any(axis=2)
    assert np.array_equal(alpha[0, 0].numpy(), wanted.astype(np.float32)) and not wanted[0, 0]


# --- Floats ---------------------------------------------------------------------------------------


@pytest.fixture
def light() -> torch.Tensor:
    """(1, 3, H, W) linear light: black, dark, white, and lamps up to 1000 times white."""
    generator = torch.Generator().manual_seed(0)
    values = 10 ** torch.empty(1, 3, HEIGHT, WIDTH).uniform_(-3, 3, generator=generator)
    values[..., 0, 0], values[..., 0, 1] = 0, 1
    return values


def save_floats(path: Path, samples: np.ndarray, half: bool = False, **attributes: Any) -> Path:
    """(H, W, C) as OpenImageIO writes it."""
    image_io = pytest.importorskip("OpenImageIO", reason="pip install '.[hdr]'")
    height, width, channels = samples.shape
    kind = image_io.HALF if half else image_io.FLOAT
    description = image_io.ImageSpec(width, height, channels, kind)
    description.channelnames = ("Y", "A")[:channels] if channels <= 2 else tuple("RGBA"[:channels])
    if channels in (2, 4):
        description.alpha_channel = channels - 1
    for name, value in attributes.items():
        kind = "float[8]" if name == "chromaticities" else f"uint8[{len(value)}]"
        value = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value
        description.attribute(name, image_io.TypeDesc(kind), value)
    output = image_io.ImageOutput.create(str(path))
    assert output.open(str(path), description)
    assert output.write_image(np.ascontiguousarray(samples, np.float32)) and output.close()
    return path


def floats_in(path: Path) -> tuple[np.ndarray, Any]:
    image_io = pytest.importorskip("OpenImageIO", reason="pip install '.[hdr]'")
    file = image_io.ImageInput.open(str(path))
    return file.read_image("float"), file.spec()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("target", [".exr", ".tif"])
@pytest.mark.parametrize("source", [".exr", ".tif"])
def test_linear_light_comes_out(tmp_path, light, source, target, channels, half):
    samples = light[0, :channels].permute(1, 2, 0).numpy()
    samples = samples.astype(np.float16).astype(np.float32) if half else samples
    photo = read_photograph(save_floats(tmp_path / f"in{source}", samples, half))
    assert photo.linear and photo.bits == 32 and photo.gray == (channels == 1)
    assert photo.image.shape == (1, 3, HEIGHT, WIDTH) and photo.image.max() > 500
    # OpenImageIO puts its own tags into a TIFF, which are none of the photograph's.
    photo = dataclasses.replace(photo, exif=None, xmp=None)
    out = write_photograph(tmp_path / f"out{target}", photo.image, photo)
    stored, description = floats_in(out)
    assert str(description.format) == "float" and np.array_equal(stored, samples)
    again = read_photograph(out)
    assert torch.equal(again.image, photo.image) and again.linear


def test_primaries_of_openexr(tmp_path, light):
    """Named in the file, kept in the file, and told to other formats as a profile."""
    samples = light[0].permute(1, 2, 0).numpy()
    source = save_floats(tmp_path / "in.exr", samples, chromaticities=DISPLAY_P3)
    photo = read_photograph(source)
    assert torch.equal(photo.image, light)
    out = write_photograph(tmp_path / "out.exr", photo.image, photo)
    stored, description = floats_in(out)
    assert np.array_equal(stored, samples)
    assert np.allclose(description.getattribute("chromaticities"), DISPLAY_P3, atol=1e-4)
    with pytest.warns(InputRepairedWarning, match="brighter than white"):
        png = write_photograph(tmp_path / "out.png", photo.image, photo)
    again = read_photograph(png)
    assert again.bits == 16
    assert np.allclose(read_profile(again.icc_profile).chromaticities(), DISPLAY_P3, atol=1e-4)
    assert (again.image - linear_to_srgb(light).clamp(max=1)).abs().max() < 0.51 / 65535
    tiff = read_photograph(write_photograph(tmp_path / "out.tif", photo.image, photo))
    assert tiff.linear and torch.equal(tiff.image, light)
    assert np.allclose(read_profile(tiff.icc_profile).chromaticities(), DISPLAY_P3, atol=1e-4)


def test_a_photograph_with_a_profile_as_openexr(tmp_path):
    samples = samples_of(8, 3)
    photo = read_photograph(
        save_source(tmp_path / "in.png", samples, icc_profile=PROFILES["Adobe"], exif=exif_block())
    )
    with pytest.warns(InputRepairedWarning, match="holds no EXIF and XMP"):
        out = write_photograph(tmp_path / "out.exr", photo.image, photo)
    stored, description = floats_in(out)
    assert np.allclose(stored, (samples / 255) ** (563 / 256), atol=1e-6)
    assert np.allclose(description.getattribute("chromaticities"), ADOBE_RGB, atol=1e-4)


@pytest.mark.parametrize("curve", [LINEAR, GAMMA])
def test_a_float_tiff_says_by_its_profile_what_it_holds(tmp_path, light, curve):
    profile = build_profile(ADOBE_RGB, curve, "floats")
    encoded = light if curve is LINEAR else light ** (256 / 563)
    samples = encoded[0].permute(1, 2, 0).numpy()
    source = save_floats(tmp_path / "in.tif", samples, ICCProfile=profile)
    photo = read_photograph(source)
    assert photo.linear and torch.allclose(photo.image, light, rtol=1e-5)
    out = write_photograph(tmp_path / "out.tif", photo.image, photo)
    assert (read_photograph(out).image / light).sub(1).nan_to_num().abs().max() < 1e-5
    with pytest.importorskip("tifffile").TiffFile(out) as file:
        stored, data = file.pages[0].asarray(), file.pages[0].tags[34675].value
    assert np.array_equal(stored, photo.image[0].permute(1, 2, 0))
    written = read_profile(data)
    assert all(c is LINEAR for c in written.curves) and "floats" in written.name
    assert (curve is LINEAR) == (data == profile)


def test_exif_in_a_float_tiff(tmp_path, light):
    photo = Photograph(light, linear=True, bits=32, exif=exif_block(), xmp=XMP)
    again = read_photograph(write_photograph(tmp_path / "out.tif", light, photo))
    exif = Image.Exif()
    exif.load(again.exif)
    check_exif(exif, WIDTH, HEIGHT)
    assert b"Lake" in again.xmp


@pytest.mark.parametrize("suffix", [".exr", ".tif"])
def test_transparent_light(tmp_path, light, suffix):
    alpha = samples_of(8, 4)[:, :, 3:].astype(np.float32) / 255
    alpha[0, :4] = 0
    colours = light[0].permute(1, 2, 0).numpy()
    source = save_floats(tmp_path / f"in{suffix}", np.dstack([colours * alpha, alpha]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        photo = read_photograph(source)
        out = write_photograph(tmp_path / f"out{suffix}", photo.image, photo)
    seen = photo.alpha > 0
    assert torch.allclose(photo.image * seen, light * seen, rtol=1e-5)
    assert (photo.image[..., 0, :4] > 0).all(), "colours of the surroundings"
    stored, _ = floats_in(out)
    # OpenImageIO gives both files' colours multiplied by the opacity.
    assert np.allclose(stored, np.dstack([colours * alpha, alpha]), rtol=1e-5)


def test_display_encoded_rendering_of_linear_light(tmp_path, light):
    """For a renderer that takes photographs cut off at white."""
    photo = read_photograph(save_floats(tmp_path / "in.exr", light[0].permute(1, 2, 0).numpy()))
    with pytest.warns(InputRepairedWarning, match=r"in\.exr is brighter than white"):
        shown = photo.display_encoded("in.exr")
    assert torch.equal(shown, linear_to_srgb(light).clamp(max=1))
    out = write_photograph(tmp_path / "out.exr", shown, photo, linear=False)
    assert (read_photograph(out).image - light.clamp(max=1)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_numpy_files(tmp_path, kind):
    samples = samples_of(8 if kind == np.uint8 else 16, 4)
    samples = samples / np.float32(65535) if kind == np.float32 else samples
    np.save(tmp_path / "in.npy", samples)
    photo = read_photograph(tmp_path / "in.npy")
    assert not photo.linear and photo.bits == 8 * samples.itemsize
    stored = np.load(write_photograph(tmp_path / "out.npy", photo.image, photo))
    assert stored.dtype == np.float32
    largest = 1 if kind == np.float32 else np.iinfo(kind).max
    assert np.allclose(visible(stored), visible(samples / np.float32(largest)), atol=1e-6)
    if kind == np.float32:
        light = read_photograph(tmp_path / "in.npy", linear=True)
        assert light.linear and torch.equal(light.image, photo.image)
        out = np.load(write_photograph(tmp_path / "light.npy", 7 * light.image, light))
        assert out.max() > 6


def test_radiance(tmp_path, light):
    photo = Photograph(light, linear=True, bits=32, icc_profile=PROFILES["P3"])
    pytest.importorskip("OpenImageIO", reason="pip install '.[hdr]'")
    with pytest.warns(InputRepairedWarning, match="holds sRGB only"):
        out = write_photograph(tmp_path / "out.hdr", light, photo)
    matrix = torch.from_numpy(read_profile(PROFILES["P3"]).to_srgb()).float()
    wanted = torch.einsum("ij,bjhw->bihw", matrix, light).clamp(min=0)
    # Eight bits and a common exponent.
    again = read_photograph(out)
    assert ((again.image - wanted).abs() <= wanted.amax(1, keepdim=True) / 120).all()


# --- Other choices --------------------------------------------------------------------------------


def test_depth_is_that_of_the_photograph_or_as_asked(tmp_path):
    ramp = torch.linspace(0, 1, 4096).reshape(1, 1, 32, 128).expand(1, 3, 32, 128).contiguous()
    deep, flat = Photograph(ramp, bits=16), Photograph(ramp, bits=8)
    assert read_photograph(write_photograph(tmp_path / "a.png", ramp, deep)).bits == 16
    assert read_photograph(write_photograph(tmp_path / "b.png", ramp, flat)).bits == 8
    asked = read_photograph(write_photograph(tmp_path / "c.png", ramp, flat, bits=16))
    assert asked.bits == 16 and (asked.image - ramp).abs().max() < 0.51 / 65535
    with pytest.warns(InputRepairedWarning, match="a.jpg holds 8 bits per channel; the 16 of"):
        write_photograph(tmp_path / "a.jpg", ramp, deep)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_photograph(tmp_path / "b.jpg", ramp, deep, bits=8)
    floats = read_photograph(write_photograph(tmp_path / "d.tif", ramp, flat, bits=32))
    assert floats.linear and torch.allclose(floats.image, srgb_to_linear(ramp))


def test_other_kinds_of_image_are_written(tmp_path):
    photo = Photograph(torch.rand(1, 3, 6, 9), bits=8)
    out = write_photograph(tmp_path / "a.png", photo.image, photo)
    pixels = np.asarray(Image.open(out))
    for count, image in enumerate((photo.image[0], pixels, pixels[None], Image.fromarray(pixels))):
        again = write_photograph(tmp_path / f"{count}.png", image, photo)
        assert np.array_equal(np.asarray(Image.open(again)), pixels)


@pytest.mark.parametrize("suffix", [".tif", ".webp", ".gif"])
def test_the_first_of_several_pictures(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 6), (shade, 0, 0)) for shade in (255, 100)]
    options = {"lossless": True} if suffix == ".webp" else {}
    path = tmp_path / f"in{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    with pytest.warns(InputRepairedWarning, match="holds 2 pictures .*; the first one was taken"):
        photo = read_photograph(path)
    assert (photo.image[:, 0] == 1).all()


@pytest.mark.parametrize("suffix", PHOTOGRAPH_SUFFIXES)
def test_whole_or_not_at_all(tmp_path, suffix):
    """Nothing beside the file, nothing over another one, nothing of a failed write."""
    if suffix in (".heic", ".heif"):
        pytest.importorskip("pillow_heif", reason="pip install '.[heic]'")
    if suffix in (".exr", ".hdr"):
        pytest.importorskip("OpenImageIO", reason="pip install '.[hdr]'")
    if suffix == ".avif":
        pytest.importorskip("PIL._avif")
    photo = Photograph(torch.rand(1, 3, 16, 16))
    out = write_photograph(tmp_path / f"out{suffix}", photo.image, photo)
    before = out.read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        write_photograph(out, 1 - photo.image, photo)
    with pytest.raises(ValueError, match="NaN"):
        write_photograph(out, photo.image * torch.nan, photo, overwrite=True)
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]
    write_photograph(out, 1 - photo.image, photo, overwrite=True)
    assert out.read_bytes() != before


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "most"), [(".jpg", 1.6), (".tif", 1.6)])
def test_memory_of_24_megapixels(tmp_path, suffix, most):
    """Reading and writing need a few copies in float (288 MB each), in a fresh process."""
    samples = np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    samples = np.tile(samples, (10, 10, 1))
    if suffix == ".tif":
        samples = samples.astype(np.uint16) * 257
    path = save_source(tmp_path / f"in{suffix}", samples, icc_profile=PROFILES["Adobe"])
    code = (
        "import resource, sys\n"
        "from bokehdiff.photographs import read_photograph, write_photograph\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20\n"
        "before = peak()\n"
        "photo = read_photograph(sys.argv[1])\n"
        "write_photograph(sys.argv[2], photo.image, photo)\n"
        "print(peak() - before)"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / f"out{suffix}")]
    repository = Path(__file__).parent.parent
    result = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=True)
    assert float(result.stdout) < most, "GiB above the imported libraries"
