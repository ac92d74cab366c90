"""ICC profiles: read as Pillow's colour management reads them, and exact there and back."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from bokehdiff.colour_profiles import (
    LINEAR,
    SRGB_CHROMATICITIES,
    SRGB_CURVE,
    ToneCurve,
    assemble_profile,
    build_profile,
    from_working,
    read_profile,
    to_working,
    working_table,
)
from bokehdiff.images import linear_to_srgb

D65 = (0.3127, 0.3290)
DISPLAY_P3 = (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, *D65)
ADOBE_RGB = (0.640, 0.330, 0.210, 0.710, 0.150, 0.060, *D65)
REC_2020 = (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, *D65)
PROPHOTO = (0.7347, 0.2653, 0.1596, 0.8404, 0.0366, 0.0001, 0.3457, 0.3585)


def gamma(exponent: float) -> ToneCurve:
    return ToneCurve(parameters=(exponent, 1, 0, 0, 0, 0, 0))


def in_table(exponent: float, length: int) -> ToneCurve:
    """As scanners and calibrated screens have it: rounded to 16 bits, with many equal entries."""
    light = np.linspace(0, 1, length) ** exponent
    return ToneCurve(table=np.round(light * 65535) / 65535)


REC_709_CURVE = ToneCurve(parameters=(1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081, 0, 0))
CURVES = {
    "P3, parametric sRGB": (DISPLAY_P3, SRGB_CURVE),
    "Adobe RGB, gamma": (ADOBE_RGB, gamma(563 / 256)),
    "ProPhoto, gamma 1.8": (PROPHOTO, gamma(461 / 256)),
    "Rec. 2020, parametric": (REC_2020, REC_709_CURVE),
    "P3, table": (DISPLAY_P3, in_table(2.2, 1024)),
    "P3, small table": (DISPLAY_P3, in_table(1.7, 5)),
    "Rec. 2020, linear": (REC_2020, LINEAR),
}


@pytest.mark.parametrize("name", CURVES)
def test_profiles_mean_what_colour_management_says(name):
    """Sample by sample as LittleCMS converts to sRGB, but for its rounding to 8 bits."""
    chromaticities, curve = CURVES[name]
    data = build_profile(chromaticities, curve, name)
    profile = read_profile(data)
    assert profile.space == "RGB" and profile.name == name
    # s15Fixed16 numbers of the adapted colours, and their inverse.
    assert np.allclose(profile.chromaticities(), chromaticities, atol=1e-4)
    samples = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    converted = ImageCms.profileToProfile(
        Image.fromarray(samples),
        ImageCms.ImageCmsProfile(io.BytesIO(data)),
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
    )
    light = np.stack([profile.curves[c](samples[..., c] / 255) for c in range(3)], axis=-1)
    own = linear_to_srgb((light @ profile.to_srgb().T).clip(0, 1)) * 255
    # Half a step of rounding, and LittleCMS's 16-bit arithmetic.
    assert np.abs(own - np.asarray(converted)).max() < 0.75


@pytest.mark.parametrize("largest", [255, 65535])
@pytest.mark.parametrize("name", CURVES)
def test_every_sample_is_found_again(name, largest):
    profile = read_profile(build_profile(*CURVES[name], name))
    table = working_table(profile.curves[0], largest)
    assert table.dtype == np.float32 and table[0] >= 0 and table[-1] <= 1
    samples = np.arange(largest + 1, dtype=np.uint8 if largest == 255 else np.uint16)[None]
    working = np.empty(samples.shape, np.float32)
    to_working(samples, table, working)
    assert np.array_equal(from_working(working, table), samples)
    # A change smaller than half the way to the next sample changes nothing.
    step = np.diff(table, append=2 * table[-1] - table[-2]) * 0.4
    assert np.array_equal(from_working((working + step).clip(0, 1), table), samples)


def test_the_working_encoding_is_the_srgb_curve_of_the_light():
    table = working_table(gamma(2.2), 255)
    assert np.allclose(table, linear_to_srgb((np.arange(256) / 255) ** 2.2), atol=1e-6)
    assert np.array_equal(working_table(None, 255), np.arange(256, dtype=np.float32) / 255)


def test_srgb_in_any_spelling_changes_nothing():
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    light = np.round(SRGB_CURVE(np.linspace(0, 1, 1024)) * 65535) / 65535
    in_a_table = build_profile(SRGB_CHROMATICITIES, ToneCurve(table=light), "sRGB")
    for data in (own, in_a_table, build_profile(DISPLAY_P3, SRGB_CURVE, "P3")):
        for curve in read_profile(data).curves:
            for largest in (255, 65535):
                assert np.array_equal(working_table(curve, largest), working_table(None, largest))
    assert np.allclose(read_profile(own).chromaticities(), SRGB_CHROMATICITIES, atol=1e-4)
    assert np.allclose(read_profile(own).to_srgb(), np.eye(3), atol=1e-3)


def parametric(form: int, *numbers: float) -> bytes:
    fixed = [round(number * 65536) for number in numbers]
    return b"para\0\0\0\0" + struct.pack(f">HH{len(fixed)}i", form, 0, *fixed)


@pytest.mark.parametrize(
    ("form", "numbers", "wanted"),
    [
        (0, (2.5,), lambda v: v**2.5),
        (1, (2, 1.25, -0.25), lambda v: np.where(v >= 0.2, (1.25 * v - 0.25) ** 2, 0)),
        (2, (2, 1, -0.125, 0.25), lambda v: np.where(v >= 0.125, (v - 0.125) ** 2, 0) + 0.25),
        (3, (2, 0.75, 0.25, 0.5, 0.5), lambda v: np.where(v >= 0.5, (0.75 * v + 0.25) ** 2, v / 2)),
        (
            4,
            (2, 0.75, 0.125, 0.5, 0.25, 0.0625, 0.03125),
            lambda v: np.where(v >= 0.25, (0.75 * v + 0.125) ** 2 + 0.0625, v / 2 + 0.03125),
        ),
    ],
)
def test_every_form_of_parametric_curve(form, numbers, wanted):
    """ICC.1:2022, table 68."""
    data = parametric(form, *numbers)
    (curve,) = read_profile(assemble_profile("GRAY", {b"kTRC": data})).curves
    values = np.linspace(0, 1, 65)
    assert np.allclose(curve(values), wanted(values), atol=1e-12)


def test_light_beyond_white_goes_on():
    assert np.allclose(gamma(2.0)(np.array([2.0])), 4)
    line = ToneCurve(table=np.array([0, 0.25, 1.0]))
    assert np.allclose(line(np.array([1.0, 2.0])), [1, 2.5])


def test_version_2_profiles():
    """White in wtpt, no chad, an ASCII description; as Adobe RGB (1998) is distributed."""
    four = build_profile(ADOBE_RGB, gamma(2.2), "four")
    white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
    tags = dict[bytes, bytes]()
    for index in range(struct.unpack_from(">I", four, 128)[0]):
        signature, offset, size = struct.unpack_from(">4sII", four, 132 + 12 * index)
        tags[signature] = four[offset : offset + size]
    del tags[b"chad"]
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + np.round(white * 65536).astype(">i4").tobytes()
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 17) + b"Adobe RGB (1998)\0" + bytes(78)
    profile = read_profile(assemble_profile("RGB", tags))
    assert profile.name == "Adobe RGB (1998)"
    assert np.allclose(profile.chromaticities(), ADOBE_RGB, atol=1e-4)


def test_look_up_tables_have_no_curves():
    only_tables = assemble_profile("RGB", {b"A2B0": b"mft2" + bytes(60)})
    falling = ToneCurve(table=np.linspace(1, 0, 16))
    assert read_profile(only_tables).curves == ()
    assert read_profile(assemble_profile("CMYK", {b"A2B0": b"mft2" + bytes(60)})).space == "CMYK"
    assert read_profile(build_profile(DISPLAY_P3, falling, "negative")).curves == ()


def test_damaged_profiles_are_refused():
    """Cut anywhere, or with any byte turned: a ValueError or a profile, never another error."""
    whole = build_profile(DISPLAY_P3, in_table(2.2, 8), "P3")
    for length in range(len(whole)):
        with pytest.raises(ValueError):
            read_profile(whole[:length])
    generator = np.random.default_rng(0)
    for _ in range(2000):
        data = bytearray(whole)
        for place in generator.integers(0, len(whole), 3):
            data[place] = generator.integers(256)
        try:
            profile = read_profile(bytes(data))
        except ValueError:
            continue
        for curve in profile.curves:
            table = working_table(curve, 255)
            assert np.isfinite(table).all() and (np.diff(table) >= 0).all()
