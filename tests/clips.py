"""Clips that the tests make with PyAV: a few small frames, with all that a video file can hold beside them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av")

SIZE = (32, 24)
"""Width and height."""
SUBTITLES = "1\n00:00:00,100 --> 00:00:00,400\nhello\n\n"


def picture(number: int, size=SIZE, bits: int = 8) -> np.ndarray:
    """Noise over a slope, (H, W, 3), as uint8 or uint16."""
    width, height = size
    noise = np.random.default_rng(number).integers(0, 120, (height, width, 3))
    slope = np.linspace(20, 120, width)[None, :, None]
    values = noise + slope + 10 * np.arange(3)
    return values.astype(np.uint8) if bits == 8 else (values * 257).astype(np.uint16)


def clip(
    path: Path,
    pictures=range(12),
    *,
    codec="libx264",
    stored="yuv420p",
    options=None,
    rate=Fraction(25),
    times=None,
    time_base=None,
    tags=(2, 0, 2, 2),
    size=SIZE,
    matrix=None,
    metadata=None,
    chapters=False,
    sound=None,
    subtitles=None,
    attachment=False,
    aspect=None,
) -> Path:
    """A video of `picture(number)` for each of `pictures`, shown at `times` (in `time_base`) or at a constant rate.

    tags: matrix, range, primaries and transfer. matrix: nine numbers of a display matrix. sound, subtitles: their codecs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    time_base = time_base or 1 / rate
    own_keys = {"movflags": "use_metadata_tags"} if metadata and path.suffix == ".mp4" else {}
    with av.open(str(path), "w", container_options=own_keys) as out:
        out.metadata.update(metadata or {})
        if chapters:
            one = {"id": 1, "start": 0, "end": 200, "time_base": Fraction(1, 1000), "metadata": {"title": "first"}}
            out.set_chapters([one, one | {"id": 2, "start": 200, "end": 400, "metadata": {"title": "second"}}])
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, stored
        context = stream.codec_context
        context.time_base = time_base
        context.colorspace, context.color_range, context.color_primaries, context.color_trc = tags
        if aspect:
            context.sample_aspect_ratio = aspect
        if matrix:
            stream.set_display_matrix(matrix)
        stream.metadata["language"] = "deu"
        audio = add_sound(out, sound) if sound else None
        words = out.add_stream_from_template(srt(path).streams[0]) if subtitles else None
        if attachment:
            out.add_attachment("font.ttf", "font/ttf", b"not a font at all")
        bits = 16 if "le" in stored else 8
        for place, number in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture(number, size, bits), format="rgb24" if bits == 8 else "rgb48le")
            frame.colorspace, frame.color_range = (6 if tags[0] in (0, 2) else tags[0]), tags[1] or 1
            frame = frame.reformat(format=stored)
            frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc = tags
            frame.pts, frame.time_base = (place if times is None else times[place]), time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if audio:
            tone = (3000 * np.sin(np.arange(19200) / 9)).astype(np.int16).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
            out.mux(audio.encode(frame))
            out.mux(audio.encode(None))
        if words:
            for packet in srt(path).demux():
                if packet.dts is not None:
                    packet.stream = words
                    out.mux(packet)
    return path


def add_sound(out, codec):
    """A stream of 48 kHz, mono."""
    audio = out.add_stream(codec, rate=48000)
    audio.layout = "mono"
    audio.metadata["language"] = "fra"
    return audio


def srt(path: Path):
    """Subtitles, opened."""
    text = path.with_suffix(".srt")
    text.write_text(SUBTITLES)
    return av.open(str(text))


def times(path: Path) -> list[Fraction]:
    """When each frame is shown, in seconds, as the packets say."""
    with av.open(str(path)) as file:
        stream = next(each for each in file.streams.video if not each.disposition & 0x400)
        return sorted(packet.pts * packet.time_base for packet in file.demux(stream) if packet.pts is not None)


def frames(path: Path) -> list[list[np.ndarray]]:
    """The planes of every frame as they are stored."""
    with av.open(str(path)) as file:
        found = []
        for frame in file.decode(video=0):
            dtype = np.uint16 if "le" in frame.format.name else np.uint8
            of_pixel = 4 if frame.format.name == "bgr0" else 1
            planes = [
                np.frombuffer(plane, dtype).reshape(plane.height, -1)[:, : plane.width * of_pixel] for plane in frame.planes
            ]
            found.append([plane.copy() for plane in planes])
        return found


def tags(path: Path) -> tuple[int, ...]:
    """Matrix, range, primaries and transfer of the first frame."""
    with av.open(str(path)) as file:
        frame = next(file.decode(video=0))
        return tuple(int(x) for x in (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc))
