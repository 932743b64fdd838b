"""Results of other sizes than the network makes: how large they are, and the antialiased reduction to that size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sanrt.errors import LargeEnoughError, PictureError, UsageError
from sanrt.model.spec import SCALES
from sanrt.wording import option

if TYPE_CHECKING:
    import pyvips

KERNEL = "cubic"
"""Catmull-Rom; of libvips' kernels the nearest to the originals of reduced photographs, by some hundredths of a decibel."""


@dataclass(frozen=True)
class ResultSize:
    """How large a result is asked to be, where that is not what the network makes of its source."""

    outscale: float | None = None
    """Times the source's width and height."""
    size: tuple[int, int] | None = None
    """Width and height to fit inside, with the source's aspect ratio."""

    def __post_init__(self) -> None:
        if self.outscale and self.size:
            raise UsageError(f"{option('outscale')} and {option('size')}: both say how large results are; leave one out")
        if self.outscale is not None and not 1 < self.outscale <= SCALES[-1]:
            raise UsageError(
                f"{option('outscale', self.outscale)}: expected more than 1, up to {SCALES[-1]}, which the largest "
                "network makes"
            )
        if self.size is not None and min(self.size) < 1:
            raise UsageError(f"{option('size', self.size)}: expected a width and a height of at least 1 pixel")

    def __str__(self) -> str:
        """`x3.5` or `3840x2160`, as it stands in the names of results; nothing where the network's size is kept."""
        if self.size:
            return "x".join(map(str, self.size))
        return f"x{self.outscale:g}" if self.outscale else ""

    def of(self, width: int, height: int, scale: int) -> tuple[int, int]:
        """Width and height of the result of a source of this size, which the network enlarges by `scale`."""
        if self.size:
            most_wide, most_high = self.size
            if most_wide * height <= most_high * width:
                return most_wide, nearest(height * most_wide / width)
            return nearest(width * most_high / height), most_high
        factor = self.outscale or scale
        return nearest(width * factor), nearest(height * factor)

    def least_scale(self, width: int, height: int) -> int | None:
        """The smallest scale of a network that enlarges a source of this size enough; None if none does."""
        wide, high = self.of(width, height, SCALES[-1])
        return next((scale for scale in SCALES if scale * width >= wide and scale * height >= high), None)

    @property
    def outscale_network(self) -> int | None:
        """The smallest scale of a network from which `outscale` is a reduction; None without one."""
        return next((scale for scale in SCALES if self.outscale and scale >= self.outscale), None)

    def checked(self, width: int, height: int, scale: int) -> tuple[int, int]:
        """The same as `of`; LargeEnoughError where that is no enlargement, PictureError where it is more than the
        network makes.
        """
        wide, high = self.of(width, height, scale)
        if self.size and (self.size[0] <= width or self.size[1] <= height):
            raise LargeEnoughError(
                f"{width} x {height} already fills {option('size', self.size)}; sanrt only enlarges, ask for more"
            )
        if wide > scale * width or high > scale * height:
            least = self.least_scale(width, height)
            most = SCALES[-1]
            remedy = (
                f"take {option('scale', least)}"
                if least
                else f"x{most} is the most: {option('scale', most)} without {option('size')} makes {most * width} x "
                f"{most * height}"
            )
            raise PictureError(f"{width} x {height} becomes {wide} x {high} by {self}, the network is x{scale}; {remedy}")
        return wide, high


def nearest(value: float) -> int:
    """The nearest whole number of pixels, at least one; halves go up."""
    return max(1, int(value + 0.5))


def reduced(image: pyvips.Image, width: int, height: int) -> pyvips.Image:
    """An 8- or 16-bit image, its last band opacity where it has one, at a smaller size; computed from top to bottom.

    Colours count by their opacity; where the result is fully transparent they count alike. In float32, as libvips' integers
    would be some ten of 65535 off, and over a thousand where its two passes clip.
    """
    if (image.width, image.height) == (width, height):
        return image

    def resized(floats: pyvips.Image) -> pyvips.Image:
        return floats.resize(width / image.width, vscale=height / image.height, kernel=KERNEL, gap=0)

    if not image.hasalpha():
        return resized(image.cast("float")).rint().cast(image.format)
    most = 255 if image.format == "uchar" else 65535
    colours = image.bands - 1
    both = resized(image.premultiply(max_alpha=most).bandjoin(image.extract_band(0, n=colours)))
    weighted = both.extract_band(0, n=colours + 1).copy(interpretation=image.interpretation)
    opacity = weighted.extract_band(colours).rint()
    visible = weighted.unpremultiply(max_alpha=most).extract_band(0, n=colours)
    shown = (opacity > 0).ifthenelse(visible, both.extract_band(colours + 1, n=colours))
    return shown.bandjoin(opacity).rint().cast(image.format).copy(interpretation=image.interpretation)
