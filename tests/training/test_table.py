"""The README's table of the bundled weights against the scores it is made of, and these against the weights."""

import json

import pytest

from sanrt.errors import SanrtError
from training.table import BEGIN, END, README, SCORES, rendered, scores, with_table


def test_the_readme_tells_the_scores_that_were_measured():
    text = README.read_text()
    assert with_table(text, rendered(json.loads(SCORES.read_text()))) == text


def test_the_scores_are_those_of_the_weights_that_ship(shared):
    told = json.loads(SCORES.read_text())
    found = {name: value for name, value in scores(shared / "data" / "eval", 8, "native") if "Set5" in name}
    assert len(found) >= 2
    for name, value in found.items():
        assert told[name] == pytest.approx(value, abs=0.02), name


def test_what_does_not_ship_is_a_dash_and_a_readme_without_its_place_is_told():
    lines = rendered({"bicubic Set5 x4": 28.43, "clean Set5 x4": 31.36, "clean Set5 x4 JPEG 60": 26.97})
    assert "| `clean` | - / - | - / - | 31.36 / - | - / - |" in lines
    assert "| `clean` | - | - | 26.97 | - |" in lines
    assert with_table(f"a\n{BEGIN}old\n{END}b\n", "new\n") == f"a\n{BEGIN}new\n{END}b\n"
    with pytest.raises(SanrtError, match="no place for the table"):
        with_table("nothing", lines)
