"""Segments as one file, without encoding again, with all else that the source has: sound, subtitles, chapters, metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from heapq import merge
from io import BytesIO
from operator import itemgetter
from typing import IO, TYPE_CHECKING, Any, cast

from sanrt.errors import PictureError
from sanrt.runtime.pictures.metadata import LABELS
from sanrt.runtime.video.container import VideoInfo, ffmpeg, opened, reading, reason
from sanrt.runtime.video.encoding import VideoOutput
from sanrt.runtime.video.formats import Codec, Container
from sanrt.runtime.video.segments import Segment

if TYPE_CHECKING:
    import av

TECHNICAL = re.compile("encoder|major_brand|minor_version|compatible_brands|duration|(_statistics|bps|number_of_).*", re.I)
"""Names of metadata that is about the source's file."""
USUAL = re.compile(
    "title|artist|album|album_artist|author|comment|composer|copyright|creation_time|date|description|disc|encoded_by|"
    "episode_id|episode_sort|genre|grouping|keywords|language|lyrics|media_type|network|performer|season_number|show|"
    "synopsis|track|year"
)
"""What MP4 has fields of its own for; others need QuickTime's keys."""
MILLISECOND = Fraction(1, 1000)


@dataclass(frozen=True)
class Copying:
    """What of the source beside its pictures goes into the result."""

    streams: tuple[int, ...]
    """Indices of streams that are copied."""
    notes: tuple[str, ...]
    """What the container does not take, one line each."""


def plan_copying(info: VideoInfo, output: VideoOutput) -> Copying:
    """Which streams the result takes over; PictureError where its container does not take the sound."""
    taken, notes = [], list[str]()
    if info.animation:
        lost = [LABELS.get(name, name) for name in info.animation.info.metadata]
        return Copying((), (f"not kept, as {output.container.named} does not hold it: {', '.join(lost)}",) * bool(lost))
    with opened(info.path) as source:
        for stream in source.streams:
            if stream.index == info.stream:
                continue
            if is_attachment(stream, output) or takes(output.container, stream):
                taken.append(stream.index)
                continue
            what = f"{stream.type} stream {stream.index} ({codec_of(stream)})"
            if stream.type == "audio":
                refusal = f"{output.container.named} holds no {codec_of(stream)} sound; choose a name ending in .mkv, or"
                if output.container is Container.MKV:
                    refusal = f"PyAV copies no {codec_of(stream)} sound into Matroska;"
                raise PictureError(f"{output.path}: {refusal} convert the sound first (ffmpeg -i IN -c:v copy -c:a aac OUT)")
            notes.append(f"left out: {what}, which {output.container.named} does not hold")
    return Copying(tuple(taken), tuple(notes))


def rounded_times(info: VideoInfo, output: VideoOutput, segments: Sequence[Segment]) -> tuple[str, ...]:
    """A note where frames are not shown at the very times of the source, since Matroska counts in milliseconds."""
    times = (time for segment in segments for time, _ in segment.times)
    if output.container.is_matroska and any((time * info.time_base / MILLISECOND).denominator > 1 for time in times):
        return (f"times of frames are rounded to milliseconds, in which {output.container.named} counts",)
    return ()


def codec_of(stream: av.stream.Stream) -> str:
    """The name of a stream's codec, or its type's."""
    context = stream.codec_context
    return context.codec.canonical_name if context else getattr(stream, "name", None) or stream.type


def is_cover(stream: av.stream.Stream) -> bool:
    """Whether a video stream is a picture of the file, as music has."""
    return stream.type == "video" and bool(stream.disposition & ffmpeg().stream.Disposition.attached_pic)


def is_attachment(stream: av.stream.Stream, output: VideoOutput) -> bool:
    """Whether a stream becomes an attachment: fonts, and cover pictures in Matroska."""
    return output.container is Container.MKV and (stream.type == "attachment" or is_cover(stream))


def takes(container: Container, stream: av.stream.Stream) -> bool:
    """Whether a container takes a stream, by the header that it would write."""
    av = ffmpeg()
    try:
        with av.open(BytesIO(), "w", format=container.value) as trial:
            copied_stream(trial, stream)
            trial.start_encoding()
    except (ValueError, av.FFmpegError):
        return False
    return True


def copied_stream(out: av.container.OutputContainer, stream: av.stream.Stream) -> av.stream.Stream:
    """A stream of the result for the packets of one of the source."""
    made: av.stream.Stream = out.add_stream_from_template(stream, opaque=True)
    made.time_base = stream.time_base
    made.disposition = stream.disposition
    made.metadata.update(kept(stream.metadata))
    return made


def kept(metadata: dict[str, str]) -> dict[str, str]:
    """What is not about the file that it was in."""
    return {key: value for key, value in metadata.items() if not TECHNICAL.fullmatch(key)}


def join(info: VideoInfo, output: VideoOutput, copying: Copying, segments: Sequence[Segment], file: IO[bytes]) -> None:
    """Write the result into an open file, whose OSErrors pass. PictureError where the container refuses something."""
    av = ffmpeg()
    try:
        with ExitStack() as files:
            source = None if info.animation else files.enter_context(opened(info.path))
            encoded = files.enter_context(opened(segments[0].path)).streams.video[0]
            others = source and not all(map(USUAL.fullmatch, kept(source.metadata))) and not output.container.is_matroska
            options = {"fflags": "+bitexact", "avoid_negative_ts": "disabled"}
            options |= {"movflags": "use_metadata_tags"} if others else {}
            with muxer(file, output.container, options) as out:
                if source is None:
                    stream = enlarged_stream(out, encoded, info, output)
                    for _, packet in enlarged_packets(info, output, segments, stream):
                        out.mux(packet)
                    return
                out.metadata.update(kept(source.metadata))
                out.set_chapters(source.chapters())
                made = result_streams(out, source, encoded, info, output, copying)
                both = enlarged_packets(info, output, segments, made[info.stream]), copied_packets(source, made, info)
                for _, packet in merge(*both, key=itemgetter(0)):
                    out.mux(packet)
    except (av.FFmpegError, ValueError) as error:
        raise PictureError(
            f"{output.path}: {output.container.named} refuses some of it ({reason(error)}); choose a name ending in .mkv"
        ) from None


@contextmanager
def muxer(file: IO[bytes], container: Container, options: dict[str, str]) -> Iterator[av.container.OutputContainer]:
    """A container in an open file. Where the body fails, its error is raised, not what closing the container then says."""
    out = ffmpeg().open(file, "w", format=container.value, container_options=options)
    try:
        yield out
    except BaseException:
        with suppress(Exception):
            out.close()
        raise
    out.close()


def result_streams(
    out: av.container.OutputContainer,
    source: av.container.InputContainer,
    encoded: av.video.stream.VideoStream,
    info: VideoInfo,
    output: VideoOutput,
    copying: Copying,
) -> dict[int, av.stream.Stream]:
    """The streams of the result by the source's indices, in the source's order; attachments are whole with that."""
    made: dict[int, av.stream.Stream] = {}
    for stream in source.streams:
        if stream.index == info.stream:
            made[stream.index] = enlarged = enlarged_stream(out, encoded, info, output)
            enlarged.disposition = stream.disposition
            enlarged.metadata.update(kept(stream.metadata))
        elif stream.index not in copying.streams:
            continue
        elif is_cover(stream) and is_attachment(stream, output):
            kind = codec_of(stream)
            name = stream.metadata.get("filename", f"cover.{kind.replace('mjpeg', 'jpg')}")
            mime = stream.metadata.get("mimetype", f"image/{kind.replace('mjpeg', 'jpeg')}")
            out.add_attachment(name, mime, cover(info, stream.index))
        elif stream.type == "attachment":
            copied_stream(out, stream)
        else:
            made[stream.index] = copied_stream(out, stream)
    return made


def enlarged_stream(
    out: av.container.OutputContainer, encoded: av.video.stream.VideoStream, info: VideoInfo, output: VideoOutput
) -> av.video.stream.VideoStream:
    """The stream of the result for the packets of segments."""
    made = cast("av.video.stream.VideoStream", copied_stream(out, encoded))
    made.time_base = info.time_base
    made.metadata.clear()
    if info.display_matrix:
        made.set_display_matrix(info.display_matrix)
    if output.encoder.codec is Codec.HEVC and not output.container.is_matroska:
        made.codec_context.codec_tag = "hvc1"  # which Apple's players want
    return made


def cover(info: VideoInfo, index: int) -> bytes:
    """The picture file that a cover stream holds."""
    with opened(info.path) as source, reading(info.path):
        return next((bytes(packet) for packet in source.demux(source.streams[index]) if packet.size), b"")


def enlarged_packets(
    info: VideoInfo, output: VideoOutput, segments: Sequence[Segment], stream: av.stream.Stream
) -> Iterator[tuple[Fraction, av.Packet[Any]]]:
    """The segments' packets with the source's timestamps, each with the time when it is to be decoded.

    Encoders keep a frame back until those that it refers to are there: by the most places that any frame was kept back, all
    times of decoding are earlier than those of display. MP4 and MOV say how long a video is by the times of decoding and the
    duration of the packet that is decoded last: it gets what is left, so that the last frame shown is held as in the source.
    """
    times = [time for segment in segments for time in segment.times]
    pts = [time for time, _ in times]
    delay = max(place - number for segment in segments for place, number in enumerate(segment.order))
    step = pts[1] - pts[0] if len(pts) > 1 else 1
    done = 0
    for segment in segments:
        with opened(segment.path) as file, reading(segment.path):
            for packet in cast("Iterator[av.Packet[Any]]", file.demux(video=0)):
                if packet.pts is None:
                    continue  # the end
                packet.time_base, packet.pts, packet.duration = info.time_base, *segment.times[packet.pts]
                packet.dts = decoded = pts[done - delay] if done >= delay else pts[0] - (delay - done) * step
                if done == len(pts) - 1 and not output.container.is_matroska:
                    began = pts[0] - delay * step
                    packet.duration = pts[-1] + (times[-1][1] or step) - pts[0] - (decoded - began)
                packet.stream = stream
                yield decoded * info.time_base, packet
                done += 1


def copied_packets(
    source: av.container.InputContainer, made: dict[int, av.stream.Stream], info: VideoInfo
) -> Iterator[tuple[Fraction, av.Packet[Any]]]:
    """The packets of the source's other streams, as they are."""
    streams = [source.streams[index] for index in made if index != info.stream]
    with reading(info.path):
        for packet in source.demux(*streams) if streams else ():
            if not packet.size:
                continue  # the end
            if packet.pts is None and packet.dts is None:  # a cover
                packet.pts = packet.dts = 0
            packet.stream = made[packet.stream_index]
            yield (packet.dts if packet.dts is not None else packet.pts or 0) * packet.time_base, packet
