"""Picture files as they are stored: samples in the file's own colours, and all that goes with them.

:mod:`bokehdiff.photographs` makes photographs of them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .colour_profiles import (
    LINEAR,
    SRGB_CHROMATICITIES,
    SRGB_CURVE,
    ColourProfile,
    build_profile,
    read_profile,
)
from .exif_blocks import ExifBlock, exif_of_tiff
from .linear_images import LINEAR_LIGHT_SUFFIXES, float_file_samples
from .picture_files import (
    HEIF_SUFFIXES,
    TIFF_SUFFIXES,
    has_sixteen_bits,
    is_unusual_tiff,
    load_numpy,
    note,
    open_picture,
    picture_samples,
    reading,
    sixteen_bit_samples,
    unusual_tiff_samples,
)
from .xmp_packets import describes_other_parts

# Photoshop's number for captions and credits.
IPTC_RESOURCE = 0x0404

# Video's numbers for curves of high dynamic range: PQ and HLG.
HIGH_DYNAMIC_RANGE_CURVES = (16, 18)


@dataclass(frozen=True, eq=False)
class StoredPicture:
    """One picture of a file, upright.

    Args:
        samples: (H, W, C) uint8, uint16, or floats; C is 1 (gray), 2 (with alpha), 3, 4.
        profile_bytes, profile: the colour profile of the samples; None: sRGB.
        exif: the EXIF block, which says upright and has no thumbnail.
        xmp: the XMP packet.
        is_light: the samples are floats of linear light; else they are as the profile says.
    """

    samples: np.ndarray
    profile_bytes: bytes | None = None
    profile: ColourProfile | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    is_light: bool = False


def read_stored_picture(file: Path) -> StoredPicture:
    """Returns the first picture of a file.

    Colours of files without curves of their own (CMYK, profiles that are look-up tables) come as
    8-bit sRGB; this, and what is damaged or lies beside the first picture, is said in a warning.

    Raises:
        ValueError: not a picture, damaged, or a package is missing.
    """
    suffix = file.suffix.lower()
    if suffix == ".npy":
        return StoredPicture(_with_channels(load_numpy(file), file.name))
    if suffix in LINEAR_LIGHT_SUFFIXES:
        return _read_floats(file)
    with reading(file):
        if suffix in HEIF_SUFFIXES:
            return _read_heif(file)
        if suffix in TIFF_SUFFIXES and (tags := _tiff_tags(file)):
            carried = {"icc_profile": tags.get(34675), "xmp": tags.get(700)}
            sample_formats = tags.get(339, 1)
            if 3 in (sample_formats if isinstance(sample_formats, tuple) else (sample_formats,)):
                return _read_floats(file, carried, _tiff_exif(file))
            return _read_picture(file, carried, _tiff_exif(file))
        return _read_picture(file)


def _with_channels(samples: Any, name: str) -> np.ndarray:
    if isinstance(samples, np.ndarray) and samples.ndim == 2:
        samples = samples[:, :, None]
    if not isinstance(samples, np.ndarray) or samples.ndim != 3 or 0 in samples.shape:
        shape = getattr(samples, "shape", type(samples).__name__)
        raise ValueError(f"{name} has shape {shape}; wanted an image (H, W, 3), or (H, W) gray.")
    if samples.shape[2] > 4:
        raise ValueError(
            f"{name} has shape {samples.shape}; wanted (H, W, C), of 1 to 4 channels: gray, gray "
            "with alpha, colour, colour with alpha."
        )
    return samples


# --- Pillow's formats -----------------------------------------------------------------------------


def _read_picture(
    file: Path, carried: dict[Any, Any] | None = None, exif: bytes | None = None
) -> StoredPicture:
    """A picture in a format that Pillow knows; of a TIFF, `carried` says what Pillow may not."""
    name = file.name
    became_srgb = False
    with open_picture(file) as picture:
        if picture is None:
            profile_bytes, profile = _usable_profile((carried or {}).get("icc_profile"), name)
            samples = unusual_tiff_samples(file)
        else:
            _note_what_is_not_kept(picture, name)
            stored_profile = (carried or picture.info).get("icc_profile")
            profile_bytes, profile = _usable_profile(stored_profile, name)
            if picture.mode in ("CMYK", "LAB") or (profile is not None and not profile.curves):
                kind = picture.mode if profile is None else profile.name or profile.space
                note(
                    f"The colours of {name} ({kind}) have no curve for each channel: they were "
                    "converted to sRGB at 8 bits. Export it with an RGB profile to keep them."
                )
                samples, profile_bytes, profile = picture_samples(picture, name), None, None
                carried = carried or picture.info
                became_srgb = True
            elif is_unusual_tiff(picture):
                samples = unusual_tiff_samples(file)
            elif has_sixteen_bits(picture):
                samples, information = sixteen_bit_samples(file)
                carried = carried or information
            else:
                samples = picture_samples(picture, name, to_srgb=False)
                carried = carried or picture.info
    carried = carried or {}
    samples = _with_channels(samples, name)
    if profile is not None:
        samples, profile_bytes, profile = _of_one_space(samples, profile_bytes, profile, name)
    return StoredPicture(
        samples,
        profile_bytes,
        profile,
        exif=_upright_exif(exif or carried.get("exif"), name, became_srgb),
        xmp=_kept_xmp(carried.get("xmp") or carried.get("XML:com.adobe.xmp"), name),
    )


def _note_what_is_not_kept(picture: Image.Image, name: str) -> None:
    count = getattr(picture, "n_frames", 1)
    if count > 1:
        note(
            f"{name} holds {count} pictures (pages, frames, or a gain map); the first one was "
            "taken."
        )
    resources = picture.info.get("photoshop")
    if isinstance(resources, dict) and IPTC_RESOURCE in resources:
        note(
            f"The IPTC data of {name} (captions, credits) are not carried over; its XMP and EXIF "
            "data are."
        )


def _usable_profile(stored: Any, name: str) -> tuple[bytes | None, ColourProfile | None]:
    """The colour profile of a file, as stored and as understood; a damaged one is left out."""
    if not stored:
        return None, None
    try:
        stored = bytes(stored)
        return stored, read_profile(stored)
    except (ValueError, TypeError, struct.error) as error:
        note(
            f"The colour profile of {name} could not be used ({error}); its colours were taken as "
            "sRGB, and the profile was left out."
        )
        return None, None


def _of_one_space(
    samples: np.ndarray, stored: bytes | None, profile: ColourProfile, name: str
) -> tuple[np.ndarray, bytes | None, ColourProfile | None]:
    """Samples and profile of one colour space: gray with a profile for colour becomes colour."""
    channels = samples.shape[2]
    if profile.space == "RGB" and channels <= 2:
        samples = samples[:, :, [0, 0, 0, 1][: channels + 2]]
    elif profile.space == "GRAY" and channels > 2:
        note(
            f"The colour profile of {name} is one for gray, which its colours are not; they were "
            "taken as sRGB, and the profile was left out."
        )
        return samples, None, None
    return samples, stored, profile


def _upright_exif(stored: Any, name: str, became_srgb: bool = False) -> bytes | None:
    """The EXIF block of an upright picture without its thumbnail; a damaged one is left out."""
    if not stored:
        return None
    try:
        block = ExifBlock(bytes(stored))
        block.set_upright()
        block.remove_thumbnail()
        if became_srgb:
            block.set_srgb()
        return block.tobytes()
    except (ValueError, TypeError, struct.error) as error:
        note(f"The EXIF data of {name} are damaged ({error}) and were left out.")
        return None


def _tiff_tags(file: Path) -> dict[int, Any]:
    """The tags of the first picture; none if they are damaged, which its reader will say."""
    tags = Image.Exif()
    try:
        with open(file, "rb") as stream:
            tags.load_from_fp(stream)
            return dict(tags)
    except Exception:  # what Pillow raises of damaged tags has no common base
        return {}


def _tiff_exif(file: Path) -> bytes | None:
    try:
        block = exif_of_tiff(file)
    except Exception as error:  # as above
        note(f"The EXIF data of {file.name} are damaged ({error}) and were left out.")
        return None
    return _upright_exif(block, file.name)


def _kept_xmp(stored: Any, name: str) -> bytes | None:
    if not stored:
        return None
    packet = stored.encode() if isinstance(stored, str) else bytes(stored)
    if describes_other_parts(packet):
        note(
            f"The XMP data of {name} describe previews, a gain map or other parts of the file, "
            "which no longer fit a changed picture; they were left out."
        )
        return None
    return packet


# --- HEIF -----------------------------------------------------------------------------------------


def open_pillow_heif(name: str) -> Any:
    """Returns the pillow_heif package.

    Raises:
        ValueError: the package is missing; `name` is the file that needs it.
    """
    try:
        import pillow_heif
    except ImportError:
        raise ValueError(
            f"{name} needs the pillow-heif package: pip install 'bokehdiff[heic]', or export it "
            "as JPEG."
        ) from None
    return pillow_heif


def _read_heif(file: Path) -> StoredPicture:
    name = file.name
    pillow_heif = open_pillow_heif(name)
    try:
        pictures = pillow_heif.open_heif(file, convert_hdr_to_8bit=False)
        picture = pictures[pictures.primary_index]
        samples = np.asarray(picture)  # libheif turns it upright
    except (ValueError, OSError, EOFError, RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name} is damaged, truncated or no HEIF picture ({reason}); wanted a complete "
            "picture. Copy or export it again."
        ) from None
    if len(pictures) > 1:
        note(f"{name} holds {len(pictures)} pictures; the main one was taken.")
    info = picture.info
    profile_bytes, profile = _usable_profile(info.get("icc_profile"), name)
    if profile is not None and not profile.curves:
        note(
            f"The colour profile of {name} ({profile.name or profile.space}) is a look-up table, "
            "which is not read here; its colours were taken as sRGB, and the profile was left out."
        )
        profile_bytes, profile = None, None
    coded = info.get("nclx_profile")
    if profile is None and coded:
        if coded["transfer_characteristics"] in HIGH_DYNAMIC_RANGE_CURVES:
            raise ValueError(
                f"{name} is coded for high dynamic range (PQ or HLG); wanted a picture for "
                "ordinary screens, or linear light: export it as JPEG, or as OpenEXR."
            )
        chromaticities = tuple(
            coded[f"color_primary_{colour}_{axis}"]
            for colour in ("red", "green", "blue", "white")
            for axis in "xy"
        )
        profile_bytes = profile_of_primaries(chromaticities)
        profile = read_profile(profile_bytes) if profile_bytes else None
    samples = _with_channels(samples, name)
    if samples.dtype == np.uint16:
        # The bits of the file stand in the upper part of 16: white is below 65535.
        largest = 2 ** info["bit_depth"] - 1
        levels = np.round(np.arange(largest + 1) * 65535 / largest).astype(np.uint16)
        samples = levels[samples >> (16 - info["bit_depth"])]
    if profile is not None:
        samples, profile_bytes, profile = _of_one_space(samples, profile_bytes, profile, name)
    return StoredPicture(
        samples,
        profile_bytes,
        profile,
        exif=_upright_exif(info.get("exif"), name),
        xmp=_kept_xmp(info.get("xmp"), name),
    )


def profile_of_primaries(chromaticities: tuple[float, ...]) -> bytes | None:
    """A profile with these primaries and the sRGB curve; None for those of sRGB, or none at all."""
    if np.allclose(chromaticities, SRGB_CHROMATICITIES, atol=1e-3):
        return None
    if min(chromaticities[1::2]) <= 0 and not any(chromaticities[6:]):
        return None
    return build_profile(chromaticities, SRGB_CURVE, "Primaries of the file, sRGB curve")


# --- Floats ---------------------------------------------------------------------------------------

# Less opaque than half a step of 8 bits: what such a pixel's colour was can no longer be told.
INVISIBLE = 1 / 510


def _read_floats(
    file: Path, carried: dict[Any, Any] | None = None, exif: bytes | None = None
) -> StoredPicture:
    """OpenEXR, Radiance, and TIFF with floats; of a TIFF, `carried` says what it holds."""
    samples, description = float_file_samples(file)
    profile_bytes, profile = _usable_profile((carried or {}).get("icc_profile"), file.name)
    if profile is not None and not profile.curves:
        note(
            f"The colour profile of {file.name} ({profile.name or profile.space}) is a look-up "
            "table, which does not go with floats; its primaries were taken as those of sRGB."
        )
        profile_bytes, profile = None, None
    chromaticities = description.getattribute("chromaticities")
    if profile is None and chromaticities is not None:
        profile_bytes = profile_of_primaries(tuple(float(v) for v in chromaticities))
        profile = read_profile(profile_bytes) if profile_bytes else None
    if profile is not None:
        samples, profile_bytes, profile = _of_one_space(samples, profile_bytes, profile, file.name)
    if samples.shape[2] in (2, 4):
        samples = _divided_by_alpha(samples, file.name)
    is_coded = carried is not None and profile is not None
    if is_coded and profile is not None:
        for channel, curve in enumerate(profile.curves):
            if curve is not LINEAR:
                samples[..., channel] = curve(samples[..., channel])
    return StoredPicture(
        samples,
        profile_bytes,
        profile,
        exif=exif,
        xmp=_kept_xmp((carried or {}).get("xmp"), file.name),
        is_light=carried is None or is_coded,
    )


def _divided_by_alpha(samples: np.ndarray, name: str) -> np.ndarray:
    """Colours as they would be without transparency; 0 where they cannot be seen."""
    colours, alpha = samples[..., :-1], samples[..., -1:].clip(0, 1)
    visible = alpha >= INVISIBLE
    glowing = float(((colours > 0).any(axis=2, keepdims=True) & (alpha == 0)).mean())
    if glowing > 0:
        note(
            f"{name} gives light where it is wholly transparent, in {100 * glowing:.3g} % of its "
            "pixels; this light was left out."
        )
    colours = np.where(visible, colours / np.where(visible, alpha, 1), 0)
    return np.concatenate([colours, alpha], axis=2)
