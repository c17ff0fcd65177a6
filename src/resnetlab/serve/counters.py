"""The service's Prometheus metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Counters:
    """The metrics of one service."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("resnetlab_requests", "Requests answered.", ("path", "status"), registry=self._registry)
        self.seconds = Histogram(
            "resnetlab_request_seconds",
            "From a request's first byte to its response's last.",
            ("path",),
            registry=self._registry,
        )
        self.images = Counter("resnetlab_images", "Images run through the network.", registry=self._registry)
        self.batches = Histogram(
            "resnetlab_batch_images", "Images per batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self._registry
        )
        self.network = Histogram("resnetlab_batch_seconds", "Network time per batch.", registry=self._registry)
        self.in_flight = Gauge("resnetlab_in_flight", "Requests being answered.", registry=self._registry)

    def count_batch(self, images: int, seconds: float) -> None:
        """Counts a batch."""
        self.images.inc(images)
        self.batches.observe(images)
        self.network.observe(seconds)

    def to_text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
