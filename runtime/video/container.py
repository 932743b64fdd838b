"""What is in a video file: its streams, size, colours and times; what sanrt cannot enlarge is refused in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from struct import unpack
from typing import TYPE_CHECKING, Any

import numpy as np

from sanrt.errors import PictureError, TooManyPixelsError, first_line, system_reason
from sanrt.extras import extra
from sanrt.runtime.pictures import animations
from sanrt.runtime.pictures.animations import UNTIMED, Animation, open_animation, ticks
from sanrt.runtime.pictures.formats import ANIMATED, Format
from sanrt.runtime.video.frames import (
    FULL,
    RGB,
    UNSPECIFIED,
    UNSPECIFIED_RANGE,
    ColourTags,
    Conversion,
    PixelFormat,
    Pixels,
    guessed_matrix,
    planes_of,
    require_matrix,
)
from sanrt.wording import option

if TYPE_CHECKING:
    import av

MAX_PIXELS = 1_000_000_000
PROGRESSIVE = (0, 1)
"""FFmpeg's field orders of streams that are not interlaced: unknown, progressive."""
WITH_OPACITY = ("bgra", "rgba", "argb", "abgr")
"""Samples of GIF and others, which are enlarged where all is opaque."""
INTERMEDIATE = ("prores", "dnxhd", "cfhd")
"""Lossy codecs of studios whose frames count as uncompressed."""
CENTRED_CODECS = ("mjpeg", "mpeg1video")
HDR_SIDE_DATA = {"DYNAMIC_HDR_PLUS": "HDR10+", "DOVI_METADATA": "Dolby Vision", "DYNAMIC_HDR_VIVID": "HDR Vivid"}
"""What changes from frame to frame and belongs to the source's pixels."""
DAMAGED = "copy it again, or keep the part that plays (ffmpeg -i IN -c copy OUT)"


@dataclass(frozen=True)
class MasteringDisplay:
    """Metadata of HDR10 (SMPTE ST 2086, CTA-861.3)."""

    primaries: tuple[Fraction, ...] = ()
    """x and y of red, green, blue and white."""
    luminance: tuple[Fraction, ...] = ()
    """Least and most, in candelas per square metre."""
    light_level: tuple[int, ...] = ()
    """Of the brightest pixel, and of the brightest frame on average."""


@dataclass(frozen=True)
class VideoInfo:
    """What the header and the first frame of a video say."""

    path: Path
    container: str
    """FFmpeg's name of the format."""
    stream: int
    """Index of the video stream that is enlarged."""
    codec: str
    lossless: bool
    """Whether its frames count as never compressed with loss."""
    width: int
    """Pixels, as they are stored: players turn them where there is a rotation."""
    height: int
    format: PixelFormat
    tags: ColourTags
    """As they stand in the stream; the range of grey that says none is full."""
    centred: bool
    rate: Fraction
    """Frames per second, on average."""
    time_base: Fraction
    """Seconds, in which the timestamps count."""
    frames: int
    """As the header says, or by duration and rate: an estimate."""
    frames_said: int = 0
    """As the header says; 0 where it does not, or counts frames that were dropped, as AVI's does."""
    aspect: Fraction | None = None
    """Width of a pixel by its height, where that is said."""
    display_matrix: tuple[int, ...] = ()
    """Nine numbers that say how players turn the frames, in FFmpeg's order; none where they do not."""
    mastering: MasteringDisplay = MasteringDisplay()
    animation: Animation | None = None
    """What a GIF or WebP says, which libvips reads; None for files that FFmpeg reads."""
    notes: tuple[str, ...] = ()
    """What is not taken over, one line each."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its frames in memory, as RGB: uint8, or uint16 over the whole 0..65535."""
        return self.format.dtype

    @property
    def conversion(self) -> Conversion:
        """From its samples to RGB."""
        matrix = self.tags.matrix
        known = guessed_matrix(self.width, self.height) if matrix in (RGB, UNSPECIFIED) else matrix
        return Conversion(self.format, known, self.tags.range == FULL, self.centred)


@dataclass(frozen=True)
class SourceFrame:
    """A decoded frame."""

    number: int
    pts: int
    """In the stream's time base."""
    duration: int
    """Likewise; 0 where it is not said."""
    frame: av.VideoFrame | Pixels = field(repr=False)
    """As FFmpeg has it, or an animation's: (H, W, 3), or (H, W, 4) with opacity."""
    damaged: bool = False
    """Whether the decoder says that it had to repair it; those of H.264 and of MPEG-1, -2 and -4 do."""


@cache
def ffmpeg() -> Any:
    """PyAV; MissingPackageError without it."""
    os.environ.setdefault("SVT_LOG", "0")  # the AV1 encoder's own words: what it refuses is told by sanrt
    with extra("video", "video"):
        import av
    return av


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """FFmpeg's errors as a PictureError of one line."""
    av = ffmpeg()
    try:
        yield
    except av.error.InvalidDataError as error:
        raise PictureError(f"{path}: damaged or no video ({reason(error)}); {DAMAGED}") from None
    except EOFError:
        raise PictureError(f"{path}: no frames in it; expected a video") from None
    except (av.FFmpegError, OSError) as error:
        raise PictureError(f"{path}: cannot be read ({reason(error)})") from None


def reason(error: BaseException) -> str:
    """What FFmpeg or the system said."""
    return getattr(error, "strerror", None) or first_line(error)


@contextmanager
def opened(path: Path) -> Iterator[av.container.InputContainer]:
    """A video file's streams and packets; PictureError where it is none.

    Read them within `reading`: errors of the body pass as they are, as it may be about other files as well.
    """
    if not path.is_file():
        what = "not a regular file; expected a video" if path.exists() else "cannot be read (No such file or directory)"
        raise PictureError(f"{path}: {what}")
    with reading(path):
        container = ffmpeg().open(os.fspath(path), metadata_errors="replace")
    with container:
        if container.format.name.endswith("_pipe"):  # FFmpeg's readers of single pictures
            raise PictureError(
                f"{path}: a {container.format.name.removesuffix('_pipe').upper()} picture by its content; name it so"
            )
        yield container


def video_stream(container: av.container.InputContainer, path: Path) -> av.video.stream.VideoStream:
    """The one to enlarge: not a cover picture; PictureError without any."""
    av = ffmpeg()
    found = [stream for stream in container.streams.video if not stream.disposition & av.stream.Disposition.attached_pic]
    if not found:
        held = ", ".join(sorted({stream.type for stream in container.streams})) or "an empty container"
        raise PictureError(f"{path}: no video stream in it, only {held}; expected a video")
    best = container.streams.best("video")
    stream = best if best in found else found[0]
    if stream.codec_context is None:
        raise PictureError(f"{path}: its video codec is unknown to FFmpeg {av.ffmpeg_version_info}; convert it first")
    return stream


def look(path: Path) -> VideoInfo:
    """What is in a video or animation; PictureError for what cannot be enlarged: damaged, truncated, empty, interlaced."""
    require_complete(path)
    if is_animation(path):
        return described_animation(open_animation(path))
    with opened(path) as container, reading(path):
        stream = video_stream(container, path)
        stream.thread_type = "NONE"  # a frame alone
        first = next(decoded(container, stream, path), None)
        if first is None:
            raise PictureError(f"{path}: no frames in its video stream; expected at least one")
        return described(path, container, stream, first)


def is_animation(path: Path) -> bool:
    """Whether a file is a GIF or WebP by its first bytes."""
    with path.open("rb") as file:
        return Format.of_content(file.read(256)) in ANIMATED


def described_animation(animation: Animation) -> VideoInfo:
    """The facts of an animation as those of a video: RGB of 8 bits, in the unit of time of its format."""
    info, count = animation.info, len(animation.delays)
    milliseconds = sum(map(shown, animation.delays))
    return VideoInfo(
        info.path,
        container=info.format,
        stream=0,
        codec=info.format,
        lossless=True,
        width=info.width,
        height=info.height,
        format=PixelFormat(8, (1, 1), rgb=True),
        tags=ColourTags(),
        centred=False,
        rate=Fraction(1000 * count, milliseconds),
        time_base=Fraction(1, ticks(info.format)),
        frames=count,
        frames_said=count,
        animation=animation,
        notes=info.notes,
    )


def described(
    path: Path, container: av.container.InputContainer, stream: av.video.stream.VideoStream, first: av.VideoFrame
) -> VideoInfo:
    """The facts of an opened video and its first frame."""
    context = stream.codec_context
    if first.interlaced_frame or context.field_order not in PROGRESSIVE:
        raise PictureError(f"{path}: interlaced; deinterlace it first (ffmpeg -i IN -vf bwdif -c:a copy OUT)")
    if first.width * first.height > MAX_PIXELS:
        raise TooManyPixelsError(f"{path}: claims {first.width} x {first.height} pixels a frame")
    form = PixelFormat(8, (1, 1), rgb=True) if first.format.name in WITH_OPACITY else PixelFormat.of(first.format)
    if form is None:
        raise PictureError(
            f"{path}: samples are {first.format.name}: transparency, or a kind that sanrt does not enlarge in videos; "
            "convert it first (ffmpeg -i IN -pix_fmt yuv444p OUT)"
        )
    tags = ColourTags(int(first.colorspace), int(first.color_range), int(first.color_primaries), int(first.color_trc))
    if first.format.name.startswith("yuvj") or (form.chroma is None and tags.range == UNSPECIFIED_RANGE):
        tags = ColourTags(tags.matrix, FULL, tags.primaries, tags.transfer)
    require_matrix(str(path), tags.matrix)
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate or Fraction(25)
    time_base = stream.time_base or 1 / rate
    duration = stream.duration * time_base if stream.duration else Fraction(container.duration or 0, 1_000_000)
    codec = context.codec.canonical_name
    return VideoInfo(
        path,
        container.format.name,
        stream.index,
        codec,
        bool(context.codec.lossless and not context.codec.lossy) or codec in INTERMEDIATE,
        first.width,
        first.height,
        form,
        tags,
        codec in CENTRED_CODECS,
        Fraction(rate),
        time_base,
        stream.frames or max(1, round(duration * rate)),
        0 if container.format.name == "avi" else stream.frames,
        stream.sample_aspect_ratio or None,
        display_matrix(first),
        mastering_display(first),
        notes=tuple(notes(container, stream, first)),
    )


def notes(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, first: av.VideoFrame
) -> Iterator[str]:
    """What of a source is not enlarged or not taken over."""
    others = [other for other in container.streams.video if other is not stream and not other.disposition & 0x400]
    if others:
        yield f"{len(others)} more video stream{'s' * (len(others) > 1)}: copied as they are"
    present = side_data(first)
    if lost := [title for name, title in HDR_SIDE_DATA.items() if name in present]:
        yield f"left out: {', '.join(lost)}, which is about each frame of the source"
    if "A53_CC" in present:
        yield "left out: closed captions within the picture data"


def side_data(frame: Any) -> Mapping[str, bytes]:
    """What FFmpeg tells of a frame beside its samples, as it lies in memory, by its own names."""
    return {data.type.name: bytes(data) for data in frame.side_data}


def display_matrix(first: av.VideoFrame) -> tuple[int, ...]:
    """How players turn a frame."""
    matrix = side_data(first).get("DISPLAYMATRIX", b"")
    return unpack("=9i", matrix[:36]) if len(matrix) >= 36 else ()


def mastering_display(first: av.VideoFrame) -> MasteringDisplay:
    """The HDR10 metadata of a frame: libavutil's structures, as they lie in memory."""
    found = side_data(first)
    primaries: tuple[Fraction, ...] = ()
    luminance: tuple[Fraction, ...] = ()
    light: tuple[int, ...] = ()
    if len(display := found.get("MASTERING_DISPLAY_METADATA", b"")) >= 88:
        *numbers, has_primaries, has_luminance = unpack("=22i", display[:88])
        ratios = [Fraction(top, bottom or 1) for top, bottom in zip(numbers[::2], numbers[1::2], strict=True)]
        primaries = tuple(ratios[:8]) if has_primaries else ()
        luminance = tuple(ratios[8:]) if has_luminance else ()
    if len(level := found.get("CONTENT_LIGHT_LEVEL", b"")) >= 8:
        light = unpack("=2I", level[:8])
    return MasteringDisplay(primaries, luminance, light)


def frames(info: VideoInfo) -> Iterator[SourceFrame]:
    """Every frame in the order of its display, with times that always grow.

    PictureError where the file is damaged, ends early, or changes its size on the way.
    """
    if info.animation:
        yield from animation_frames(info.animation)
        return
    with opened(info.path) as container, reading(info.path):
        stream = next(stream for stream in container.streams.video if stream.index == info.stream)
        stream.thread_type = "AUTO"
        number, last = 0, None
        for frame in decoded(container, stream, info.path, info.frames_said):
            if (frame.width, frame.height) != (info.width, info.height):
                raise PictureError(
                    f"{info.path}: frame {number} is {frame.width} x {frame.height}, the first one {info.width} x "
                    f"{info.height}; expected one size, cut the file where it changes"
                )
            pts = frame.pts if frame.pts is not None else frame.dts
            if pts is None:
                pts = last + max(1, round(1 / (info.rate * info.time_base))) if last is not None else 0
            pts = pts if last is None else max(pts, last + 1)
            yield SourceFrame(number, pts, frame.duration or 0, frame, frame.is_corrupt)
            number, last = number + 1, pts


def animation_frames(animation: Animation) -> Iterator[SourceFrame]:
    """The same of an animation; the duration of a frame that says none is 0, and it is shown as long as players do."""
    unit, pts = 1000 // ticks(animation.info.format), 0
    for number, (delay, frame) in enumerate(zip(animation.delays, animations.frames(animation), strict=True)):
        yield SourceFrame(number, pts, delay // unit, frame)
        pts += shown(delay) // unit


def shown(delay: int) -> int:
    """For how many milliseconds players show a frame that says `delay`; they take 10 or less for a mistake."""
    return delay if delay > 10 else UNTIMED


def decoded(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, path: Path, said: int = 0
) -> Iterator[av.VideoFrame]:
    """The frames of a stream that should have so many packets, also one that was cut in front of its first keyframe.

    PictureError where it ends early; what else is damaged raises FFmpeg's error.
    """
    number, began = 0, False
    for packet in container.demux(stream):
        number += bool(packet.size)
        try:
            found = packet.decode()
        except ffmpeg().error.InvalidDataError:
            if began:
                raise
            continue
        for frame in found:
            began = True
            yield frame
    if number < said:
        raise PictureError(f"{path}: ends after {number} of {said} frames; {DAMAGED}")


def require_opaque(info: VideoInfo, background: tuple[int, int, int] | None) -> None:
    """Raise PictureError for a transparent animation that becomes a video and is laid onto no colour."""
    if info.animation and info.animation.info.alpha and background is None:
        raise PictureError(
            f"{info.path}: transparent frames, which videos do not hold; lay them onto a colour with "
            f"{option('flatten', 'white')}, or name a .webp or .gif"
        )


def picture_of(frame: av.VideoFrame | Pixels, info: VideoInfo) -> Pixels:
    """A frame as RGB (H, W, 3), uint8 or uint16, with opacity as a fourth channel where an animation has any."""
    if isinstance(frame, np.ndarray):
        return frame
    if frame.format.name in WITH_OPACITY and frame.reformat(format="rgba").to_ndarray()[..., 3].min() < 255:
        raise PictureError(f"{info.path}: transparent frames; lay them onto a colour first")
    return info.conversion.to_rgb(planes_of(frame, info.format))


def require_complete(path: Path) -> None:
    """Raise PictureError for a file whose own structure says that its end is missing: ISO media, Matroska, AVI."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
            if not head:
                raise PictureError(f"{path}: empty file; expected a video")
            end = 0
            if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
                end = end_of_boxes(file, size)
            elif head.startswith(b"\x1aE\xdf\xa3"):
                end = end_of_segment(file)
            elif head[:4] == b"RIFF":
                end = 8 + int.from_bytes(head[4:8], "little")
    except OSError as error:
        raise PictureError(f"{path}: cannot be read ({system_reason(error)})") from None
    if end > size:
        raise PictureError(f"{path}: truncated, {size} bytes of {end}; {DAMAGED}")


def end_of_boxes(file: Any, size: int) -> int:
    """Where the last box of an ISO media file ends, by its own length."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        header = file.read(16)
        length = int.from_bytes(header[:4], "big")
        length = int.from_bytes(header[8:16], "big") if length == 1 else length or size - at
        if length < 8:
            break  # padding, or what FFmpeg is to complain of
        at += length
    return at


def end_of_segment(file: Any) -> int:
    """Where the segment of a Matroska file ends, by its own length; 0 where that is unknown, as in live recordings."""
    at = 0
    for name in (b"\x1aE\xdf\xa3", b"\x18S\x80g"):
        file.seek(at)
        head = file.read(12)
        if not head.startswith(name) or len(head) < 12:
            return 0
        octets = 9 - head[4].bit_length()
        length = int.from_bytes(head[4 : 4 + octets], "big") & ((1 << (7 * octets)) - 1)
        if octets > 8 or length == (1 << (7 * octets)) - 1:
            return 0
        at += 4 + octets + length
    return at
