"""`sanrt run - - --y4m`: raw frames through pipes."""

from __future__ import annotations

import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
from typer.testing import CliRunner

from sanrt.cli import app
from sanrt.errors import PictureError, UsageError
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend
from sanrt.runtime.pictures.codec import Encoding
from sanrt.runtime.runs.y4m_stream import Stream, enlarge
from sanrt.runtime.tiling.upscaling import NetworkRunner
from sanrt.runtime.video.y4m import RawFrame, plane_shapes, read_frames, read_header, write_frame


@pytest.fixture(scope="module")
def model(tiny_model):
    """The tiny x2 model, already prepared for its backend."""
    load_backend("onnxruntime", tiny_model(2), RunOptions()).close()
    return tiny_model(2)


def source(words: str, numbers, width=33, height=25) -> bytes:
    """A stream of noise with this header behind its size, one frame for each number."""
    line = f"YUV4MPEG2 W{width} H{height} {words}\n".encode()
    header, out = read_header(BytesIO(line), "x"), BytesIO(line)
    out.seek(0, 2)
    for number in numbers:
        random = np.random.default_rng(number)
        shapes = plane_shapes(header.format, width, height)
        planes = [random.integers(0, 1 << header.format.bits, shape).astype(header.format.dtype) for shape in shapes]
        write_frame(out, RawFrame(b"FRAME\n", planes))
    return out.getvalue()


def enlarged(data: bytes, model, **encoding) -> bytes:
    """What the library makes of a stream."""
    file, out = BytesIO(data), BytesIO()
    with load_backend("onnxruntime", model, RunOptions(threads=1)) as network:
        enlarge(Stream(file, "x", read_header(file, "x"), out), NetworkRunner(network), Encoding(**encoding))
    return out.getvalue()


def sanrt(data: bytes, model, *options):
    """The command with the stream on its standard input."""
    words = [sys.executable, "-m", "sanrt", "run", "-", "-", "--y4m", "--model", str(model), "--backend", "onnxruntime"]
    return subprocess.run([*words, "--threads", "1", *options], input=data, capture_output=True)


@pytest.mark.parametrize(
    "colours",
    ["420jpeg", "420mpeg2 XYSCSS=420MPEG2", "420p10 XCOLORRANGE=FULL", "422", "444p10", "411", "mono", "mono12", "440"],
)
def test_the_header_is_kept_to_the_letter_but_for_the_size_and_frames_are_what_the_network_makes(model, colours):
    words = f"F30000:1001 Ip A4:3 C{colours}"
    data = source(words, [0, 1])
    result = enlarged(data, model)
    assert result.partition(b"\n")[0] == f"YUV4MPEG2 W66 H50 {words}".encode()
    planes, conversion = frames_of(data)
    found, _ = frames_of(result)
    assert len(found) == 2
    with load_backend("onnxruntime", model, RunOptions(threads=1)) as network:
        runner = NetworkRunner(network)
        for before, after in zip(planes, found, strict=True):
            rgb = conversion.to_rgb(before)
            large, _ = runner.run_array(runner.decide_array(25, 33), rgb)
            assert all(np.array_equal(a, b) for a, b in zip(conversion.from_picture(large), after, strict=True))


def frames_of(data: bytes):
    """The planes of every frame, and the conversion of the stream."""
    file = BytesIO(data)
    header = read_header(file, "x")
    return [frame.planes for frame in read_frames(file, header, "x")], header.conversion


def test_frames_come_out_of_a_pipe_before_the_source_has_ended(model):
    data = source("F25:1", range(4))
    part = len(data) - (len(data) - 26) // 4
    words = [sys.executable, "-m", "sanrt", "run", "-", "--y4m", "--model", str(model), "--backend", "onnxruntime"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(data[:part])
        process.stdin.flush()
        whole = enlarged(data, model)
        first = process.stdout.read(len(whole) // 3)
        process.stdin.write(data[part:])
        process.stdin.close()
        assert first + process.stdout.read() == whole
        told = process.stderr.read().decode()
    assert process.returncode == 0
    assert "sanrt: 4 frames, " in told.splitlines()[-1]


def test_a_stream_that_ends_within_a_frame_is_written_up_to_it_and_is_an_error(model):
    data = source("F25:1 C420mpeg2", range(3))
    done = sanrt(data[:-10], model, "--quiet")
    assert done.returncode == 1
    assert done.stderr == b"sanrt: standard input: ends within frame 2; the 2 before it are written\n"
    assert done.stdout == enlarged(source("F25:1 C420mpeg2", range(2)), model)


def test_equal_frames_are_written_again_and_sizes_fit_the_chroma(model):
    found, _ = frames_of(enlarged(source("F25:1", [1, 1, 2]), model, size=(51, 51)))
    assert [plane.shape for plane in found[0]] == [(38, 50), (19, 25), (19, 25)]
    assert np.array_equal(found[0][0], found[1][0])
    assert not np.array_equal(found[1][0], found[2][0])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no timers that interrupt writes")
def test_a_write_that_signals_interrupt_is_written_to_its_end_by_an_unbuffered_python_too():
    program = """
import os, signal
from sanrt.cli.streams import standard_output
signal.signal(signal.SIGALRM, lambda *_: os.write(2, b"!"))
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
with standard_output() as out:
    out.write(bytes(1 << 20))
    signal.setitimer(signal.ITIMER_REAL, 0)
"""
    with subprocess.Popen([sys.executable, "-u", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr.read(2) == b"!!"
        assert len(process.stdout.read()) == 1 << 20


def test_grey_that_says_no_range_is_full():
    def full(words):
        return read_header(BytesIO(f"YUV4MPEG2 W8 H8 F25:1 {words}\n".encode()), "x").full_range

    assert [full("Cmono"), full("Cmono12"), full("Cmono XCOLORRANGE=FULL"), full("C420 XCOLORRANGE=FULL")] == [True] * 4
    assert [full("Cmono XCOLORRANGE=LIMITED"), full("C420"), full("C420 XCOLORRANGE=LIMITED")] == [False] * 3


def test_a_reader_that_leaves_ends_the_run_without_a_word(model):
    data = source("F25:1", [0, 1] * 20)
    words = [sys.executable, "-m", "sanrt", "run", "-", "-", "--y4m", "--quiet", "--model", str(model)]
    with subprocess.Popen(
        [*words, "--backend", "onnxruntime"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        told = feed(process, data)
    assert (process.returncode, told) == (1, b"")


def feed(process, data: bytes) -> bytes:
    """Write as much as is taken; what was said on stderr."""
    try:
        process.stdin.write(data)
        process.stdin.close()
    except BrokenPipeError:
        pass
    return process.stderr.read()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "nothing in it"),
        (b"\x89PNG", "no YUV4MPEG2"),
        (b"YUV4MPEG2 W8 H8 F25:1 It\n", "interlaced"),
        (b"YUV4MPEG2 W8 H8 F25:1 C444alpha\n", "its samples are 444alpha"),
        (b"YUV4MPEG2 W8 H8 F25:1 C420p17\n", "its samples are 420p17"),
        (b"YUV4MPEG2 W8 F25:1\n", "its header says H; expected H and a number"),
        (b"YUV4MPEG2 W999999 H999999\n", "claims 999999 x 999999 pixels"),
        (b"YUV4MPEG2 W8 H8", "no YUV4MPEG2"),
        (b"YUV4MPEG2 W16 H16\n", "no frames in it"),
        (b"YUV4MPEG2 W16 H16\nnonsense\n", "no frame where frame 0 is expected"),
    ],
)
def test_what_is_no_stream_of_frames_is_one_line(data, said):

    file = BytesIO(data)
    with pytest.raises(PictureError, match=said):
        list(read_frames(file, read_header(file, "standard input"), "standard input"))


@pytest.mark.parametrize("words", [["a.mp4", "-"], ["-", "-", "--codec", "h264"], ["-", "-", "--dry-run"]])
def test_files_and_their_options_are_refused_beside_raw_frames(words):
    done = CliRunner().invoke(app, ["run", "--y4m", *words])
    assert isinstance(done.exception, UsageError)
    assert "--y4m" in str(done.exception)
