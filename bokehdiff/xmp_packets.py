"""XMP packets made to fit another picture."""

from __future__ import annotations

import re

# Pictures inside the packet, and parts of the file that it describes: previews of the photograph as
# it was, depth and gain maps, films. They are not in the file that is written.
FOREIGN_PARTS = (
    b"xmp:Thumbnails", b"hdrgm:", b"HDRGainMap", b"Container:Directory", b"GImage:", b"GDepth:",
    b"GCamera:MicroVideo", b"GCamera:MotionPhoto", b"xmpNote:HasExtendedXMP",
)  # fmt: skip

WIDTH_NAMES, HEIGHT_NAMES = (
    rb"tiff:ImageWidth|exif:PixelXDimension",
    (rb"tiff:ImageLength|exif:PixelYDimension"),
)


def describes_other_parts(packet: bytes) -> bool:
    """Whether a packet holds pictures, or describes parts of the file beside its main picture."""
    return any(name in packet for name in FOREIGN_PARTS)


def fitted_packet(packet: bytes, width: int, height: int) -> bytes:
    """The packet of an upright picture of this size, where it names orientation and size."""
    for names, value in ((rb"tiff:Orientation", 1), (WIDTH_NAMES, width), (HEIGHT_NAMES, height)):
        # name="6", and <name>6</name>
        pattern = rb"((?:" + names + rb")(?:\s*=\s*[\"']|>\s*))\d+"
        packet = re.sub(pattern, rb"\g<1>" + str(value).encode(), packet)
    return packet
