"""What Prometheus may read at /metrics. A registry of its own, so that two apps do not mix.

Times are taken where an answer's pieces arrive at the event loop: what a client sees, less the
network. The engine's own counters are read from its last step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from hymba.engine.request import Completion
from hymba.engine.service import Service

CONTENT_TYPE = CONTENT_TYPE_LATEST
FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2.5)
CALL = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
WINDOW = 5.0  # seconds that "tokens a second" looks back

# name in the engine's Stats: (its name here, what it is); a name that ends in _total is a counter
GAUGES = {
    "running": ("requests_running", "completions that have a slot"),
    "waiting": ("requests_waiting", "requests in the queue"),
    "cache_bytes": ("cache_bytes", "cache in use"),
    "cache_bytes_total": ("cache_limit_bytes", "cache there is"),
    "prefix_bytes": ("prefix_cache_bytes", "snapshots kept of prompts"),
}
COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "tokens of prompts taken"),
    "generated_tokens": ("generated_tokens", "tokens said"),
    "prefix_hits": ("prefix_hits", "prompts whose beginning was found in the prefix cache"),
    "prefix_hit_tokens": ("prefix_hit_tokens", "tokens found there, not computed again"),
    "preemptions": ("preemptions", "sequences set aside for want of cache"),
    "steps": ("engine_steps", "steps of the engine"),
}


class Metrics:
    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self.rate = Rate()
        self.first = self._histogram("time_to_first_token_seconds", "call to first token", FIRST)
        self.token = self._histogram("time_per_output_token_seconds", "token to token", TOKEN)
        self.call = self._histogram("request_seconds", "a call that ended by itself", CALL)
        self.completions = Counter(
            "hymba_completions",
            "completions by how they ended: stop, length, cancelled (calls), error (calls)",
            ["finish"],
            registry=self.registry,
        )
        self.http = Counter(
            "hymba_http_requests", "answers", ["path", "status"], registry=self.registry
        )
        self.registry.register(_Engine(service))

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"hymba_{name}", about, buckets=buckets, registry=self.registry)

    def watch(self) -> Watch:
        return Watch(self)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Watch:
    """The clock of one call."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start = time.perf_counter()
        self._last: dict[int, float] = {}  # by choice: when its last piece came

    def saw(self, index: int, part: Completion) -> None:
        now = time.perf_counter()
        count = len(part.tokens)
        if count:
            self._metrics.rate.add(count, now)
            if not self._last:
                self._metrics.first.observe(now - self._start)
            if index in self._last:
                for _ in range(count):
                    self._metrics.token.observe((now - self._last[index]) / count)
            self._last[index] = now
        if part.finish is not None:
            self._metrics.completions.labels(part.finish).inc()

    def ended(self, how: str) -> None:
        if how == "done":
            self._metrics.call.observe(time.perf_counter() - self._start)
        else:
            self._metrics.completions.labels(how).inc()


class Rate:
    """Tokens a second, lately."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, count: int, now: float) -> None:
        self._seen.append((now, count))
        self._sum += count
        self._forget(now)

    def now(self) -> float:
        """Over the last WINDOW seconds, or since the first token in them if that is shorter."""
        now = time.perf_counter()
        self._forget(now)
        if not self._seen:
            return 0.0
        return self._sum / min(WINDOW, max(1.0, now - self._seen[0][0]))

    def _forget(self, now: float) -> None:
        while self._seen and self._seen[0][0] < now - WINDOW:
            self._sum -= self._seen.popleft()[1]


class _Engine(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        stats = self._service.stats
        for name, (ours, about) in GAUGES.items():
            yield GaugeMetricFamily(f"hymba_{ours}", about, value=getattr(stats, name))
        for name, (ours, about) in COUNTERS.items():
            yield CounterMetricFamily(f"hymba_{ours}", about, value=getattr(stats, name))
