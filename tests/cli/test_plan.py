import json
from pathlib import Path

import numpy as np
import pytest
import pyvips
from typer.testing import CliRunner

from sanrt.cli import app
from sanrt.errors import ModelError, UsageError
from sanrt.files import keep
from sanrt.runtime.pictures.codec import PictureInfo
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.runs.estimate import Speed
from sanrt.runtime.tiling.options import Tiling
from sanrt.runtime.tiling.plan import TilingPlan


@pytest.fixture
def folder(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    pyvips.Image.new_from_array(pixels).write_to_file(str(tmp_path / "small.png"))
    pyvips.Image.black(3000, 2000, bands=3).copy(interpretation="srgb").write_to_file(str(tmp_path / "large.png"))
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    return tmp_path


def test_plan_tells_sizes_ways_and_what_is_skipped_and_keeps_its_measurement(folder, tiny_model):
    model = tiny_model(2)
    arguments = ["plan", str(folder), "--model", str(model), "--memory", "512M", "--threads", "1"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert f"{folder / 'small.png'}: 80 x 60" in done.output
    assert f"{folder / 'large.png'}: 3000 x 2000" in done.output
    assert "onnxruntime: whole, 2 x 2 regions" in done.output
    assert "onnxruntime: exact in tiles of" in done.output
    assert "20 x 20 regions" in done.output
    assert f"skipped: {folder / 'broken.png'}" in done.output
    (kept,) = (model.parent / ".derived").glob("*-speed-onnxruntime.json")
    keep([kept.parent], kept.name, json.dumps({"pixel": 1.0, "pair": 0.0}).encode())
    assert "onnxruntime: whole, 2 x 2 regions, 0.01 GiB, about 80 min" in CliRunner().invoke(app, arguments).output
    assert not (folder / "results.sanrt-plan").exists()


def test_plan_leaves_out_what_a_run_would_skip_and_counts_only_the_rest(folder, tiny_model):
    (folder / "broken.png").unlink()
    named = ["--model", str(tiny_model(2)), "--threads", "1"]
    output = folder / "out"
    run = CliRunner().invoke(app, ["run", str(folder / "small.png"), str(output), "--suffix", "_x2", *named])
    assert run.exit_code == 0, run.output
    arguments = ["plan", str(folder), "--output", str(output), "--tiling", "exact", "--tile", "256", *named]
    lines = CliRunner().invoke(app, [*arguments, "--suffix", "_x2"]).output.splitlines()
    assert lines[0] == f"{output}: 1 of 2 results are there already and would be skipped; 1 remain"
    assert "small.png" not in "\n".join(lines[1:])
    (total,) = (line for line in lines if line.startswith("all that remain on onnxruntime: "))
    (alone,) = (line for line in lines if line.startswith("  onnxruntime: "))
    assert total.rpartition("about ")[2] == alone.rpartition("about ")[2]
    assert CliRunner().invoke(app, arguments).output.startswith(f"{output}: 0 of 2 results")
    (folder / "large.png").unlink()
    done = CliRunner().invoke(app, [*arguments, "--suffix", "_x2"])
    assert done.exit_code == 0
    assert done.output == f"{output}: 1 of 1 results are there already and would be skipped; 0 remain\n"
    (output / "small_x2.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"small_x2\.png: already there and not made by sanrt"):
        CliRunner().invoke(app, [*arguments, "--suffix", "_x2"], catch_exceptions=False)


@pytest.mark.parametrize("named", [["--model", "missing.onnx"]])
def test_a_model_that_is_not_there_is_an_error_not_an_empty_plan(folder, named):
    with pytest.raises(ModelError, match=r"missing.*sanrt export"):
        CliRunner().invoke(app, ["plan", str(folder / "small.png"), *named], catch_exceptions=False)


def test_an_estimate_grows_with_pixels_halos_and_pairs(tiny_model):
    from sanrt.runtime.artifacts.models import read_spec

    arch = read_spec(tiny_model(2)).architecture
    whole, tiled = TilingPlan(Tiling.WHOLE, 400, 2), TilingPlan(Tiling.EXACT, 100, 2)
    speed = Speed(1e-6, 0.0)
    assert speed.seconds(400, 400, whole, arch) == pytest.approx(0.16)
    assert speed.seconds(400, 400, tiled, arch) == pytest.approx(0.16 * 1.04**2)
    assert Speed(0.0, 1e-9).seconds(400, 400, whole, arch) == pytest.approx(2 * 400**4 / 16 * 1e-9)


def test_a_backend_that_cannot_do_a_picture_says_why_beside_the_others(folder, tiny_model):
    from sanrt.cli.plan import lines
    from sanrt.runtime.artifacts.sizes import Limits, Profile, Size
    from sanrt.runtime.backends.protocol import RunOptions
    from sanrt.runtime.backends.registry import load_backend
    from sanrt.runtime.pictures.jobs import Job
    from sanrt.runtime.runs.estimate import picture_plan
    from sanrt.runtime.tiling.options import UpscaleOptions

    job, speeds = Job(folder / "small.png", folder / "out.png"), {"torch": Speed(1.0, 0), "onnxruntime": Speed(1.0, 0)}
    loaded = [load_backend(name, tiny_model(2), RunOptions(threads=1)) for name in speeds]
    loaded[0].limits = Limits((Profile(Size(1, 4, 4), Size(1, 8, 8), Size(1, 16, 16)),))
    told = lines(picture_plan(job, loaded, speeds, UpscaleOptions(tiling=Tiling.WHOLE)))
    assert told[0] == f"{job.source}: 80 x 60"
    assert told[1].startswith("  torch: 80 x 60 pixels as a whole, its engine takes 4 x 4 to 16 x 16")
    assert told[2].startswith("  onnxruntime: whole")


@pytest.mark.parametrize(("tiling", "measured"), [(Tiling.WHOLE, "torch"), (Tiling.EXACT, "torch by stages")])
def test_streamed_pictures_are_planned_at_the_speed_of_the_stages(tiny_model, tiling, measured):
    from sanrt.runtime.backends.protocol import RunOptions
    from sanrt.runtime.backends.registry import load_backend
    from sanrt.runtime.runs.estimate import BY_STAGES, estimate
    from sanrt.runtime.tiling.options import UpscaleOptions

    speeds = {"torch": Speed(1e-2, 0), "torch" + BY_STAGES: Speed(3e-2, 0)}
    with load_backend("torch", tiny_model(2), RunOptions(threads=1)) as backend:
        info = PictureInfo(Path("a.png"), Format.PNG, 10, 10)
        found = estimate(backend, speeds, info, UpscaleOptions(tiling=tiling, tile=16))
        assert found.seconds == speeds[measured].seconds(10, 10, found.plan, backend.spec.architecture)


def test_explain_tiles_shows_exact_as_whole_and_overlapped_as_different(folder, tiny_model):
    arguments = [str(folder / "small.png"), str(folder / "out.png"), "--model", str(tiny_model(2)), "--threads", "1"]
    done = CliRunner().invoke(app, ["run", *arguments, "--tile", "32", "--backend", "onnxruntime", "--explain-tiles"])
    assert done.exit_code == 0, done.output
    rows = {line.split()[0]: float(line.split()[1]) for line in done.output.splitlines() if " of 255 " in line}
    assert rows["whole"] == 0
    assert rows["exact"] < 2e-4 * 255 < rows["overlap"]
    assert not (folder / "out.png").exists()
