"""Colours under full transparency do not reach what is seen."""

from __future__ import annotations

import numpy as np
import pytest
import pyvips
from typer.testing import CliRunner

from sanrt import Upscaler
from sanrt.cli import app
from sanrt.runtime.pictures.transparency import fill_hidden

SIZE = 40
HIDDEN = {"black": (0, 0, 0), "white": (255, 255, 255), "magenta": (255, 0, 255)}


def disc(hidden: tuple[int, int, int]) -> np.ndarray:
    """An RGBA disc, its colours changing slowly, on hidden ones."""
    y, x = np.mgrid[:SIZE, :SIZE]
    inside = (x - 19.5) ** 2 + (y - 19.5) ** 2 < 14**2
    colours = np.dstack([60 + 3 * x, 40 + 2 * y, np.full_like(x, 90)])
    return np.dstack([np.where(inside[..., None], colours, hidden), 255 * inside]).astype(np.uint8)


def on_white(picture: np.ndarray) -> np.ndarray:
    opacity = picture[..., 3:] / 255
    return picture[..., :3] * opacity + 255 * (1 - opacity)


def brute_force(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The distance of the nearest visible pixel by rows and columns passed."""
    ys, xs = np.nonzero(alpha)
    y, x = np.mgrid[: alpha.shape[0], : alpha.shape[1]]
    return (abs(y[..., None] - ys) + abs(x[..., None] - xs)).min(axis=-1)


def test_hidden_colours_are_those_of_a_nearest_visible_pixel():
    rng = np.random.default_rng(1)
    alpha = (rng.random((23, 31)) > 0.93).astype(np.uint8) * rng.integers(1, 256, (23, 31), np.uint8)
    y, x = np.mgrid[:23, :31]
    places = np.dstack([y, x, alpha]).astype(np.uint8)
    filled = fill_hidden(places, alpha)
    found = abs(filled[..., 0].astype(int) - y) + abs(filled[..., 1].astype(int) - x)
    assert (found == brute_force(places, alpha)).all()
    assert (filled[..., 2] > 0).all(), "every colour comes from a visible pixel"
    assert (filled[alpha > 0] == places[alpha > 0]).all()


@pytest.mark.parametrize("opacity", [0, 1, 255])
def test_a_picture_with_nothing_hidden_or_nothing_visible_is_left_alone(opacity):
    colours = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    assert fill_hidden(colours, np.full((5, 6), opacity, np.uint8)) is colours


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_the_library_gives_one_disc_whatever_is_hidden_beside_it(tiny_model, dtype):
    factor = {np.uint8: 1, np.uint16: 257, np.float32: 1 / 256}[dtype]
    with Upscaler.load(tiny_model(2), backend="onnxruntime", threads=1) as upscaler:
        results = [upscaler((disc(colour).astype(float) * factor).astype(dtype)) for colour in HIDDEN.values()]
        assert all((result == results[0]).all() for result in results)
    with Upscaler.load(tiny_model(2), backend="onnxruntime", threads=1, keep_hidden=True) as upscaler:
        kept = [upscaler((disc(colour).astype(float) * factor).astype(dtype)) for colour in HIDDEN.values()]
        assert not all((result == kept[0]).all() for result in kept)


@pytest.mark.parametrize("tiling", [[], ["--tiling", "exact", "--tile", "16"]], ids=["whole", "streamed"])
def test_files_give_one_disc_on_white_whatever_is_hidden_beside_it(tmp_path, tiny_model, tiling, monkeypatch):
    monkeypatch.setattr("sanrt.runtime.tiling.streaming.STRIP_ROWS", 7)
    folder = tmp_path / "in"
    folder.mkdir()
    for name, colour in HIDDEN.items():
        pyvips.Image.new_from_array(disc(colour)).write_to_file(str(folder / f"{name}.png"))
    options = ["--model", str(tiny_model(2)), "--backend", "onnxruntime", "--threads", "1", *tiling]

    def results(output: str, *more: str) -> list[np.ndarray]:
        assert CliRunner().invoke(app, ["run", str(folder), str(tmp_path / output), *options, *more]).exit_code == 0
        return [pyvips.Image.new_from_file(str(tmp_path / output / f"{name}.png")).numpy() for name in HIDDEN]

    filled = results("filled")
    assert all((each == filled[0]).all() for each in filled)
    with Upscaler.load(tiny_model(2), backend="onnxruntime", threads=1) as upscaler:
        assert np.abs(on_white(filled[0]) - on_white(upscaler(disc(HIDDEN["black"])))).max() <= 1
    kept = results("kept", "--keep-hidden-colours")
    assert np.abs(on_white(kept[0]) - on_white(kept[1])).max() > 5
