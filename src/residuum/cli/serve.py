"""`residuum serve`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from residuum.cli import console
from residuum.errors import DataError, UsageError


def serve(
    model: str,
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
    engine: str = "auto",
    precision: str = "auto",
    pictures: Path | None = None,
    device: str = "auto",
) -> None:
    """Serve a model of any task over HTTP, with a page to drop pictures on. Needs the extra: pip install 'residuum[serve]'

    Example: `residuum serve runs/digits/model.safetensors --port 8000`

    Then open http://127.0.0.1:8000/, or send pictures: `curl -F picture=@three.png http://127.0.0.1:8000/predict`. Other
    programs find all there is at /docs. Ctrl-C or SIGTERM stops it once what is under way is answered.

    Parameters
    ----------
    model
        A model file, or a publisher's name such as torchvision:resnet50.IMAGENET1K_V2.
    host
        Address to listen on; 0.0.0.0 lets other machines in.
    port
        Port to listen on; 0 takes a free one.
    latency_ms
        How long a picture waits for others at most, to be shown to the network together.
    max_batch
        Pictures shown to the network at once.
    max_body_mb
        Largest body of a request.
    max_pixels
        Largest picture, width times height.
    timeout
        Seconds for sending a request, and again for answering it.
    max_in_flight
        Requests that are answered at once; more get 429 and Retry-After.
    engine
        torch, onnxruntime or openvino; auto takes the fastest that is installed and agrees with torch on the model's check
        pictures, and says which. Explanations are torch's business.
    precision
        fp32, bf16 or int8; auto is bf16 where the hardware computes it and the engine agrees, else fp32.
    pictures
        A folder of pictures for a model file that holds none (an imported one): engines are held to torch on every second
        one, and int8 is calibrated on the others.
    device
        cpu, cuda, cuda:1, … ; auto takes a GPU where there is one. On a GPU the engine is torch.
    """
    try:
        from residuum.use.serve.answering import load
        from residuum.use.serve.app import make_app
        from residuum.use.serve.limits import Limits
        from residuum.use.serve.process import serve as run
        from residuum.use.serve.service import Service
    except ImportError as error:
        raise UsageError(
            f"serve needs the package {error.name}; install it with: pip install 'residuum[serve]'"
        ) from error
    from PIL import Image

    from residuum.data.decode import picture_files
    from residuum.use.engines import check_names

    positive = {"--max-batch": max_batch, "--max-body-mb": max_body_mb, "--max-pixels": max_pixels,
                "--timeout": timeout, "--max-in-flight": max_in_flight}  # fmt: skip
    for option, value in positive.items():
        if not 0 < value < 1e12:
            raise UsageError(f"{option} must be above 0, not {value}.")
    if not 0 <= latency_ms <= 60_000:
        raise UsageError(f"--latency-ms must lie between 0 and 60000, not {latency_ms:g}.")
    if not 0 <= port <= 65_535:
        raise UsageError(f"--port must lie between 0 and 65535, not {port}.")
    check_names(engine, precision)
    if pictures is not None and not pictures.is_dir():
        raise DataError(f"{pictures} is no folder; --pictures takes a folder of pictures.")
    given = list(islice(picture_files([pictures]), 256)) if pictures is not None else []
    limits = Limits(
        max_body=int(max_body_mb * 1e6),
        max_pixels=max_pixels,
        timeout=timeout,
        max_in_flight=max_in_flight,
        latency=latency_ms / 1000,
        max_batch=max_batch,
    )
    answering, computes = load(model, engine, precision, device, given)
    console.say(f"engine: {computes}")
    blank = answering.prepare(Image.new("RGB", (320, 240)))
    for n in answering.batches:  # the first are slow; better now than for somebody
        answering.show([blank] * min(n, max_batch))
    service = Service(answering, limits)
    run(
        make_app(service),
        host,
        port,
        timeout,
        lambda address: console.say(f"{model} is served at {address} (Ctrl-C stops it)"),
    )
