"""Formats that libvips' wheels do not read: BMP, TGA and JPEG 2000 by Pillow, HEIC by pillow-heif (the `formats` extra)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sanrt.errors import PictureError, TooManyPixelsError
from sanrt.extras import extra
from sanrt.runtime.pictures.formats import Format

if TYPE_CHECKING:
    import pyvips

PLUGINS = {Format.BMP: ["BMP"], Format.TGA: ["TGA"], Format.JP2: ["JPEG2000"]}
MODES = {"1": "L", "P": "RGBA", "PA": "RGBA", "RGBX": "RGB", "RGBa": "RGBA", "La": "LA", "YCbCr": "RGB"}
"""What Pillow's other modes are converted to."""
TAKEN = ("L", "LA", "RGB", "RGBA", "I;16")
BLOBS = {"icc_profile": "icc-profile-data", "exif": "exif-data", "xmp": "xmp-data"}
JP2_SIZE = re.compile(rb"\xff\x51..(?:..)(?:.{32})(..)(.)", re.DOTALL)
"""A codestream's size marker, with the count of its components and the bits of the first."""


def load(path: Path, form: Format, max_pixels: int) -> pyvips.Image:
    """The picture, upright and decoded, as libvips would have loaded it.

    MissingPackageError without the extra, PictureError for a damaged file, or one of more than `max_pixels`.
    """
    with extra("formats", f"{path}: reading {form.upper()}"):
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = None  # `check_size` knows what the caller allows
        if form is Format.HEIC:
            import pillow_heif
    try:
        if form is Format.HEIC:
            return heic_image(pillow_heif.open_heif(path, convert_hdr_to_8bit=False), path, max_pixels)
        with Image.open(path, formats=PLUGINS[form]) as opened:
            check_size(path, opened.size, max_pixels)
            if form is Format.JP2:
                check_depth(path, opened.mode)
            picture: Any = opened
            if opened.mode == "P" and "transparency" not in opened.info:
                picture = opened.convert("RGB")
            elif opened.mode in MODES:
                picture = opened.convert(MODES[opened.mode])
            if picture.mode not in TAKEN:
                raise PictureError(f"{path}: {form.upper()} in mode {opened.mode}; expected grey or RGB, convert it first")
            return as_vips(np.asarray(picture), {**opened.info})
    except PictureError:
        raise
    except Exception as error:  # decoders raise whatever they like
        raise PictureError(f"{path}: damaged {form.upper()} file ({' '.join(str(error).split()) or 'cut short'})") from None


def heic_image(opened: Any, path: Path, max_pixels: int) -> pyvips.Image:
    """The primary picture; libheif turns it upright. Samples of more than 8 bits are spread over 16."""
    import pyvips

    check_size(path, opened.size, max_pixels)
    bits = opened.info.get("bit_depth", 8)
    pixels = np.asarray(opened)
    if pixels.dtype == np.uint16:  # libheif's bits are the upper ones
        stored = pixels >> (16 - bits)
        pixels = np.rint(stored * (65535 / (2**bits - 1))).astype(np.uint16)
    image = as_vips(pixels, opened.info)
    image.set_type(pyvips.GValue.gint_type, "bits-per-sample", bits)
    image.set_type(pyvips.GValue.gint_type, "orientation", 1)
    return image


def as_vips(pixels: Any, info: Mapping[Any, Any]) -> pyvips.Image:
    """(H, W) or (H, W, bands) samples with the profile, EXIF and XMP that Pillow found."""
    import pyvips

    sixteen = pixels.dtype == np.uint16
    bands = 1 if pixels.ndim == 2 else pixels.shape[2]
    grey, colour = ("grey16", "rgb16") if sixteen else ("b-w", "srgb")
    image = pyvips.Image.new_from_array(np.ascontiguousarray(pixels)).copy(interpretation=grey if bands < 3 else colour)
    image = image.copy_memory()  # a region of it would not keep the array alive
    for name, vips_name in BLOBS.items():
        if isinstance(value := info.get(name), bytes) and value:
            image.set_type(pyvips.GValue.blob_type, vips_name, value)
    return image


def check_size(path: Path, size: tuple[int, int], max_pixels: int) -> None:
    """PictureError for a header that claims more pixels than allowed, before any is decoded."""
    if size[0] * size[1] > max_pixels:
        raise TooManyPixelsError(
            f"{path}: claims {size[0]} x {size[1]} pixels; at most {max_pixels / 1e6:.0f} megapixels are allowed"
        )


def check_depth(path: Path, mode: str) -> None:
    """PictureError for a JPEG 2000 file of more than 8 bits in colour, of which Pillow would read 8."""
    with path.open("rb") as file:
        found = JP2_SIZE.search(file.read(1 << 16))
    bits = (found[2][0] & 127) + 1 if found else 8
    if bits > 8 and not mode.startswith("I;16"):
        raise PictureError(
            f"{path}: JPEG 2000 of {bits} bits in {mode}; expected 8, or 16 in grey; convert it to a 16-bit PNG or TIFF"
        )
