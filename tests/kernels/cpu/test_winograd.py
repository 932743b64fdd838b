"""The CPU kernels against PyTorch in float64, on this processor and written for narrower vectors."""

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

from sanrt.kernels.cpu import attention, ir, schedule, soca, winograd  # noqa: E402
from sanrt.kernels.cpu.schedule import Program, Step, moments_of  # noqa: E402
from sanrt.kernels.cpu.soca import Gate, moments_rows  # noqa: E402
from sanrt.kernels.cpu.winograd import Convolution, Map, Products, method_of  # noqa: E402
from sanrt.kernels.cpu.workers import Workers  # noqa: E402
from sanrt.model.soca import SOCA  # noqa: E402

PAIRS = ir.this_processor().pairs and ir.PAIRS[4]
NARROW = ir.Processor("", "", lanes=4, registers=16, pairs=PAIRS)
"""Any processor of this family: LLVM's plainest code."""
INT16 = pytest.param(Products.INT16, marks=pytest.mark.skipif(not PAIRS, reason="no 16-bit products on this processor"))
PRODUCTS = (Products.FP32, INT16)
CLOSE = {Products.FP32: 2e-5, Products.INT16: 0.02}
"""Root mean square of the error, of the values'; of noise, which is the worst that 16-bit products can meet."""
WORST = 10
"""The largest error, of that: a tile's corners are coarser than its middle."""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=["this processor", "narrow vectors"])
def processor(request, monkeypatch):
    if request.param == "narrow vectors":
        for module in (ir, winograd, attention, schedule, soca):
            monkeypatch.setattr(module, "this_processor", lambda: NARROW)
        for module in (schedule, attention, soca):
            monkeypatch.setattr(module, "kernels", module.kernels.__wrapped__)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def filled(height, width, channels, products, seed=0, taps=3):
    made = Map.zeros(height, width, channels, method_of(products, taps))
    made.pixels[..., :channels] = random(height, width, channels, seed=seed)
    return made


def expected(source, weight, bias):
    """(height, width, channels) by PyTorch in float64."""
    x = torch.from_numpy(source).double().permute(2, 0, 1)[None]
    y = torch.nn.functional.conv2d(x, torch.from_numpy(weight).double(), torch.from_numpy(bias).double(), padding="same")
    return y[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("inputs", "outputs", "taps", "height", "width"),
    [
        (64, 64, 3, 9, 14),
        (3, 32, 3, 8, 8),
        (32, 3, 3, 5, 6),
        (48, 48, 3, 1, 1),
        (20, 12, 5, 6, 5),
        (64, 48, 5, 13, 30),
        (32, 32, 3, 70, 66),
    ],
)
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_convolution_gives_what_pytorch_gives(processor, inputs, outputs, taps, height, width, products, threads):
    weight, bias = random(outputs, inputs, taps, taps, seed=1) / 10, random(outputs, seed=2)
    gate = np.zeros(winograd.whole_vectors(inputs), np.float32)
    gate[:inputs] = random(inputs, seed=3)
    source = filled(height, width, inputs, products, taps=taps)
    output, added, also = (filled(height, width, outputs, products, seed, taps) for seed in (4, 5, 6))
    conv, workers = Convolution(weight, bias, products), Workers(threads)
    pixels = source.pixels[..., :inputs]
    plain, gated = expected(pixels, weight, bias), expected(pixels * gate[:inputs], weight, bias)

    def check(want, **options):
        Program([Step(conv, source, output, **options)], workers).run()
        assert_close(output.pixels[..., :outputs], want, products)
        inside = np.count_nonzero(output.pixels[..., :outputs])
        assert np.count_nonzero(output.array) <= inside, "written outside of the picture or of its channels"

    output.array[..., outputs:] = 0
    check(plain)
    check(np.maximum(plain, 0), relu=True)
    check(gated + added.pixels[..., :outputs], added=added, gate=gate)
    check(plain + added.pixels[..., :outputs] + also.pixels[..., :outputs], added=added, also=also)
    output.array[:] = added.array
    check(plain + added.pixels[..., :outputs], added=output)
    workers.close()


def assert_close(got, want, products):
    allowed = CLOSE[products] * max(np.sqrt(np.mean(want**2)), 1)
    errors = got - want
    assert np.sqrt(np.mean(errors**2)) < allowed
    assert np.abs(errors).max() < WORST * allowed


def block_steps(height, width, products, channels=16):
    """Two residual blocks in place and a last convolution, as a group of the network; and what they give by PyTorch."""
    x, method = filled(height, width, channels, products), method_of(products)
    hidden, features = (Map.zeros(height, width, channels, method) for _ in range(2))
    spread = 15 * (channels / 16) ** 0.5
    weights = [random(channels, channels, 3, 3, seed=seed) / spread for seed in range(5)]
    bias = random(channels) / 10
    conv = [Convolution(weight, bias, products) for weight in weights]
    f = want = np.array(x.pixels[..., :channels])
    for first, second in (weights[:2], weights[2:4]):
        f = f + expected(np.maximum(expected(f, first, bias), 0).astype(np.float32), second, bias).astype(np.float32)
    want = want + expected(f, weights[4], bias)
    steps = [
        Step(conv[0], x, hidden, relu=True),
        Step(conv[1], hidden, features, added=x),
        Step(conv[2], features, hidden, relu=True),
        Step(conv[3], hidden, features, added=features, moments=moments_of(features, products)),
        Step(conv[4], features, x, added=x),
    ]
    return steps, want, f


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("height", "width", "channels"), [(3, 4, 16), (50, 7, 16), (61, 75, 16), (20, 26, 48), (20, 26, 64), (14, 20, 128)]
)
def test_steps_follow_each_other_in_place_on_any_number_of_threads(processor, height, width, channels, products, threads):
    workers = Workers(threads)
    steps, want, features = block_steps(height, width, products, channels)
    Program(steps, workers).run()
    workers.close()
    assert_close(steps[-1].output.pixels[..., :channels], want, products)
    moments = steps[3].moments
    counts, means = moments[:, 0, 0], moments[:, 1, :channels]
    scatter = np.triu(moments[:, 2 : 2 + channels, :channels].sum(0, dtype=np.float64))
    scatter += np.triu(scatter, 1).T
    rows = features.reshape(-1, channels)
    assert counts.sum() == len(rows)
    mean = counts @ means / len(rows)
    scatter += (means - mean).T @ np.diag(counts) @ (means - mean)
    assert_close(mean, rows.mean(0), products)
    assert_close(scatter / len(rows), np.cov(rows.T, bias=True), products)


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of three strips, two steps at a time."""
    for name, value in (("PART", 3), ("MOST_LAG", 2), ("STRIP", 50_000)):
        monkeypatch.setattr(schedule, name, value)
    schedule.tickets.cache_clear()
    yield
    schedule.tickets.cache_clear()


@pytest.mark.parametrize("products", PRODUCTS)
def test_the_result_depends_neither_on_the_number_of_threads_nor_on_the_order_of_the_strips(
    products, monkeypatch, small_parts
):
    results = []
    for threads, near in ((1, 2**40), (2, 2**40), (5, 2**40), (1, 0), (2, 0), (5, 0)):
        monkeypatch.setattr(schedule, "NEAR", near)
        workers = Workers(threads)
        steps, _, _ = block_steps(61, 75, products)
        Program(steps, workers).run()
        workers.close()
        results.append((steps[-1].output.array, steps[3].moments))
    for result in results[1:]:
        for got, first in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(got, first)


@pytest.mark.parametrize("products", [INT16])
def test_sums_of_rounded_products_come_close_to_32_bits_and_not_beyond(products):
    """All products of one point have the largest magnitude and the same sign."""
    method = method_of(products)
    row = np.poly([q for q in method.finite if q != 1])[::-1]  # of B^T, for the point 1
    signs = np.where(np.append(row, np.zeros(method.side - len(row))) < 0, -1, 1)
    weight, bias = np.ones((16, 64, 3, 3), np.float32), np.zeros(16, np.float32)
    tile = method.tile
    source, output = (Map.zeros(3 * tile, 3 * tile, n, method) for n in (64, 16))
    source.array[tile : 2 * tile + 2, tile : 2 * tile + 2] = 1e4 * np.outer(signs, signs)[..., None]
    conv = Convolution(weight, bias, products)
    largest = conv.weight.reshape(method.points, -1, 16, 2).astype(np.int64)[method.side + 1].sum((0, 2)).max()
    assert 0.99 * 2**31 < abs(largest) * winograd.LARGEST < 2**31
    Program([Step(conv, source, output)], Workers(1)).run()
    want = expected(source.pixels[..., :64], weight, bias)
    errors = output.pixels[..., :16] - want  # all channels round alike here, so they are large; a wrapped sum's are larger
    assert np.sqrt(np.mean(errors**2)) < 0.1 * np.sqrt(np.mean(want**2))


@pytest.mark.parametrize(("rows", "columns", "threads"), [(30, 54, 2), (60, 107, 3), (7, 5, 1), (3, 2, 2)])
def test_in_large_maps_a_thread_takes_a_part_through_several_steps_and_waits_for_nothing_that_comes_later(
    rows, columns, threads
):
    def taken(far):
        return [part[:-1] for part in schedule.tickets(rows, columns, 6, 12, 21, threads, far)]

    step, flag, first, last = (schedule.TICKET.index(name) for name in ("step", "flag", "first_needed", "last_needed"))
    todo, done = [list(part) for part in taken(far=True)], set()
    while any(todo):
        ready = [part for part in todo if part and done.issuperset(range(part[0][first], part[0][last]))]
        assert ready, "every thread waits"
        done.add(ready[0].pop(0)[flag])
    plain, parts = taken(far=False), taken(far=True)
    assert [sorted(map(tuple, part)) for part in plain] == [sorted(map(tuple, part)) for part in parts]
    assert all((np.diff(part[:, step]) >= 0).all() for part in plain)
    assert rows < 30 or all((np.diff(part[:, step]) < 0).any() for part in parts)


def test_a_thread_that_fails_leaves_nobody_waiting(monkeypatch):
    workers = Workers(2)
    steps, want, _ = block_steps(61, 75, Products.FP32)
    starving, buffer = Program(steps, workers), workers.buffer

    def starved(name, size):
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("no room")
        return buffer(name, size)

    monkeypatch.setattr(workers, "buffer", starved)
    with pytest.raises(MemoryError, match="no room"):
        starving.run()
    monkeypatch.undo()
    steps, want, _ = block_steps(61, 75, Products.FP32)
    Program(steps, workers).run()
    assert_close(steps[-1].output.pixels[..., :16], want, Products.FP32)
    workers.close()


def test_steps_that_would_write_beyond_their_maps_are_refused():
    source, output = (filled(6, 6, 16, Products.FP32, seed) for seed in (1, 2))
    conv, other = (Convolution(random(16, n, 3, 3), random(16)) for n in (16, 48))
    for wrong in (
        lambda: Step(other, source, output),
        lambda: Step(conv, source, source),
        lambda: Step(conv, source, filled(6, 7, 16, Products.FP32)),
        lambda: Step(conv, source, output, also=output),
        lambda: Step(conv, source, output, gate=random(8)),
        lambda: Program([Step(conv, source, output, moments=moments_rows(3, 16))], Workers(1)),
    ):
        with pytest.raises(AssertionError):
            wrong()


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_values_that_are_no_numbers_stay_visible(products, value):
    source, output = filled(6, 6, 16, products), Map.zeros(6, 6, 16, method_of(products))
    source.pixels[2, 2, 0] = value
    conv = Convolution(random(16, 16, 3, 3), random(16), products)
    Program([Step(conv, source, output)], Workers(1)).run()
    assert not np.isfinite(output.pixels[2, 2]).any()


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_map_of_zeros_gives_the_bias(products):
    source, output = (Map.zeros(6, 6, 16, method_of(products)) for _ in range(2))
    bias = random(16)
    Program([Step(Convolution(random(16, 16, 3, 3), bias, products), source, output)], Workers(1)).run()
    np.testing.assert_array_equal(output.pixels, np.broadcast_to(bias, (6, 6, 16)))


@pytest.mark.parametrize(("channels", "reduction"), [(16, 4), (24, 3), (64, 16)])
@pytest.mark.parametrize("iterations", [1, 5, 12])
def test_the_gate_is_that_of_the_reference(processor, channels, reduction, iterations):
    torch.manual_seed(channels)
    reference = SOCA(channels, reduction, iterations).double()
    x = torch.randn(1, channels, 20, 30, dtype=torch.float64) @ torch.randn(30, 30, dtype=torch.float64) + 3
    padded = winograd.whole_vectors(channels)
    moments, parts = moments_rows(3, padded), np.split(x[0].reshape(channels, -1).numpy(), [70, 500], axis=1)
    for row, part in zip(moments, parts, strict=True):
        row[0], row[1, :channels] = part.shape[1], part.mean(1)
        row[2 : 2 + channels, :channels] = np.triu(np.cov(part, bias=True) * part.shape[1])

    def pad(values):
        values = values.detach().numpy()
        padding = [(0, 0)] * (values.ndim - 1) + [(0, padded - channels)]
        return np.ascontiguousarray(np.pad(values, padding), np.float32)

    down, up = reference.down.weight[:, :, 0, 0], reference.up.weight[:, :, 0, 0]
    bias = reference.down.bias.detach().numpy().astype(np.float32)
    out = ir.aligned((padded,))
    Gate(channels, iterations, pad(down), bias, pad(up.T), pad(reference.up.bias))(moments, out)
    want = (reference(x) / x)[0, :, 0, 0].detach().numpy()
    np.testing.assert_allclose(out[:channels], want, atol=2e-6)


@pytest.mark.parametrize(("queries", "keys", "channels"), [(1, 1, 2), (7, 5, 4), (50, 33, 8), (12, 64, 3), (60, 1300, 4)])
@pytest.mark.parametrize("factor", [1, 30])
def test_attention_gives_what_pytorch_gives(processor, queries, keys, channels, factor):
    query, key, value = (random(n, channels, seed=n + s) for n, s in ((queries, 0), (keys, 1), (keys, 2)))
    scores = torch.from_numpy(query * factor).double() @ torch.from_numpy(key).double().T
    want = (torch.softmax(scores, -1) @ torch.from_numpy(value).double()).numpy()
    for threads in (1, 3):
        got = attention.attention(Workers(threads), query * np.float32(factor), key, value)
        np.testing.assert_allclose(got, want, atol=2e-6 * factor)


@pytest.mark.parametrize("order", [1, -1])
def test_the_largest_score_may_come_in_any_block(order):
    query, value = np.ones((5, 2), np.float32), random(1300, 2)
    key = np.repeat(np.linspace(0, 60, 1300, dtype=np.float32)[::order, None], 2, axis=1)
    weights = np.exp((query.astype(np.float64) @ key.T) - 120)
    want = weights / weights.sum(1, keepdims=True) @ value
    np.testing.assert_allclose(attention.attention(Workers(2), query, key, value), want, atol=1e-4)


def test_attention_with_a_score_that_is_no_number_gives_none():
    query, key = random(4, 4), random(9, 4)
    key[5, 0] = np.nan
    assert np.isnan(attention.attention(Workers(1), query, key, random(9, 4))).all()


def test_an_error_in_any_thread_reaches_the_caller_and_the_threads_live_on():
    workers, seen = Workers(2), []

    def fails(_):
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        workers.run(fails)
    workers.run(lambda _: seen.append(1))
    assert seen == [1, 1]


def test_an_interrupt_is_told_when_no_thread_is_at_work_any_more():
    workers, seen = Workers(2), []

    def slow(_):
        if threading.current_thread() is not threading.main_thread():
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.2)
        seen.append(1)

    with pytest.raises(KeyboardInterrupt):
        workers.run(slow)
    assert seen == [1, 1]
    workers.run(lambda _: seen.append(2))
    assert seen == [1, 1, 2, 2]


def test_ended_threads_leave_the_work_to_the_caller():
    workers, seen = Workers(3), []
    workers.close()
    workers.run(lambda _: seen.append(1))
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
        module = ir.Module(ir.this_processor())
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
    assert ir.Module(ir.this_processor()).machine_code()
