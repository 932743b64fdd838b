"""What tiling does to a picture: whole, exactly streamed and overlapped, side by side on a sample of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil

from sanrt.arrays import psnr
from sanrt.geometry import Box
from sanrt.runtime.backends.protocol import Backend
from sanrt.runtime.pictures.codec import Pixels, open_picture
from sanrt.runtime.pictures.storage import fetched
from sanrt.runtime.tiling.options import Tiling, UpscaleOptions
from sanrt.runtime.tiling.upscaling import upscale
from sanrt.runtime.video.container import frames, look, picture_of
from sanrt.runtime.video.formats import is_video

SAMPLE = 192
"""Longest side of the sample, which is the picture's middle."""

TILE = 64
"""Side of its tiles where none is asked for: small beside the sample, as tiles are beside a large picture."""

TICK = 0.005
"""Seconds between two looks at the memory."""


@dataclass(frozen=True)
class Explained:
    """One tiling of the sample, held against the whole."""

    tiling: Tiling
    largest: float
    """Difference, of 255."""
    psnr: float
    """dB; infinite where nothing differs."""
    seconds: float
    peak: int
    """Bytes of resident memory that came on top while it ran."""


def explain(backend: Backend, path: Path, options: UpscaleOptions) -> Iterator[Explained]:
    """Whole, exact and overlapped, each against the whole; the float results are compared, before any rounding."""
    pixels = sample(path)
    tile = min(options.tile or TILE, max(16, max(pixels.shape[:2]) // 2))
    picture = (pixels / np.iinfo(pixels.dtype).max).astype(np.float32)
    upscale(backend, picture, sampled(options, Tiling.EXACT, tile))  # sessions are opened before times are taken
    whole = None
    for tiling in Tiling.WHOLE, Tiling.EXACT, Tiling.OVERLAP:
        started, grown = time.perf_counter(), Peak()
        with grown.watched():
            result = upscale(backend, picture, sampled(options, tiling, tile))
        whole = result if whole is None else whole
        largest = 255 * float(abs(result - whole).max())
        yield Explained(tiling, largest, psnr(result, whole, peak=1), time.perf_counter() - started, grown.bytes)


def sampled(options: UpscaleOptions, tiling: Tiling, tile: int) -> UpscaleOptions:
    """The options of a run, with the tiling to be compared; the sample's tiles may be too small for its overlap."""
    overlap = None if options.overlap is None or tiling is not Tiling.OVERLAP else min(options.overlap, tile // 2)
    return replace(options, tiling=tiling, tile=None if tiling is Tiling.WHOLE else tile, overlap=overlap)


def sample(path: Path) -> Pixels:
    """The middle of a picture, or of a video's first frame, at most SAMPLE pixels a side."""
    if is_video(path):
        with fetched(path) as local:
            info = look(local)
            frame = picture_of(next(frames(info)).frame, info)[..., :3]
        box = Box(0, 0, *frame.shape[:2]).middle(SAMPLE)
        return frame[box.top : box.bottom, box.left : box.right]
    with fetched(path) as local, open_picture(local) as source:
        box = Box(0, 0, source.info.height, source.info.width).middle(SAMPLE)
        return source.rgb(box.top, box.height)[:, box.left : box.right]


@dataclass
class Peak:
    """The largest growth of this process' resident memory while it is watched."""

    bytes: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look every TICK, from a thread."""
        start = resident()

        def look() -> None:
            while not self.stop.wait(TICK):
                self.bytes = max(self.bytes, resident() - start)

        thread = threading.Thread(target=look, name="sanrt-memory")
        thread.start()
        try:
            yield
        finally:
            self.stop.set()
            thread.join()


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(psutil.Process().memory_info().rss)
