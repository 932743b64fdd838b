"""Which of the bundled weights suit a picture or video file."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from sanrt.errors import SanrtError
from sanrt.model.bundled import PHOTO_QUALITY
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.pictures.jpeg import quality
from sanrt.runtime.pictures.storage import RemotePath, fetched
from sanrt.runtime.video.container import look
from sanrt.runtime.video.formats import is_video


def suits_photo(source: Path, named_otherwise: bool = False) -> bool:
    """Whether a file is a JPEG of a quality at which `photo` is better than `clean`, or a video compressed with loss.

    named_otherwise: whether it is a video whatever its name, as standard input is that becomes one.
    False where it cannot be read. A remote file is looked at only if it is named as a JPEG or a video. Lossless codecs, and
    those of studios (ProRes, DNxHD, CineForm), count as uncompressed.
    """
    if named_otherwise or is_video(source):
        with suppress(SanrtError), fetched(source) as local:
            return not look(local).lossless
        return False
    if isinstance(source, RemotePath) and Format.of_suffix(source) is not Format.JPEG:
        return False
    with suppress(OSError):
        found = quality(source)
        return found is not None and found <= PHOTO_QUALITY
    return False
