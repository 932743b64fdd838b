"""The loaded models of a process: each loaded when it is first asked for, the least recently used dropped for others."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sanrt.request import ModelChoice
from sanrt.runtime.backends.protocol import Backend, RunOptions
from sanrt.runtime.backends.registry import load_backend
from sanrt.runtime.host import free_host_memory

SHORT = 2**30
"""Bytes of free memory of the machine below which models that nobody uses are dropped."""


@dataclass(frozen=True)
class Key:
    """A model and how it is loaded; a file that is written anew is another model."""

    backend: str
    path: Path
    options: RunOptions
    modified: int
    size: int


@dataclass
class Networks:
    """Models by what they were loaded from, and the one thread that runs them."""

    loaded: dict[Key, Backend] = field(default_factory=dict)
    """The least recently used first."""
    users: Counter[Key] = field(default_factory=Counter)
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "sanrt-network"))

    def start(self, choice: ModelChoice) -> None:
        """Load a model before it is asked for; raises as `load_backend` does."""
        try:
            with self.needed(choice.preferred()) as key:
                self.thread.submit(self.load, key).result()
        except BaseException:
            self.stop()
            raise

    @contextmanager
    def needed(self, choice: ModelChoice) -> Iterator[Key]:
        """While the context lasts the model, once loaded, is not dropped; for the event loop's thread."""
        path = choice.path
        facts = path.stat() if path.exists() else os.stat_result((0,) * 10)  # `load` tells what is missing
        key = Key(choice.backend, path, choice.options, facts.st_mtime_ns, facts.st_size)
        self.users[key] += 1
        try:
            yield key
        finally:
            self.users[key] -= 1

    def load(self, key: Key) -> Backend:
        """The model, loaded if it is not; called in the thread. Raises as `load_backend` does."""
        for other in [other for other in self.loaded if other != key and not self.users[other]]:
            if free_host_memory() >= SHORT:
                break
            self.loaded.pop(other).close()
        network = self.loaded.pop(key, None) or load_backend(key.backend, key.path, key.options)
        self.loaded[key] = network
        return network

    def stop(self) -> None:
        """Drop all models, and end the thread."""
        self.thread.submit(self.close)
        self.thread.shutdown(wait=True)

    def close(self) -> None:
        """Drop all models; called in the thread."""
        while self.loaded:
            self.loaded.popitem()[1].close()
