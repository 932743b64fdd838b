from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from sanrt.errors import FileError, ModelError, UsageError
from sanrt.model.spec import Architecture, ModelSpec, Precision
from sanrt.runtime.artifacts import engines
from sanrt.runtime.artifacts.engines import (
    RTX_GPUS,
    BuildOptions,
    EngineInfo,
    Identity,
    Proof,
    check_fresh,
    check_host,
    choose_engine,
    choose_stages,
    default_path,
    json_path,
    read_engine,
    read_engine_bytes,
    save_engine,
)
from sanrt.runtime.artifacts.flavors import Flavor
from sanrt.runtime.artifacts.sizes import TILES, Profile, Size

PLAN = b"an engine of some bytes"
SPEC = ModelSpec(Architecture(4, 1, 1, 16, 8), "0" * 64, "nothing", 5, Precision.FP16, report={"parity": {"max_abs": 0.1}})
PROOF = Proof("build log", 3, {"fp16": 7}, [], 9, [], 8, [], ["_gemm_mha_v2"], 1 << 20)
RTX = BuildOptions(Flavor.RTX, gpus=("sm89",))
TENSORRT = BuildOptions(Flavor.TENSORRT)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(engines, "installed_version", lambda flavor: "9.9")
    path = tmp_path / "san x4.onnx"
    path.write_bytes(b"the exported model")
    return path


def saved(
    model: Path, options: BuildOptions = RTX, gpu: str = "sm89", version: str = "9.9", path: Path | None = None
) -> EngineInfo:
    identity = Identity(hashlib.sha256(model.read_bytes()).hexdigest(), options, version, gpu, "0.1")
    path = path or default_path(model, identity)
    info = EngineInfo(
        path, SPEC, os.path.relpath(model, path.parent), identity, len(PLAN), hashlib.sha256(PLAN).hexdigest(), PROOF
    )
    save_engine(info, PLAN)
    return info


def test_facts_are_read_back_as_they_were_written(model: Path):
    profiles = (Profile(), Profile(Size(1, 8, 8), Size(2, 9, 9), Size(2, 10, 10)))
    info = saved(model, replace(RTX, profiles=profiles, workspace=64, timing_cache=Path("a/b")))
    assert read_engine(info.path) == info
    assert read_engine_bytes(info) == PLAN
    assert [p.name for p in model.parent.iterdir() if "partial" in p.name] == []


@pytest.mark.parametrize(
    "changed",
    [
        {"precision": Precision.BF16},
        {"flavor": Flavor.TENSORRT},
        {"profiles": (Profile(opt=Size(1, 180, 321)),)},
        {"gpus": ("sm89", "sm120")},
        {"workspace": 1},
        {"level": 2},
        {"timing_cache": Path("x")},
        {"allow_precision": True},
        {"allow_unfused_attention": True},
        {"kernels": True},
    ],
)
def test_every_option_is_part_of_the_identity(changed: dict[str, object]):
    identity = Identity("1", RTX, "9.9", "sm89", "0.1")
    assert replace(identity, options=replace(RTX, **changed)).digest != identity.digest


def test_stage_engines_are_another_thing_than_a_whole_one_of_the_same_sizes(model: Path):
    whole = saved(model, replace(RTX, profiles=(TILES,)))
    stages = saved(model, replace(RTX, profiles=(TILES,), stages=True))
    assert whole.identity.digest != stages.identity.digest
    assert (whole.path.suffix, stages.path.suffix) == (".engine", ".stages")
    assert read_engine(stages.path) == stages
    assert "--stages" in stages.command
    assert "--max" not in stages.command
    assert choose_engine(model, "any", "sm89") == whole
    assert choose_stages(whole, "any", "sm89") == stages


@pytest.mark.parametrize("sizes", [{"max": Size(2, 512, 512)}, {"min": Size(1, 8, 8)}])
def test_stage_engines_take_one_tile_at_a_time_however_small(sizes: dict[str, Size]):
    with pytest.raises(UsageError, match="`stages`: expected tiles"):
        replace(RTX, profiles=(replace(TILES, **sizes),), stages=True)
    with pytest.raises(UsageError, match="`stages`: expected tiles"):
        replace(RTX, profiles=(TILES, TILES), stages=True)


def test_the_options_above_are_all_there_are():
    tried = {"precision", "flavor", "profiles", "gpus", "workspace", "level", "timing_cache", "allow_precision"}
    assert {f.name for f in fields(BuildOptions)} == tried | {"allow_unfused_attention", "kernels", "stages"}


@pytest.mark.parametrize("name", ["onnx", "version", "gpu", "sanrt"])
def test_everything_else_is_part_of_the_identity_too(name: str):
    identity = Identity("1", RTX, "9.9", "sm89", "0.1")
    assert replace(identity, **{name: "another"}).digest != identity.digest


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(PLAN[:-1]), rf"damaged \({len(PLAN) - 1} bytes, expected {len(PLAN)}\)"),
        (lambda p: p.write_bytes(PLAN[:-1] + b"!"), "altered"),
        (lambda p: p.unlink(), "cannot be read"),
    ],
)
def test_damaged_engines_are_refused(model: Path, damage, message: str):
    info = saved(model)
    damage(info.path)
    with pytest.raises(ModelError, match=message) as caught:
        read_engine_bytes(read_engine(info.path))
    assert f"rebuild with `{info.command}`" in one_line(caught)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b'{"spec": 3}'])
def test_damaged_facts_are_refused(model: Path, content: bytes):
    info = saved(model)
    json_path(info.path).write_bytes(content)
    with pytest.raises(ModelError, match="sanrt build") as caught:
        read_engine(info.path)
    one_line(caught)


def test_edited_facts_are_refused(model: Path):
    info = saved(model)
    facts = json.loads(json_path(info.path).read_text())
    facts["identity"]["version"] = "10.0"
    json_path(info.path).write_text(json.dumps(facts))
    with pytest.raises(ModelError, match="was altered"):
        read_engine(info.path)


def test_an_engine_without_facts_is_refused(tmp_path: Path):
    (tmp_path / "foreign.engine").write_bytes(b"someone's")
    with pytest.raises(ModelError, match=r"foreign\.engine: its facts foreign\.engine\.json cannot be read"):
        read_engine(tmp_path / "foreign.engine")


def test_stale_engines_are_refused_and_deployed_ones_need_no_onnx(model: Path):
    info = saved(model)
    check_fresh(info)
    model.write_bytes(b"exported again")
    with pytest.raises(ModelError, match=r"stale, san x4\.onnx has changed"):
        check_fresh(info)
    model.unlink()
    check_fresh(info)


@pytest.mark.parametrize(
    ("options", "gpu", "here", "fits"),
    [
        (RTX, "sm89", "sm89", True),
        (RTX, "sm89", "sm120", False),
        (replace(RTX, gpus=()), ",".join(RTX_GPUS), "sm120", True),
        (replace(RTX, gpus=()), ",".join(RTX_GPUS), "sm90", False),
        (TENSORRT, "NVIDIA L4 sm89", "sm89", True),
        (TENSORRT, "NVIDIA L40 sm89", "sm89", False),
    ],
)
def test_engines_run_only_on_the_gpus_they_were_built_for(
    model: Path, options: BuildOptions, gpu: str, here: str, fits: bool
):
    info = saved(model, options, gpu)
    if fits:
        check_host(info, "NVIDIA L4", here)
    else:
        with pytest.raises(ModelError, match=f"built for .*, but this GPU is NVIDIA L4 {here}"):
            check_host(info, "NVIDIA L4", here)


def test_the_rebuild_command_names_the_gpu_that_is_here(model: Path):
    with pytest.raises(ModelError) as caught:
        check_host(saved(model), "NVIDIA RTX 5090", "sm120")
    assert "--gpu sm120" in one_line(caught)


@pytest.mark.parametrize("installed", [None, "9.8"])
def test_another_version_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch, installed: str | None):
    info = saved(model)
    monkeypatch.setattr(engines, "installed_version", lambda flavor: installed)
    with pytest.raises(ModelError, match=r"built by TensorRT-RTX 9\.9, but TensorRT-RTX .*installed"):
        check_host(info, "NVIDIA L4", "sm89")


def test_the_newest_engine_that_fits_is_chosen(model: Path):
    with pytest.raises(ModelError, match="no engine was built from it"):
        choose_engine(model, "NVIDIA L4", "sm89")
    fitting, other = saved(model), saved(model, replace(RTX, gpus=("sm120",)), "sm120")
    assert choose_engine(model, "NVIDIA L4", "sm89") == fitting
    assert choose_engine(model, "NVIDIA RTX 5090", "sm120") == other
    with pytest.raises(ModelError, match="this GPU is NVIDIA T4 sm75"):
        choose_engine(model, "NVIDIA T4", "sm75")


def test_the_rebuild_command_is_read_back_as_the_same_options(model: Path):
    from typer.testing import CliRunner

    from sanrt.cli import app

    options = replace(RTX, precision=Precision.BF16, profiles=(Profile(max=Size(1, 200, 400)),) * 2, level=1, workspace=9)
    words = shlex.split(saved(model, options).command)
    assert words[:3] == ["sanrt", "build", str(model)]
    assert words.count("--max") == 2
    result = CliRunner().invoke(app, [*words[1:2], "missing.onnx", *words[3:]])
    assert "No such option" not in result.output


@pytest.mark.parametrize("text", ["", "64", "1x64", "1x64x64x64", "1x64x-1", "0x64x64", "ax64x64", "1 x64x64"])
def test_sizes_of_another_form_are_refused(text: str):
    with pytest.raises(UsageError, match="expected BATCHxHEIGHTxWIDTH"):
        Size.parse(text)


def test_profiles_out_of_order_are_refused():
    with pytest.raises(UsageError, match="expected min <= opt <= max"):
        Profile(Size(1, 64, 64), Size(1, 32, 64), Size(1, 64, 64))


def test_a_full_disk_leaves_nothing(model: Path, small_disk):
    wanted = r"cannot be written \(File too large\); it needs 0 MiB; choose .* -o"
    with pytest.raises(FileError, match=wanted), small_disk():
        saved_without_model(model, bytes(5000))
    assert [p.name for p in model.parent.iterdir()] == [model.name]


def saved_without_model(model: Path, plan: bytes = b"plan") -> None:
    identity = Identity("1" * 64, RTX, "9.9", "sm89", "0.1")
    save_engine(EngineInfo(model.with_name("e.engine"), SPEC, model.name, identity, len(plan), "2" * 64, PROOF), plan)


def test_engines_are_described_without_tensorrt_torch_or_onnx(model: Path):
    info = saved(model)
    code = (
        f"import sys; from sanrt.cli import app; app(['info', {str(info.path)!r}], standalone_mode=False); "
        f"print(set(sys.modules) & {{'torch', 'onnx', 'tensorrt', 'tensorrt_rtx_bindings'}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "8 of 8 regions fused" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"
