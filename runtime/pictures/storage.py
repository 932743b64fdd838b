"""Pictures in object stores and other file systems that pyarrow knows, named by URL: `s3://bucket/folder/name.png`.

The pipeline works on local files. A remote picture is copied to a local one before it is opened; a result is written
locally, whole, before it is sent.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any

from sanrt.errors import PictureError, SanrtError, UsageError
from sanrt.extras import extra

OBJECT_STORES = frozenset({"s3", "gs", "gcs", "abfs", "abfss"})
"""Schemes whose files appear when their writer closes them, whole; elsewhere a file grows where it is written."""
URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)")


class RemotePath(Path, PurePosixPath):
    """A file or folder behind a URL, with as much of Path's behaviour as finding pictures and telling of them needs."""

    def __str__(self) -> str:
        return re.sub(r"^([a-z][a-z0-9+.-]+):/", r"\1://", super().__str__())

    @property
    def scheme(self) -> str:
        """As in `scheme://`."""
        return self.parts[0].removesuffix(":")

    @property
    def root_folder(self) -> RemotePath:
        """The bucket, or the host."""
        return RemotePath(*self.parts[:2])

    @property
    def place(self) -> tuple[Any, str]:
        """pyarrow's file system, and the path in it."""
        filesystem, root = file_system(str(self.root_folder))
        return filesystem, "/".join((root.rstrip("/"), *self.parts[2:]))

    @cached_property
    def facts(self) -> Any:
        """pyarrow's FileInfo; OSError if it cannot be had."""
        filesystem, path = self.place
        return filesystem.get_file_info(path)

    @cached_property
    def etag(self) -> str | None:
        """What the store tells this content by; None where it has no such thing. OSError if it cannot be had."""
        with self.open() as stream:
            return etag_of(stream)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Kind, size and time of change."""
        if self.facts.type.name == "NotFound":
            raise FileNotFoundError(2, os.strerror(2), str(self))
        kind, changed = (stat.S_IFDIR if self._is("Directory") else stat.S_IFREG), self.facts.mtime_ns or 0
        times = (0, changed // 10**9, 0)
        return os.stat_result((kind, 0, 0, 1, 0, 0, self.facts.size or 0, *times), {"st_mtime_ns": changed})

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """PictureError if that cannot be found out."""
        return not self._is("NotFound")

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """PictureError if that cannot be found out."""
        return self._is("Directory")

    def _is(self, kind: str) -> bool:
        with translate_errors(self, "cannot be looked up"):
            return str(self.facts.type.name) == kind

    def open(self, mode: str = "rb", *_: Any, **__: Any) -> IO[Any]:  # type: ignore[override]
        """For reading bytes only."""
        assert mode == "rb"
        filesystem, path = self.place
        stream: IO[Any] = filesystem.open_input_file(path)
        return stream

    def resolve(self, strict: bool = False) -> RemotePath:
        """Itself: there are no links."""
        return self

    def absolute(self) -> RemotePath:
        """Itself."""
        return self

    def files(self, recursive: bool) -> Iterator[RemotePath]:
        """The files below, in order."""
        from pyarrow.fs import FileSelector

        filesystem, path = self.place
        with translate_errors(self, "folder cannot be read"):
            found = filesystem.get_file_info(FileSelector(path, recursive=recursive))
        for info in sorted(found, key=lambda info: str(info.path).split("/")):
            if info.type.name == "File":
                file = self / info.path[len(path) :].lstrip("/")
                file.__dict__["facts"] = info
                yield file

    def download(self, local: Path) -> None:
        """Copy the file's content; PictureError if that fails."""
        with translate_errors(self, "cannot be read"):
            with self.open() as source, local.open("wb") as copy:
                etag = etag_of(source)
                while piece := source.read(1 << 22):
                    copy.write(piece)
            with self.open() as now:
                changed = etag_of(now) != etag
        if changed:
            raise PictureError(f"{self}: changed while it was read; run again once it is complete")
        self.__dict__["etag"] = etag  # of what was copied, whatever was known of it before
        self.__dict__.pop("facts", None)

    def upload(self, local: Path) -> None:
        """Store the content of a local file here, whole or not at all; PictureError if that fails."""
        filesystem, path = self.place
        direct = self.scheme in OBJECT_STORES
        written = path if direct else f"{path}.sanrt-{secrets.token_hex(4)}.partial"
        with translate_errors(self, "cannot be written"):
            if not direct:
                filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            with local.open("rb") as source, publishing(filesystem.open_output_stream(written)) as stream:
                while piece := source.read(1 << 22):
                    stream.write(piece)
            if not direct:
                filesystem.move(written, path)


def etag_of(stream: Any) -> str | None:
    """What the store tells the content of an open object by; None where it has no such thing."""
    facts = {name.lower(): value for name, value in getattr(stream, "metadata", dict)().items()}
    return facts.get("etag", b"").decode().strip('"') or None


@contextmanager
def publishing(stream: Any) -> Iterator[Any]:
    """An output stream of pyarrow's, closed, which publishes the object, only if the body succeeds.

    pyarrow cannot give a stream up, and closes one that is freed. So after an error it is neither closed nor ever freed,
    and the object stays as it was.
    """
    try:
        yield stream
    except BaseException:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(stream))
        raise
    stream.close()


def located(text: str) -> Path:
    """The path that a person named: local, or a URL."""
    if not text.strip():
        raise UsageError("an empty name; expected a file, a folder or a URL")
    if not (url := URL.fullmatch(text)):
        return Path(text)
    return Path("/", url[2]) if url[1] == "file" else RemotePath(text)


def check_buckets(paths: Iterable[Path]) -> None:
    """PictureError if a path's bucket (or host's root) is not there; except one that may not be looked at."""
    for root in {path.root_folder for path in paths if isinstance(path, RemotePath)}:
        try:
            found = root.facts.type.name != "NotFound"
        except io_errors():
            continue
        if not found:
            raise PictureError(f"{root}: no such bucket; make it first, or correct the name")


@cache
def file_system(root: str) -> tuple[Any, str]:
    """pyarrow's file system for a URL's root, and the path of that root in it."""
    with extra("ray", root):
        import pyarrow as pa
        from pyarrow.fs import FileSystem
    try:
        filesystem, path = FileSystem.from_uri(root)
    except (OSError, pa.ArrowException) as error:
        raise PictureError(f"{root}: cannot be reached ({reason(error)})") from None
    return filesystem, str(path)


@contextmanager
def translate_errors(path: Path, what: str) -> Iterator[None]:
    """An OSError, or pyarrow's own error, as a PictureError of one line."""
    try:
        yield
    except io_errors() as error:
        raise PictureError(f"{path}: {what} ({reason(error)})") from None


def io_errors() -> tuple[type[Exception], ...]:
    """OSError, and what pyarrow raises beside it: for names that a store does not allow, for one."""
    arrow = sys.modules.get("pyarrow")
    return (OSError, arrow.ArrowException) if arrow else (OSError,)


def reason(error: Exception) -> str:
    """What went wrong, without what only the store's owner could use."""
    if isinstance(error, FileNotFoundError):
        return "No such file or directory"
    text = " ".join(((error.strerror if isinstance(error, OSError) else "") or str(error)).split())
    return re.sub(r"^.*?(?=AWS Error)|( \(Request ID: .*)$", "", text)


@contextmanager
def fetched(path: Path) -> Iterator[Path]:
    """A local file with the content of `path`: itself, or a copy for as long as the context lasts.

    On Windows an error about it may still have it open, and the copy stays.
    """
    if not isinstance(path, RemotePath):
        yield path
        return
    with (
        tempfile.TemporaryDirectory(prefix="sanrt-", ignore_cleanup_errors=True) as folder,
        named_as(path, Path(folder)) as local,
    ):
        path.download(local)
        yield local


@contextmanager
def delivered(path: Path) -> Iterator[Path]:
    """A local path; what the body writes there is at `path` afterwards, whole. It is `path` itself where that is local."""
    if not isinstance(path, RemotePath):
        yield path
        return
    with (
        tempfile.TemporaryDirectory(prefix="sanrt-", ignore_cleanup_errors=True) as folder,
        named_as(path, Path(folder)) as local,
    ):
        yield local
        path.upload(local)


@contextmanager
def named_as(path: RemotePath, folder: Path) -> Iterator[Path]:
    """A file in a local folder; errors about it are told of `path`."""
    local = folder / path.name
    try:
        yield local
    except SanrtError as error:
        raise type(error)(str(error).replace(str(local), str(path))) from None


def scratch_folder(result: Path) -> Path:
    """Where scratch files for a result go: beside it if that is local, else where the system has them."""
    if isinstance(result, RemotePath):
        return Path(tempfile.gettempdir())
    with translate_errors(result.parent, "cannot be written"):
        result.parent.mkdir(parents=True, exist_ok=True)
    return result.parent
