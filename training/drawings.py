"""Drawn pictures, free for any use, for the hard edges that photographs have few of: letters, shapes, cells, stripes."""

from __future__ import annotations

import string

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from training.data import Picture

OVERSAMPLING = 3
"""Drawn so many times larger, then averaged, so that edges lie anywhere between pixels."""

ALPHABET = string.ascii_letters + string.digits + ".,:;-+/()&%"

Field = npt.NDArray[np.float32]
"""(S, S), a number for every pixel."""


def drawing(side: int, random: np.random.Generator) -> Picture:
    """A square picture, uint8 (side, side, 3): cells, stripes or a smooth ground, with shapes, lines or letters on it."""
    large = side * OVERSAMPLING
    ground = (cells, stripes, smooth)[random.integers(3)]
    canvas = Image.fromarray(np.clip(ground(large, random), 0, 255).astype(np.uint8))
    for number in random.permutation(3)[: random.integers(ground is smooth, 3)]:
        (shapes, lines, letters)[number](ImageDraw.Draw(canvas), large, random)
    return np.asarray(canvas.reduce(OVERSAMPLING))


def colour(random: np.random.Generator) -> tuple[int, ...]:
    """A random one; every third time black or white."""
    if random.random() < 0.33:
        return (int(random.integers(0, 30)),) * 3 if random.random() < 0.5 else (int(random.integers(225, 256)),) * 3
    return tuple(int(level) for level in random.integers(0, 256, 3))


def waves(side: int, random: np.random.Generator, count: int = 5) -> Field:
    """A smooth field of about -1..1: a sum of waves that are some tenths of the picture long."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / np.float32(side)
    total = np.zeros((side, side), np.float32)
    for down, across, start in random.normal(0, (9, 9, 99), (count, 3)).astype(np.float32):
        total += np.sin(down * y + across * x + start)
    return total / np.float32(count**0.5)


def smooth(side: int, random: np.random.Generator) -> Field:
    """One colour, or two that flow into each other."""
    share = np.clip(0.5 + random.choice([0, 0.5]) * waves(side, random), 0, 1)[..., None]
    return np.asarray(share * colour(random) + (1 - share) * colour(random))


def stripes(side: int, random: np.random.Generator) -> Field:
    """Bent stripes of two grounds, their edges hard, 8 to 80 pixels from one to the next."""
    period = OVERSAMPLING * 8 * 10 ** random.random()
    y, x = np.mgrid[0:side, 0:side]
    angle = random.uniform(0, np.pi)
    phase = (x * np.cos(angle) + y * np.sin(angle)) / period + random.uniform(0, 0.1) * side / period * waves(
        side, random, 3
    )
    return np.where((phase % 1 < random.uniform(0.2, 0.8))[..., None], smooth(side, random), smooth(side, random))


def cells(side: int, random: np.random.Generator) -> Field:
    """A Voronoi pattern with borders, bent: like the wings of insects, leaded glass, leaves."""
    count = int(random.integers(20, 150))
    places = random.random((count, 2)) * side
    bend = np.float32(side * random.uniform(0, 0.04))
    y, x = (axis.astype(np.float32) + bend * waves(side, random) for axis in np.mgrid[0:side, 0:side])
    nearest = second = np.full((side, side), np.inf, np.float32)
    owner = np.zeros((side, side), np.int16)
    for number, (top, left) in enumerate(places.astype(np.float32)):
        distance = (y - top) ** 2 + (x - left) ** 2
        owner[distance < nearest] = number
        nearest, second = np.minimum(distance, nearest), np.minimum(np.maximum(distance, nearest), second)
    colours = np.array([colour(random) for _ in range(count)], np.float32)
    inside = colours[owner] + random.uniform(0, 60) * waves(side, random)[..., None]
    border = OVERSAMPLING * random.uniform(0.5, 8) * (1 + 0.5 * waves(side, random))
    return np.where((np.sqrt(second) - np.sqrt(nearest) < border)[..., None], colour(random), inside)


def shapes(draw: ImageDraw.ImageDraw, side: int, random: np.random.Generator) -> None:
    """Polygons and ellipses, some with an outline."""
    for _ in range(random.integers(3, 20)):
        middle, reach = random.random(2) * side, side * random.uniform(0.02, 0.3)
        outline, width = (colour(random), int(random.integers(1, 8 * OVERSAMPLING))) if random.random() < 0.5 else (None, 0)
        if random.random() < 0.4:
            box = sorted(middle[0] + random.uniform(-1, 1, 2) * reach), sorted(middle[1] + random.uniform(-1, 1, 2) * reach)
            draw.ellipse([box[0][0], box[1][0], box[0][1], box[1][1]], colour(random), outline, width)
        else:
            corners = middle + random.uniform(-1, 1, (int(random.integers(3, 7)), 2)) * reach
            draw.polygon([tuple(corner) for corner in corners], colour(random), outline, width)


def lines(draw: ImageDraw.ImageDraw, side: int, random: np.random.Generator) -> None:
    """Straight lines, broken ones and arcs, from half a pixel wide."""
    for _ in range(random.integers(5, 40)):
        width = int(random.integers(2, 5 * OVERSAMPLING))
        points = random.random((int(random.integers(2, 5)), 2)) * side
        if random.random() < 0.3:
            low, high = points.min(0), points.max(0) + 1
            start = random.uniform(0, 360)
            draw.arc([*low, *high], start, start + random.uniform(30, 300), colour(random), width)
        else:
            draw.line([tuple(point) for point in points], colour(random), width, joint="curve")


def letters(draw: ImageDraw.ImageDraw, side: int, random: np.random.Generator) -> None:
    """Lines of words of random letters, 8 to 60 pixels high, each line of one size and colour."""
    top = random.uniform(0, 0.2) * side
    while top < side:
        size = OVERSAMPLING * 8 * 7.5 ** random.random()
        words = ["".join(random.choice(list(ALPHABET), random.integers(1, 10))) for _ in range(12)]
        bold = int(random.integers(0, 1 + max(1, int(size / 16))))
        place = (random.uniform(-0.1, 0.4) * side, top)
        draw.text(place, " ".join(words), colour(random), ImageFont.load_default(size), stroke_width=bold)
        top += size * random.uniform(1.1, 3)
