"""`sanrt doctor` tells what can run, what cannot, and what to do about it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from sanrt.cli import app
from sanrt.extras import install_command
from sanrt.model.spec import Architecture, ModelSpec, Precision
from sanrt.runtime import host as machine
from sanrt.runtime.artifacts.engines import BuildOptions, EngineInfo, Identity, Proof, save_engine
from sanrt.runtime.artifacts.flavors import Flavor
from sanrt.runtime.artifacts.sizes import Profile, Size
from sanrt.runtime.backends.protocol import BackendStatus
from sanrt.runtime.backends.registry import BACKENDS
from sanrt.runtime.host import Gpu, Gpus
from sanrt.runtime.runs import doctor


@pytest.fixture
def statuses(monkeypatch):
    """Every backend not installed, but for those that the test adds."""
    found = {name: BackendStatus(name, None, False, f"{name} is not installed", f"pip install {name}") for name in BACKENDS}
    monkeypatch.setattr("sanrt.runtime.backends.registry.status", lambda name, device=0: found[name])
    monkeypatch.setattr(doctor, "status", lambda name, device=0: found[name])
    return found


def test_the_default_backend_makes_it_succeed(statuses):
    statuses["onnxruntime"] = BackendStatus("onnxruntime", "1.30", True, "runs on the CPU")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "--backend auto: onnxruntime, runs on the CPU" in result.output
    assert "to run openvino: pip install openvino\n" in result.output
    assert "to run onnxruntime:" not in result.output


def test_nothing_to_run_with_is_status_1(statuses):
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert f"--backend auto: nothing can run; {install_command('cpu')}" in result.output


def test_an_engine_runtime_alone_is_no_default(statuses):
    """TensorRT runs a model only once an engine was built from it."""
    statuses["tensorrt"] = BackendStatus("tensorrt", "11.4", True, "runs on a GPU")
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1


def test_engines_are_told_with_what_their_largest_pictures_take(statuses, tmp_path):
    options = BuildOptions(Flavor.RTX, gpus=("sm89",), profiles=(Profile(max=Size(1, 1080, 1920)),))
    proof = Proof("build log", 1, {"fp16": 1}, [], 1, [], 8, [], [], memory=2 * 2**30)
    spec = ModelSpec(Architecture(4, 1, 1, 32, 8), "0" * 64, "nothing", 5, Precision.FP16)
    identity = Identity("1" * 64, options, "1.7", "sm89", "0")
    info = EngineInfo(tmp_path / "x.engine", spec, "x.onnx", identity, 4, "0" * 64, proof)
    save_engine(info, b"plan")
    facts = dict(doctor.diagnose(tmp_path).facts)
    assert facts["engine"] == "x.engine, for sm89: up to 1x1080x1920 in 2.0 GiB of a GPU's memory"
    assert info.activations(Size(1, 180, 320)) == 2 * 32 * 43 * 180 * 320
    (tmp_path / "x.engine.json").write_bytes(b"{")
    assert "not the facts of a sanrt engine" in dict(doctor.diagnose(tmp_path).facts)["engine"]


def test_the_machine_is_described(statuses, monkeypatch, tmp_path):
    gpus = Gpus((Gpu("NVIDIA [L4]", (8, 9), 24 << 30),), "580.65.06", "13.0")
    monkeypatch.setattr(machine, "gpus", lambda: gpus)
    facts = dict(doctor.diagnose(tmp_path / "models").facts)
    assert facts["GPU 0"] == "NVIDIA [L4], compute capability 8.9, 24.0 GiB"
    assert facts["driver"] == "580.65.06, CUDA up to 13.0"
    assert float(facts["free disk"].split()[0]) > 0
    assert float(facts["free memory"].split()[0]) > 0
    output = CliRunner().invoke(app, ["doctor", "--models", str(tmp_path)]).output
    assert "NVIDIA [L4]" in output


def test_it_imports_no_network_library():
    code = (
        "import sys; from pathlib import Path; from sanrt.runtime.runs.doctor import diagnose; diagnose(Path());"
        "assert not {'torch', 'onnx', 'openvino'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cpu_features_are_read_from_the_flags(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor: 0\nmodel name\t: Some CPU: fast\nflags\t: fpu avx2 avx512_bf16\n\nflags\t: fpu\n")
    monkeypatch.setattr(machine, "CPUINFO", cpuinfo)
    assert machine.cpu_name() == "Some CPU: fast"
    assert machine.cpu_features() == ("AVX2", "AVX512-BF16")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_share_of_the_cores_is_told(files, expected, monkeypatch, tmp_path):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    (tmp_path / "own").write_text("0::/\n4:cpu,cpuacct:/\n")
    monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "own")
    assert machine.core_quota() == expected


def test_free_disk_is_that_of_the_nearest_folder_there_is(tmp_path):
    assert machine.free_disk(tmp_path / "not" / "there") > 0
