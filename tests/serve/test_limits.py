"""What a server refuses before work, and that hostile clients cost nobody else anything."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil
import pytest

from sanrt.errors import UsageError
from sanrt.serve import queue as queue_module
from sanrt.serve.options import allowed_hosts, read_token
from tests.mutate import mutated
from tests.serve.conftest import encoded, until

PICTURE = encoded(".png")


@pytest.fixture
def gate(monkeypatch):
    """Holds every picture before the network until it is set."""
    opened, enlarge = threading.Event(), queue_module.enlarge

    def held(*arguments):
        assert opened.wait(60)
        return enlarge(*arguments)

    monkeypatch.setattr(queue_module, "enlarge", held)
    return opened


def raw(running, head: bytes) -> socket.socket:
    """A connection on which something was sent."""
    connection = socket.create_connection((running.host, running.port), timeout=30)
    connection.sendall(head)
    return connection


def own_threads() -> list[str]:
    """The names of the threads that sanrt started."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("sanrt"))


def claims(width: int, height: int) -> bytes:
    """A PNG whose header claims a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + PICTURE[33:]


def test_a_header_that_claims_too_much_is_refused_before_a_pixel_is_decoded(serving):
    with serving(pixels=1000) as running:
        for size in [(100_000, 100_000), (40, 26), (2**31 - 1, 2**31 - 1)]:
            answer = running.upscale(claims(*size))
            assert answer.status in (413, 422), answer.body
        assert running.upscale(claims(100_000, 100_000)).json["kind"] == "too_large"
        assert running.upscale(PICTURE).status == 200


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(serving):
    with serving(bytes=len(PICTURE)) as running:
        pieces = (PICTURE[at : at + 100] for at in range(0, len(PICTURE), 100))
        assert running.ask("POST", "/v1/upscale", pieces).status == 200
        assert running.upscale(PICTURE + b"x").json["kind"] == "too_large"
        more = iter([PICTURE, b"x"])
        answer = running.ask("POST", "/v1/upscale", more)
        assert (answer.status, answer.json["detail"]) == (
            413,
            f"the request has more than {len(PICTURE)} bytes, the most that this server takes",
        )


def test_where_the_line_is_full_clients_are_told_when_to_come_back(serving, gate):
    with serving(queue=2) as running, ThreadPoolExecutor() as pool:
        held = [pool.submit(running.upscale, PICTURE) for _ in range(2)]
        until(lambda: running.queue.pictures == 2)
        answer = running.upscale(PICTURE)
        assert (answer.status, answer.json["kind"]) == (503, "busy")
        assert int(answer.headers["retry-after"]) >= 1
        counted = running.metric("sanrt_failures_total", kind="busy")
        answer = running.ask("GET", "/readyz")
        assert (answer.status, answer.json["kind"]) == (503, "busy")
        assert int(answer.headers["retry-after"]) >= 1
        assert running.metric("sanrt_failures_total", kind="busy") == counted, "a question whether it is busy is no failure"
        assert running.ask("GET", "/healthz").status == 200
        gate.set()
        assert [each.result().status for each in held] == [200, 200]
        assert running.upscale(PICTURE).status == 200


def test_sixty_four_clients_against_eight_places_get_the_right_picture_or_a_503(serving):
    pictures = [encoded(".png", bands=1 + index % 4, width=20 + index % 5) for index in range(8)]
    with serving(queue=8) as running, ThreadPoolExecutor(64) as pool:
        expected = [running.upscale(picture).body for picture in pictures]
        counts: Counter[int] = Counter()
        for _ in range(3):
            asked = [(index % 8, pool.submit(running.upscale, pictures[index % 8])) for index in range(64)]
            for index, future in asked:
                answer = future.result()
                counts[answer.status] += 1
                assert answer.status in (200, 503), answer.body
                assert answer.status == 503 or answer.body == expected[index]
        assert counts[200] >= 8
        assert running.queue.pictures == 0


def test_a_client_that_goes_away_frees_its_place(serving, gate):
    head = b"POST /v1/upscale HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(PICTURE)
    with serving(queue=4) as running, ThreadPoolExecutor() as pool:
        running_one = pool.submit(running.upscale, PICTURE)
        until(lambda: running.queue.pictures == 1)
        clients = [raw(running, head + PICTURE) for _ in range(3)]
        until(lambda: running.queue.pictures == 4)
        for client in clients:
            client.close()
        until(lambda: running.queue.pictures == 1)
        gate.set()
        assert running_one.result().status == 200
        until(lambda: running.queue.pictures == 0)
        assert running.metric("sanrt_failures_total", kind="gone") == 3
        assert running.upscale(PICTURE).status == 200


def test_a_picture_that_takes_too_long_is_given_up(serving, monkeypatch):
    enlarge = queue_module.enlarge
    monkeypatch.setattr(queue_module, "enlarge", lambda *arguments: (time.sleep(0.6), enlarge(*arguments))[1])
    with serving(seconds=0.3) as running:
        answer = running.upscale(PICTURE)
        assert (answer.status, answer.json["kind"]) == (504, "too_long")
        assert "took more than the 0.3 s" in answer.json["detail"]
        monkeypatch.setattr(queue_module, "enlarge", enlarge)
        assert running.upscale(PICTURE).status == 200


def test_slow_and_broken_senders_are_told_or_forgotten_and_leave_nothing(serving):
    head = b"POST /v1/upscale HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(PICTURE)
    process = psutil.Process()
    with serving(seconds=1.0) as running:
        running.upscale(PICTURE)
        until(lambda: running.app.state.uploads.open == 0)
        files, threads = process.num_fds(), own_threads()
        slow = [raw(running, head + PICTURE[:20]) for _ in range(4)]
        for _ in range(20):
            raw(running, head + PICTURE[:50]).close()
            raw(running, head + PICTURE).close()
            raw(running, b"POST /v1/ups").close()
            raw(running, b"\x00\xff nonsense\r\n\r\n").close()
        answers = [b"".join(iter(partial(client.recv, 1 << 16), b"")) for client in slow]
        assert all(b" 408 " in answer and b"slow_sender" in answer for answer in answers), answers
        for client in slow:
            client.close()
        assert running.upscale(PICTURE).status == 200
        until(lambda: running.app.state.uploads.open == 0 and running.queue.pictures == 0)
        until(lambda: process.num_fds() <= files)
        assert own_threads() == threads


def test_hundreds_of_mutated_pictures_get_a_picture_or_one_line_and_leave_nothing(serving, caplog):
    process = psutil.Process()
    with serving() as running:
        running.upscale(PICTURE)
        files = process.num_fds()
        for name, data in mutated(300, seed=19):
            answer = running.upscale(data or b"x", "format=png&flatten=white")
            assert answer.status in (200, 413, 422), (name, answer)
            if answer.status != 200:
                detail = answer.json["detail"]
                assert "\n" not in detail, (name, detail)
                assert "unexpected" not in detail, (name, detail)
                assert "/" not in detail.partition("(")[0], (name, detail)
        assert running.upscale(PICTURE).status == 200
        until(lambda: process.num_fds() <= files)
    assert not [record for record in caplog.records if record.exc_info]


def test_paths_lead_nowhere(running):
    for path in ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/v1/../../etc/passwd", "/..%5c..%5cetc"):
        answer = running.ask("GET", path)
        assert answer.status == 404, (path, answer)


def test_without_the_token_nothing_is_done(serving, monkeypatch):
    token = "a-token-that-is-long-enough"
    monkeypatch.setattr("sanrt.serve.options.is_loopback", lambda host: False)  # so that any Host is answered
    with serving(token=token) as running:
        for headers in ({}, {"Authorization": "Bearer another-token-of-that-length"}, {"Authorization": f"Basic {token}"}):
            answer = running.upscale(PICTURE, **headers)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert answer.headers["content-type"] == "application/problem+json"
        for host in ("a/b?", "a?b", "a#b", "a@b/healthz?"):  # which would make another path of the request's URL
            assert running.upscale(PICTURE, Host=host).status in (400, 401), host
        for path in ("/v1%2fupscale", "/%76%31/upscale", "//v1/upscale", "/page/../v1/upscale", "/v1/upscale/"):
            assert running.ask("POST", path, PICTURE).status in (401, 404, 405), path
        assert running.ask("GET", "/metrics").status == 401
        assert running.ask("GET", "/healthz").status == 200
        assert running.upscale(PICTURE, Authorization=f"Bearer {token}").status == 200


def test_other_sites_pages_and_other_names_of_the_machine_are_refused(running):
    assert running.upscale(PICTURE, Sec_Fetch_Site="cross-site").status == 403
    assert running.upscale(PICTURE, Sec_Fetch_Site="same-site").status == 403
    assert running.upscale(PICTURE, Sec_Fetch_Site="same-origin").status == 200
    for origin in ("http://evil.com", "https://evil.com:8000", "null", "http://127.0.0.1:1", ""):
        assert running.upscale(PICTURE, Origin=origin).status == 403, origin
    assert running.upscale(PICTURE, Origin=f"http://{running.host}:{running.port}").status == 200
    answer = running.upscale(PICTURE, Host="rebound.example")
    assert (answer.status, answer.headers["content-type"], answer.json["kind"]) == (
        400,
        "application/problem+json",
        "refused",
    )
    assert answer.json["detail"].startswith("Host is none of this server's names; expected one of ")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert running.upscale(PICTURE, Host="localhost:8000").status == 200


def test_other_machines_need_a_token_unless_told_otherwise():
    for host in ("127.0.0.1", "::1", "localhost"):
        assert "*" not in allowed_hosts(host, None, False)
    for host in ("0.0.0.0", "::", "192.168.1.2", "a.example"):
        with pytest.raises(UsageError, match="add --token FILE, or --without-token"):
            allowed_hosts(host, None, False)
        assert allowed_hosts(host, "t" * 20, False) == allowed_hosts(host, None, True) == ("*",)


def test_a_token_is_one_long_word(tmp_path):
    (tmp_path / "token").write_text(" 0123456789abcdef\n")
    assert read_token(tmp_path / "token") == "0123456789abcdef"
    for text in ("", "short", "0123456789 abcdef", "0123456789\nabcdef", "0123456789abcdéf"):
        (tmp_path / "token").write_text(text)
        with pytest.raises(UsageError, match="expected one line of at least 16 characters"):
            read_token(tmp_path / "token")
    with pytest.raises(UsageError, match="cannot be read"):
        read_token(tmp_path / "none")


def test_terminated_under_load_it_finishes_what_runs_and_leaves_nothing(models, tmp_path):
    words = ["serve", "--port", "0", "--models", models, "--scale", "2", "--backend", "onnxruntime", "--threads", "1"]
    command = [sys.executable, "-m", "sanrt", *map(str, words), "--folder", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    port = int(process.stdout.readline().split(":")[2].split("/")[0])
    picture = encoded(".png", height=100, width=100)
    head = b"POST /v1/upscale HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(picture)
    answers: list[bytes] = []

    def ask() -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(head + picture)
            answers.append(b"".join(iter(lambda: connection.recv(1 << 16), b"")))

    clients = [threading.Thread(target=ask) for _ in range(6)]
    for client in clients:
        client.start()
    until(lambda: bool(answers))
    os.kill(process.pid, signal.SIGTERM)
    for client in clients:
        client.join()
    _, err = process.communicate(timeout=60)
    statuses = Counter(answer.split()[1] for answer in answers)
    assert statuses.keys() <= {b"200", b"503"}, answers
    assert statuses[b"200"] >= 2, answers  # the first, and the one that was in the network meanwhile
    for answer in answers:
        top, _, body = answer.partition(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in top.splitlines() if line.lower().startswith(b"content-length"))
        assert len(body) == length
    assert (process.returncode, err) == (0, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--host", "0.0.0.0"], "other machines reach it; add --token FILE"),
        (["--port", "TAKEN"], "cannot be listened on (Address already in use"),
        (["--backend", "nothing"], "unknown backend"),
        (["--scale", "7"], "expected 2, 3, 4, 8"),
        (["--max-bytes", "many"], "expected a number of bytes"),
    ],
)
def test_what_cannot_be_served_is_one_line(words, line, models, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [str(taken.getsockname()[1]) if word == "TAKEN" else word for word in words]
        command = [sys.executable, "-m", "sanrt", "serve", "--port", "0", "--models", str(models), "--scale", "2", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode in (1, 2)
    assert line in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
