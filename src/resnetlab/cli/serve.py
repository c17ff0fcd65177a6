"""`resnetlab serve`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from resnetlab.cli import console
from resnetlab.cli.options import ModelName, Texts
from resnetlab.errors import DataError, UsageError, missing_package


def serve(
    model: ModelName,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    latency_ms: float = 5.0,
    max_batch: int = 16,
    max_body_mb: float = 20.0,
    max_pixels: int = 50_000_000,
    timeout: float = 30.0,
    max_in_flight: int = 64,
    allowed_host: Texts = (),
    backend: str = "auto",
    precision: str = "auto",
    images: Path | None = None,
    device: str = "auto",
) -> None:
    """Serve a model of any task over HTTP, with a page to drop images on. Needs the extra `serve`.

    Example: `resnetlab serve runs/digits/model.safetensors --port 8000`

    Then open http://127.0.0.1:8000/, or send images: `curl -F image=@three.png http://127.0.0.1:8000/predict`. Other
    programs find the operations at /docs. Ctrl-C or SIGTERM stops it once the requests in progress are answered.

    Parameters
    ----------
    host
        Address to listen on; 0.0.0.0 lets other machines in.
    port
        Port to listen on; 0 takes a free one.
    latency_ms
        Most milliseconds that an image waits for others to form a batch.
    max_batch
        Most images in a batch.
    max_body_mb
        Largest body of a request.
    max_pixels
        Largest image, width times height.
    timeout
        Seconds for sending a request, and again for answering it.
    max_in_flight
        Requests answered at the same time; further ones get 429 and Retry-After.
    allowed_host
        A name by which clients call the service, in their Host header; may be given several times. IP addresses and localhost
        are always answered. By default other names are refused where --host is this machine only, as a protection from pages
        of other sites (DNS rebinding), and answered where it is not; a proxy on this machine may need its name here.
    backend
        torch, onnxruntime or openvino; auto takes the fastest that is installed and agrees with torch on the model's
        reference images, and logs which. Explanations are always computed by torch.
    precision
        fp32, bf16 or int8; auto is bf16 where the hardware supports it and the backend agrees, else fp32.
    images
        A folder of images for a model file that contains none (an imported one): backends are checked against torch on
        every second one, and int8 is calibrated on the others.
    device
        cpu, cuda, cuda:1, … ; auto takes a GPU where there is one. On a GPU the backend is torch.
    """
    try:
        from resnetlab.serve.app import make_app
        from resnetlab.serve.limits import Limits
        from resnetlab.serve.models import load_served_model
        from resnetlab.serve.process import check_address, run_server
        from resnetlab.serve.service import Service
    except ImportError as error:
        if (error.name or "").startswith("resnetlab"):  # a fault of ours
            raise
        raise missing_package("serve", error.name, "serve") from error
    import torch
    from PIL import Image

    from resnetlab.data.decode import find_image_files
    from resnetlab.inference.backends import check_backend_request

    positive = {"--max-batch": max_batch, "--max-body-mb": max_body_mb, "--max-pixels": max_pixels,
                "--timeout": timeout, "--max-in-flight": max_in_flight}  # fmt: skip
    for option, value in positive.items():
        if not 0 < value < 1e12:
            raise UsageError(f"{option} must be above 0, not {value}.")
    if not 0 <= latency_ms <= 60_000:
        raise UsageError(f"--latency-ms must be between 0 and 60000, not {latency_ms:g}.")
    if not 0 <= port <= 65_535:
        raise UsageError(f"--port must be between 0 and 65535, not {port}.")
    check_backend_request(backend, precision)
    if images is not None and not images.is_dir():
        raise DataError(f"{images} is not a folder; --images takes a folder of images.")
    check_address(host, port)
    reference = list(islice(find_image_files([images]), 256)) if images is not None else []
    limits = Limits(
        max_body=int(max_body_mb * 1e6),
        max_pixels=max_pixels,
        timeout=timeout,
        max_in_flight=max_in_flight,
        latency=latency_ms / 1000,
        max_batch=max_batch,
    )
    served, description = load_served_model(model, backend, precision, device, reference)
    console.log(f"backend: {description}")
    stored = torch.zeros(240, 320, served.pixel_format.channels)
    blank = served.prepare(stored if served.pixel_format.dtype else Image.new("RGB", (320, 240)))
    for n in served.warmup_batches:  # the first batches are slow; nobody should wait for them
        served.predict([blank] * min(n, max_batch))
    run_server(
        make_app(Service(served, limits), _find_host_names(host, allowed_host)),
        host,
        port,
        timeout,
        lambda address: console.log(f"{model} is served at {address} (Ctrl-C stops it)"),
    )


def _find_host_names(host: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """The names that are answered; none where all are."""
    from ipaddress import ip_address

    try:
        is_local = ip_address(host).is_loopback
    except ValueError:
        is_local = host.lower() == "localhost"
    return ("localhost", host, *allowed) if is_local or allowed else ()
