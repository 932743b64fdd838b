"""Every member of TensorRT that the code touches exists in each supported release, or is for TensorRT-RTX alone.

`tensorrt_api.json` lists the classes and members that the Python bindings of each release have.
"""

from __future__ import annotations

import ast
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from sanrt.export import engine
from sanrt.runtime.backends.tensorrt import backend as tensorrt
from sanrt.runtime.backends.tensorrt import library as flavors
from sanrt.runtime.backends.tensorrt import stages as tensorrt_stages

API = json.loads(Path(__file__).with_name("tensorrt_api.json").read_text())
OBJECTS = {
    engine: {
        "builder": "Builder",
        "network": "INetworkDefinition",
        "parser": "OnnxParser",
        "parser.get_error()": "ParserError",
        "config": "IBuilderConfig",
        "engine": "ICudaEngine",
        "engine.create_engine_inspector()": "EngineInspector",
        "trt.Runtime()": "Runtime",
    },
    flavors: {"runtime": "Runtime"},
    tensorrt: {
        "self.engine": "ICudaEngine",
        "settings": "IRuntimeConfig",
        "self.settings": "IRuntimeConfig",
        "cache": "IRuntimeCache",
        "self.settings.get_runtime_cache()": "IRuntimeCache",
        "context": "IExecutionContext",
        "lane.context": "IExecutionContext",
    },
    tensorrt_stages: {
        "engine": "ICudaEngine",
        "settings": "IRuntimeConfig",
        "stage.settings": "IRuntimeConfig",
        "cache": "IRuntimeCache",
        "context": "IExecutionContext",
        "opened.context": "IExecutionContext",
    },
}
"""What the expressions in each module that hold TensorRT objects are."""
MODULE = ("trt", "self.trt")
RTX_ONLY = {
    "ComputeCapability",
    "CudaGraphStrategy",
    "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.get_runtime_cache",
    "IRuntimeConfig.set_runtime_cache",
}
"""Behind RTX alone: targets of a build, and `self.rtx`."""


def spelled(node: ast.expr) -> str:
    """An expression as a dotted path, arguments left out."""
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return f"{spelled(node.value)}.{node.attr}"
        case ast.Call():
            return f"{spelled(node.func)}()"
    return ""


def touched(module: object) -> set[str]:
    """`Class.member`, or `Class` alone, for everything of TensorRT that a module's source mentions."""
    members = set()
    for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
        if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
            continue
        owner = spelled(node.value)
        if owner in OBJECTS[module]:
            members.add(f"{OBJECTS[module][owner]}.{node.attr}")
        elif owner in MODULE:
            members.add(node.attr)
        elif owner.startswith(tuple(f"{name}." for name in MODULE)) and not owner.endswith("()"):
            path = owner.removeprefix("self.").removeprefix("trt.")
            members.add(f"{path}.{node.attr}")
    return members


def exists(api: dict[str, list[str]], member: str) -> bool:
    owner, _, name = member.partition(".")
    return owner in api and all(part in api[owner] for part in name.split(".") if part)


@pytest.mark.parametrize("release", API)
def test_every_member_exists_in_every_release(release: str):
    members = set().union(*map(touched, OBJECTS))
    if "RTX" not in release:
        members -= RTX_ONLY
    missing = sorted(member for member in members if not exists(API[release], member))
    assert not missing


def test_the_sources_are_really_read():
    members = set().union(*map(touched, OBJECTS))
    assert members >= RTX_ONLY
    assert {
        "Builder.create_network",
        "IBuilderConfig.clear_flag",
        "PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10",
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.infer_shapes",
        "ICudaEngine.create_execution_context",
        "OnnxParser.parse",
        "BuilderFlag.TF32",
        "EngineInspector.get_engine_information",
        "ExecutionContextAllocationStrategy.USER_MANAGED",
    } <= members


def test_members_that_newer_releases_dropped_would_be_found():
    for gone in ("BuilderFlag.FP16", "ICudaEngine.device_memory_size", "Builder.platform_has_fast_fp16"):
        assert exists(API["TensorRT 10.13"], gone)
        assert not exists(API["TensorRT 11.4"], gone)


@pytest.mark.skipif(
    not find_spec("tensorrt_rtx_bindings"), reason="TensorRT-RTX is not installed (pip install 'sanrt[rtx]')"
)
def test_the_installed_tensorrt_rtx_has_every_member():
    import tensorrt_rtx_bindings

    for member in set().union(*map(touched, OBJECTS)):
        found: object = tensorrt_rtx_bindings
        for part in member.split("."):
            assert hasattr(found, part), member
            found = getattr(found, part)
