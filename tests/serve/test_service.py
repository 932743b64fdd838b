"""What a request resolves to, apart from HTTP."""

from __future__ import annotations

from pathlib import Path

import pytest

from sanrt.errors import UsageError
from sanrt.model import bundled
from sanrt.model.bundled import WeightsKind
from sanrt.request import ModelChoice
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.serve.options import ServeOptions
from sanrt.serve.parameters import read_parameters
from sanrt.serve.service import Service, available_weights
from sanrt.serve.uploads import Upload, clean_stem
from tests.serve.conftest import encoded


@pytest.fixture
def choice(tmp_path, monkeypatch) -> ModelChoice:
    """Bundled weights for x2 and x4, those for photographs at x2 alone."""
    (tmp_path / "weights").mkdir()
    for name, source in {"san_x2": "san_x2", "san_x2_photo": "san_x2", "san_x4": "san_x4"}.items():
        (tmp_path / "weights" / f"{name}.safetensors").write_bytes((bundled.FOLDER / f"{source}.safetensors").read_bytes())
    monkeypatch.setattr(bundled, "FOLDER", tmp_path / "weights")
    return ModelChoice(None, tmp_path / "none", 2, "native", RunOptions())


def examined(choice: ModelChoice, folder: Path, picture: bytes, **parameters: str):
    """The weights and scale that a picture goes through, and why."""
    (folder / "picture").write_bytes(picture)
    order = Service(ServeOptions(choice), None).examined(Upload(folder / "picture", "picture", list(parameters.items())))
    return order.part.choice.weights, order.part.recipe.scale, order.part.reason


def test_weights_are_chosen_by_the_content_as_run_chooses_them(choice, tmp_path):
    poor, good = encoded(".jpg", Q=60), encoded(".jpg", Q=95)
    assert examined(choice, tmp_path, poor) == (
        WeightsKind.PHOTO,
        2,
        f"JPEG of quality {bundled.PHOTO_QUALITY} or less, through the weights for photographs",
    )
    assert examined(choice, tmp_path, good) == (None, 2, "")
    assert examined(choice, tmp_path, poor, weights="clean") == (WeightsKind.CLEAN, 2, "")
    assert examined(choice, tmp_path, poor, scale="4") == (None, 4, "")
    with pytest.raises(UsageError, match="no fast weights for x2"):
        examined(choice, tmp_path, poor, weights="fast")


def test_the_size_that_is_asked_for_says_the_scale(choice, tmp_path):
    assert examined(choice, tmp_path, encoded(".png"), size="50x50")[1] == 2
    assert examined(choice, tmp_path, encoded(".png"), outscale="3.5")[1] == 4
    assert examined(choice, tmp_path, encoded(".png"), scale="4", outscale="1.5")[1] == 4


@pytest.mark.parametrize(
    ("sent", "stem"),
    [
        ("a.png", "a"),
        ("../../etc/pass wd.jpg", "pass wd"),
        ("C:\\pictures\\K\xe4tzchen.tar.webp", "K\xe4tzchen.tar"),
        ('a"b\r\nSet-Cookie: x=1\x1b[31m.png', 'a"bSet-Cookie: x=1[31m'),
        ("\u202egnp.exe", "gnp"),
        ("\udce4a.png", "a"),
        (".png", "png"),
        ("...", "picture"),
        ("", "picture"),
        ("x" * 300 + ".png", "x" * 100),
    ],
)
def test_a_sender_s_name_is_taken_without_folders_and_what_no_name_should_have(sent, stem):
    assert clean_stem(sent) == stem


def test_what_there_is_can_be_asked_for(choice):
    assert available_weights(choice) == {2: ["auto", "clean", "photo"], 4: ["auto", "clean"]}


def test_a_value_is_never_taken_for_an_option():
    with pytest.raises(UsageError, match="format: --lossless"):
        read_parameters([("format", "--lossless")])
    with pytest.raises(UsageError, match="does not take a value"):
        read_parameters([("lossless=1 --scale", "2")])
    assert read_parameters([("keep_hidden_colours", "yes"), ("self-ensemble", "0")]).upscaling.keep_hidden
