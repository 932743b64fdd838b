"""How the result of a video is encoded: settled from its header, before a frame is enlarged; and frames as packets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from sanrt.errors import PictureError
from sanrt.runtime.video.container import MasteringDisplay, VideoInfo, ffmpeg, reason
from sanrt.runtime.video.formats import ENCODERS, Codec, Container, Encoder, VideoEncoding, encoder_named, require_known
from sanrt.runtime.video.frames import (
    FULL,
    LIMITED,
    RGB,
    UNSPECIFIED,
    ColourTags,
    Conversion,
    PixelFormat,
    Pixels,
    frame_of,
    guessed_matrix,
)
from sanrt.wording import option

if TYPE_CHECKING:
    import av

SUBSAMPLED: tuple[tuple[int, int] | None, ...] = (None, (1, 1), (2, 1), (2, 2))
"""From the finest chroma to the coarsest; grey has none."""
SMALL = 640 * 360
"""Pixels of a frame below which x264 is not to be trusted with all that it does."""
TICK = Fraction(1, 1000)
"""Matroska's unit of time: in the files of segments a frame's time is its number."""
MOST_RATE = Fraction(240)
"""Frames per second that SVT-AV1 takes; times do not depend on it."""
MOST_DELAY = 64
"""More frames than any encoder keeps back."""


@dataclass(frozen=True)
class VideoOutput:
    """How one result will be written."""

    path: Path
    container: Container
    encoder: Encoder
    options: tuple[tuple[str, str], ...]
    """Of the encoder, in FFmpeg's words."""
    width: int
    height: int
    format: PixelFormat
    stored: str
    """FFmpeg's name of the samples as the encoder takes them."""
    tags: ColourTags
    """As they are written."""
    matrix: int
    """That the samples are made by."""
    centred: bool
    rate: Fraction
    aspect: Fraction | None
    notes: tuple[str, ...] = ()

    @property
    def conversion(self) -> Conversion:
        """From RGB to its samples."""
        return Conversion(self.format, self.matrix, self.tags.range == FULL, self.centred)


def plan_video(info: VideoInfo, path: Path, size: tuple[int, int], asked: VideoEncoding) -> VideoOutput:
    """How the result of a video, of this width and height, is written to `path`.

    PictureError for what the container or the encoder cannot hold, UsageError as `require_known` does.
    """
    container, named = require_named(path, asked)
    encoder = named or suitable(info, container)
    require_known(encoder, asked.crf, asked.preset)
    require_held(path, container, encoder)
    form, stored, notes = sample_format(info, encoder, container, path)
    require_divisible(path, size, form, encoder)
    tags, matrix, tag_notes = colours(info, size, form)
    told = codec_notes(info, container, encoder, form.bits, named is None)
    output = VideoOutput(
        path,
        container,
        encoder,
        tuple(sorted(options(encoder, asked, form, info.mastering, size).items())),
        *size,
        form,
        stored,
        tags,
        matrix,
        info.centred and form.chroma == info.format.chroma,
        min(info.rate, MOST_RATE) if encoder.codec is Codec.AV1 else info.rate,
        info.aspect,
        (*info.notes, *told, *notes, *tag_notes, *unsaid_mastering(encoder, info)),
    )
    require_opened(output)
    return output


def require_named(path: Path, asked: VideoEncoding) -> tuple[Container, Encoder | None]:
    """The container of a result and the encoder that was asked for, by names; PictureError where they do not fit."""
    container = Container.of_suffix(path)
    if container is None:
        raise PictureError(
            f"{path}: cannot be written as a video; expected a name ending in "
            + ", ".join(suffix for each in Container for suffix in each.suffixes)
        )
    encoder = encoder_named(asked.codec) if asked.codec else None
    if encoder:
        require_held(path, container, encoder)
    return container, encoder


def codec_notes(info: VideoInfo, container: Container, encoder: Encoder, bits: int, chosen: bool) -> Iterator[str]:
    """Notes on a codec that is not the source's, where sanrt chose it, and on one that few players take."""
    if chosen and not info.animation and info.codec != encoder.codec:
        who = f"{container.named} holds" if info.codec in list(Codec) else "sanrt writes"
        yield f"{info.codec} becomes {encoder.codec}: {who} no {info.codec}"
    if encoder.codec is Codec.H264 and bits > 8 and not container.is_matroska:
        yield f"H.264 of {bits} bits (High 10), which few devices play; take {option('codec', 'hevc')} for these"


def suitable(info: VideoInfo, container: Container) -> Encoder:
    """The encoder where none is asked for: of the source's codec, else AV1 in WebM, H.264 for 8 bits, HEVC for more."""
    own = next((codec for codec in Codec if codec == info.codec), None)
    if own and holds(container, ENCODERS[own]):
        return ENCODERS[own]
    if container is Container.WEBM:
        return ENCODERS[Codec.AV1]
    return ENCODERS[Codec.H264 if info.format.bits == 8 else Codec.HEVC]


def holds(container: Container, encoder: Encoder) -> bool:
    """Whether a container takes what an encoder makes."""
    match encoder.codec:
        case Codec.AV1:
            return container is not Container.MOV
        case Codec.FFV1:
            return container is Container.MKV
        case Codec.PRORES:
            return container in (Container.MOV, Container.MKV)
        case _:
            return container is not Container.WEBM


def require_held(path: Path, container: Container, encoder: Encoder) -> None:
    """Raise PictureError where the container does not take the codec, or FFmpeg has no such encoder."""
    if not holds(container, encoder):
        fitting = [other for other in Container if holds(other, encoder)]
        endings = " or ".join(other.suffixes[0] for other in fitting)
        raise PictureError(
            f"{path}: {container.named} holds no {encoder.codec}; choose a name ending in {endings}, or another codec"
        )
    try:
        ffmpeg().Codec(encoder.name, "w")
    except ValueError:
        raise PictureError(f"{path}: PyAV has no encoder {encoder.name} here; choose {', '.join(Codec)}") from None


def sample_format(info: VideoInfo, encoder: Encoder, container: Container, path: Path) -> tuple[PixelFormat, str, list[str]]:
    """The encoder's format nearest to the source's samples, FFmpeg's name of it, and what it loses, for people.

    PictureError where the encoder has too few bits.
    """
    source, notes = info.format, []
    if source.rgb and encoder.codec in (Codec.H264, Codec.HEVC) and container is not Container.MKV:
        source = replace(source, rgb=False, chroma=(2, 2))
        notes = [f"RGB becomes 4:2:0, which is all that most players show of {encoder.codec}; a .mkv holds it finer"]
    said = ffmpeg().Codec(encoder.name, "w").video_formats
    taken = {each.name for each in said} if said else {"yuv420p"}  # what a device takes it says when it is opened
    candidates = [
        (form, stored)
        for bits in range(source.bits, 17)
        for form in by_likeness(replace(source, bits=bits))
        if (stored := stored_as(form, taken))
    ]
    if not candidates:
        raise PictureError(
            f"{path}: {encoder.name} takes no {source.bits}-bit samples; "
            f"choose {option('codec', 'hevc')} (up to 12 bits) or ffv1 (up to 16)"
        )
    form, stored = candidates[0]
    finest, found = SUBSAMPLED.index(near(source.chroma)), SUBSAMPLED.index(form.chroma)
    lost = (source.rgb and not form.rgb and found > 1) or (found > finest and source.chroma is not None)
    notes += [f"{source.subsampling} becomes {form.subsampling}: {encoder.name} takes no finer colours"] * lost
    return form, stored, notes


def by_likeness(source: PixelFormat) -> Iterator[PixelFormat]:
    """Formats of a depth that hold another's samples, the likest first, then those that hold less of the colours."""
    yield source
    plain = replace(source, rgb=False)
    nearest = near(source.chroma)
    at = SUBSAMPLED.index(nearest)
    finer, coarser = SUBSAMPLED[1:at][::-1], SUBSAMPLED[at + 1 :]
    for chroma in (nearest, *finer, *coarser) if nearest else (None, (2, 2), (2, 1), (1, 1)):
        yield replace(plain, chroma=chroma)


def near(chroma: tuple[int, int] | None) -> tuple[int, int] | None:
    """The usual subsampling that holds one: 4:1:1 and the like are held by 4:4:4 alone."""
    return chroma if chroma in SUBSAMPLED else (1, 1)


def stored_as(form: PixelFormat, taken: set[str]) -> str:
    """FFmpeg's name of the samples that an encoder takes for a format; empty if it takes none."""
    packed = {("gbrp", 8): "bgr0"}.get((form.name, form.bits), "")
    semi = {"yuv420p": "nv12", "yuv420p10le": "p010le"}.get(form.name, "")
    return next((name for name in (form.name, packed, semi) if name in taken), "")


def require_divisible(path: Path, size: tuple[int, int], form: PixelFormat, encoder: Encoder) -> None:
    """Raise PictureError for sides that the encoder's chroma does not divide."""
    across, down = form.chroma or (1, 1)
    if encoder.codec is Codec.AV1:
        across = down = 2
    if encoder.codec is not Codec.FFV1 and (size[0] % across or size[1] % down):
        raise PictureError(
            f"{path}: {size[0]} x {size[1]} has an odd side, which {encoder.codec} with {form.subsampling} cannot hold; "
            f"take {option('scale')} 2 or 4, or {option('codec', 'ffv1')} in a .mkv"
        )


def colours(info: VideoInfo, size: tuple[int, int], form: PixelFormat) -> tuple[ColourTags, int, list[str]]:
    """The tags of the result, the matrix of its samples, and a note where a tag is added.

    Where the source does not say its matrix, players go by its size, which the result exceeds: it says what they would take.
    """
    tags = info.tags
    if form.rgb:
        return replace(tags, matrix=RGB), tags.matrix, []
    if info.format.rgb or (info.format.chroma is None and form.chroma):
        matrix = guessed_matrix(*size) if tags.matrix in (RGB, UNSPECIFIED) else tags.matrix
        return replace(tags, matrix=matrix, range=LIMITED), matrix, []
    if tags.matrix != UNSPECIFIED or form.chroma is None:
        return tags, info.conversion.matrix, []
    matrix = guessed_matrix(info.width, info.height)
    if matrix == guessed_matrix(*size):
        return tags, matrix, []
    note = "its colour matrix is not said in the source; the result says BT.601, which players take for that size"
    return replace(tags, matrix=matrix), matrix, [note]


def require_opened(output: VideoOutput) -> None:
    """Raise PictureError where the encoder does not begin: sides beyond its limits, a device that is not here."""
    av, encoder = ffmpeg(), output.encoder
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as said, av.open(BytesIO(), "w", format="matroska") as container:
            open_stream(container, output).codec_context.open()
    except av.FFmpegError as error:
        lines = [text.strip() for _, _, text in said]
        why = f"({lines[0] if lines else reason(error)})"
        if encoder.device:
            raise PictureError(
                f"{output.path}: {encoder.name} does not begin here {why}, it needs {encoder.device}; take "
                f"{option('codec', encoder.codec)}, which runs anywhere"
            ) from None
        raise PictureError(
            f"{output.path}: {encoder.name} takes no {output.width} x {output.height} {output.stored} {why}; take another "
            f"{option('codec', Codec.FFV1)} or {option('scale')}"
        ) from None
    finally:
        av.logging.set_level(level)


def options(
    encoder: Encoder, asked: VideoEncoding, form: PixelFormat, mastering: MasteringDisplay, size: tuple[int, int]
) -> dict[str, str]:
    """What the encoder is told, in FFmpeg's words."""
    found = dict(encoder.options)
    crf, preset = asked.crf if asked.crf is not None else encoder.crf, asked.preset or encoder.preset
    if crf is not None:
        found[encoder.crf_option] = str(crf)
    if preset is not None:
        found["preset"] = preset
    if encoder.codec is Codec.PRORES:
        found["profile"] = "4444" if form.chroma == (1, 1) else "hq"
    if name := PARAMETERS.get(encoder.name):
        told = [found[name]] if name in found else []
        told += [f"{key}={value}" for key, value in mastering_parameters(encoder.name, mastering).items()]
        # x264's tree of macroblocks has other bytes now and then where rows are short, and a run must have those of another
        told += ["mbtree=0"] * (encoder.name == "libx264" and size[0] * size[1] < SMALL)
        found |= {name: ":".join(told)} if told else {}
    return found


PARAMETERS = {"libx264": "x264-params", "libx265": "x265-params", "libsvtav1": "svtav1-params"}
"""The option by which an encoder takes options of its own."""


def mastering_parameters(encoder: str, mastering: MasteringDisplay) -> dict[str, str]:
    """HDR10 metadata in an encoder's own words."""
    found = {}
    if mastering.primaries and mastering.luminance:
        (rx, ry, gx, gy, bx, by, wx, wy), (low, high) = mastering.primaries, mastering.luminance
        if encoder == "libsvtav1":
            text = (
                f"G({float(gx)},{float(gy)})B({float(bx)},{float(by)})R({float(rx)},{float(ry)})WP({float(wx)},{float(wy)})"
            )
            found["mastering-display"] = f"{text}L({float(high)},{float(low)})"
        else:
            r, g, b, w = ((round(x * 50000), round(y * 50000)) for x, y in ((rx, ry), (gx, gy), (bx, by), (wx, wy)))
            text = f"G({g[0]},{g[1]})B({b[0]},{b[1]})R({r[0]},{r[1]})WP({w[0]},{w[1]})"
            name = "mastering-display" if encoder == "libx264" else "master-display"
            found[name] = f"{text}L({round(high * 10000)},{round(low * 10000)})"
    if mastering.light_level:
        most, average = mastering.light_level
        found[{"libx264": "cll", "libx265": "max-cll"}.get(encoder, "content-light")] = f"{most},{average}"
    return found


def unsaid_mastering(encoder: Encoder, info: VideoInfo) -> Iterator[str]:
    """A note where the encoder cannot say what the source says of its mastering display."""
    if info.mastering != MasteringDisplay() and encoder.name not in PARAMETERS:
        yield f"left out: HDR10 mastering metadata, which {encoder.name} does not take"


class SegmentEncoder:
    """Pictures as a Matroska file that begins with a keyframe and refers to no other; a frame's time is its number.

    Open it first, and close it in the end. PictureError where the encoder refuses.
    """

    def __init__(self, output: VideoOutput) -> None:
        self.output = output
        self.order: list[int] = []
        """Numbers of the frames in the order of decoding, so far."""
        self.number = 0
        self.last: tuple[Pixels | None, list[Pixels]] = None, []
        """The picture that was added last, and its planes."""

    def open(self, file: IO[bytes]) -> None:
        """Begin; the file is open for writing, and stays so."""
        options = {"fflags": "+bitexact", "avoid_negative_ts": "disabled"}
        self.container = ffmpeg().open(file, "w", format="matroska", container_options=options)
        self.stream = open_stream(self.container, self.output)

    def close(self) -> None:
        """Give up what the encoder holds; a file that was not finished is of no use."""
        self.container.close()

    def add(self, picture: Pixels) -> None:
        """The next frame; the same object as before is not converted again."""
        output, (last, planes) = self.output, self.last
        if picture is not last:
            planes = output.conversion.from_picture(picture)
        self.last = picture, planes
        frame = frame_of(planes, output.format, output.tags)
        frame = frame if output.stored == output.format.name else frame.reformat(format=output.stored)
        frame.pts, frame.time_base = self.number, 1 / output.rate
        self.number += 1
        self.write(frame)

    def finish(self) -> None:
        """What the encoder holds back, and the end of the file."""
        self.write(None)
        self.container.close()

    def write(self, frame: av.VideoFrame | None) -> None:
        """The packets that a frame, or the end, brings."""
        output = self.output
        try:
            for packet in self.stream.encode(frame):
                assert packet.pts is not None
                # encoders are seldom wrong about when to decode, and then refused; `join` finds it anew for all segments
                packet.dts, packet.time_base = len(self.order) - MOST_DELAY, TICK
                self.order.append(packet.pts)
                self.container.mux(packet)
        except ffmpeg().FFmpegError as error:
            what = f"{output.width} x {output.height} {output.stored}"
            raise PictureError(f"{output.path}: {output.encoder.name} refuses {what} ({reason(error)})") from None


def open_stream(container: av.container.OutputContainer, output: VideoOutput) -> av.video.stream.VideoStream:
    """The stream of an encoder that is set up for a result."""
    added = container.add_stream(output.encoder.name, rate=output.rate, options=dict(output.options))
    stream = cast("av.video.stream.VideoStream", added)
    context = stream.codec_context
    context.width, context.height, context.pix_fmt = output.width, output.height, output.stored
    context.time_base = 1 / output.rate
    context.sample_aspect_ratio = output.aspect or Fraction(0, 1)
    tags = output.tags
    context.colorspace, context.color_range = tags.matrix, tags.range
    context.color_primaries, context.color_trc = tags.primaries, tags.transfer
    context.bit_rate = 0
    return stream
