"""`sanrt serve --ray`: real Ray Serve processes on this machine; one of two replicas is really killed."""

from __future__ import annotations

import importlib.util
import socket
import threading
import time

import psutil
import pytest

pytest.importorskip("ray", reason="needs the ray-serve extra")
if not importlib.util.find_spec("fastapi"):
    pytest.skip("needs the ray-serve extra", allow_module_level=True)

from concurrent.futures import ThreadPoolExecutor

from ray import serve

from sanrt.request import ModelChoice
from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.runs.ray_pool import LOCAL, Share, connected
from sanrt.serve.options import Limits, ServeOptions
from sanrt.serve.ray_deployment import build, deployment
from tests.serve.conftest import Running, encoded, until

TOKEN = "a-token-that-is-long-enough"
PICTURE = encoded(".png", width=120, height=120)


def replicas() -> list[psutil.Process]:
    """The processes of the replicas that this process' Ray runs."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ServeReplica:sanrt:Replica" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def two(models, tmp_path_factory):
    """Two replicas behind an entrance."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("pictures")
    choice = ModelChoice(None, models, 2, "onnxruntime", RunOptions(threads=1))
    options = ServeOptions(choice.absolute(), Limits(bytes=100_000), None, folder, TOKEN)
    with connected(LOCAL, 2, 1):
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
            serve.run(deployment(options, Share(2, 1), least=2), name="sanrt", logging_config={"log_level": "ERROR"})
            yield Running("127.0.0.1", port, None)
        finally:
            serve.shutdown()
    assert len(list(folder.iterdir())) <= 1, "only the killed replica's folder stays"


def test_the_application_answers_through_ray_as_it_does_alone(two, running):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert two.upscale(PICTURE, **headers).body == running.upscale(PICTURE).body
    assert two.upscale(b"hello", **headers).json == running.upscale(b"hello").json
    assert two.upscale(bytes(100_001), **headers).json["kind"] == "too_large"
    assert two.upscale(PICTURE).status == 401
    assert two.ask("GET", "/v1/about", **headers).json["jobs"] is False
    assert two.ask("POST", "/v1/jobs", PICTURE, **headers).status == 404
    assert two.ask("GET", "/").headers["content-security-policy"].startswith("default-src 'none'")


def test_what_a_killed_replica_had_is_given_to_another_and_nothing_is_lost(two, running):
    until(lambda: len(replicas()) == 2)
    expected = running.upscale(PICTURE).body
    killed = threading.Event()

    def ask(number: int) -> bytes:
        if number == 12:
            replicas()[0].kill()
            killed.set()
        answer = two.upscale(PICTURE, Authorization=f"Bearer {TOKEN}")
        while answer.status == 503:  # the line of the one that is left may be full
            assert "died" not in answer.json["detail"]
            time.sleep(0.2)
            answer = two.upscale(PICTURE, Authorization=f"Bearer {TOKEN}")
        assert answer.status == 200, answer
        return answer.body

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(ask, range(40))) == {expected}
    assert killed.is_set()
    until(lambda: len(replicas()) == 2)


def test_a_configuration_file_names_what_is_built(tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    assert build({"scale": 2, "replicas": 4, "cpus": 2, "token": str(tmp_path / "token")})
    with pytest.raises(TypeError, match="anything"):
        build({"anything": 1})
