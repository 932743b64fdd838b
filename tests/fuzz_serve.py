"""`python -m tests.fuzz_serve --count 10000`: damaged pictures and rude clients against `sanrt serve`, a process of its own.

Fails on an answer that is neither a picture nor a problem of one line, on a word in the server's log, and where the
picture that is sent last is not answered as the first one was. Prints the server's memory, open files and threads after
the first hundredth and at the end.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from tests.mutate import mutated, originals

WHOLE = originals()["rgb.png"]


def main() -> None:
    """Start a server, send, check, sum up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    problems: list[str] = []
    rude = random.Random(options.seed)
    with served() as (process, port):
        expected = asked(port, WHOLE)
        for number, (name, data) in enumerate(mutated(options.count, options.seed)):
            if number == options.count // 100:
                print(state(process), flush=True)
            if rude.random() < 0.05:
                counts["rude"] += 1
                be_rude(port, data, rude)
            answer = asked(port, data or b"x")
            counts[str(answer[0])] += 1
            if complaint := wrong(*answer):
                problems.append(f"{name}: {complaint}")
            if "_intact_" in name and "float" not in name and answer[0] != 200:
                problems.append(f"{name}: undamaged, {answer[1][:200]!r}")
            if number % 1000 == 999:
                print(number + 1, dict(counts), len(problems), "problems", flush=True)
        if asked(port, WHOLE) != expected:
            problems.append("the last picture is not answered as the first one was")
        print(state(process), dict(counts), flush=True)
        process.terminate()
        if log := process.communicate(timeout=120)[1]:
            problems.append(f"the server said: {log[:2000]}")
        if process.returncode:
            problems.append(f"the server ended with {process.returncode}")
    print(*problems, sep="\n", end="\n" * bool(problems))
    sys.exit(1 if problems else 0)


@contextmanager
def served() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server of the bundled x2 weights, and its port."""
    command = [
        sys.executable,
        "-m",
        "sanrt",
        "serve",
        "--port",
        "0",
        "--scale",
        "2",
        "--backend",
        "native",
        "--seconds",
        "60",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process, int(process.stdout.readline().split(":")[2].split("/")[0])
        finally:
            process.kill()


def asked(port: int, picture: bytes) -> tuple[int, bytes, str]:
    """Status, body and content type."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("POST", "/v1/upscale?format=png", picture)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers["content-type"]
    finally:
        connection.close()


def be_rude(port: int, data: bytes, rude: random.Random) -> None:
    """Send a part, say nonsense, ask for other files, or leave before the answer."""
    length = len(data) + rude.choice([0, 0, 1, 10**6])
    head = b"POST /v1/upscale HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % length
    words = rude.choice(
        [
            head + data,
            head + data[: len(data) // 2],
            head[: rude.randrange(1, len(head))],
            rude.randbytes(200),
            b"GET /../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n",
        ]
    )
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(words)


def wrong(status: int, body: bytes, kind: str) -> str:
    """What is wrong with an answer; empty if nothing is."""
    if status == 200:
        return (
            "" if kind == "image/png" and body.startswith(b"\x89PNG") and body.endswith(b"IEND\xaeB`\x82") else "cut short"
        )
    if status not in (413, 422) or kind != "application/problem+json":
        return f"{status} {kind} {body[:200]!r}"
    detail = json.loads(body)["detail"]
    return detail if "\n" in detail or "unexpected" in detail or "sanrt-serve" in detail else ""


def state(process: subprocess.Popen[str]) -> str:
    """The server's memory, files and threads."""
    seen = psutil.Process(process.pid)
    return f"{seen.memory_info().rss >> 20} MiB, {seen.num_fds()} files, {seen.num_threads()} threads"


if __name__ == "__main__":
    main()
