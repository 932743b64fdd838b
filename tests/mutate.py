"""Damaged pictures, the same ones for the same seed: every format and mode, with bits flipped, cut, spliced, overwritten.

`python tests/mutate.py --count 5000 --out DIR` writes them as files, undamaged ones among them.
"""

from __future__ import annotations

import argparse
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pyvips

WIDTH, HEIGHT = 33, 25


def _pixels(bands: int, dtype: type) -> pyvips.Image:
    """A gradient with noise: compresses like a picture, has no flat colour."""
    rng = np.random.default_rng(bands)
    y, x, band = np.mgrid[:HEIGHT, :WIDTH, :bands]
    values = (5 * x + 4 * y + 30 * band + rng.integers(0, 20, (HEIGHT, WIDTH, bands))) * (np.iinfo(dtype).max // 255)
    image = pyvips.Image.new_from_array(values.clip(0, np.iinfo(dtype).max).astype(dtype))
    grey, colour = ("b-w", "srgb") if dtype is np.uint8 else ("grey16", "rgb16")
    return image.copy(interpretation=grey if bands < 3 else colour)


def _with_metadata(image: pyvips.Image) -> pyvips.Image:
    """An EXIF orientation with a thumbnail, an ICC profile and XMP."""
    image = image.icc_transform("srgb", input_profile="srgb").copy()
    image.set_type(pyvips.GValue.gstr_type, "exif-ifd0-Make", "maker")
    image.set_type(pyvips.GValue.gint_type, "orientation", 6)
    image.set_type(pyvips.GValue.blob_type, "jpeg-thumbnail-data", image.resize(0.3).jpegsave_buffer(keep="none"))
    image.set_type(pyvips.GValue.blob_type, "xmp-data", b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>")
    return image


@cache
def originals() -> dict[str, bytes]:
    """File name to content: one undamaged picture per format and mode."""
    grey, rgb, rgba = (_pixels(bands, np.uint8) for bands in (1, 3, 4))
    deep_grey, deep_rgb, deep_rgba = (_pixels(bands, np.uint16) for bands in (1, 3, 4))
    tagged, cmyk = _with_metadata(rgb), rgba.copy(interpretation="cmyk")
    pages = rgb.crop(0, 0, WIDTH, 24).copy()
    pages.set_type(pyvips.GValue.gint_type, "page-height", 8)
    return {
        "grey.png": grey.pngsave_buffer(),
        "grey_alpha.png": _pixels(2, np.uint8).pngsave_buffer(),
        "one_bit.png": (grey > 128).pngsave_buffer(bitdepth=1),
        "palette.png": rgb.pngsave_buffer(palette=True, bitdepth=4),
        "palette_alpha.png": rgba.pngsave_buffer(palette=True),
        "rgb.png": rgb.pngsave_buffer(),
        "rgba_interlaced.png": rgba.pngsave_buffer(interlace=True),
        "grey_16.png": deep_grey.pngsave_buffer(),
        "rgb_16.png": deep_rgb.pngsave_buffer(),
        "rgba_16.png": deep_rgba.pngsave_buffer(),
        "tagged.png": tagged.pngsave_buffer(),
        "grey.jpg": grey.jpegsave_buffer(),
        "rgb.jpg": rgb.jpegsave_buffer(),
        "progressive.jpg": rgb.jpegsave_buffer(interlace=True, subsample_mode="off"),
        "restarts.jpg": rgb.jpegsave_buffer(restart_interval=2),
        "cmyk.jpg": cmyk.jpegsave_buffer(),
        "tagged.jpg": tagged.jpegsave_buffer(),
        "rgb.webp": rgb.webpsave_buffer(),
        "rgba.webp": rgba.webpsave_buffer(),
        "lossless.webp": rgba.webpsave_buffer(lossless=True),
        "animated.webp": pages.webpsave_buffer(),
        "tagged.webp": tagged.webpsave_buffer(),
        "grey.tif": grey.tiffsave_buffer(),
        "one_bit.tif": grey.tiffsave_buffer(bitdepth=1, compression="ccittfax4"),
        "rgb_lzw.tif": rgb.tiffsave_buffer(compression="lzw", predictor="horizontal"),
        "rgb_jpeg.tif": rgb.tiffsave_buffer(compression="jpeg"),
        "rgb_tiled.tif": rgb.tiffsave_buffer(tile=True, tile_width=16, tile_height=16, compression="deflate"),
        "rgba_16.tif": deep_rgba.tiffsave_buffer(),
        "big.tif": rgb.tiffsave_buffer(bigtiff=True, compression="packbits"),
        "float.tif": rgb.cast("float").tiffsave_buffer(),
        "cmyk.tif": cmyk.tiffsave_buffer(),
        "tagged.tif": tagged.tiffsave_buffer(),
        "rgb.gif": rgb.gifsave_buffer(),
        "rgba.gif": rgba.gifsave_buffer(),
        "interlaced.gif": rgb.gifsave_buffer(interlace=True),
        "animated.gif": pages.gifsave_buffer(),
        "rgb.avif": rgb.heifsave_buffer(compression="av1", effort=0),
        "rgba_10.avif": deep_rgba.heifsave_buffer(compression="av1", bitdepth=10, effort=0),
    }


def _flip(data: bytearray, other: bytes, rng: np.random.Generator) -> bytearray:
    for _ in range(rng.integers(1, 9)):
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return data


def _flip_header(data: bytearray, other: bytes, rng: np.random.Generator) -> bytearray:
    data[: len(data) // 4] = _flip(data[: len(data) // 4], other, rng)
    return data


def _cut(data: bytearray, other: bytes, rng: np.random.Generator) -> bytearray:
    return data[: rng.integers(len(data))]


def _drop(data: bytearray, other: bytes, rng: np.random.Generator) -> bytearray:
    start = int(rng.integers(len(data)))
    del data[start : start + int(rng.integers(1, 40))]
    return data


def _splice(data: bytearray, other: bytes, rng: np.random.Generator) -> bytearray:
    return data[: rng.integers(len(data))] + other[rng.integers(len(other)) :]


def _overwrite(data: bytearray, other: bytes, rng: np.random.Generator) -> bytearray:
    """A number of 1, 2 or 4 bytes becomes an extreme one."""
    size = int(rng.choice([1, 2, 4]))
    value = int(rng.choice([0, 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1]))
    start = int(rng.integers(max(1, len(data) - size)))
    data[start : start + size] = value.to_bytes(size, "big" if rng.random() < 0.5 else "little")
    return data


_MUTATIONS: tuple[Callable[[bytearray, bytes, np.random.Generator], bytearray], ...] = (
    _flip,
    _flip_header,
    _cut,
    _drop,
    _splice,
    _overwrite,
)


def _with_checksums(data: bytes) -> bytes:
    """A PNG with each chunk's CRC made right, so that the damage gets past the CRC check."""
    at, result = 8, bytearray(data)
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + size > len(data):
            break
        struct.pack_into(">I", result, at + 8 + size, zlib.crc32(data[at + 4 : at + 8 + size]))
        at += 12 + size
    return bytes(result)


def mutated(count: int, seed: int = 0, sources: Mapping[str, bytes] | None = None) -> Iterator[tuple[str, bytes]]:
    """`count` times a file name and its content; one in twenty is undamaged, and its name says so.

    sources: the undamaged ones by their names, instead of `originals()`.
    """
    rng = np.random.default_rng(seed)
    sources = sources or originals()
    names = list(sources)
    for number in range(count):
        name = str(rng.choice(names))
        if number % 20 == 0:
            yield f"{number:06}_intact_{name}", sources[name]
            continue
        mutation = _MUTATIONS[rng.integers(len(_MUTATIONS))]
        data = bytes(mutation(bytearray(sources[name]), sources[str(rng.choice(names))], rng))
        if name.endswith(".png") and rng.random() < 0.7:
            data = _with_checksums(data)
        yield f"{number:06}{mutation.__name__}_{name}", data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, data in mutated(options.count, options.seed):
        (options.out / name).write_bytes(data)


if __name__ == "__main__":
    main()
