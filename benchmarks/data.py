"""Images per second of our input pipeline and of torchvision's, alternating in one process on photographs of 500x375.

    uv run --extra fast python benchmarks/data.py                        # images: ../shared/data/flowers
    uv run --extra fast python benchmarks/data.py --images FOLDER --rounds 7 --json results.json
    uv run --extra fast python benchmarks/data.py --only tables,coco,embed

Per core: everything runs in this process with one thread. Whole batches are compared, decoded, augmented, normalised, stacked:

    torchvision resized    ImageFolder, RandomResizedCrop, flip, ToTensor, Normalize (PIL), DataLoader
    torchvision scale      the same with the paper's augmentation, written plainly: resize the shorter side, crop 224
    ours ...               the same two, with Pillow and with simplejpeg (the extra "fast")

Then, one after the other, or only some with --only:

    pipeline     the forms above
    cifar        CIFAR's augmentation of a whole batch beside a ResNet-20 training step
    memory       while reading from folders of 10,000 and 100,000 names
    tables       seconds from a path to a list of 100,000 labelled images (--names), beside torchvision's ImageFolder
    coco         a COCO document of 120,000 images (--documents), beside pycocotools: processor seconds and memory
    embed        feature vectors beside predictions: ResNet-18 at 224 pixels, fp32, by --backend

Ratios to torchvision's form are medians over rounds; figures of two runs are not comparable.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

import resnetlab
from resnetlab.data import decode, sources
from resnetlab.data.augment import Augmentation
from resnetlab.data.crops import Crop
from resnetlab.data.dataset import MemorySplit
from resnetlab.data.sampler import TrainLoader
from resnetlab.device import select_device
from resnetlab.inference.embed import embed_data
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.resnet import build
from resnetlab.preprocessing import Preprocessing

FLOWERS = Path(__file__).resolve().parents[2] / "shared" / "data" / "flowers" / "train"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 32


def photographs(source: Path, target: Path) -> Path:
    """The images of a folder of class folders, cut and enlarged to 500x375 (or 375x500), JPEG of quality 90."""
    for file in sorted(source.rglob("*.jpg")):
        image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        size = (500, 375) if image.width >= image.height else (375, 500)
        place = target / file.parent.name / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        ImageOps.fit(image, size, Image.Resampling.LANCZOS).save(place, quality=90)
    return target


class PlainScale:
    """The paper's augmentation as one would write it: resize the whole image, then crop."""

    def __call__(self, image: Image.Image) -> Image.Image:
        from torchvision.transforms import functional as G
        from torchvision.transforms import transforms as T

        side = int(torch.randint(256, 481, ()))
        return T.RandomCrop(224)(G.resize(image, side))


def torchvision_batches(folder: Path, form: str) -> Iterator[torch.Tensor]:
    from torchvision import datasets, transforms

    crop = transforms.RandomResizedCrop(224) if form == "resized" else PlainScale()
    steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    data = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    while True:
        for images, _ in torch.utils.data.DataLoader(data, BATCH, shuffle=True, drop_last=True):
            yield images


def our_batches(folder: Path, form: str) -> Iterator[torch.Tensor]:
    data = sources.load_dataset(str(folder), Path("data"))
    shape = Preprocessing(3, (224, 224), 256, torch.tensor(MEAN), torch.tensor(STD))
    assert data.all_images is not None
    loader = TrainLoader(
        data.all_images, shape, Augmentation(flip=True, crop=Crop(form)), BATCH, 0, select_device("fp32", "cpu")
    )
    step = 0
    while True:
        yield loader.batch(step).images
        step += 1


def speeds(folder: Path, rounds: int, batches: int) -> dict[str, float]:
    """Images per second of every form; medians over rounds in which all take turns."""
    simplejpeg = decode.simplejpeg
    makers: dict[str, tuple[Callable[[Path, str], Iterator[torch.Tensor]], str, object]] = {}
    for form in ("resized", "scale"):
        makers[f"torchvision {form}"] = (torchvision_batches, form, None)
        makers[f"ours {form}, pillow"] = (our_batches, form, None)
        if simplejpeg is not None:
            makers[f"ours {form}, simplejpeg"] = (our_batches, form, simplejpeg)
    streams = {name: make(folder, form) for name, (make, form, _) in makers.items()}
    measured: dict[str, list[float]] = {name: [] for name in streams}
    for turn in range(rounds + 1):
        for name, stream in streams.items():
            decode.simplejpeg = makers[name][2]
            began = time.perf_counter()
            for _ in range(batches):
                next(stream)
            if turn:  # the first warms up
                measured[name].append(batches * BATCH / (time.perf_counter() - began))
    decode.simplejpeg = simplejpeg
    return {name: round(statistics.median(values), 1) for name, values in measured.items()}


def cifar_share(rounds: int) -> float:
    """The time of CIFAR's augmentation of a batch of 128, as a fraction of a ResNet-20 training step."""
    device_config = select_device("auto", "cpu")
    images = torch.randint(256, (50_000, 32, 32, 3), dtype=torch.uint8)
    split = MemorySplit(images, torch.randint(10, (50_000,)))
    shape = Preprocessing(3, (32, 32), 32, torch.full((32, 32, 3), 0.5), torch.ones(3))
    loader = TrainLoader(split, shape, Augmentation(4, "mean", True), 128, 0, device_config)
    net = build("resnet20")
    device_config.place(net).train()
    shares = []
    for step in range(rounds + 1):
        began = time.perf_counter()
        batch = loader.batch(step)
        loaded = time.perf_counter() - began
        with device_config.autocast():
            loss = F.cross_entropy(net(batch.images).float(), batch.labels)
        loss.backward()
        shares.append(loaded / (time.perf_counter() - began - loaded))
    return round(statistics.median(shares[1:]), 4)


def memory(folder: Path, count: int) -> dict[str, float]:
    """MiB by which a fresh process grows: by the index of `count` names, and then by reading 40 batches."""
    with tempfile.TemporaryDirectory() as place:
        files = sorted(folder.rglob("*.jpg"))
        for i in range(count):
            link = Path(place) / f"class {i % 5}" / f"{i:06d}.jpg"
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(files[i % len(files)])
        return run_again("--memory-of", place)


def peak_memory() -> float:
    """MiB that this process had at most."""
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage's figure would be the parent's
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def grown(folder: Path) -> dict[str, float]:
    before = peak_memory()
    stream = our_batches(folder, "resized")
    next(stream)
    indexed = peak_memory()
    for _ in range(40):
        next(stream)
    return {
        "index_and_first_batch": round(indexed - before, 1),
        "forty_batches_more": round(peak_memory() - indexed, 1),
    }


def write_coco_document(file: Path, images: int, objects: int = 7) -> None:
    """A document like instances_train2017.json: 24 corners an object, the keys that COCO has."""
    draw = random.Random(0)
    url = "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg"
    with file.open("w") as stream:
        stream.write('{"info": {}, "images": [')
        for i in range(images):
            entry = {"license": 3, "file_name": f"{i:012}.jpg", "height": 480, "width": 640, "flickr_url": url, "id": i}
            stream.write(", " * (i > 0) + json.dumps(entry))
        stream.write('], "annotations": [')
        for i in range(images * objects):
            x, y = draw.uniform(0, 500), draw.uniform(0, 350)
            outline = [round(v + draw.uniform(0, 100), 2) for _ in range(24) for v in (x, y)]
            entry = {"segmentation": [outline], "area": 702.1, "iscrowd": 0, "image_id": i // objects}
            entry |= {"bbox": [round(x, 2), round(y, 2), 100.0, 100.0], "category_id": 1 + i % 80, "id": i}
            stream.write(", " * (i > 0) + json.dumps(entry))
        stream.write('], "categories": [')
        stream.write(
            ", ".join(json.dumps({"supercategory": "s", "id": i, "name": f"c{i}"}) for i in range(1, 81)) + "]}"
        )


def read_document(file: Path, reader: str) -> dict[str, float]:
    """Processor seconds and MiB by which this process grows while it reads a COCO document."""
    from resnetlab.data.coco_document import read_coco_document

    before, began = peak_memory(), time.process_time()
    if reader == "pycocotools":
        from pycocotools.coco import COCO

        with contextlib.redirect_stdout(io.StringIO()):
            document: object = COCO(str(file))
    else:
        document = read_coco_document(file, masks=reader == "ours, masks")
    return {"seconds": round(time.process_time() - began, 1), "mib": round(peak_memory() - before) * bool(document)}


def coco_documents(images: int) -> dict[str, dict[str, float]]:
    """`read_document` of every reader, each in a fresh process."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "instances_train.json"
        write_coco_document(file, images)
        readers = ("ours, boxes", "ours, masks", "pycocotools")
        return {reader: run_again("--document-of", str(file), "--reader", reader) for reader in readers}


def table_figures(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """Seconds and MiB to list labelled images, each in a fresh process: ImageFolder, our folder, a table of the same files."""
    with tempfile.TemporaryDirectory() as place:
        root, file = Path(place, "images"), next(folder.rglob("*.jpg")).resolve()
        names = [f"class {i % 100:02d}/{i:06d}.jpg" for i in range(count)]
        for i, name in enumerate(names):
            if i < 100:
                (root / name).parent.mkdir(parents=True)
            (root / name).symlink_to(file)
        rows = "".join(f"images/{name},{name[:8]}\n" for name in names)
        Path(place, "table.csv").write_text("path,label\n" + rows)
        kinds = {"torchvision ImageFolder": root, "ours, folder": root, "ours, table": Path(place, "table.csv")}
        return {name: run_again("--list-of", str(path), "--reader", name) for name, path in kinds.items()}


def list_images(path: Path, reader: str) -> dict[str, float]:
    """Seconds and MiB by which this process grows while it lists labelled images."""
    from torchvision import datasets

    before, began = peak_memory(), time.perf_counter()
    found: object = (
        sources.load_dataset(str(path), Path("data")) if reader.startswith("ours") else datasets.ImageFolder(str(path))
    )
    return {"seconds": round(time.perf_counter() - began, 2), "mib": round(peak_memory() - before) * bool(found)}


def run_again(*options: str) -> dict[str, float]:
    """What this file prints with some options in a fresh process."""
    command = [sys.executable, __file__, *options]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def embed_speeds(folder: Path, rounds: int, backend: str, count: int = 200) -> dict[str, float]:
    """Images per second of feature vectors and of predictions, in turns, and the median of their ratios."""
    shape = Preprocessing(3, (224, 224), 256, torch.tensor(MEAN), torch.tensor(STD))
    net = build("resnet18", classes=2, seed=0).eval()
    with tempfile.TemporaryDirectory() as place:
        TrainedModel(net, ("a", "b"), shape).save(Path(place, "model.safetensors"))
        model = resnetlab.load(Path(place, "model.safetensors"), device="cpu", precision="fp32")
        for i, file in enumerate(sorted(folder.rglob("*.jpg"))[:count]):
            link = Path(place, "images", "ab"[i % 2], f"{i}.jpg")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
        root = Path(place, "images")
        names = sorted(map(str, root.rglob("*.jpg")))
        if backend != "torch":
            for output in ("scores", "features"):
                print(output, model.select_backend(backend, "fp32", names[:16], output=output))
        kinds: dict[str, Callable[[], int]] = {
            "predict": lambda: sum(1 for _ in model.predictions((name, name) for name in names)),
            "embed": lambda: sum(row.features is not None for row in embed_data(model, root)),
        }
        measured: dict[str, list[float]] = {name: [] for name in kinds}
        for turn in range(rounds + 1):
            for name, work in kinds.items():
                began = time.perf_counter()
                done = work()
                if turn:  # the first warms up
                    measured[name].append(done / (time.perf_counter() - began))
    ratios = [a / b for a, b in zip(measured["embed"], measured["predict"], strict=True)]
    medians = {name: round(statistics.median(values), 1) for name, values in measured.items()}
    return medians | {"ratio": round(statistics.median(ratios), 2)}


def print_pipeline(folder: Path, options: argparse.Namespace) -> object:
    with tempfile.TemporaryDirectory() as place:
        found = speeds(photographs(folder, Path(place)), options.rounds, options.batches)
    print(f"{'pipeline':<28} {'images/s':>9}   ratio to torchvision's")
    for name, speed in found.items():
        base = found["torchvision " + name.split()[1].rstrip(",")]
        print(f"{name:<28} {speed:>9.0f}   {speed / base:.2f}")
    return found


def print_cifar(_: Path, options: argparse.Namespace) -> object:
    share = cifar_share(4 * options.rounds)
    print(f"CIFAR augmentation: {share:.1%} of a ResNet-20 step of 128")
    return share


def print_memory(folder: Path, _: argparse.Namespace) -> object:
    with tempfile.TemporaryDirectory() as place:
        images = photographs(folder, Path(place))
        grew = {count: memory(images, count) for count in (10_000, 100_000)}
    for count, values in grew.items():
        print(f"{count:,} names: {values['index_and_first_batch']:.0f} MiB for the index and one batch, "
              f"{values['forty_batches_more']:.0f} MiB more over 40 batches")  # fmt: skip
    return grew


def print_tables(folder: Path, options: argparse.Namespace) -> object:
    found = table_figures(folder, options.names)
    for reader, values in found.items():
        print(f"{reader:<24} {values['seconds']:.2f} s, {values['mib']:,.0f} MiB for {options.names:,} images")
    return found


def print_coco(_: Path, options: argparse.Namespace) -> object:
    found = coco_documents(options.documents)
    for reader, values in found.items():
        print(f"{reader:<14} {values['seconds']:.1f} s, {values['mib']:,.0f} MiB for {options.documents:,} images")
    return found


def print_embed(folder: Path, options: argparse.Namespace) -> object:
    found = embed_speeds(folder, options.rounds, options.backend)
    print(f"embed {found['embed']:.1f}, predict {found['predict']:.1f} images/s; ratio {found['ratio']:.2f}")
    return found


PARTS: dict[str, Callable[[Path, argparse.Namespace], object]] = {
    "pipeline": print_pipeline,
    "cifar": print_cifar,
    "memory": print_memory,
    "tables": print_tables,
    "coco": print_coco,
    "embed": print_embed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=FLOWERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--backend", default="torch", help="of the part embed")
    parser.add_argument("--names", type=int, default=100_000)
    parser.add_argument("--documents", type=int, default=120_000)
    for hidden in ("--memory-of", "--document-of", "--list-of"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--reader", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.document_of:
        return print(json.dumps(read_document(options.document_of, options.reader)))
    if options.list_of:
        return print(json.dumps(list_images(options.list_of, options.reader)))
    if options.memory_of:
        return print(json.dumps(grown(options.memory_of)))
    found = {name: PARTS[name](options.images, options) for name in options.only.split(",")}
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    return None


if __name__ == "__main__":
    main()
