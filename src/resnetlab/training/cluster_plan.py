"""What a training run costs on a cluster: bytes, rounds and memory by counting, times by a model of them (docs/scale.md).

Every figure says where it comes from: COUNTED from the network and the protocol; MEASURED here (docs/log.md); GIVEN by the
caller; ASSUMED, a default that the caller may replace; MODELLED, computed from the others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from resnetlab.errors import UsageError, public
from resnetlab.formatting import format_estimate, format_share
from resnetlab.models.cost import compute_cost
from resnetlab.models.spec import Specification
from resnetlab.training.exchange import BUCKET_BYTES
from resnetlab.training.recipes import SGD_BATCH

COUNTED, MEASURED, GIVEN, ASSUMED, MODELLED = "counted", "measured", "given", "assumed", "modelled"
FLOAT = 4  # bytes of a parameter and of a gradient
BACKWARD = 2 / 3  # share of a step that is its backward pass, beside which gradients travel
BYTES_PER_INDEXED_IMAGE = 90  # of names, places, labels: measured with ImageNet's names (tests/test_shards.py)
FINGERPRINT = 8  # bytes an image in a model file
IMAGES_PER_CORE = 935  # decoded, cropped and resized to 224 pixels per second by a core (docs/log.md, 2026-11-21: data)
MACHINE_LINK = 300e9  # bytes/s between the GPUs of a machine (NVLink)
MIN_EFFICIENCY = 0.9
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


@public
def _check_positive(values: Mapping[str, float]) -> None:
    for key, value in values.items():
        if not 0 < value < math.inf:
            raise UsageError(f"--{key.replace('_', '-')} must be above 0, not {value}.")


@dataclass(frozen=True)
class Cluster:
    """The machines.

    Attributes:
        gpus: of all machines.
        gpus_per_machine: of each.
        link: of a machine to the others, Gbit/s.
        latency: of a message between machines, microseconds.
        images_per_second: that one GPU trains on alone; None for `tflops` over the network's operations.
        tflops: 10^12 operations that a GPU sustains in training, two for each multiply-add.
        cores: CPU cores for each GPU.
    """

    gpus: int
    gpus_per_machine: int = 8
    link: float = 100.0
    latency: float = 30.0
    images_per_second: float | None = None
    tflops: float = 60.0
    cores: int = 12

    def __post_init__(self) -> None:
        _check_positive({key: value for key, value in vars(self).items() if value is not None})

    @property
    def machines(self) -> int:
        return -(-self.gpus // self.gpus_per_machine)


@dataclass(frozen=True)
class Job:
    """The run. `batch_per_gpu` images of `image_size` pixels in a step of each GPU; `image_bytes` is the mean of a file."""

    net: str
    spec: Specification
    images: int
    image_size: int = 224
    batch_per_gpu: int = 128
    epochs: float = 90.0
    image_bytes: int = 115_000

    def __post_init__(self) -> None:
        _check_positive({key: value for key, value in vars(self).items() if key not in ("net", "spec")})

    @cached_property
    def counts(self) -> tuple[int, int]:
        """Parameters, and multiply-adds of an image."""
        cost = compute_cost(self.spec, (self.image_size, self.image_size))
        return cost.parameters, cost.multiply_adds


class Figure(NamedTuple):
    """One line of a plan: value in a unit of the SI, its text, and where it comes from."""

    value: float
    text: str
    basis: str


@dataclass(frozen=True)
class Plan:
    """The figures by name, and sentences on what limits the run, the first limit first."""

    figures: dict[str, Figure]
    limits: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; seconds, bytes and shares."""
        figures = {key: {"value": f.value, "basis": f.basis} for key, f in self.figures.items()}
        return {"figures": figures, "limits": self.limits}


def parse_count(text: str) -> int:
    """A number of images; raises UsageError.

    >>> parse_count("1.28M"), parse_count("50k"), parse_count("1,281,167")
    (1280000, 50000, 1281167)
    """
    match = re.fullmatch(r"([\d,]*\.?\d+)([kmgb]?)", text.strip().lower())
    if match is None:
        raise UsageError(f"--images takes a number such as 1.28M, 50k or 1281167, not {text!r}.")
    return round(float(match[1].replace(",", "")) * UNITS[match[2]])


def count_link_bytes(parameters: int, machines: int) -> float:
    """Bytes that leave a machine in a step: every machine sums one part of the gradient, and sends the sum to the others.

    As many as in a ring, 2·4·P·(M - 1)/M, whatever the number of processes of a machine.
    """
    return 2 * FLOAT * parameters * (machines - 1) / machines


def step_times(job: Job, cluster: Cluster) -> tuple[float, float, float]:
    """Seconds of a step: computing alone; the exchange of gradients alone; and the part of it that computing does not hide.

    Buckets leave while the backward pass goes on, so what is left is the rest of the exchange, or at least the last bucket.
    """
    parameters, multiply_adds = job.counts
    rate = cluster.images_per_second or cluster.tflops * 1e12 / (3 * 2 * multiply_adds)  # backward is twice forward
    compute, gradient = job.batch_per_gpu / rate, FLOAT * parameters
    local, buckets = min(cluster.gpus, cluster.gpus_per_machine), max(1, math.ceil(gradient / BUCKET_BYTES))
    exchange = 2 * gradient * (local - 1) / local / MACHINE_LINK
    if cluster.machines > 1:
        seconds = count_link_bytes(parameters, cluster.machines) / (cluster.link * 1e9 / 8)
        exchange += seconds + 2 * buckets * cluster.latency * 1e-6
    return compute, exchange, max(exchange / buckets, exchange - BACKWARD * compute) if cluster.gpus > 1 else 0.0


def make_plan(job: Job, cluster: Cluster) -> Plan:
    """The plan of a run on a cluster."""
    parameters, multiply_adds = job.counts
    compute, exchange, exposed = step_times(job, cluster)
    efficiency, batch = compute / (compute + exposed), job.batch_per_gpu * cluster.gpus
    rate = batch / (compute + exposed)
    seconds, steps = job.epochs * job.images / rate, round(job.epochs * job.images / batch)
    alone = Figure(job.batch_per_gpu / compute, f"{job.batch_per_gpu / compute:,.0f} images/s", ASSUMED)
    if cluster.images_per_second:
        alone = alone._replace(basis=GIVEN)
    link_bytes = count_link_bytes(parameters, cluster.machines)
    read, cores = rate * job.image_bytes / cluster.machines, job.batch_per_gpu / compute / IMAGES_PER_CORE
    checkpoint = 2 * FLOAT * parameters  # weights and momentum
    model_file, index = FLOAT * parameters + FINGERPRINT * job.images, BYTES_PER_INDEXED_IMAGE * job.images
    figures = {
        "one GPU alone": alone,
        "parameters": Figure(parameters, f"{parameters / 1e6:,.1f} M", COUNTED),
        "multiply-adds of an image": Figure(multiply_adds, f"{multiply_adds / 1e9:,.2f} G", COUNTED),
        "batch": Figure(batch, f"{batch:,} images, {steps:,} steps", COUNTED),
        "bytes out of each machine's link, a step": Figure(link_bytes, _bytes(link_bytes), COUNTED),
        "computing, a step": Figure(compute, _milliseconds(compute), MODELLED),
        "exchange of gradients, a step": Figure(exchange, _milliseconds(exchange), MODELLED),
        "of it not hidden by computing": Figure(exposed, _milliseconds(exposed), MODELLED),
        "efficiency": Figure(efficiency, format_share(efficiency), MODELLED),
        "all GPUs": Figure(rate, f"{rate:,.0f} images/s", MODELLED),
        f"{job.epochs:g} epochs": Figure(seconds, format_estimate(seconds), MODELLED),
        "reading, each machine": Figure(read, f"{_bytes(read)}/s", MODELLED),
        "CPU cores for decoding, each GPU": Figure(
            cores, f"{cores:.1f}", MEASURED if alone.basis == GIVEN else MODELLED
        ),
        "images on disk": Figure(job.images * job.image_bytes, _bytes(job.images * job.image_bytes), ASSUMED),
        "list of images in memory, each machine": Figure(index, _bytes(index), MEASURED),
        "checkpoint": Figure(checkpoint, _bytes(checkpoint), COUNTED),
        "model file, with fingerprints of the images": Figure(model_file, _bytes(model_file), COUNTED),
    }
    return Plan(figures, find_limits(job, cluster))


def find_limits(job: Job, cluster: Cluster) -> list[str]:
    """What breaks as GPUs are added, by the number of GPUs at which it does, the first limit first."""
    large = f"the batch exceeds {SGD_BATCH:,}, where SGD's error rises: optimizer=lars or lamb, or smaller shares"
    found: list[tuple[float, str]] = [(SGD_BATCH // job.batch_per_gpu + 1, large)]
    for gpus in (cluster.gpus_per_machine * 2**k for k in range(1, 13)):
        compute, _, exposed = step_times(job, replace(cluster, gpus=gpus))
        if compute / (compute + exposed) < MIN_EFFICIENCY:
            share = format_share(MIN_EFFICIENCY)
            found.append((gpus, f"the exchange brings the efficiency below {share}: a faster link, or larger shares"))
            break
    compute, *_ = step_times(job, cluster)
    alone = job.batch_per_gpu / compute
    per_machine = alone * min(cluster.gpus, cluster.gpus_per_machine)
    if per_machine * job.image_bytes * 8 > cluster.link * 1e9:
        found.append((1, "images from other machines need more than the link: copy them to each machine's disk"))
    if (cores := alone / IMAGES_PER_CORE) > cluster.cores:
        need = f"{cores:.0f} cores a GPU, not {cluster.cores}"
        found.append((1, f"decoding needs {need}: smaller files (data pack --resize)"))
    found.append((job.images / (2 * job.batch_per_gpu), "an epoch has fewer than two steps"))
    return [
        f"{'now' if gpus <= cluster.gpus else f'from {math.ceil(gpus):,} GPUs on'}: {text}"
        for gpus, text in sorted(found)
    ]


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


def _bytes(number: float) -> str:
    """Bytes in powers of 1,000.

    >>> _bytes(204_456_256), _bytes(0), _bytes(1.5e12)
    ('204 MB', '0 B', '1.5 TB')
    """
    power = min(4, int(math.log10(number) // 3)) if number >= 1 else 0
    value = number / 1000**power
    return f"{value:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}" if value < 1000 else f"{value:,.0f} TB"
