"""Video files by their names, and the codecs of results. Imports no FFmpeg."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

from sanrt.errors import UsageError
from sanrt.wording import option

PACKAGE = "av"
"""What reads and writes videos: PyAV, with FFmpeg in its wheel."""


class Container(StrEnum):
    """A kind of video file that is written, by FFmpeg's name of what writes it."""

    MP4 = "mp4"
    MOV = "mov"
    MKV = "matroska"
    WEBM = "webm"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """File name endings in lower case, the usual one first."""
        return _SUFFIXES[self]

    @property
    def named(self) -> str:
        """Its name for people."""
        return {Container.MKV: "Matroska", Container.WEBM: "WebM"}.get(self, self.upper())

    @property
    def is_matroska(self) -> bool:
        """Whether it is made of EBML elements, and counts time in milliseconds."""
        return self in (Container.MKV, Container.WEBM)

    @classmethod
    def of_suffix(cls, path: Path) -> Container | None:
        """The one that a file name stands for; None if it stands for none that is written."""
        return next((container for container in cls if path.suffix.lower() in container.suffixes), None)


_SUFFIXES = {
    Container.MP4: (".mp4", ".m4v"),
    Container.MOV: (".mov", ".qt"),
    Container.MKV: (".mkv",),
    Container.WEBM: (".webm",),
}
_STREAMS = (".avi", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".m2v", ".vob", ".flv", ".f4v", ".wmv", ".asf")
_OTHERS = (".3gp", ".3g2", ".ogv", ".mxf", ".dv", ".divx", ".rm", ".rmvb", ".nut", ".y4m")
WRITTEN_SUFFIXES = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
VIDEO_SUFFIXES = (*WRITTEN_SUFFIXES, *_STREAMS, *_OTHERS)


def is_video(path: Path) -> bool:
    """Whether a file name stands for a video, whose result is one."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def is_text(path: Path) -> bool:
    """Whether a file is named like an MPEG transport stream, and is TypeScript or a translation by its first bytes."""
    if path.suffix.lower() not in (".ts", ".mts"):
        return False
    try:
        with path.open("rb") as file:
            return not re.search(rb"[\0-\x08\x0e-\x1f\xff]", file.read(1024))
    except OSError:
        return False


def videos_are_readable() -> bool:
    """Whether what reads videos is installed."""
    return find_spec(PACKAGE) is not None


def result_suffix(source: Path) -> str:
    """The ending of a video's result where none is named: its own, or that of Matroska, which holds what others do."""
    return source.suffix if source.suffix.lower() in WRITTEN_SUFFIXES else ".mkv"


class Codec(StrEnum):
    """What videos are compressed by."""

    H264 = "h264"
    HEVC = "hevc"
    AV1 = "av1"
    FFV1 = "ffv1"
    PRORES = "prores"


@dataclass(frozen=True)
class Encoder:
    """An encoder of FFmpeg's, and how it is used."""

    codec: Codec
    name: str
    """FFmpeg's."""
    crf: int | None = None
    """Constant rate factor: smaller is better; None for one that has no such thing."""
    crf_range: tuple[int, int] = (0, 51)
    crf_option: str = "crf"
    preset: str | None = None
    """Its speed, by its own names; None for one that has none."""
    presets: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    """Others, in FFmpeg's words."""
    device: str = ""
    """What it needs beside a processor, for people; empty for one that runs anywhere."""


X26X_PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo")
NVENC_PRESETS = tuple(f"p{number}" for number in range(1, 8))
QUIET_X265 = {"x265-params": "log-level=error"}

ENCODERS = {
    Codec.H264: Encoder(Codec.H264, "libx264", 17, preset="medium", presets=X26X_PRESETS),
    Codec.HEVC: Encoder(Codec.HEVC, "libx265", 19, preset="medium", presets=X26X_PRESETS, options=QUIET_X265),
    Codec.AV1: Encoder(Codec.AV1, "libsvtav1", 23, (0, 63), preset="8", presets=tuple(map(str, range(14)))),
    Codec.FFV1: Encoder(Codec.FFV1, "ffv1", options={"level": "3", "slicecrc": "1", "g": "1"}),
    Codec.PRORES: Encoder(Codec.PRORES, "prores_ks"),
}
"""Of each codec the one that runs anywhere."""
DEVICES = {
    "nvenc": "an NVIDIA GPU that encodes this, with its driver",
    "qsv": "an Intel GPU that encodes this, with its driver",
    "amf": "an AMD GPU that encodes this, with its driver",
    "videotoolbox": "macOS",
    "vaapi": "a GPU that encodes this, with a VA-API driver",
    "v4l2m2m": "a Linux device that encodes this",
}
"""What the encoders of each kind need that are no programs alone."""
HARDWARE = re.compile(rf"(h264|hevc|av1)_({'|'.join(DEVICES)})")
"""Their names; they are taken only where they are asked for."""


def encoder_named(name: str) -> Encoder | None:
    """The encoder that a codec's name, or a hardware encoder's, stands for; None for any other word."""
    if name in list(Codec):
        return ENCODERS[Codec(name)]
    if not (found := HARDWARE.fullmatch(name)):
        return None
    codec, device = Codec(found[1]), DEVICES[found[2]]
    if found[2] != "nvenc":
        return Encoder(codec, name, device=device)
    options = {"rc": "vbr", "b": "0"}
    return Encoder(codec, name, 19, crf_option="cq", preset="p5", presets=NVENC_PRESETS, options=options, device=device)


@dataclass(frozen=True)
class VideoEncoding:
    """What the user may choose about written videos."""

    codec: str | None = None
    """One of Codec, or a hardware encoder's name; None is the source's, or what suits the container."""
    crf: int | None = None
    """Constant rate factor; None is the encoder's default here."""
    preset: str | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for a word that is no codec's, and for a factor or preset that the codec does not have."""
        if self.codec is None:
            return
        encoder = encoder_named(self.codec)
        if encoder is None:
            raise UsageError(
                f"{option('codec', self.codec)}: expected {', '.join(Codec)}, or a hardware encoder such as h264_nvenc"
            )
        require_known(encoder, self.crf, self.preset)


def require_known(encoder: Encoder, crf: int | None, preset: str | None) -> None:
    """Raise UsageError for a factor or a preset that an encoder does not have."""
    low, high = encoder.crf_range
    if crf is not None and encoder.crf is None:
        raise UsageError(f"{option('crf', crf)}: {encoder.name} has no such thing; leave it out")
    if crf is not None and not low <= crf <= high:
        raise UsageError(f"{option('crf', crf)}: expected {low} to {high} for {encoder.codec}")
    if preset is not None and preset not in encoder.presets:
        expected = f"expected one of {', '.join(encoder.presets)}" if encoder.presets else "leave it out"
        raise UsageError(f"{option('preset', preset)}: {encoder.name} has none of this name; {expected}")
