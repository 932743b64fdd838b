"""libvips is one for all threads: whose fault an error is, whoever else uses it meanwhile."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest
import pyvips

from sanrt.errors import PictureError
from sanrt.runtime import host
from sanrt.runtime.pictures import libvips
from sanrt.runtime.pictures.codec import open_picture, upscale_alpha
from sanrt.runtime.pictures.libvips import LOCKS, SharedLock


def test_the_reason_is_asked_for_again_when_another_thread_emptied_the_buffer_and_nobody_writes(tmp_path):
    path = tmp_path / "cut.gif"
    content = pyvips.Image.gaussnoise(64, 64, seed=1).cast("uchar").gifsave_buffer()
    path.write_bytes(content[: len(content) // 2])
    attempts = []

    def work():
        attempts.append(LOCKS.writing.holders)
        try:
            pyvips.Image.new_from_file(str(path), fail_on="error").avg()
        except pyvips.Error as error:
            if len(attempts) == 1:  # as if another thread had asked for an attribute of an image just then
                raise pyvips.Error(error.message, " ") from None
            raise

    with pytest.raises(PictureError, match=r"^a\.gif: damaged \(gifload: Unexpected end of GIF source data\)$"):
        libvips.read("a.gif: damaged", work)
    assert attempts == [0, 0]


def test_one_alone_waits_until_all_others_are_done():
    lock, order = SharedLock(), []

    def alone():
        with lock.alone():
            order.append("alone")

    with lock.together(), lock.together():
        thread = threading.Thread(target=alone)
        thread.start()
        thread.join(0.1)
        order.append("together")
    thread.join()
    assert order == ["together", "alone"]


def test_text_that_is_not_utf_8_in_the_buffer_fails_no_other_picture():
    libvips.vips()
    said = pyvips.ffi.new("char[]", b"heif: \xff")
    assert pyvips.error._to_string(said) == "heif: \ufffd"
    assert upscale_alpha(np.zeros((2, 3), np.uint8), 2).shape == (4, 6)


@pytest.mark.skipif(host.sys.platform == "win32", reason="Windows forks no process")
def test_a_process_that_is_forked_while_a_thread_reads_can_read(tmp_path):
    path = tmp_path / "a.png"
    pyvips.Image.black(8, 8).write_to_file(str(path))
    reading, done = threading.Event(), threading.Event()

    def work():
        reading.set()
        done.wait()

    thread = threading.Thread(target=libvips.read, args=("", work))
    thread.start()
    reading.wait()
    child = os.fork()
    if not child:
        signal.alarm(20)
        with open_picture(path) as picture:
            os._exit(int(picture.rgb().max()))
    status = os.waitpid(child, 0)[1]
    done.set()
    thread.join()
    assert status == 0
