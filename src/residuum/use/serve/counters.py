"""What the service counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Counters:
    """The figures of one service."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("residuum_requests", "Requests answered.", ("path", "status"), registry=self._registry)
        self.seconds = Histogram(
            "residuum_request_seconds",
            "From a request's first byte to its answer's last.",
            ("path",),
            registry=self._registry,
        )
        self.pictures = Counter("residuum_pictures", "Pictures shown to the network.", registry=self._registry)
        self.batches = Histogram(
            "residuum_batch_pictures",
            "Pictures in a batch.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self._registry,
        )
        self.network = Histogram("residuum_batch_seconds", "Time of the network for a batch.", registry=self._registry)
        self.in_flight = Gauge("residuum_in_flight", "Requests being answered.", registry=self._registry)

    def batch(self, pictures: int, seconds: float) -> None:
        """Counts a batch."""
        self.pictures.inc(pictures)
        self.batches.observe(pictures)
        self.network.observe(seconds)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)
