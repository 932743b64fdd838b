"""A real S3 server on loopback (moto's), and a proxy before it that cuts connections."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from urllib.request import Request, urlopen

import pytest

from sanrt.runtime.pictures.storage import file_system

BUCKET = "pictures"
KEEP = 2000
"""Bytes that the proxy lets through of a transfer that it cuts."""


@dataclass
class Proxy:
    """Forwards to the server; a request whose first bytes contain one of `cut` breaks off, in its body or its answer."""

    server: tuple[str, int]
    cut: set[bytes] = field(default_factory=set)
    cuts: int = 0
    seen: list[bytes] = field(default_factory=list)
    """The first line of each request."""

    def __post_init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                ends = client, socket.create_connection(self.server)
                left = {"request": 1 << 62, "answer": 1 << 62}
                for source, sink, what in ((*ends, "request"), (*ends[::-1], "answer")):
                    threading.Thread(target=self.pump, args=(source, sink, what, left), daemon=True).start()

    def pump(self, source, sink, what, left) -> None:
        with suppress(OSError), closing(source), closing(sink):
            while data := source.recv(1 << 16):
                if what == "request" and data.startswith((b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE ")):
                    self.seen.append(data.partition(b"\r\n")[0])
                if what == "request" and any(marked in data for marked in self.cut):
                    left["request" if data.startswith(b"PUT") else "answer"] = KEEP
                sink.sendall(data[: left[what]])
                left[what] -= len(data)
                if left[what] < 0:
                    self.cuts += 1
                    for end in (source, sink):
                        end.shutdown(socket.SHUT_RDWR)
                    return


@dataclass
class Store:
    """The server as the tests see it."""

    proxy: Proxy
    client: object

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def tree(self, prefix: str) -> dict[str, bytes]:
        """Names and contents below a prefix."""
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        read = {entry["Key"]: self.client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read() for entry in found}
        return {key.removeprefix(prefix): content for key, content in read.items()}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Requests need known credentials within."""
        self.free_requests(0)
        try:
            yield
        finally:
            self.free_requests(1 << 30)

    def free_requests(self, count: int) -> None:
        host, port = self.proxy.server
        url = f"http://{host}:{port}/moto-api/reset-auth"
        urlopen(Request(url, str(count).encode(), {"Content-Type": "text/plain"}, method="POST")).close()


@contextmanager
def serving() -> Iterator[Store]:
    """The server with an empty bucket; the environment points to the proxy before it. Skips where it is not installed."""
    for name in ("pyarrow", "moto", "boto3"):
        pytest.importorskip(name, reason="needs the extras [ray] and [ray-test]")
    import boto3
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INITIAL_NO_AUTH_ACTION_COUNT", str(1 << 30))
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        proxy = Proxy(server.get_host_and_port())
        known = {"AWS_ACCESS_KEY_ID": "known", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in {**known, "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        file_system.cache_clear()
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{proxy.server[1]}")
        client.create_bucket(Bucket=BUCKET)
        try:
            yield Store(proxy, client)
        finally:
            file_system.cache_clear()
            proxy.listener.close()
            server.stop()
