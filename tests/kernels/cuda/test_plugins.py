"""The plugins against a stand-in for TensorRT's plugin module, held to the members recorded from the real bindings."""

import json
import re
import sys
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from onnx import TensorProto

from sanrt.errors import BackendError
from sanrt.kernels.cuda import plugins
from sanrt.kernels.cuda.soca import max_merged_rows, partial_size
from sanrt.model.graph import san_model
from sanrt.model.spec import Architecture, GraphOptions, ModelSpec, Precision


class DataType(Enum):
    FLOAT, HALF, BF16, INT8, INT32 = range(5)


class TensorFormat(Enum):
    LINEAR, HWC8 = range(2)


class TensorDesc(SimpleNamespace):
    """A tensor's dtype, shape_expr and format."""


class AutoTuneCombination(tuple):
    """The strings it was made of."""

    def __new__(cls, *parts: str) -> "AutoTuneCombination":
        return super().__new__(cls, parts)


class Bindings:
    """What `tensorrt` and `tensorrt.plugin` are to the plugins; keeps what is registered."""

    def __init__(self) -> None:
        self.functions: dict[tuple[str, str], Any] = {}
        self.trt = ModuleType("tensorrt")
        self.trtp = ModuleType("tensorrt.plugin")
        vars(self.trt).update(DataType=DataType, TensorFormat=TensorFormat, float32=DataType.FLOAT, int32=DataType.INT32)
        vars(self.trt).update(QuickPluginCreationRequest=1, IPluginV3QuickAOTBuild=1, __version__="11.4.0.106")
        vars(self.trtp).update(
            TensorDesc=TensorDesc,
            KernelLaunchParams=type("KernelLaunchParams", (SimpleNamespace,), {}),
            AutoTuneCombination=type(
                "AutoTuneCombination", (tuple,), {"__new__": lambda cls, *parts: tuple.__new__(cls, parts)}
            ),
            SymExprs=list,
            SymIntExprs=lambda length: [None] * length,
            SymInt32=lambda value: value,
            from_shape_expr=lambda shape, dtype: TensorDesc(shape_expr=shape, dtype=dtype, format=TensorFormat.LINEAR),
            op=SimpleNamespace(),
        )
        for kind in ("register", "autotune", "aot_impl"):
            setattr(self.trtp, kind, lambda name, kind=kind: lambda function: self.keep(kind, name, function))

    def keep(self, kind: str, name: str, function: Any) -> Any:
        assert not any(isinstance(annotation, str) for annotation in function.__annotations__.values())
        self.functions[kind, name] = function
        self.trtp.op.sanrt = SimpleNamespace(soca_statistics=1)
        return function


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Bindings:
    fake = Bindings()
    monkeypatch.setitem(sys.modules, "tensorrt", fake.trt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", fake.trtp)
    fake.trt.plugin = fake.trtp
    plugins.register(fake.trt)
    return fake


def parameters(ptx: bytes, kernel: str) -> int:
    """How many arguments a kernel of a PTX text takes."""
    head = re.search(rf"\.entry {kernel}\((.*?)\)", ptx.decode(), re.DOTALL)
    assert head
    return head[1].count(".param")


def weights_descs(dtype: DataType, channels: int, hidden: int) -> list[TensorDesc]:
    shapes = (hidden, channels, 1, 1), (hidden,), (channels, hidden, 1, 1), (channels,)
    return [TensorDesc(dtype=dtype, shape_expr=shape, format=TensorFormat.LINEAR) for shape in shapes]


@pytest.mark.parametrize(("format", "layout"), [(TensorFormat.LINEAR, "nchw"), (TensorFormat.HWC8, "nhwc")])
def test_launches_match_the_kernels_they_name(
    bindings: Bindings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: TensorFormat, layout: str
) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x = TensorDesc(dtype=DataType.HALF, shape_expr=(3, 16, 20, 30), format=format)
    partials, counters = bindings.functions["register", "sanrt::soca_statistics"](x, 16)
    assert partials.shape_expr == (3, max_merged_rows(16), partial_size(16))
    name, ptx, launch, integers = bindings.functions["aot_impl", "sanrt::soca_statistics"](x, 16, (partials, counters), 0)
    assert (name, launch.grid_x, launch.grid_y, launch.block_x, integers) == (
        f"soca_statistics_{layout}",
        32,
        3,
        64,
        [600, 1],
    )
    assert parameters(ptx, name) == 1 + len(integers) + 2

    weights = weights_descs(DataType.HALF, 16, 4)
    gates = bindings.functions["register", "sanrt::soca_gate"](partials, *weights, 16, 4, 5)
    assert (gates.shape_expr, gates.dtype) == ((3, 16, 1, 1), DataType.HALF)
    name, ptx, launch, integers = bindings.functions["aot_impl", "sanrt::soca_gate"](
        partials, *weights, 16, 4, 5, (gates,), 0
    )
    assert (name, launch.grid_x, launch.block_x, integers) == ("soca_gate", 3, 256, [32, 32, 5, 4])
    assert parameters(ptx, name) == 5 + len(integers) + 1


def test_half_precision_maps_may_come_channels_last(bindings: Bindings) -> None:
    formats = bindings.functions["autotune", "sanrt::soca_statistics"]
    assert formats(TensorDesc(dtype=DataType.HALF), 64, ()) == [("FP16, FP32, INT32", "LINEAR*HWC8, LINEAR, LINEAR")]
    assert formats(TensorDesc(dtype=DataType.FLOAT), 64, ()) == [("FP32, FP32, INT32", "LINEAR, LINEAR, LINEAR")]


def test_registering_twice_registers_once(bindings: Bindings) -> None:
    bindings.functions.clear()
    plugins.register(bindings.trt)
    assert not bindings.functions


@pytest.mark.parametrize(
    ("trt", "numpy", "refused"),
    [
        ("10.13.3.9", "2.4.0", True),
        ("10.16.1.11", "2.5", True),
        ("11.1.0.106", "2.4.6", True),
        ("11.2.1.2", "2.4.6", False),
        ("10.13.3.9", "2.3.5", False),
    ],
)
def test_bindings_that_make_numbers_of_arrays_are_refused_with_a_numpy_that_does_not(
    bindings: Bindings, trt: str, numpy: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen in the bindings' source: int(array of one), until 11.2 takes its first element; NumPy 2.4 made it a TypeError."""
    bindings.trt.__version__ = trt
    monkeypatch.setattr(plugins.np, "__version__", numpy)
    with pytest.raises(BackendError, match=r"pip install 'numpy<2.4'") if refused else nullcontext():
        plugins.register(bindings.trt)


def test_formats_the_kernels_do_not_take_are_refused(bindings: Bindings) -> None:
    with pytest.raises(BackendError, match=r"64 channels of DataType\.INT8.*kernels=False"):
        plugins.soca_source(bindings.trt, DataType.INT8, 64)
    with pytest.raises(BackendError, match="24 channels"):
        plugins.soca_source(bindings.trt, DataType.HALF, 24)


@pytest.mark.parametrize("version", ["10.13.3.9", "10.16.1.11", "11.4.0.106"])
def test_full_tensorrt_has_every_class_the_plugins_need(shared: Path, version: str) -> None:
    recorded = json.loads((shared / "tensorrt_api" / f"{version}.json").read_text())
    assert {"QuickPluginCreationRequest", "IPluginV3QuickAOTBuild"} <= recorded.keys()
    assert {"HALF", "BF16", "FLOAT"} <= set(recorded["DataType"])
    assert {"LINEAR", "HWC8"} <= set(recorded["TensorFormat"])


def test_tensorrt_rtx_is_refused_by_name(shared: Path) -> None:
    recorded = json.loads((shared / "tensorrt_api" / "rtx.json").read_text())
    rtx = ModuleType("tensorrt_rtx")
    vars(rtx).update(dict.fromkeys(recorded))
    with pytest.raises(BackendError, match=r"tensorrt_rtx.*no ahead-of-time plugins.*kernels=False"):
        plugins.register(rtx)


def test_a_graph_with_kernels_has_two_plugin_nodes_for_each_soca() -> None:
    torch = pytest.importorskip("torch")
    from sanrt.model.san import SAN

    arch = Architecture(scale=2, groups=2, blocks=1, channels=16, reduction=4)
    with torch.random.fork_rng():
        weights = {name: t.detach().numpy() for name, t in SAN(arch).state_dict().items()}
    model = san_model(ModelSpec(arch, "0" * 64, "random", 7), weights, GraphOptions(precision=Precision.FP16, kernels=True))
    nodes = [node for node in model.graph.node if node.domain == "sanrt"]
    assert [node.op_type for node in nodes] == ["soca_statistics", "soca_gate"] * 2
    attributes = {a.name: a.i or a.s.decode() for a in nodes[1].attribute}
    assert attributes == {
        "plugin_namespace": "sanrt",
        "plugin_version": "1",
        "aot": 1,
        "channels": 16,
        "hidden": 4,
        "iterations": 7,
    }
    kinds = {i.name: i.data_type for i in model.graph.initializer}
    assert all(kinds[name] == TensorProto.FLOAT16 for name in nodes[1].input[1:])
    assert not any("newton" in node.name or ".step" in node.name for node in model.graph.node)
