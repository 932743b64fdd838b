"""The CPU convolution against PyTorch's in float64, on this processor and written for narrower vectors."""

from __future__ import annotations

import signal
import threading
import time
from hashlib import sha256

import numpy as np
import pytest

from sanrt.errors import BackendError

torch = pytest.importorskip("torch")
pytest.importorskip("llvmlite")

from sanrt.kernels import attention_cpu, llvm, winograd  # noqa: E402
from sanrt.kernels.threads import Workers  # noqa: E402
from sanrt.kernels.winograd import Convolution, Map  # noqa: E402

NARROW = llvm.Processor("", "", lanes=4, registers=16)
"""Any processor of this family: LLVM's plainest code."""


@pytest.fixture(params=["this processor", "narrow vectors"])
def processor(request, monkeypatch, tmp_path):
    if request.param == "narrow vectors":
        for module in (llvm, winograd, attention_cpu):
            monkeypatch.setattr(module, "this_processor", lambda: NARROW)
        for module in (winograd, attention_cpu):
            monkeypatch.setattr(module, "kernels", module.kernels.__wrapped__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def filled(height, width, channels, seed=0):
    made = Map.zeros(height, width, channels)
    made.pixels[..., :channels] = random(height, width, channels, seed=seed)
    return made


def expected(source, weight, bias, shuffle=1):
    """(height, width, channels) by PyTorch in float64."""
    x = torch.from_numpy(source).double().permute(2, 0, 1)[None]
    y = torch.nn.functional.conv2d(x, torch.from_numpy(weight).double(), torch.from_numpy(bias).double(), padding=1)
    return torch.nn.functional.pixel_shuffle(y, shuffle)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("inputs", "outputs", "shuffle", "height", "width"),
    [
        (64, 64, 1, 9, 14),
        (3, 32, 1, 8, 8),
        (32, 3, 1, 5, 6),
        (48, 48, 1, 1, 1),
        (20, 20, 2, 6, 5),
        (16, 16, 3, 4, 7),
        (32, 32, 1, 70, 66),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_convolution_gives_what_pytorch_gives(processor, inputs, outputs, shuffle, height, width, threads):
    weight, bias = random(outputs * shuffle**2, inputs, 3, 3, seed=1) / 10, random(outputs * shuffle**2, seed=2)
    source, gate = filled(height, width, inputs), random(inputs, seed=3)
    output, added = (filled(height * shuffle, width * shuffle, outputs, seed=seed) for seed in (4, 5))
    conv, workers = Convolution(weight, bias, shuffle), Workers(threads)
    pixels = source.pixels[..., :inputs]
    plain, gated = expected(pixels, weight, bias, shuffle), expected(pixels * gate, weight, bias, shuffle)

    def check(want, **options):
        conv(workers, source, output, **options)
        np.testing.assert_allclose(output.pixels[..., :outputs], want, atol=1e-4)
        inside = np.count_nonzero(output.pixels[..., :outputs])
        assert np.count_nonzero(output.array) <= inside, "written outside of the picture or of its channels"

    output.array[..., outputs:] = 0
    check(plain)
    check(np.maximum(plain, 0), relu=True)
    check(gated + added.pixels[..., :outputs], add=added, gate=gate)
    output.array[:] = added.array
    check(plain + added.pixels[..., :outputs], add=output)
    workers.close()


def test_values_that_are_no_numbers_stay_visible():
    source, output = filled(6, 6, 16), Map.zeros(6, 6, 16)
    source.pixels[2, 2, 0] = np.nan
    Convolution(random(16, 16, 3, 3), random(16))(Workers(1), source, output, relu=True)
    assert np.isnan(output.pixels[2, 2]).all()


@pytest.mark.parametrize(("queries", "keys", "channels"), [(1, 1, 2), (7, 5, 4), (50, 33, 8), (12, 64, 3)])
@pytest.mark.parametrize("factor", [1, 30])
def test_attention_gives_what_pytorch_gives(processor, queries, keys, channels, factor):
    query, key, value = (random(n, channels, seed=n + s) for n, s in ((queries, 0), (keys, 1), (keys, 2)))
    scores = torch.from_numpy(query * factor).double() @ torch.from_numpy(key).double().T
    want = (torch.softmax(scores, -1) @ torch.from_numpy(value).double()).numpy()
    for threads in (1, 3):
        got = attention_cpu.attention(Workers(threads), query * np.float32(factor), key, value)
        np.testing.assert_allclose(got, want, atol=2e-6 * factor)


def test_attention_with_a_score_that_is_no_number_gives_none():
    query, key = random(4, 4), random(9, 4)
    key[5, 0] = np.nan
    assert np.isnan(attention_cpu.attention(Workers(1), query, key, random(9, 4))).all()


def test_an_error_in_any_thread_reaches_the_caller_and_the_threads_live_on():
    workers, seen = Workers(2), []

    def fails():
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        workers.run(fails)
    workers.run(lambda: seen.append(1))
    assert seen == [1, 1]


def test_an_interrupt_is_told_when_no_thread_is_at_work_any_more():
    workers, seen = Workers(2), []

    def slow():
        if threading.current_thread() is not threading.main_thread():
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.2)
        seen.append(1)

    with pytest.raises(KeyboardInterrupt):
        workers.run(slow)
    assert seen == [1, 1]
    workers.run(lambda: seen.append(2))
    assert seen == [1, 1, 2, 2]


def test_ended_threads_leave_the_work_to_the_caller():
    workers, seen = Workers(3), []
    workers.close()
    workers.run(lambda: seen.append(1))
    assert seen == [1]


def test_more_threads_than_can_be_started_are_told(monkeypatch):
    def full(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    with pytest.raises(BackendError, match="4 threads cannot be started"):
        Workers(4)


def test_compiled_code_is_kept_and_used_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = []
    for _ in range(2):
        module = llvm.Module(llvm.this_processor())
        with module.function("nothing", 1, 0):
            pass
        code.append(module.machine_code())
        module.compile()["nothing"](0)
    assert code[0] == code[1]
    (kept,) = (tmp_path / "sanrt" / "kernels").iterdir()
    for damaged in b"", kept.read_bytes()[:-9]:
        kept.write_bytes(damaged)
        assert module.machine_code() == code[0]
    kept.write_bytes(sha256(b"as it was kept").digest() + b"as it was kept")
    assert module.machine_code() == b"as it was kept"


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert llvm.Module(llvm.this_processor()).machine_code()
