import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from sanrt.errors import OutOfMemoryError, ScratchError
from sanrt.geometry import Box
from sanrt.runtime.tiling import featuremaps
from sanrt.runtime.tiling.featuremaps import BAND, FeatureStore, Fetched, MemoryMap, ScratchMap


def test_tiles_cover_every_pixel_once_and_none_is_larger_than_asked():
    seen = np.zeros((101, 67), int)
    for box in Box(0, 0, 101, 67).tiles(16):
        assert max(box.height, box.width) <= 16
        seen[box.top : box.bottom, box.left : box.right] += 1
    assert (seen == 1).all()


def test_a_halo_stops_at_the_picture():
    assert Box(0, 10, 20, 30).grown(8, Box(0, 0, 24, 64)) == Box(0, 2, 24, 38)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
@pytest.mark.parametrize("width", [1, BAND, BAND + 1, 3 * BAND - 5])
def test_a_scratch_file_holds_what_memory_holds(tmp_path, width, dtype):
    rng = np.random.default_rng(0)
    maps = MemoryMap(5, 40, width, dtype), ScratchMap(5, 40, width, dtype, tmp_path)
    whole = Box(0, 0, 40, width)
    for m in maps:
        m.write(whole, np.zeros((1, 5, 40, width), dtype))
    for _ in range(60):
        top, left = rng.integers(40), rng.integers(width)
        box = Box(top, left, rng.integers(top, 40) + 1, rng.integers(left, width) + 1)
        part = rng.integers(0, 255, (1, 5, box.height, box.width)).astype(dtype)
        for m in maps:
            m.write(box, part)
        np.testing.assert_array_equal(maps[0].read(box), part)
        np.testing.assert_array_equal(maps[1].read(whole), maps[0].read(whole))
    maps[1].close()


def test_memory_goes_to_the_first_maps_and_no_file_shows(tmp_path):
    with FeatureStore(4 * 10 * 10 * 4, tmp_path) as store:
        first, second = (store.new(4, 10, 10) for _ in range(2))
        assert (type(first), type(second)) == (MemoryMap, ScratchMap)
        assert list(tmp_path.iterdir()) == []


class StandInDevice:
    """A GPU that is the host: its parts are lists of an array, which nothing else could read."""

    def __init__(self, room):
        self.room = room

    def new(self, *shape):
        if not self.room:
            raise OutOfMemoryError("none left")
        self.room -= 1
        return MemoryMap(*shape, np.float32)

    def fetch(self, part):
        return part[0]


def test_the_gpu_comes_first_then_memory_then_scratch_files(tmp_path):
    size = 4 * 10 * 10
    with FeatureStore(4 * size, tmp_path, StandInDevice(9), 2 * 4 * size) as store:
        made = [store.new(4, 10, 10) for _ in range(4)]
        assert [type(getattr(m, "map", m)) for m in made] == [MemoryMap, MemoryMap, MemoryMap, ScratchMap]
        assert [type(m) for m in made] == [MemoryMap, MemoryMap, Fetched, Fetched]
        box, part = Box(2, 3, 8, 9), np.ones((1, 4, 6, 6), np.float32)
        for m in made[2:]:
            m.write(box, [part])
            np.testing.assert_array_equal(m.read(box), part)
            m.write(box, 2 * part)
            np.testing.assert_array_equal(m.read(box), 2 * part)


def test_a_gpu_with_less_memory_than_it_said_is_not_asked_again(tmp_path):
    device = StandInDevice(1)
    with FeatureStore(2**20, tmp_path, device, 2**20) as store:
        assert [type(store.new(4, 10, 10)) for _ in range(2)] == [MemoryMap, Fetched]
        device.room = 1
        assert type(store.new(4, 10, 10)) is Fetched


def test_pixels_of_pictures_stay_on_the_host(tmp_path):
    with FeatureStore(2**20, tmp_path, StandInDevice(9), 2**20) as store:
        assert type(store.new(3, 10, 10, np.uint8)) is Fetched


def test_a_full_disk_is_told_at_once(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(featuremaps, "reserve", full)
    with pytest.raises(ScratchError, match=r"no scratch file of 0\.4 GB \(No space left on device\); free some space"):
        FeatureStore(0, tmp_path).new(10, 3000, 3200)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_writing_is_told(tmp_path):
    program = f"""
        import resource, signal
        from pathlib import Path
        import numpy as np
        from sanrt.errors import ScratchError
        from sanrt.geometry import Box
        from sanrt.runtime.tiling.featuremaps import ScratchMap
        m = ScratchMap(4, 64, 64, np.float32, Path({str(tmp_path)!r}))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            m.write(Box(0, 0, 64, 64), np.ones((1, 4, 64, 64), np.float32))
        except ScratchError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout


def test_a_killed_process_leaves_no_scratch_file(tmp_path):
    program = f"""
        import os
        from pathlib import Path
        import numpy as np
        from sanrt.geometry import Box
        from sanrt.runtime.tiling.featuremaps import FeatureStore
        with FeatureStore(0, Path({str(tmp_path)!r})) as store:
            store.new(4, 64, 64).write(Box(0, 0, 64, 64), np.ones((1, 4, 64, 64), np.float32))
            os.kill(os.getpid(), {int(signal.SIGKILL)})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("offsets", ["the system's", "none"])
def test_rows_come_back_from_a_scratch_file_whole_and_in_place(tmp_path, monkeypatch, offsets):
    if offsets == "none":  # as on Windows
        for name in "preadv", "pwritev":
            monkeypatch.delattr(os, name, raising=False)
    rows = np.random.default_rng(0).random((30, 7, 16), np.float32)
    with FeatureStore(0, tmp_path) as store:
        file = store.new_rows(40, rows[0].nbytes)
        file.write(5, rows)
        file.write(9, rows[:2])
        got = np.empty_like(rows)
        file.read(5, got)
        assert not list(tmp_path.iterdir())
    rows[4:6] = rows[:2].copy()
    np.testing.assert_array_equal(got, rows)
    assert store.maps == []


def test_rows_on_a_full_disk_are_one_error(tmp_path, small_disk):
    with FeatureStore(0, tmp_path) as store, small_disk(), pytest.raises(ScratchError, match="free some space"):
        store.new_rows(100, 4096)
