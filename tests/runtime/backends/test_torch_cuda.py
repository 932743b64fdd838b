from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sanrt.errors import BackendError, OutOfMemoryError
from sanrt.kernels.cuda.experimental import VARIABLE, Experiment
from sanrt.model.san import SAN
from sanrt.model.spec import Architecture, ModelSpec, Precision
from sanrt.runtime.backends import torch_cuda
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend
from sanrt.runtime.backends.torch_cuda import CudaNetwork, Graphs, TorchStages, cuda_errors_about, load, prepared, status
from sanrt.runtime.tiling.featuremaps import FeatureStore
from sanrt.runtime.tiling.streaming import ArraySource, Streaming

PYTORCH_NAMES = {Precision.FP32: "float32", Precision.FP16: "float16", Precision.BF16: "bfloat16"}


@pytest.fixture
def net() -> SAN:
    torch.manual_seed(8)
    net = SAN(Architecture(scale=2, groups=1, blocks=1, channels=16, reduction=4))
    nn.init.constant_(net.gamma, 0.3)
    return net.eval().requires_grad_(False)


def test_the_prepared_network_is_the_reference_in_float32(net: SAN) -> None:
    x = 255 * torch.rand(1, 3, 10, 13)
    torch.testing.assert_close(prepared(net, torch.float32)(x), net(x), rtol=0, atol=1e-3)


def test_half_precision_lies_between_mean_shifts_that_stay_float32(net: SAN) -> None:
    fast, x = prepared(net, torch.bfloat16), 255 * torch.rand(1, 3, 10, 13)
    y = fast(x)
    assert y.dtype == torch.float32
    assert fast.head.weight.dtype == torch.bfloat16
    assert net.mean_in.weight.dtype == net.head.weight.dtype == torch.float32
    assert 0 < (y - net(x)).square().mean().sqrt() < 2


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-3), (torch.bfloat16, 4)])
@pytest.mark.parametrize("device_memory", [0, 2**30])
def test_stages_stream_the_whole_network_wherever_its_maps_are(net: SAN, dtype, most, device_memory) -> None:
    x = 255 * torch.rand(1, 3, 37, 29)
    stages = TorchStages(net, torch.device("cpu"), dtype)
    spec = ModelSpec(net.arch, "0" * 64, "seeded", 5)
    y = torch.full((1, 3, 74, 58), torch.nan)

    def sink(box, part):
        y[:, :, box.top : box.bottom, box.left : box.right] = torch.from_numpy(part)

    made, new = [], stages.new
    stages.new = lambda *shape: made.append(new(*shape)) or made[-1]
    store = FeatureStore(2**30, device=stages.maps, device_memory=device_memory)
    Streaming(stages, spec, ArraySource(x.numpy()), store, 16, 2).run(sink)
    assert (y - net(x)).square().mean().sqrt() < most
    assert [m.tensor for m in made] == [None] * (3 if device_memory else 0)
    assert net.head.weight.dtype == torch.float32


def test_maps_say_whether_they_are_finite(net: SAN) -> None:
    stages = TorchStages(net, torch.device("cpu"), torch.float32)
    pixels = 255 * torch.rand(1, 3, 9, 9).numpy()
    for bright in (1.0, float("inf")):
        pixels[0, 0, 4, 4] = bright
        (part,) = stages.run("head", pixels, np.array([0, 0, 9, 9]))
        assert stages.finite(part) == (bright == 1)
        assert stages.fetch(part).dtype == np.float32


def test_each_shape_and_k_is_captured_once_and_the_least_recent_is_dropped() -> None:
    captured: list[tuple[int, int]] = []

    def capture(x: Tensor, regions: int):
        captured.append((len(x), regions))
        return lambda y: y + len(captured)

    graphs = Graphs(capture, release=lambda: None, most=2)
    a, b, c = (torch.zeros(n, 4) for n in (4, 5, 6))
    for x, regions in ((a, 2), (b, 2), (a, 2), (c, 2), (a, 2), (a, 3), (a, 2)):
        assert graphs(x, regions).shape == x.shape
    assert captured == [(4, 2), (5, 2), (6, 2), (4, 3)]
    assert len(graphs.replays) == 2


@pytest.mark.parametrize("words", ["cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory"])
@pytest.mark.parametrize("kind", [RuntimeError, torch.cuda.OutOfMemoryError])
def test_where_memory_is_missed_other_recordings_are_dropped_and_it_is_tried_once_more(kind, words) -> None:
    room, released = [True, False, True], []

    def capture(x: Tensor, regions: int):
        if not room.pop(0):
            raise kind(words)
        return lambda y: y

    graphs = Graphs(capture, release=lambda: released.append(len(graphs.replays)), most=4)
    graphs(torch.zeros(4), 2)
    graphs(torch.zeros(5), 2)
    assert (released, len(graphs.replays)) == ([0], 1)
    room[:] = [False, False]
    with pytest.raises(kind, match=words):
        graphs(torch.zeros(6), 2)
    assert room == []
    room[:] = [False]
    with pytest.raises(kind, match=words):  # nothing is held that could be dropped
        graphs(torch.zeros(6), 2)


def test_other_failures_are_not_tried_again() -> None:
    tried = []

    def capture(x: Tensor, regions: int):
        tried.append(len(x))
        if len(x) == 5:
            raise RuntimeError("an illegal memory access was encountered")
        return lambda y: y

    graphs = Graphs(capture, release=lambda: None, most=4)
    graphs(torch.zeros(4), 2)
    with pytest.raises(RuntimeError, match="illegal"):
        graphs(torch.zeros(5), 2)
    assert tried == [4, 5]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), OutOfMemoryError),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), OutOfMemoryError),
        (RuntimeError("CUDA error: invalid argument"), BackendError),
    ],
)
def test_a_lack_of_memory_is_told_whichever_library_met_it(error: RuntimeError, kind: type[BackendError]) -> None:
    with pytest.raises(BackendError) as caught, cuda_errors_about("a GPU"):
        raise error
    assert type(caught.value) is kind


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(net: SAN) -> None:
    with pytest.raises(BackendError, match="no CUDA GPU"):
        CudaNetwork(net)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_backend_is_not_usable_without_a_gpu_and_says_how_to_make_it(tiny_model) -> None:
    found = status()
    assert not found.usable
    assert found.remedy
    with pytest.raises(BackendError, match="no CUDA GPU"):
        load(tiny_model(), RunOptions())


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.BF16])
def test_the_backend_agrees_with_the_reference_on_a_gpu(tiny_model, precision: Precision) -> None:
    """In 16 bits, this network of random weights magnifies roundings: no more so than the same network does on the CPU."""
    x = 255 * torch.rand(1, 3, 24, 31)
    with (
        load(tiny_model(), RunOptions(precision=precision)) as fast,
        load_backend("torch", tiny_model(), RunOptions()) as reference,
    ):
        expected = torch.from_numpy(reference.infer(x.numpy()))
        rounded = prepared(fast.reference, getattr(torch, PYTORCH_NAMES[precision]))(x)
        assert rms(torch.from_numpy(fast.infer(x.numpy())) - expected) < max(2 * rms(rounded - expected), 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_replays_on_a_gpu_give_what_the_reference_gives(net: SAN) -> None:
    fast = CudaNetwork(net, dtype=torch.float32)
    for size, regions in (((24, 31), 2), ((40, 40), 2), ((24, 31), 3), ((24, 31), 2)):
        x = 255 * torch.rand(1, 3, *size)
        net.attention.regions = regions
        assert rms(fast(x, regions).cpu() - net(x)) < 1e-3


@pytest.mark.parametrize(("named", "experiments"), [("", set()), ("soca", {Experiment.SOCA})])
def test_the_backend_takes_the_experiments_that_the_environment_names(
    named: str, experiments: set[Experiment], net: SAN, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = {}
    monkeypatch.setenv(VARIABLE, named)
    monkeypatch.setattr(torch_cuda, "network", lambda model, regions: (net, ModelSpec(net.arch, "0" * 64, "seeded", 5)))
    monkeypatch.setattr(torch_cuda, "CudaNetwork", lambda *arguments, **options: taken.update(options))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 1))
    load(Path("model.onnx"), RunOptions())
    assert taken == {"experiments": experiments}
