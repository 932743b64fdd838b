"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
"""Upper bounds of the histogram's buckets."""


class Metrics:
    """The counters of one server."""

    def __init__(self, queue: Callable[[], int], models: Callable[[], int]) -> None:
        """`queue` and `models` tell how many pictures and models there are now."""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.pictures = Counter("sanrt_pictures", "Pictures upscaled", registry=self.registry)
        self.pixels = Counter("sanrt_pixels", "Pixels of their sources", registry=self.registry)
        self.failures = Counter("sanrt_failures", "Requests that came to nothing", ["kind"], registry=self.registry)
        self.seconds = Histogram(
            "sanrt_step_seconds", "Time of one step of a picture", ["step"], registry=self.registry, buckets=SECONDS
        )
        Gauge("sanrt_queue", "Pictures that wait or are worked on", registry=self.registry).set_function(queue)
        Gauge("sanrt_models", "Models that are loaded", registry=self.registry).set_function(models)

    def upscaled(self, pixels: int, seconds: Mapping[str, float]) -> None:
        """Count a picture and the time of its steps."""
        self.pictures.inc()
        self.pixels.inc(pixels)
        for step, took in seconds.items():
            self.seconds.labels(step).observe(took)

    def failed(self, kind: str) -> None:
        """Count a request that came to nothing."""
        self.failures.labels(kind).inc()
