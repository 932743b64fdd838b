"""Files are written whole or not at all, and what is kept to spare work is never taken for something else."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Timer

import pytest

from sanrt import files
from sanrt.errors import FileError
from sanrt.files import (
    cached_file,
    keep,
    kept,
    remove_leftovers,
    replacing,
    require_writable,
    sole_user,
    source_digest,
    temporary_folder,
    write_whole,
)


def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path, small_disk):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"before")
    wanted = r"a\.onnx: cannot be written \(File too large\); free some space$"
    with pytest.raises(FileError, match=wanted), small_disk():
        write_whole(path, bytes(5000), "free some space")
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"a.onnx": b"before"}


def test_an_interrupt_while_writing_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"before")

    def interrupted():
        with replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"a.onnx": b"before"}


def test_threads_that_write_one_file_at_once_do_not_meet(tmp_path):
    contents = [bytes([n]) * 100_000 for n in range(16)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda content: write_whole(tmp_path / "new" / "a.onnx", content), contents))
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["a.onnx"]
    assert (tmp_path / "new" / "a.onnx").read_bytes() in contents


def test_a_file_that_another_program_has_open_for_a_moment_is_replaced_all_the_same(tmp_path):
    """Windows refuses to while it is open; a virus scanner opens what was just written."""
    path = tmp_path / "a.onnx"
    path.write_bytes(b"before")
    scanner = path.open("rb")
    closing = Timer(0.2, scanner.close)
    closing.start()
    write_whole(path, b"after")
    closing.join()
    assert path.read_bytes() == b"after"


def test_names_of_any_length_can_be_written(tmp_path):
    path = tmp_path / ("ü" * 127)
    write_whole(path, b"content")
    assert path.read_bytes() == b"content"


def test_the_next_write_removes_what_a_killed_one_left_and_spares_what_is_being_written(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from sanrt.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as file:\n    print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "a.onnx"], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        write_whole(tmp_path / "b.onnx", b"meanwhile")
        assert len(list(tmp_path.iterdir())) == 2
        process.kill()
    assert len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))  # on Windows the young ones are spared
    write_whole(tmp_path / "b.onnx", b"after")
    assert [each.name for each in tmp_path.iterdir()] == ["b.onnx"]


def test_a_named_pipe_called_like_a_leftover_does_not_stop_anybody(tmp_path):
    os.mkfifo(tmp_path / ".a.sanrt-b.partial")
    write_whole(tmp_path / "a.onnx", b"content")
    assert (tmp_path / ".a.sanrt-b.partial").is_fifo()


@pytest.mark.skipif(files.sys.platform == "win32", reason="Windows removes no file that is open")
def test_a_file_that_is_swept_away_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock, removed = files.fcntl.flock, []

    def late(file, how):
        if not removed:
            (path,) = tmp_path.iterdir()
            path.unlink()
            removed.append(path)
        lock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    write_whole(tmp_path / "a.onnx", b"content")
    assert removed
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"a.onnx": b"content"}


def test_a_place_that_cannot_be_written_is_told_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=r"cannot be written \((File exists|Not a directory)\); choose another place"):
        require_writable(tmp_path / "file" / "a.onnx")
    require_writable(tmp_path / "new" / "a.onnx")
    assert not list((tmp_path / "new").iterdir())


def test_what_is_kept_is_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return b"content"

    for _ in range(3):
        assert cached_file([tmp_path / "a", tmp_path / "b"], "name", make) == b"content"
    assert len(made) == 1
    assert not (tmp_path / "b").exists()


def test_a_folder_that_cannot_be_written_is_replaced_by_the_next_and_the_last_by_memory(tmp_path):
    (tmp_path / "file").touch()
    keep([tmp_path / "file" / "a", tmp_path / "b"], "name", b"content")
    assert kept([tmp_path / "file" / "a", tmp_path / "b"], "name") == b"content"
    assert cached_file([tmp_path / "file" / "a"], "name", lambda: b"made") == b"made"


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: content[:-1] + b"?"])
def test_damage_to_a_kept_file_is_seen_and_it_is_made_again(tmp_path, damage):
    keep([tmp_path], "name", b"content")
    path = tmp_path / "name"
    path.write_bytes(damage(path.read_bytes()))
    assert kept([tmp_path], "name") is None
    assert cached_file([tmp_path], "name", lambda: b"again") == b"again"
    assert kept([tmp_path], "name") == b"again"


def test_without_a_home_folder_nothing_is_kept(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "none"))
    assert files.cache_folder() == tmp_path / "file" / "none" / ".cache" / "sanrt"
    assert cached_file([files.cache_folder()], "name", lambda: b"made") == b"made"


def test_a_digest_of_source_changes_with_the_source_alone(tmp_path, monkeypatch):
    folder = tmp_path / "somebody"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "a.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)

    def digest():
        source_digest.cache_clear()
        return source_digest("somebody")

    before = digest()
    (folder / "notes.txt").write_text("no source")
    assert digest() == before
    (folder / "a.py").write_text("x = 2\n")
    assert digest() != before
    source_digest.cache_clear()


def test_leftovers_of_other_kinds_stay(tmp_path):
    for name in ("a.partial", ".a.partial", "a.sanrt-1.partial"):
        (tmp_path / name).touch()
    assert remove_leftovers(tmp_path) == []


@pytest.mark.skipif(files.sys.platform == "win32", reason="Windows removes no file that is open")
def test_a_lock_that_was_removed_while_it_was_opened_is_made_again(tmp_path, monkeypatch):
    lock, held = tmp_path / "new" / "lock", files.fcntl.flock

    def after_its_removal(*arguments):
        monkeypatch.setattr(files.fcntl, "flock", held)
        lock.unlink()
        held(*arguments)

    monkeypatch.setattr(files.fcntl, "flock", after_its_removal)
    with sole_user(lock) as first:
        with sole_user(lock) as second:
            assert (first, second) == (True, False)
        assert lock.exists()
    assert not lock.exists()


def test_a_file_is_on_the_disk_before_it_takes_its_place_and_its_name_afterwards(tmp_path, monkeypatch):
    path, seen = tmp_path / "a", []

    def fsync(descriptor):
        seen.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), os.fstat(descriptor).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(path, b"content")
    (is_folder, size, exists), *then = seen
    assert (is_folder, size, exists) == (False, 7, False)
    folders = [(is_folder, exists) for is_folder, _, exists in then]
    assert folders == ([] if files.sys.platform == "win32" else [(True, True)])


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_say_what_is_on_the_disk_is_written_to(tmp_path, monkeypatch, code):
    def fsync(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"


def test_a_disk_that_fails_on_the_way_is_told_and_the_file_stays_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"before")

    def fsync(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(FileError, match="Input/output error"):
        write_whole(tmp_path / "a", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"before"


def test_an_error_of_the_system_in_a_librarys_words_is_told_in_these(tmp_path):
    with (
        pytest.raises(FileError, match=r"cannot be written \(its own words\); choose"),
        files.replacing(tmp_path / "a"),
    ):
        raise OSError("its own words")


HOLDER = """
import sys, time
from pathlib import Path
from sanrt.files import temporary_folder
with temporary_folder(Path(sys.argv[1]), "sanrt-serve") as folder:
    (folder / "picture").write_bytes(b"x")
    print(folder, flush=True)
    time.sleep(600)
"""


def test_a_killed_process_s_temporary_folder_is_removed_by_the_next_and_a_living_one_s_never(tmp_path):
    (tmp_path / "sanrt-serve-photos").mkdir()
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as living:
        try:
            spared = Path(living.stdout.readline().strip())
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
                left = Path(killed.stdout.readline().strip())
                killed.kill()
            assert (left / "picture").exists()
            age(left)
            with temporary_folder(tmp_path, "sanrt-serve") as own:
                assert not left.exists()
                assert (spared / "picture").exists()
                assert own.stat().st_mode & 0o777 == 0o700 or sys.platform == "win32"
            assert not own.exists()
        finally:
            living.kill()
    age(spared)
    with temporary_folder(tmp_path, "sanrt-serve"):
        assert not spared.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["sanrt-serve-photos"]


def age(folder):
    """Make a temporary folder's lock old: on Windows young ones are spared."""
    os.utime(folder.with_name(f".sanrt-serve.sanrt-{folder.name.rpartition('-')[2]}.partial"), (0, 0))


def test_a_folder_whose_lock_another_process_cleared_away_is_removed_too(tmp_path):
    (tmp_path / "sanrt-serve-0123456789abcdef").mkdir()
    with temporary_folder(tmp_path, "sanrt-serve") as own:
        assert [path for path in tmp_path.iterdir() if path.is_dir()] == [own]
