"""POST /v1/upscale: the bytes of `sanrt run`, and what is refused in which words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sanrt import Written, upscale_files
from sanrt.cli import app as command_line
from sanrt.serve.openapi import EXAMPLES, description
from sanrt.serve.parameters import options, read_parameters
from tests.serve.conftest import Running, encoded, until

KINDS = {
    "rgb.png": encoded(".png"),
    "grey.png": encoded(".png", bands=1),
    "alpha.png": encoded(".png", bands=4),
    "deep.png": encoded(".png", dtype=np.uint16),
    "deep_alpha.png": encoded(".png", bands=4, dtype=np.uint16),
    "photo.jpg": encoded(".jpg", Q=80),
    "lossy.webp": encoded(".webp"),
    "lossless.webp": encoded(".webp", bands=4, lossless=True),
    "deep.tif": encoded(".tif", dtype=np.uint16),
    "palette.gif": encoded(".gif"),
}


def result_of_run(models: Path, folder: Path, name: str, picture: bytes, **options: object) -> bytes:
    """What `sanrt run` writes for a picture."""
    (folder / name).write_bytes(picture)
    (outcome,) = upscale_files(
        folder / name, folder / "out/", scale=2, models=models, backend="onnxruntime", threads=1, **options
    )
    assert isinstance(outcome, Written)
    return outcome.job.destination.read_bytes()


@pytest.mark.parametrize("name", KINDS)
def test_the_answer_is_the_bytes_of_sanrt_run(name, running, models, tmp_path):
    answer = running.upscale(KINDS[name])
    assert answer.status == 200, answer.body
    assert answer.body == result_of_run(models, tmp_path, name, KINDS[name])
    assert answer.headers["content-type"] == f"image/{'png' if name.endswith('gif') else form(name)}"


def form(name: str) -> str:
    return {"jpg": "jpeg", "tif": "tiff"}.get(name[-3:], name.rpartition(".")[2])


def test_parameters_mean_what_options_mean(running, models, tmp_path):
    answer = running.upscale(KINDS["alpha.png"], "format=webp&quality=70&flatten=red&outscale=1.5&self-ensemble")
    options = {"format": "webp", "quality": 70, "background": (255, 0, 0), "outscale": 1.5, "self_ensemble": True}
    assert answer.body == result_of_run(models, tmp_path, "a.png", KINDS["alpha.png"], **options)
    assert answer.headers["content-disposition"] == 'inline; filename="picture_x1.5.webp"'


def test_a_form_is_as_good_as_a_body(running):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="format"\r\n\r\njpeg\r\n'
        b'--x\r\nContent-Disposition: form-data; name="picture"; filename="../../../etc/a.png"\r\n\r\n'
        + KINDS["rgb.png"]
        + b"\r\n--x--\r\n"
    )
    answer = running.upscale(body, Content_Type="multipart/form-data; boundary=x")
    assert (answer.status, answer.headers["content-type"]) == (200, "image/jpeg")
    assert answer.body == running.upscale(KINDS["rgb.png"], "format=jpeg").body
    assert answer.headers["content-disposition"] == 'inline; filename="a_x2.jpg"'


def test_a_result_has_the_sent_name_and_what_size_it_is(running):
    form = '--x\r\nContent-Disposition: form-data; name="p"; filename="{}"\r\n\r\n{}\r\n--x--\r\n'
    head, tail = form.format("K\xe4tz chen.png", "{}").split("{}")
    body = head.encode() + KINDS["rgb.png"] + tail.encode()
    answer = running.upscale(body, Content_Type="multipart/form-data; boundary=x")
    assert answer.headers["content-disposition"] == "inline; filename*=utf-8''K%C3%A4tz%20chen_x2.png"
    place = running.ask("POST", "/v1/jobs?size=50x50", body, Content_Type="multipart/form-data; boundary=x").headers[
        "location"
    ]
    until(lambda: running.ask("GET", place).json["result"])
    assert running.ask("GET", place).json["result"]["name"] == "K\xe4tz chen_50x50.png"
    answer = running.ask("GET", f"{place}/result")
    assert answer.headers["content-disposition"] == "inline; filename*=utf-8''K%C3%A4tz%20chen_50x50.png"


def test_a_model_may_have_any_name(serving, models, tmp_path):
    named = tmp_path / "\u6a21\u578b.onnx"
    named.write_bytes((models / "san_x2.onnx").read_bytes())
    with serving(named=named) as running:
        answer = running.upscale(KINDS["rgb.png"])
        assert (answer.status, answer.headers["sanrt-model"]) == (200, "\\u6a21\\u578b.onnx")


def test_what_was_noted_is_in_headers(running):
    answer = running.upscale(KINDS["deep.png"], "format=jpeg")
    assert answer.notes == ["16-bit samples become 8-bit: JPEG holds no more"]
    assert answer.headers["sanrt-model"] == "san_x2.onnx"
    assert answer.headers["server-timing"].startswith("read;dur=")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("scale=7", "scale: 7: expected 2, 3, 4, 8"),
        ("quality=0", "quality: expected 1 or more"),
        ("quality=a%0ab", "quality: "),
        ("format=bmp", "format: bmp: sanrt reads it, and writes png instead"),
        ("model=a.onnx", "there is no parameter model"),
        ("record=a.jsonl", "there is no parameter record"),
        ("scratch=a", "there is no parameter scratch"),
        ("scale=2&scale=4", "scale: said twice"),
        ("lossless=maybe", "lossless: maybe; expected true or false"),
        ("lossless=true", "lossless: changes nothing in png files"),
        ("size=1x1&outscale=2", "outscale and size: both say how large results are"),
        ("tile=32&tiling=whole", "tiles of 32 pixels with whole tiling"),
        ("=1", "there is no parameter"),
    ],
)
def test_wrong_parameters_are_told_in_the_words_of_requests(query, words, running):
    answer = running.upscale(KINDS["rgb.png"], query)
    assert (answer.status, answer.headers["content-type"]) == (400, "application/problem+json")
    assert words in answer.json["detail"]
    assert "\n" not in answer.json["detail"]
    assert answer.json["kind"] == "usage"


def test_refusals_are_the_lines_of_the_command_line(running, models, tmp_path):
    (tmp_path / "picture").write_bytes(KINDS["rgb.png"][:60])
    words = ["run", "picture", "out.png", "--models", str(models), "--scale", "2", "--backend", "onnxruntime"]
    done = subprocess.run([sys.executable, "-m", "sanrt", *words], cwd=tmp_path, capture_output=True, text=True)
    answer = running.upscale(KINDS["rgb.png"][:60])
    assert answer.status == 422
    assert f"sanrt: {answer.json['detail']}\n" == done.stderr


def test_what_is_no_picture_is_unprocessable_and_no_body_is_wrong_usage(running):
    assert running.upscale(b"hello").status == 422
    answer = running.upscale(b"")
    assert (answer.status, "no picture" in answer.json["detail"]) == (400, True)
    answer = running.upscale(b"--x--\r\n", Content_Type="multipart/form-data; boundary=x")
    assert (answer.status, "no file" in answer.json["detail"]) == (400, True)
    answer = running.upscale(b"nonsense", Content_Type="multipart/form-data")
    assert (answer.status, answer.headers["content-type"]) == (400, "application/problem+json")


def test_another_scale_than_a_named_model_s_is_refused_without_its_folder(serving, models):
    with serving(named=models / "san_x2.onnx") as running:
        answer = running.upscale(KINDS["rgb.png"], "scale=4")
        assert answer.json["detail"].startswith("san_x2.onnx: is for x2, but scale=4 was asked for")
        assert running.upscale(KINDS["rgb.png"]).status == 200


def test_models_are_loaded_when_first_asked_for_and_dropped_when_memory_is_short(serving, monkeypatch):
    with serving() as running:
        assert len(running.queue.networks.loaded) == 1
        assert running.upscale(KINDS["rgb.png"], "scale=4").status == 200
        assert running.metric("sanrt_models") == 2
        monkeypatch.setattr("sanrt.serve.networks.free_host_memory", lambda: 0)
        first = running.upscale(KINDS["rgb.png"], "scale=2")
        assert [key.path.name for key in running.queue.networks.loaded] == ["san_x2.onnx"]
        assert running.upscale(KINDS["rgb.png"], "scale=4").status == 200
        assert [key.path.name for key in running.queue.networks.loaded] == ["san_x4.onnx"]
        assert running.upscale(KINDS["rgb.png"], "scale=2").body == first.body


def test_health_readiness_and_metrics(running: Running):
    assert running.ask("GET", "/healthz").json == {"status": "ok"}
    assert running.ask("GET", "/readyz").json == {"status": "ready"}
    before = running.metric("sanrt_pictures_total"), running.metric("sanrt_failures_total", kind="picture")
    running.upscale(KINDS["rgb.png"])
    running.upscale(b"hello")
    after = running.metric("sanrt_pictures_total"), running.metric("sanrt_failures_total", kind="picture")
    assert after == (before[0] + 1, before[1] + 1)
    text = running.ask("GET", "/metrics").body.decode()
    for name in ("sanrt_pixels_total", 'sanrt_step_seconds_count{step="upscale"}', "sanrt_queue 0.0", "process_open_fds"):
        assert name in text


def test_unknown_paths_and_methods_are_problems(running):
    for method, path, status in [("GET", "/v1/upscale", 405), ("GET", "/v1/nothing", 404), ("PUT", "/healthz", 405)]:
        answer = running.ask(method, path)
        assert (answer.status, answer.json["status"]) == (status, status)
        assert answer.json["kind"] == ("not_found" if status == 404 else "usage")
        assert answer.headers["content-type"] == "application/problem+json"


def test_every_route_and_parameter_is_described_and_every_example_is_taken(running):
    found = running.ask("GET", "/openapi.json").json
    assert found == json.loads(json.dumps(description()))
    routes = {route.path for route in running.app.routes if getattr(route, "methods", None)}
    assert set(found["paths"]) == routes - {"/openapi.json"}
    assert {option.opts[0].lstrip("-") for option in options()} == set(EXAMPLES)
    for parameter in found["paths"]["/v1/upscale"]["post"]["parameters"]:
        read_parameters([(parameter["name"], str(parameter["example"]))])


def test_the_command_is_there_and_tells_its_options():
    assert "serve" in {command.callback.__name__ for command in command_line.registered_commands}
