import pytest
import torch
from torch import Tensor, nn

from sanrt.errors import BackendError
from sanrt.kernels.cuda.experimental import Experiment
from sanrt.kernels.cuda.operators import (
    rectified_convolution,
    region_attention,
    residual,
    soca_gate,
    summed_convolution,
    unbiased,
    use_kernels,
)
from sanrt.model.attention import RegionAttention
from sanrt.model.san import SAN
from sanrt.model.soca import SOCA, covariance
from sanrt.model.spec import Architecture


def network(steps: int | None = 5) -> SAN:
    torch.manual_seed(4)
    net = SAN(Architecture(scale=2, groups=1, blocks=1, channels=16, reduction=4, value_range=1.0, sqrt_iterations=steps))
    nn.init.constant_(net.gamma, 0.3)
    return net.eval().requires_grad_(False)


def gate_arguments(channels: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, SOCA, tuple[Tensor, ...]]:
    torch.manual_seed(5)
    module = SOCA(channels, 4, 5).eval().requires_grad_(False).to(dtype)
    assert module.down.bias is not None
    assert module.up.bias is not None
    x = torch.randn(2, channels, 9, 11).to(dtype)
    return x, module, (x, module.down.weight, module.down.bias, module.up.weight, module.up.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_the_cpu_the_gate_is_the_references_to_the_bit(dtype: torch.dtype) -> None:
    x, module, arguments = gate_arguments(dtype=dtype)
    assert torch.equal(soca_gate(*arguments, 5), module.gate(covariance(x)))


@pytest.mark.parametrize("regions", [1, 2, 3])
def test_on_the_cpu_attention_is_the_references_to_the_bit(regions: int) -> None:
    torch.manual_seed(6)
    module = RegionAttention(32, regions).eval().requires_grad_(False)
    x = torch.randn(2, 32, 13, 17)
    maps = torch.cat([module.query(x), module.key(x), module.value(x)], 1)
    torch.testing.assert_close(module.out(region_attention(maps, regions)) + x, module(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_operators_keep_to_their_declared_shapes_and_layouts(channels_last: bool) -> None:
    maps = torch.randn(2, 12, 9, 10)
    maps = maps.contiguous(memory_format=torch.channels_last) if channels_last else maps
    torch.library.opcheck(region_attention, (maps, 2))
    torch.library.opcheck(soca_gate, (*gate_arguments()[2], 5))
    torch.library.opcheck(rectified_convolution, (maps, torch.randn(8, 12, 3, 3), torch.randn(8)))
    torch.library.opcheck(residual, (maps, torch.randn(12), torch.randn_like(maps)))
    sums = [torch.randn_like(maps[:, :8]) for _ in range(2)]
    torch.library.opcheck(summed_convolution, (maps, torch.randn(8, 12, 3, 3), torch.randn(8), sums))
    assert region_attention(maps, 2).is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.parametrize("experiments", [(), tuple(Experiment)], ids=["measured", "experimental"])
@pytest.mark.parametrize("size", [(1, 4, 4), (2, 21, 30)])
def test_a_network_with_the_operators_is_the_reference(
    size: tuple[int, int, int], experiments: tuple[Experiment, ...]
) -> None:
    net, x = network(), torch.rand(size[0], 3, *size[1:])
    torch.testing.assert_close(use_kernels(net, experiments=experiments)(x), net(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("experiment", [None, *Experiment])
def test_each_experiment_reaches_its_own_operator_alone(experiment: Experiment | None) -> None:
    net = use_kernels(network(), experiments=[experiment] * (experiment is not None))
    exported = torch.export.export(net, (torch.rand(1, 3, 12, 14),))
    calls = [node for node in exported.graph.nodes if node.op == "call_function"]
    names = [str(node.target) for node in calls]
    flags = {str(node.target).split(".")[1] for node in calls if node.args[-1:] == (True,)}
    assert flags == ({"soca": {"soca_gate"}, "attention": {"region_attention"}}.get(str(experiment), set()))
    assert names.count("sanrt.summed_convolution.default") == (2 if experiment == "cudnn" else 0)
    assert names.count("sanrt.residual.default") == (0 if experiment == "cudnn" else 2)


def test_the_network_given_is_left_as_it_was() -> None:
    net = network()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    fused = use_kernels(net).half()
    assert fused is not net
    assert isinstance(net.attention, RegionAttention)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_torch_compile_takes_the_network_whole() -> None:
    net, x = use_kernels(network()), torch.rand(1, 3, 12, 14)
    run_nvrtc = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(run_nvrtc(x), net(x))
    torch.testing.assert_close(run_nvrtc(torch.rand(1, 3, 9, 10)).shape, torch.Size([1, 3, 18, 20]))


def test_torch_export_keeps_the_operators_with_dynamic_sizes() -> None:
    net, x = use_kernels(network()), torch.rand(2, 3, 12, 14)
    height, width = (torch.export.Dim(name, min=4, max=512) for name in ("height", "width"))
    exported = torch.export.export(net, (x,), dynamic_shapes=({2: height, 3: width},))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count("sanrt.soca_gate.default") == 1
    assert targets.count("sanrt.region_attention.default") == 2
    y = torch.rand(2, 3, 17, 23)
    torch.testing.assert_close(exported.module()(y), net(y))


def convolution() -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(7)
    return nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False), torch.randn(2, 8, 6, 7)


@pytest.mark.parametrize("batch", [1, 2])
def test_scaling_the_weights_by_the_gate_is_scaling_the_input(batch: int) -> None:
    conv, x = convolution()
    assert conv.bias is not None
    gate = torch.rand(batch, 8, 1, 1)
    x = x[:batch]
    torch.testing.assert_close(residual(unbiased(conv, x, gate), conv.bias, x), conv(x * gate) + x)


def test_a_rectified_convolution_is_both() -> None:
    conv, x = convolution()
    assert conv.bias is not None
    torch.testing.assert_close(rectified_convolution(x, conv.weight, conv.bias), torch.relu(conv(x)))


def test_a_network_with_the_exact_square_root_is_refused() -> None:
    with pytest.raises(BackendError, match="exact square root"):
        use_kernels(network(None))


def test_steps_can_stand_for_the_exact_square_root() -> None:
    net, x = network(None), torch.rand(1, 3, 20, 20)
    few, many = (use_kernels(net, exact_as=steps)(x) - net(x) for steps in (3, 20))
    assert many.abs().max() < few.abs().max()
