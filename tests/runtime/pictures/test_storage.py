"""Pictures behind URLs: a real S3 server on loopback, wrong credentials, missing buckets, connections cut in the middle."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from pathlib import Path, PosixPath, WindowsPath

import numpy as np
import pytest
import pyvips

from sanrt.errors import PictureError
from sanrt.runtime.pictures import storage
from sanrt.runtime.pictures.jobs import Naming, find_pictures
from sanrt.runtime.pictures.storage import RemotePath, located
from tests.runtime import s3 as server


@pytest.fixture(scope="module")
def s3():
    with server.serving() as store:
        yield store


def png(seed: int, side=40) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return pyvips.Image.new_from_array(values).write_to_buffer(".png")


def fill(s3, folder: Path, prefix: str, names) -> Path:
    """The same pictures in the store and in a local folder."""
    for seed, name in enumerate(names):
        path = folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(seed))
        s3.put(f"{prefix}/in/{name}", path.read_bytes())
    return folder / "in"


def test_a_store_gets_the_bytes_of_the_local_run_and_a_second_run_skips_them(s3, sanrt, tmp_path):
    names = ["a.png", "sub/b.png", "sub/ü c.webp", ".hidden/d.png", "notes.txt"]
    local = fill(s3, tmp_path, "good", names)
    url = f"s3://{server.BUCKET}/good"
    assert sanrt(local, tmp_path / "out")[0] == 0
    status, out, err = sanrt(f"{url}/in", f"{url}/out")
    assert (status, err) == (0, "")
    assert "3 written" in out
    expected = {name: (tmp_path / "out" / name).read_bytes() for name in names[:3]}
    assert s3.tree("good/out/") == expected
    assert "3 skipped" in sanrt(f"{url}/in", f"{url}/out")[1]
    assert "3 written" in sanrt(f"{url}/in", tmp_path / "fetched")[1]
    assert {name: (tmp_path / "fetched" / name).read_bytes() for name in expected} == expected


def test_finished_pictures_in_a_store_are_skipped_without_downloading_a_source(s3, sanrt, tmp_path):
    fill(s3, tmp_path, "skip", [f"{number}.png" for number in range(5)])
    url = f"s3://{server.BUCKET}/skip"
    assert "5 written" in sanrt(f"{url}/in", f"{url}/out")[1]
    s3.proxy.seen.clear()
    assert "0 written, 5 skipped" in sanrt(f"{url}/in", f"{url}/out")[1]
    fetched = [line for line in s3.proxy.seen if line.startswith(b"GET /pictures/skip/")]
    assert len(fetched) == 5
    assert all(line.startswith(b"GET /pictures/skip/out/") for line in fetched)


def test_a_result_in_a_store_follows_its_source_and_is_replaced_only_as_sanrt_wrote_it(s3, sanrt, tmp_path):
    fill(s3, tmp_path, "changed", ["a.png"])
    url = f"s3://{server.BUCKET}/changed"
    assert "1 written" in sanrt(f"{url}/in", f"{url}/out")[1]
    s3.put("changed/in/a.png", png(1))
    assert "or from this one before it changed; made again" in sanrt(f"{url}/in", f"{url}/out")[1]
    assert "made with other options before; made again" in sanrt(f"{url}/in", f"{url}/out", "--self-ensemble")[1]
    edited = s3.tree("changed/out/")["a.png"] + b"more"
    for content, why in ((edited, "changed since sanrt made it"), (png(2), "not made by sanrt")):
        s3.put("changed/out/a.png", content)
        status, _, err = sanrt(f"{url}/in", f"{url}/out")
        assert status == 2
        assert f"{url}/out/a.png: already there and {why}" in err
        assert s3.tree("changed/out/") == {"a.png": content}


def test_a_connection_cut_in_a_transfer_fails_that_picture_alone_and_leaves_no_half_result(s3, sanrt, tmp_path):
    fill(s3, tmp_path, "cut", ["fine.png", "read.png", "write.png"])
    url = f"s3://{server.BUCKET}/cut"
    s3.proxy.cut = {b"GET /pictures/cut/in/read.png", b"PUT /pictures/cut/out/write.png"}
    try:
        status, out, err = sanrt(f"{url}/in", f"{url}/out")
    finally:
        s3.proxy.cut = set()
    assert s3.proxy.cuts >= 2
    assert status == 1
    assert "1 written, 2 failed" in out
    reading, writing = err.splitlines()
    assert reading.startswith(f"sanrt: {url}/in/read.png: cannot be read (")
    assert writing.startswith(f"sanrt: {url}/in/write.png: {url}/out/write.png: cannot be written (")
    assert set(s3.tree("cut/out/")) == {"fine.png"}
    assert "2 written, 1 skipped" in sanrt(f"{url}/in", f"{url}/out")[1]


def test_a_large_upload_cut_in_a_later_part_leaves_nothing(s3, tmp_path):
    (tmp_path / "large").write_bytes(np.random.default_rng(0).bytes(25 << 20))
    target = located(f"s3://{server.BUCKET}/large")
    s3.proxy.cut = {b"partNumber=2"}
    try:
        with pytest.raises(PictureError, match="cannot be written"):
            target.upload(tmp_path / "large")
    finally:
        s3.proxy.cut = set()
    assert s3.tree("large") == {}


@pytest.mark.parametrize("size", [9 << 20, 40 << 20])
def test_a_result_that_cannot_be_read_to_its_end_leaves_the_object_as_it_was(s3, tmp_path, size):
    """In a process of its own: what is left open must not be published when it ends either."""
    (tmp_path / "local").write_bytes(bytes(size))
    s3.put("unread", b"earlier")
    code = """
import sys
from pathlib import Path, PosixPath, WindowsPath
from sanrt.errors import PictureError
from sanrt.runtime.pictures.storage import located

class Failing:
    def __init__(self, file): self.file, self.left = file, 2
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()
    def read(self, size):
        self.left -= 1
        if self.left < 0: raise OSError(5, "Input/output error")
        return self.file.read(size)

class Local(type(Path())):
    def open(self, mode): return Failing(super().open(mode))

try:
    located(sys.argv[1]).upload(Local(sys.argv[2]))
except PictureError as error:
    print(error)
"""
    url = f"s3://{server.BUCKET}/unread"
    done = subprocess.run([sys.executable, "-c", code, url, tmp_path / "local"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{url}: cannot be written (Input/output error)\n"
    assert s3.tree("unread") == {"": b"earlier"}


def test_wrong_credentials_are_told_in_one_line(s3, sanrt, tmp_path, monkeypatch):
    fill(s3, tmp_path, "locked", ["a.png"])
    url = f"s3://{server.BUCKET}/locked"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    storage.file_system.cache_clear()
    with s3.locked():
        status, _, err = sanrt(f"{url}/in", tmp_path / "out")
        wrote, _, why = sanrt(tmp_path / "in", f"{url}/out")
    storage.file_system.cache_clear()
    assert (status, wrote) == (1, 1)
    for text in (err, why):
        assert len(text.splitlines()) == 1
        assert "AWS Error" in text
        assert url in text
    assert s3.tree("locked/out/") == {}


def test_a_missing_bucket_is_told_before_any_work(s3, sanrt, tmp_path):
    fill(s3, tmp_path, "missing", ["a.png"])
    for arguments in ((f"s3://nowhere/{'in'}", tmp_path / "out"), (tmp_path / "in", "s3://nowhere/out")):
        status, out, err = sanrt(*arguments)
        assert (status, out) == (1, "")
        assert err == "sanrt: s3://nowhere: no such bucket; make it first, or correct the name\n"


def test_a_missing_or_damaged_object_is_told_by_its_url(s3, sanrt, tmp_path):
    s3.put("bad/damaged.png", png(0)[:100])
    for name in ("none.png", "damaged.png"):
        url = f"s3://{server.BUCKET}/bad/{name}"
        status, _, err = sanrt(url, tmp_path / "out")
        assert status == 1
        assert err.startswith(f"sanrt: {url}: ")
        assert "/tmp" not in err


def test_a_file_system_that_shows_files_as_they_grow_gets_them_renamed(tmp_path, monkeypatch):
    fs = pytest.importorskip("pyarrow.fs", reason="needs the extra [ray]")
    moved = []

    class Watched:
        """pyarrow's local file system, its renames noted."""

        def __init__(self):
            self.inner = fs.LocalFileSystem()

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def move(self, source, target):
            moved.append((Path(source).name, Path(target).name, Path(target).exists()))
            self.inner.move(source, target)

    monkeypatch.setattr(storage, "file_system", lambda root: (Watched(), str(tmp_path)))
    (tmp_path / "local").write_bytes(b"new")
    target = located("hdfs://host:8020/folder/a.png")
    target.upload(tmp_path / "local")
    target.upload(tmp_path / "local")
    assert [(name.endswith(".partial"), target, there) for name, target, there in moved] == [
        (True, "a.png", False),
        (True, "a.png", True),
    ]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["a.png"]
    assert [str(job.source) for job in find_pictures([located("hdfs://host:8020/folder")], tmp_path / "o", Naming())] == [
        "hdfs://host:8020/folder/a.png"
    ]


def test_urls_stay_urls_as_paths_join_part_and_travel():
    path = located("s3://bucket/folder") / Path("sub/a.png")
    assert isinstance(path, RemotePath)
    assert str(path) == "s3://bucket/folder/sub/a.png"
    assert str(path.with_name("b.jpg").parent) == "s3://bucket/folder/sub"
    assert str(path.relative_to(located("s3://bucket/folder"))) == "sub/a.png"
    assert str(pickle.loads(pickle.dumps(path))) == str(path)
    assert str(Path("out") / path.relative_to(located("s3://bucket"))) == "out/folder/sub/a.png"
    assert located("file:///a/b.png") == Path("/a/b.png")
    assert not isinstance(located("c:/a.png"), RemotePath)


def test_what_pyarrow_raises_of_its_own_is_one_line():
    import pyarrow as pa

    told = r"^s3://b/a\.png: cannot be read \(a name of two lines\)$"
    with pytest.raises(PictureError, match=told), storage.translate_errors(RemotePath("s3://b/a.png"), "cannot be read"):
        raise pa.ArrowInvalid("a name\nof two lines")


class Changing:
    """Stands in for an open object of a store, in which another one takes its place with every opening but the first."""

    opened = 0

    def __init__(self, *_):
        Changing.opened += 1
        self.number, self.stream = Changing.opened, io.BytesIO(b"content")

    def metadata(self):
        return {"ETag": b"%d" % self.number}

    def read(self, size):
        return self.stream.read(size)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_an_object_that_changes_while_it_is_copied_is_refused_and_else_known_by_what_was_copied(tmp_path, monkeypatch):
    path = RemotePath("s3://b/a.png")
    path.__dict__["etag"] = "of an earlier look"
    monkeypatch.setattr(RemotePath, "open", Changing)
    with pytest.raises(PictureError, match=r"^s3://b/a\.png: changed while it was read"):
        path.download(tmp_path / "a.png")
    monkeypatch.setattr(Changing, "metadata", lambda self: {"ETag": b"7"})
    path.download(tmp_path / "a.png")
    assert path.etag == "7"


def test_urls_are_told_from_windows_drives_and_are_no_paths_of_one_system():
    assert isinstance(located("s3://bucket/a.png"), RemotePath)
    assert not isinstance(located("C:/photos/a.png"), RemotePath)
    assert not issubclass(RemotePath, PosixPath | WindowsPath)  # which exist on one system alone
