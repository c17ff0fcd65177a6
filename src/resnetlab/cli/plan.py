"""`resnetlab plan`."""

from __future__ import annotations

from resnetlab.cli import console
from resnetlab.cli.options import Flag


def plan(
    *,
    gpus: int,
    net: str = "resnet50",
    images: str = "1.28M",
    link: float = 100.0,
    gpus_per_machine: int = 8,
    batch_per_gpu: int = 128,
    epochs: float = 90.0,
    image_size: int | None = None,
    image_bytes: int = 115_000,
    images_per_second: float | None = None,
    tflops: float = 60.0,
    latency: float = 30.0,
    cores: int = 12,
    json: Flag = False,
) -> None:
    """Plan a training run on many GPUs: time, efficiency, storage, and what breaks first.

    Example: `resnetlab plan --gpus 64 --net resnet50 --images 1.28M --link 100`

    Nothing is run. Every figure says whether it is counted, measured, given, assumed or modelled; docs/scale.md has the model.

    Parameters
    ----------
    gpus
        GPUs of all machines together.
    net
        A network's name.
    images
        Images to train on, such as 1.28M or 50k.
    link
        A machine's link to the others, in Gbit/s.
    gpus_per_machine
        GPUs in a machine.
    batch_per_gpu
        Images in each GPU's share of a step.
    epochs
        Length of the run.
    image_size
        Side of the input in pixels; by default the paper's, 32 or 224.
    image_bytes
        Mean size of an image's file, in bytes.
    images_per_second
        What one GPU trains on alone: `images_per_second` of a short run on one. Without it `tflops` and the network's
        multiply-adds give a guess.
    tflops
        10^12 operations per second that a GPU sustains in training.
    latency
        Of a message between machines, in microseconds.
    cores
        CPU cores for each GPU.
    json
        Print one JSON document: seconds, bytes, shares.
    """
    from resnetlab.models.cost import default_image_size
    from resnetlab.models.spec import get_specification
    from resnetlab.training.cluster_plan import Cluster, Job, make_plan, parse_count

    spec = get_specification(net)
    job = Job(
        net=net,
        spec=spec,
        images=parse_count(images),
        image_size=default_image_size(spec) if image_size is None else image_size,
        batch_per_gpu=batch_per_gpu,
        epochs=epochs,
        image_bytes=image_bytes,
    )
    cluster = Cluster(gpus, gpus_per_machine, link, latency, images_per_second, tflops, cores)
    found = make_plan(job, cluster)
    if json:
        return console.print_json({"net": net, "gpus": gpus, "images": job.images} | found.to_json())
    rows = [(name, figure.text, figure.basis) for name, figure in found.figures.items()]
    title = f"{net} on {job.images:,} images with {gpus:,} GPUs in {cluster.machines:,} machines, {link:g} Gbit/s"
    console.print_table(title, ("", "figure", "basis"), rows, right=(1,))
    print("\nWhat breaks first:")
    for sentence in found.limits:
        console.write_line(f"- {sentence}")
    return None
