"""ICC colour profiles: their curves and primaries, and the encoding photographs are worked on in.

Blur adds up light, which is the same sum in any primaries. So a photograph keeps the primaries of
its file, whatever their gamut, and only its curves are exchanged: the samples of the file become
linear light by the profile's curves, and the light is encoded with the sRGB curve, which the
renderers know (the *working encoding*). Going back, the file's own samples are found again exactly.

Read here: profiles with one curve for each channel and a matrix (Display P3, Adobe RGB, ProPhoto,
Rec. 2020, those of cameras and screens), and gray ones. Profiles that are look-up tables (CMYK,
printers) have no such curves. ICC.1:2022, sections 7 to 10, defines the bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from .srgb import linear_to_srgb

# The white of the ICC connection space, and its cone responses' matrix (Bradford).
D50 = np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
# x and y of red, green, blue and white.
SRGB_CHROMATICITIES = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, 0.3127, 0.3290)

# Curves nearer to sRGB's than this are sRGB's, stored in a table or with rounded parameters.
SRGB_CURVE_TOLERANCE = 5e-4

# How many of its parameters (g, a, b, c, d, e, f) each kind of parametric curve stores.
PARAMETER_COUNTS = {0: 1, 1: 3, 2: 4, 3: 5, 4: 7}


@dataclass(frozen=True, eq=False)
class ToneCurve:
    """The linear light of the samples of one channel, both in [0, 1].

    Args:
        parameters: (g, a, b, c, d, e, f) of ``(a v + b)^g + e`` from v = d up, ``c v + f`` below;
            None for a curve in a table.
        table: (N,) light at N samples evenly from 0 to 1, else None.
    """

    parameters: tuple[float, ...] | None = None
    table: np.ndarray | None = None

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Linear light, float64, of samples from 0 up; beyond 1 a table goes on straight."""
        values = np.asarray(values, np.float64)
        if self.table is not None:
            last = len(self.table) - 1
            light = np.interp(values * last, np.arange(last + 1), self.table)
            slope = (self.table[-1] - self.table[-2]) * last
            return light + np.maximum(values - 1, 0) * slope
        assert self.parameters is not None
        g, a, b, c, d, e, f = self.parameters
        return np.where(values >= d, np.maximum(a * values + b, 0) ** g + e, c * values + f)


LINEAR = ToneCurve(parameters=(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0))
SRGB_CURVE = ToneCurve(parameters=(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045, 0.0, 0.0))


@dataclass(frozen=True, eq=False)
class ColourProfile:
    """What a profile says of the samples in its file.

    Args:
        space: ``"RGB"``, ``"GRAY"``, ``"CMYK"``, ...
        curves: one for each channel, never falling; none where the profile is a look-up table.
        colorants: (3, 3) XYZ under D50 of red, green and blue, in columns; None without a matrix.
        white: (3,) XYZ of the white of the device, Y = 1.
        name: the description in the profile, perhaps empty.
    """

    space: str
    curves: tuple[ToneCurve, ...]
    colorants: np.ndarray | None
    white: np.ndarray
    name: str

    def chromaticities(self) -> tuple[float, ...]:
        """x and y of red, green, blue and white as the device shows them, before adaptation."""
        assert self.colorants is not None
        native = np.linalg.inv(_adaptation(self.white)) @ self.colorants
        columns = np.column_stack([native, self.white])
        return tuple(float(v) for v in (columns[:2] / columns.sum(axis=0)).T.ravel())

    def to_srgb(self) -> np.ndarray:
        """(3, 3) matrix from linear light in the profile's primaries to those of sRGB."""
        assert self.colorants is not None
        return np.linalg.inv(_colorants(SRGB_CHROMATICITIES)) @ self.colorants


def read_profile(data: bytes) -> ColourProfile:
    """Returns what the bytes of an ICC profile say.

    Raises:
        ValueError: they are no whole profile.
    """
    if len(data) < 132 or data[36:40] != b"acsp":
        raise ValueError("it has no ICC header")
    (count,) = struct.unpack_from(">I", data, 128)
    if count > (len(data) - 132) // 12:
        raise ValueError(f"its table of {count} tags is longer than the profile")
    tags = {}
    for index in range(count):
        signature, offset, size = struct.unpack_from(">4sII", data, 132 + 12 * index)
        if offset + size > len(data):
            raise ValueError(f"its tag {signature.decode('latin-1')} lies beyond its end")
        tags[signature] = data[offset : offset + size]
    space = data[16:20].decode("latin-1").strip()
    wanted = {"RGB": (b"rTRC", b"gTRC", b"bTRC"), "GRAY": (b"kTRC",)}.get(space, ())
    curves: tuple[ToneCurve, ...] = ()
    colorants = None
    if wanted and all(signature in tags for signature in wanted):
        curves = tuple(_read_curve(tags[signature]) for signature in wanted)
    if space == "RGB" and all(signature in tags for signature in (b"rXYZ", b"gXYZ", b"bXYZ")):
        colorants = np.column_stack([_read_xyz(tags[s]) for s in (b"rXYZ", b"gXYZ", b"bXYZ")])
    flat = colorants is not None and abs(np.linalg.det(colorants)) < 1e-6
    falling = any(not _is_rising(curve) for curve in curves)
    if falling or flat or (space == "RGB" and colorants is None):
        curves = ()
    return ColourProfile(space, curves, colorants, _white(tags), _description(tags))


def _read_curve(data: bytes) -> ToneCurve:
    if len(data) < 12:
        raise ValueError("one of its curves is cut short")
    kind = data[:4]
    if kind == b"curv":
        (count,) = struct.unpack_from(">I", data, 8)
        if count > (len(data) - 12) // 2:
            raise ValueError("one of its curves is cut short")
        stored = np.frombuffer(data, ">u2", count, 12)
        if count == 0:
            return LINEAR
        if count == 1:
            gamma = float(stored[0]) / 256
            return LINEAR if gamma == 1 else ToneCurve(parameters=(gamma, 1, 0, 0, 0, 0, 0))
        return ToneCurve(table=stored / 65535)
    if kind == b"para":
        (form,) = struct.unpack_from(">H", data, 8)
        count = PARAMETER_COUNTS.get(form, 0)
        if not count or len(data) < 12 + 4 * count:
            raise ValueError("one of its curves is of an unknown form or cut short")
        numbers = [n / 65536 for n in struct.unpack_from(f">{count}i", data, 12)]
        parameters = _full_parameters(form, numbers)
        return LINEAR if parameters == LINEAR.parameters else ToneCurve(parameters=parameters)
    raise ValueError(f"one of its curves is of the unknown kind {kind.decode('latin-1')}")


def _full_parameters(form: int, numbers: list[float]) -> tuple[float, ...]:
    """(g, a, b, c, d, e, f) from the parameters that a form stores."""
    g, a, b, c, d, e, f = (numbers + [0.0] * 7)[:7]
    if form == 0:
        return (g, 1, 0, 0, 0, 0, 0)
    if form in (1, 2):
        if a == 0:
            raise ValueError("one of its curves is constant")
        return (g, a, b, 0, -b / a, c, c)
    return (g, a, b, c, d, e, f)


def _is_rising(curve: ToneCurve) -> bool:
    with np.errstate(all="ignore"):
        light = curve(np.linspace(0, 1, 4097))
    if not np.isfinite(light).all() or light[-1] <= max(light[0], 0):
        return False
    # Rounded parameters leave seams of this size.
    return bool((np.diff(light) > -1e-4).all())


def _read_xyz(data: bytes) -> np.ndarray:
    if len(data) < 20:
        raise ValueError("one of its colours is cut short")
    return np.array(struct.unpack_from(">3i", data, 8)) / 65536


def _white(tags: dict[bytes, bytes]) -> np.ndarray:
    """The white of the device: by the adaptation that is stored, else the stored white itself."""
    if len(tags.get(b"chad", b"")) >= 44:
        adaptation = np.array(struct.unpack_from(">9i", tags[b"chad"], 8)).reshape(3, 3) / 65536
        if abs(np.linalg.det(adaptation)) > 1e-6:
            white = np.linalg.inv(adaptation) @ D50
            return white / white[1]
    if len(tags.get(b"wtpt", b"")) >= 20:
        white = _read_xyz(tags[b"wtpt"])
        if (white > 0).all():
            return white / white[1]
    return D50


def _description(tags: dict[bytes, bytes]) -> str:
    data = tags.get(b"desc", b"")
    if data[:4] == b"desc" and len(data) >= 12:
        (length,) = struct.unpack_from(">I", data, 8)
        return data[12 : 12 + length].split(b"\0")[0].decode("ascii", "replace").strip()
    if data[:4] == b"mluc" and len(data) >= 28:
        length, offset = struct.unpack_from(">II", data, 20)
        return data[offset : offset + length].decode("utf-16-be", "replace").strip("\0 ")
    return ""


def _adaptation(white: np.ndarray) -> np.ndarray:
    """(3, 3) matrix of XYZ under a white to XYZ under D50 (Bradford)."""
    return np.linalg.inv(BRADFORD) @ np.diag(BRADFORD @ D50 / (BRADFORD @ white)) @ BRADFORD


def _colorants(chromaticities: tuple[float, ...]) -> np.ndarray:
    """(3, 3) XYZ under D50 of red, green and blue, which add up to white, in columns."""
    x, y = np.array(chromaticities).reshape(4, 2).T
    columns = np.stack([x / y, np.ones(4), (1 - x - y) / y])
    primaries, white = columns[:, :3], columns[:, 3]
    return _adaptation(white) @ (primaries * np.linalg.solve(primaries, white))


def build_profile(chromaticities: tuple[float, ...], curve: ToneCurve, name: str) -> bytes:
    """Returns the bytes of an ICC profile (version 4) with these primaries and one curve.

    Args:
        chromaticities: x and y of red, green, blue and white.
        curve: of all three channels.
        name: what programs show.
    """
    red, green, blue = _colorants(chromaticities).T
    x, y = chromaticities[6:]
    adaptation = _adaptation(np.array([x / y, 1, (1 - x - y) / y]))
    tone = _curve_bytes(curve)
    return assemble_profile(
        "RGB",
        {
            b"desc": _text(name),
            b"cprt": _text("No copyright, use freely"),
            b"wtpt": _xyz_bytes(D50),
            b"chad": b"sf32\0\0\0\0" + _fixed(adaptation.ravel()),
            b"rXYZ": _xyz_bytes(red),
            b"gXYZ": _xyz_bytes(green),
            b"bXYZ": _xyz_bytes(blue),
            b"rTRC": tone,
            b"gTRC": tone,
            b"bTRC": tone,
        },
    )


def assemble_profile(space: str, tags: dict[bytes, bytes]) -> bytes:
    """Returns an ICC profile (version 4, of a display) of these tags."""
    table, body, placed = b"", b"", dict[bytes, int]()
    start = 132 + 12 * len(tags)
    for signature, data in tags.items():
        if data not in placed:
            placed[data] = start + len(body)
            body += data + b"\0" * (-len(data) % 4)
        table += struct.pack(">4sII", signature, placed[data], len(data))
    header = struct.pack(
        ">I4sI4s4s4s6H4s28s12s48s",
        start + len(body), b"", 0x04300000, b"mntr", space.ljust(4).encode(), b"XYZ ",
        2000, 1, 1, 0, 0, 0, b"acsp", b"", _fixed(D50), b"",
    )  # fmt: skip
    return header + struct.pack(">I", len(tags)) + table + body


def _curve_bytes(curve: ToneCurve) -> bytes:
    if curve.table is not None:
        stored = np.round(curve.table * 65535).astype(">u2")
        return b"curv\0\0\0\0" + struct.pack(">I", len(stored)) + stored.tobytes()
    assert curve.parameters is not None
    return b"para\0\0\0\0" + struct.pack(">HH", 4, 0) + _fixed(np.array(curve.parameters))


def _xyz_bytes(colour: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(colour)


def _fixed(numbers: np.ndarray) -> bytes:
    """Numbers with 16 bits after the point."""
    return np.round(numbers * 65536).astype(">i4").tobytes()


def _text(words: str) -> bytes:
    encoded = words.encode("utf-16-be")
    return (
        b"mluc\0\0\0\0"
        + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(encoded), 28)
        + (encoded)
    )


# --- The working encoding -------------------------------------------------------------------------


def working_table(curve: ToneCurve | None, largest: int) -> np.ndarray:
    """(largest + 1,) float32 in [0, 1]: the working encoding of every whole-number sample.

    ``table[v] = sRGB(curve(v / largest) / curve(1))``. Exactly ``v / largest`` where the curve is
    sRGB's, or there is none.
    """
    samples = np.arange(largest + 1) / largest
    if curve is not None:
        light = (curve(samples) / curve(np.ones(1))).clip(0, 1)
        encoded = linear_to_srgb(_without_steps(light))
        if np.abs(encoded - samples).max() > SRGB_CURVE_TOLERANCE:
            return encoded.astype(np.float32)
    return samples.astype(np.float32)


def _without_steps(light: np.ndarray) -> np.ndarray:
    """Leans samples of equal light within the rounding to 16 bits of curves in tables, so that each
    has its own light and is found again."""
    light = np.maximum.accumulate(light)
    starts = np.flatnonzero(np.diff(light, prepend=-1.0))
    lengths = np.diff(starts, append=len(light))
    rises = np.minimum(np.diff(light[starts], append=light[-1]), 1 / 65535)
    position = np.arange(len(light)) - np.repeat(starts, lengths)
    return light + position * np.repeat(rises / lengths, lengths)


def to_working(samples: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """Writes the working encoding of (H, W) whole-number samples to (H, W) float32."""
    np.take(table, samples, out=out, mode="clip")


def from_working(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Returns (H, W) uint8 or uint16: of (H, W) values in [0, 1] the samples nearest to them."""
    kind = np.uint8 if len(table) == 256 else np.uint16
    largest = len(table) - 1
    if np.array_equal(table, working_table(None, largest)):
        return (values * np.float32(largest) + np.float32(0.5)).clip(0, largest).astype(kind)
    middles = (table[1:].astype(np.float64) + table[:-1]) / 2
    return np.searchsorted(middles.astype(np.float32), values).astype(kind)
