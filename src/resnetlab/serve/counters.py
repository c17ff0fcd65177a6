"""The service's Prometheus metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # limits of the buckets, in images


class Counters:
    """The metrics of one service."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        seconds = "From a request's first byte to its response's last."
        self.requests = Counter("resnetlab_requests", "Requests answered.", ("path", "status"), registry=registry)
        self.seconds = Histogram("resnetlab_request_seconds", seconds, ("path",), registry=registry)
        self.images = Counter("resnetlab_images", "Images run through the network.", registry=registry)
        self.batches = Histogram(
            "resnetlab_batch_images", "Images per batch.", buckets=BATCH_BUCKETS, registry=registry
        )
        self.network = Histogram("resnetlab_batch_seconds", "Network time per batch.", registry=registry)
        self.in_flight = Gauge("resnetlab_in_flight", "Requests being answered.", registry=registry)

    def count_batch(self, images: int, seconds: float) -> None:
        """Counts a batch."""
        self.images.inc(images)
        self.batches.observe(images)
        self.network.observe(seconds)

    def to_text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
