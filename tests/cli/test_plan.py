import json
import re
from dataclasses import asdict, replace
from fractions import Fraction
from inspect import signature

import numpy as np
import pytest
import pyvips
from typer.testing import CliRunner

from sanrt.cli import app
from sanrt.cli.plan import plan
from sanrt.cli.run import run
from sanrt.errors import BackendError, ModelError, UsageError
from sanrt.files import keep
from sanrt.runtime.pictures.codec import open_picture
from sanrt.runtime.runs import estimate
from sanrt.runtime.runs.estimate import Costs, Work
from sanrt.runtime.tiling.options import Tiling
from sanrt.runtime.tiling.plan import TilingPlan

COSTS = Costs(opening=0.0, pixel=1.0, pair=0.0, memory=1000.0)


def costs_of(costs):
    """The same by `infer` and by stages."""
    return lambda through_stages: costs


@pytest.fixture(autouse=True)
def small_trials(monkeypatch):
    """What is measured is measured on small pictures."""
    monkeypatch.setattr(estimate, "OPENED", 16)
    monkeypatch.setattr(estimate, "SMALL", (16, 64))
    monkeypatch.setattr(estimate, "SIDE", 64)
    monkeypatch.setattr(estimate, "LARGE", (96,))
    monkeypatch.setattr(estimate, "MOST_ROUNDS", estimate.LEAST_ROUNDS)


@pytest.fixture
def folder(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    pyvips.Image.new_from_array(pixels).write_to_file(str(tmp_path / "small.png"))
    pyvips.Image.black(3000, 2000, bands=3).copy(interpretation="srgb").write_to_file(str(tmp_path / "large.png"))
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    return tmp_path


def test_plan_tells_a_line_for_each_picture_and_keeps_its_measurement(folder, tiny_model):
    model = tiny_model(2)
    named = ["--model", str(model), "--threads", "1", "--backend", "onnxruntime"]
    arguments = ["plan", str(folder), *named, "--memory", "512MB"]
    (folder / "broken.png").unlink()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    large, small, total = done.output.splitlines()
    assert large.startswith(f"{folder / 'large.png'}: 3000 x 2000 on onnxruntime: exact in tiles of ")
    assert "20 x 20 regions" in large
    told = rf"{folder / 'small.png'}: 80 x 60 on onnxruntime: whole, 2 x 2 regions, 0\.\d+ GiB of memory, about \d+\.\d s"
    assert re.fullmatch(told, small)
    assert total.startswith("2 to write, about ")
    (kept,) = (model.parent / ".derived").glob("*-costs-onnxruntime.json")
    keep([kept.parent], kept.name, json.dumps(asdict(COSTS)).encode())
    again = CliRunner().invoke(app, arguments).output.splitlines()[1]
    assert again.endswith("about 80 min")
    assert float(again.partition(" GiB of memory")[0].rpartition(" ")[2]) >= COSTS.memory * 80 * 60 / 2**30
    kept.unlink()


def test_plan_tells_what_a_streamed_picture_needs_on_the_disk(folder, tiny_model):
    options = ["--model", str(tiny_model(2)), "--threads", "1", "--tiling", "exact", "--backend", "onnxruntime"]
    output = CliRunner().invoke(app, ["plan", str(folder / "large.png"), "--memory", "512M", *options]).output
    maps, colours, result = 3 * 4 * 16 * 6e6, 3 * 6e6, 4 * 3 * 6e6
    told = float(output.partition(" GiB of scratch files")[0].rpartition(" ")[2]) * 2**30
    assert result < told <= maps + colours + result + 0.01 * 2**30


@pytest.mark.parametrize("name", ["broken.png", "missing.png"])
def test_what_cannot_be_planned_is_an_error_and_the_others_are_planned(folder, tiny_model, name):
    named = ["--model", str(tiny_model(2)), "--threads", "1", "--backend", "onnxruntime"]
    done = CliRunner().invoke(app, ["plan", str(folder / name), str(folder / "small.png"), str(folder / "out/"), *named])
    assert done.exit_code == 1
    assert f"{folder / 'small.png'}: 80 x 60" in done.stdout
    assert f"sanrt: {folder / name}: " in done.stderr
    assert done.stdout.splitlines()[-1].endswith(", 1 failed")


def test_plan_takes_what_run_takes(folder, tiny_model):
    parameters = {command: signature(function).parameters for command, function in (("plan", plan), ("run", run))}
    more = {"dry_run", "verbose", "explain_tiles", "record", "ray", "workers", "y4m"}
    assert set(parameters["plan"]) == set(parameters["run"]) - more


def test_plan_honours_the_preferred_variant_as_run_does(folder, tiny_model, tmp_path_factory):
    from sanrt.runtime.backends.default_variant import prefer

    exported = tmp_path_factory.mktemp("preferring") / "san_x2.onnx"
    variant = exported.with_name("san_x2.variant.onnx")
    for path in exported, variant:
        path.write_bytes(tiny_model(2).read_bytes())
    prefer(exported, variant, "torch", None)
    named = ["--models", str(exported.parent), "--scale", "2", "--threads", "1"]
    assert " on torch: " in CliRunner().invoke(app, ["plan", str(folder / "small.png"), *named]).output


def test_plan_leaves_out_what_a_run_would_skip(folder, tiny_model):
    (folder / "broken.png").unlink()
    named = ["--model", str(tiny_model(2)), "--threads", "1", "--backend", "onnxruntime", "--suffix", "_x2"]
    output = str(folder / "out/")
    run = CliRunner().invoke(app, ["run", str(folder / "small.png"), output, *named])
    assert run.exit_code == 0, run.output
    lines = CliRunner().invoke(app, ["plan", str(folder), output, *named]).output.splitlines()
    assert lines[0] == "1 of 2 results are there already and would be skipped"
    assert "small.png" not in "\n".join(lines[1:])
    assert lines[-1].startswith("1 to write, about ")
    (folder / "large.png").unlink()
    done = CliRunner().invoke(app, ["plan", str(folder), output, *named])
    assert done.exit_code == 0
    assert done.output == "1 of 1 results are there already and would be skipped\n"
    (folder / "out" / "small_x2.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"small_x2\.png: already there and not made by sanrt"):
        CliRunner().invoke(app, ["plan", str(folder), output, *named], catch_exceptions=False)


@pytest.mark.parametrize("named", [["--model", "missing.onnx"]])
def test_a_model_that_is_not_there_is_an_error_not_an_empty_plan(folder, named):
    with pytest.raises(ModelError, match=r"missing.*sanrt export"):
        CliRunner().invoke(app, ["plan", str(folder / "small.png"), *named], catch_exceptions=False)


def test_the_work_of_a_picture_counts_what_tiles_share_and_the_pairs_of_its_regions(tiny_model):
    from sanrt.runtime.artifacts.models import read_spec

    arch = read_spec(tiny_model(2)).architecture
    halo, own_pairs = 2 * arch.body_halo, 2 * 400 * 300 * (400 * 300 / 4 / 4)
    assert Work.of(400, 300, TilingPlan(Tiling.WHOLE, 400, 2), arch) == Work(400 * 300, own_pairs)
    assert Work.of(400, 300, TilingPlan(Tiling.EXACT, 100, 2, strips=True), arch) == Work(400 * 300, own_pairs)
    assert Work.of(400, 300, TilingPlan(Tiling.EXACT, 150, 4), arch) == Work((400 + 2 * halo) * (300 + halo), own_pairs / 4)
    tiles = 3 * 3
    overlapped = Work(tiles * 150**2, tiles * 2 * 150**2 * (150**2 / 4 / 4))
    assert Work.of(400, 300, TilingPlan(Tiling.OVERLAP, 150, 2, overlap=16), arch) == overlapped


@pytest.mark.parametrize("name", ["native", "onnxruntime"])
def test_the_measured_costs_are_those_of_a_run(name, tiny_model):
    """Their sizes are left to the benchmarks."""
    from sanrt.runtime.backends.protocol import RunOptions
    from sanrt.runtime.backends.registry import load_backend

    with load_backend(name, tiny_model(2), RunOptions(threads=1)) as backend:
        costs = estimate.infer_costs(backend)
        found = [costs] if name == "native" else [costs, estimate.stages_costs(backend)]
    for each in found:
        assert each.pixel > 0
        assert min(each.opening, each.pair, each.memory, each.filed) >= 0


def test_noise_leaves_every_pixel_a_cost():
    costs, large = Costs(2.0, 1.0, 1e-3, 0.0), estimate.Run(Work(100, 1000.0), seconds=5.0, memory=0)
    assert estimate.fitted(costs, large) == replace(costs, pixel=0.02)
    assert estimate.fitted(replace(costs, opening=6.0), large) == Costs(0.0, 0.05, 0.0, 0.0)


@pytest.mark.parametrize("name", ["native", "onnxruntime"])
def test_pictures_take_by_the_estimate_what_their_own_way_through_the_network_takes(name, tiny_model, monkeypatch):
    """A machine of known costs, where stages take six times as long as `infer`, as OpenVINO's do."""
    from sanrt.runtime.backends.protocol import RunOptions
    from sanrt.runtime.backends.registry import load_backend

    infer, stages = Costs(0.0, 3e-6, 8e-10, 0.0), Costs(0.9, 18e-6, 9e-10, 0.0)

    def run(backend, side, plan):
        work = Work.of(side, side, plan, backend.spec.architecture)
        return estimate.Run(work, (stages if plan.tiling is Tiling.EXACT else infer).seconds(work), 0)

    monkeypatch.setattr(estimate, "run", run)
    monkeypatch.setattr(estimate, "filed_seconds", lambda *_: 0.0)
    with load_backend(name, tiny_model(2), RunOptions(threads=1)) as backend:
        found = [(estimate.infer_costs(backend), infer)]
        found += [(estimate.stages_costs(backend), stages)] if name == "onnxruntime" else []
    for costs, true in found:
        for work in Work(384 * 256, 1e9), Work(1152 * 768, 2e10):
            assert costs.seconds(work) == pytest.approx(true.seconds(work), rel=0.03)


@pytest.mark.parametrize(("name", "tiling"), [("native", Tiling.WHOLE), ("onnxruntime", Tiling.EXACT)])
def test_regions_that_a_backend_s_infer_has_not_go_through_its_stages_in_tiles(name, tiling, tiny_model):
    from sanrt.runtime.backends.protocol import RunOptions
    from sanrt.runtime.backends.registry import load_backend
    from sanrt.runtime.tiling.options import UpscaleOptions
    from sanrt.runtime.tiling.plan import plan_tiling

    with load_backend(name, tiny_model(2), RunOptions(threads=1)) as backend:
        assert plan_tiling(backend, 300, 400, UpscaleOptions()).tiling is Tiling.WHOLE
        photograph = plan_tiling(backend, 500, 400, UpscaleOptions())
        assert (photograph.tiling, photograph.regions) == (tiling, 4)
        assert plan_tiling(backend, 500, 400, UpscaleOptions(tiling=Tiling.WHOLE)).tiling is Tiling.WHOLE


def test_a_picture_that_the_backend_cannot_do_is_refused_in_its_words(folder, tiny_model):
    from sanrt.runtime.artifacts.sizes import Limits, Profile, Size
    from sanrt.runtime.backends.protocol import RunOptions
    from sanrt.runtime.backends.registry import load_backend
    from sanrt.runtime.pictures.codec import Encoding
    from sanrt.runtime.pictures.jobs import Job
    from sanrt.runtime.runs.estimate import LoadedProcess, picture_estimate
    from sanrt.runtime.tiling.options import UpscaleOptions

    job = Job(folder / "small.png", folder / "out.png")
    with load_backend("torch", tiny_model(2), RunOptions(threads=1)) as backend:
        backend.limits = Limits((Profile(Size(1, 4, 4), Size(1, 8, 8), Size(1, 16, 16)),))
        with pytest.raises(BackendError, match="torch: 80 x 60 pixels as a whole, its engine takes 4 x 4 to 16 x 16"):
            picture_estimate(
                job, backend, costs_of(COSTS), UpscaleOptions(tiling=Tiling.WHOLE), Encoding(), LoadedProcess(0, 0)
            )


def test_the_scratch_files_of_native_s_plan_are_those_that_the_run_makes(tmp_path, tiny_model, monkeypatch):
    from sanrt.runtime.backends.protocol import RunOptions
    from sanrt.runtime.backends.registry import load_backend
    from sanrt.runtime.tiling.featuremaps import ScratchRows
    from sanrt.runtime.tiling.options import PROCESS_MEMORY, UpscaleOptions, memory_for
    from sanrt.runtime.tiling.plan import SOURCE_BYTES
    from sanrt.runtime.tiling.upscaling import NetworkRunner

    path, files, made = tmp_path / "a.png", [], ScratchRows.__init__
    pyvips.Image.black(300, 1500, bands=3).copy(interpretation="srgb").write_to_file(str(path))

    def counted(rows, count, size, folder):
        files.append(count * size)
        made(rows, count, size, folder)

    monkeypatch.setattr(ScratchRows, "__init__", counted)
    numbers = []
    with load_backend("native", tiny_model(2), RunOptions(threads=1)) as backend, open_picture(path) as source:
        least = memory_for(backend.strips.needed(1500, 300, 16).memory + 300 * 1500 * SOURCE_BYTES)
        for memory in least, PROCESS_MEMORY + 100 * 2**20, PROCESS_MEMORY + 2**28:
            files.clear()
            options = UpscaleOptions(tiling=Tiling.EXACT, memory=memory)
            found = estimate.estimate(backend, costs_of(COSTS), source.info, options)
            filed = estimate.estimate(backend, costs_of(replace(COSTS, filed=1e-3)), source.info, options)
            assert filed.seconds - found.seconds == pytest.approx(1e-3 * (found.scratch - 300 * 1500 * 4 * 3))
            result, _ = NetworkRunner(backend, options).run_file(found.plan, source, tmp_path)
            result.close()
            assert found.scratch == sum(files) + 300 * 1500 * 4 * 3
            assert found.memory <= options.budget
            numbers.append(len(files))
    assert numbers[0] == 3 > numbers[1] > numbers[2] == 0


def test_explain_tiles_shows_exact_as_whole_and_overlapped_as_different(folder, tiny_model):
    arguments = [str(folder / "small.png"), str(folder / "out.png"), "--model", str(tiny_model(2)), "--threads", "1"]
    done = CliRunner().invoke(app, ["run", *arguments, "--tile", "32", "--backend", "onnxruntime", "--explain-tiles"])
    assert done.exit_code == 0, done.output
    rows = {line.split()[0]: float(line.split()[1]) for line in done.output.splitlines() if " of 255 " in line}
    assert rows["whole"] == 0
    assert rows["exact"] < 2e-4 * 255 < rows["overlap"]
    assert not (folder / "out.png").exists()


def test_plan_tells_what_run_tells_of_a_picture(tmp_path, tiny_model):
    pyvips.Image.black(30, 20, bands=3).copy(interpretation="srgb").write_to_file(str(tmp_path / "a.gif"))
    pyvips.Image.black(30, 20, bands=4).copy(interpretation="cmyk").write_to_file(str(tmp_path / "b.tif"))
    named = ["--model", str(tiny_model(2)), "--threads", "1", "--backend", "onnxruntime"]
    planned = CliRunner().invoke(app, ["plan", str(tmp_path), *named]).output.splitlines()
    assert planned[0].endswith(" s; GIF is written as PNG")
    assert planned[1].endswith(" s; CMYK converted to sRGB")
    previewed = CliRunner().invoke(app, ["run", "--dry-run", str(tmp_path), *named]).output
    assert "GIF is written as PNG" in previewed
    assert "CMYK converted to sRGB" in previewed


def test_plan_tells_frames_rate_pace_segments_and_refusals_of_videos(tmp_path, tiny_model, monkeypatch):
    pytest.importorskip("av")
    from tests.clips import clip

    clip(tmp_path / "in" / "a.mp4", range(12), rate=Fraction(30000, 1001))
    (tmp_path / "in" / "cut.mp4").write_bytes((tmp_path / "in" / "a.mp4").read_bytes()[:-50])
    words = ["plan", str(tmp_path / "in"), str(tmp_path / "out"), "--model", str(tiny_model(2)), "--backend", "onnxruntime"]
    monkeypatch.setattr("sanrt.runtime.runs.estimate.costs_of", lambda *_: COSTS)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    line, total = done.stdout.splitlines()
    told = (
        r"32 x 24, 12 frames of 29\.97 per second on onnxruntime: whole, .* GiB of memory, \S+ MiB of scratch files, about "
    )
    assert re.fullmatch(re.escape(str(tmp_path / "in" / "a.mp4")) + ": " + told + r".* \(0.0013 frames/s\)", line)
    assert total.endswith(", 1 failed")
    assert "cut.mp4: truncated" in done.stderr
    assert not (tmp_path / "out").exists()
