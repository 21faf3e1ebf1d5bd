"""The server's metrics for Prometheus."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

WINDOW = 60.0  # seconds over which images per second are counted
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """A server's counters, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("scale_rae_requests", "Requests answered.", ["route", "status"], registry=registry)
        self.latency = Histogram(
            "scale_rae_request_seconds",
            "Seconds from a request's arrival to the end of its answer.",
            ["route"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._dropped = Counter(
            "scale_rae_connections_dropped", "Connections refused or ended.", ["reason"], registry=registry
        )
        self.waiting = Gauge("scale_rae_requests_waiting", "Requests in the queue.", registry=registry)
        self.running = Gauge("scale_rae_requests_running", "Requests that are worked at.", registry=registry)
        self.batch = Histogram(
            "scale_rae_batch_size",
            "Replies given, or images drawn or looked at, at once.",
            ["stage"],
            registry=registry,
            buckets=_SIZES,
        )
        self.stages = Histogram(
            "scale_rae_stage_seconds", "Seconds that a batch takes.", ["stage"], registry=registry, buckets=_SECONDS
        )
        self.images = Counter("scale_rae_images", "Images drawn to their end.", registry=registry)
        self.evaluations = Counter(
            "scale_rae_evaluations",
            "Images times evaluations of the network, unfinished images too.",
            registry=registry,
        )
        self.candidates = Counter(
            "scale_rae_candidates", "What became of candidates of searches.", ["fate"], registry=registry
        )
        self.tokens = Counter("scale_rae_tokens", "Tokens written by the model.", registry=registry)
        rate = Gauge("scale_rae_images_per_second", "Images drawn a second, over the last minute.", registry=registry)
        rate.set_function(self.images_per_second)
        self._recent: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()
        self._began = time.monotonic()

    def drop(self, reason: str) -> None:
        """Counts a connection that was refused, or ended because its client broke a limit."""
        self._dropped.labels(reason).inc()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the seconds of a stage of a batch."""
        start = time.perf_counter()
        yield
        self.stages.labels(name).observe(time.perf_counter() - start)

    def drew(self, count: int) -> None:
        """Counts drawn images."""
        self.images.inc(count)
        with self._lock:
            self._recent.append((time.monotonic(), count))

    def images_per_second(self) -> float:
        """Images drawn per second over the last WINDOW."""
        now = time.monotonic()
        with self._lock:
            while self._recent and self._recent[0][0] < now - WINDOW:
                self._recent.popleft()
            return sum(count for _, count in self._recent) / max(1.0, min(WINDOW, now - self._began))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
