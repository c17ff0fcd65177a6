"""Engines agree with torch in fp32, or are not taken; and prediction streams through whichever was."""

from __future__ import annotations

import csv
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from residuum.cli.main import run
from residuum.data import digits
from residuum.data.decode import decode, listed
from residuum.errors import DataError, UsageError
from residuum.models.bundle import Bundle
from residuum.models.resnet import build
from residuum.models.samples import Samples
from residuum.preprocessing import Preprocessing
from residuum.use import engines
from residuum.use.engines import Agreement, Kind, choose
from residuum.use.graphs import Graphs
from residuum.use.predict import AHEAD, BATCH, load
from residuum.use.whole import reference

DIGITS = digits.load()
CHECK, TRAINING = DIGITS.test.images[:16], DIGITS.train.images[:64]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    net: Any = build("resnet8", classes=10, channels=1, seed=0)
    prepared = Preprocessing(1, (8, 8), 8, torch.tensor([0.3]), torch.tensor([0.38]))
    return Bundle(
        net.eval(), tuple("0123456789"), prepared, 2.0, samples=Samples(CHECK, DIGITS.test.labels[:16], TRAINING)
    )


@pytest.fixture(scope="module")
def file(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("engines") / "m.safetensors"
    bundle.save(path)
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seventy pictures, one of them broken: more than are done in torch without a choice."""
    for i in range(70):
        Image.fromarray(DIGITS.test.images[i, :, :, 0].numpy()).save(tmp_path / f"{i:03}.png")
    (tmp_path / "011.png").write_bytes(b"broken")
    return tmp_path


def by_hand(bundle: Bundle, pixels: Tensor) -> Tensor:
    x = (pixels.float() / 255 - 0.3) / 0.38
    with torch.no_grad():
        return torch.softmax(bundle.net(x.permute(0, 3, 1, 2)) / 2.0, 1)


@pytest.mark.parametrize(
    ("name", "precision", "bound"),
    [
        ("torch", "fp32", 1e-5),
        ("torch", "bf16", 0.03),
        ("onnxruntime", "fp32", 1e-5),
        ("openvino", "fp32", 1e-5),
        ("openvino", "int8", 0.2),
    ],
)
def test_each_engine_says_what_the_network_says(bundle: Bundle, name: str, precision: str, bound: float) -> None:
    fresh = DIGITS.test.images[100:107]
    chosen = choose(bundle, name, precision)
    for pixels in (fresh, fresh[:1], fresh[:4]):  # batches of any size, also from another thread, as a service asks
        with ThreadPoolExecutor(1) as thread:
            scores = thread.submit(chosen.answer, pixels).result()
        assert torch.equal(scores, chosen.answer(pixels))
        assert scores.dtype == torch.float32 and scores.shape == (len(pixels), 10)
        assert float((scores - by_hand(bundle, pixels)).abs().max()) < bound
    assert "on 16 check pictures" in chosen.why
    assert torch.allclose(reference(bundle, fresh), by_hand(bundle, fresh), atol=1e-6)


def fake(shift: float, rounds: int) -> Kind:
    """An engine that is `shift` off in one score, and so slow."""

    def start(made: bytes, graphs: Graphs, precision: str) -> Any:
        def answer(pixels: Tensor) -> Tensor:
            for _ in range(rounds):
                scores = reference(graphs.bundle, pixels)
            return scores + shift * torch.eye(10)[0]

        return answer

    return Kind((), ("fp32",), lambda graphs, precision: b"made", start)


def test_auto_takes_the_fastest_that_agrees(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"slow": fake(0.0, 8), "wrong": fake(0.2, 1), "right": fake(1e-4, 2)}
    monkeypatch.setattr(engines, "ENGINES", table)
    pace = {id(kind): n for n, kind in zip((8.0, 1.0, 2.0), table.values(), strict=True)}
    built: dict[int, float] = {}

    def timed(answers: list[Any], pixels: Tensor) -> list[float]:  # no clock: a busy machine would decide the test
        return [built[id(answer)] for answer in answers]

    for kind in table.values():
        plain = kind.start

        def start(*a: Any, plain: Any = plain, kind: Kind = kind) -> Any:
            answer = plain(*a)
            built[id(answer)] = pace[id(kind)]
            return answer

        object.__setattr__(kind, "start", start)
    monkeypatch.setattr(engines, "seconds", timed)
    chosen = choose(bundle)
    assert (chosen.name, chosen.precision) == ("right", "fp32")
    assert "slow fp32 takes 4.00 times as long" in chosen.why and "wrong fp32 does not agree" in chosen.why
    monkeypatch.setattr(engines, "ENGINES", {"wrong": fake(0.2, 1), "torch": fake(float("nan"), 1)})
    chosen = choose(bundle)
    assert chosen.name == "torch" and "wrong fp32 does not agree" in chosen.why


def test_agreement() -> None:
    a = torch.tensor([[0.6, 0.4], [0.3, 0.7]])
    assert Agreement.between(a, a) == Agreement(1.0, 0.0)
    half = Agreement.between(torch.tensor([[0.4, 0.6], [0.3, 0.7]]), a)
    assert half.top1_agreement == 0.5 and half.largest_difference == pytest.approx(0.2) and not half.within(0.99, 0.3)
    assert not Agreement.between(a * float("nan"), a).within(0.0, 0.99)
    torn = torch.tensor([[0.502, 0.498], [0.51, 0.49]])  # undecided, and barely decided
    assert Agreement.between(torn.flip(1), torn).top1_agreement == 0.5


@pytest.mark.parametrize(
    ("engine", "precision", "sentence"),
    [
        ("tensorrt", "auto", "unknown engine 'tensorrt'"),
        ("torch", "int8", "torch computes in bf16 or fp32 here, not in int8"),
        ("onnxruntime", "bf16", "onnxruntime computes in fp32 or int8 here, not in bf16"),
        ("auto", "fp16", "unknown precision 'fp16'; did you mean"),
    ],
)
def test_wrong_requests(bundle: Bundle, engine: str, precision: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        choose(bundle, engine, precision)


def test_what_is_not_installed_or_not_there(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = replace(bundle, samples=None)
    assert choose(bare).name == "torch" and "no check pictures" in choose(bare).why
    with pytest.raises(UsageError, match="--calibrate FOLDER"):
        choose(bare, "openvino", "int8")
    with pytest.raises(UsageError, match="other pictures than it is judged on"):
        choose(bare, "openvino", "int8", check=CHECK, training=CHECK)
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'residuum\[openvino\]'"):
        choose(bundle, "openvino")
    with pytest.raises(UsageError, match="no engine installed here computes in int8"):
        choose(bundle, "auto", "int8")
    assert choose(bundle).name == "torch"


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = run(["predict", *arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_the_command_says_which_engine(
    file: str, folder: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = said(capsys, file, str(folder / "000.png"), "--json")
    assert code == 0 and "engine: torch fp32 (for 64 pictures or fewer" in err
    code, out, err = said(capsys, file, str(folder), "--format", "jsonl", "--engine", "openvino", "--precision", "fp32")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and "engine: openvino fp32 (as asked; top-1 agrees on 100.0%" in err
    assert "1 of 70 pictures could not be read. The first: " in err
    assert [Path(row["image"]).name for row in rows] == [f"{i:03}.png" for i in range(70)]
    assert "error" in rows[11] and sum("error" in row for row in rows) == 1
    expected = by_hand(bundle, DIGITS.test.images[:70])
    for i in (0, 12, 69):
        best = rows[i]["top"][0]
        assert best["class"] == str(int(expected[i].argmax())) and best["score"] == pytest.approx(
            float(expected[i].max()), abs=1e-4
        )


def test_every_form_says_the_same(file: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in range(70, 130):  # beyond the rows that a table lays out together
        Image.fromarray(DIGITS.test.images[more, :, :, 0].numpy()).save(folder / f"{more:03}.png")
    common = (file, str(folder), "--engine", "torch", "--precision", "fp32", "--top", "1")
    whole = json.loads(said(capsys, *common, "--json")[1])["predictions"]
    lines = [json.loads(line) for line in said(capsys, *common, "--format", "jsonl")[1].splitlines()]
    rows = list(csv.DictReader(io.StringIO(said(capsys, *common, "--format", "csv")[1])))
    table = said(capsys, *common)[1].splitlines()
    assert whole == lines and len(rows) == 130
    assert [row["class"] for row in rows if not row["error"]] == [p["top"][0]["class"] for p in whole if "top" in p]
    shown = [line for line in table if ".png" in line]
    assert len(shown) == 130 and len({line.index(".png") for line in shown}) == 1


def test_what_people_mistype(file: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    (folder / "empty").mkdir()
    one = str(folder / "000.png")
    code, out, err = said(capsys, file, one, str(folder / "empty"), "--json")
    good, bad = json.loads(out)["predictions"]
    assert code == 1 and "top" in good and bad["image"].endswith("empty") and "holds no picture" in bad["error"]
    code, out, _ = said(capsys, file, str(folder / "empty"), "--json")
    assert code == 1 and len(json.loads(out)["predictions"]) == 1

    class Stdin:
        buffer = io.BytesIO(Path(one).read_bytes())

    monkeypatch.setattr("sys.stdin", Stdin)
    code, out, _ = said(capsys, file, "-", one, "--json")
    first, second = json.loads(out)["predictions"]
    assert code == 0 and first["image"] == "-" and first["top"] == second["top"]
    for wrong, sentence in (
        (("",), "the name of a picture is empty"),
        (("-", "-"), "give it once"),
        ((one, "--format", "csv", "--json"), "--json and --format csv contradict each other"),
        ((one, "--engine", "opnvino"), "unknown engine 'opnvino'; did you mean 'openvino'?"),
    ):
        code, out, err = said(capsys, file, *wrong)
        assert (code, out) == (2, "") and sentence in err
    code, out, err = said(capsys, file, one, "--precision", "int8", "--calibrate", "nowhere")
    assert (code, out) == (1, "") and "nowhere is no folder; --calibrate takes a folder of pictures." in err
    assert said(capsys, file, one, "--format", "json", "--json")[0] == 0


def test_a_large_folder_streams(file: str, tmp_path: Path) -> None:
    """Of thousands of pictures few are looked at before the first answer, and few are ever held."""
    model = load(file, device="cpu")
    content = io.BytesIO()
    Image.fromarray(DIGITS.test.images[0, :, :, 0].numpy()).save(content, "png")
    asked = 0

    def endless() -> Any:
        nonlocal asked
        while True:
            asked += 1
            yield f"{asked}", content.getvalue()

    answers = model.named_predictions(endless(), top=1)
    for n in range(1, 2001):
        assert next(answers).name == str(n)
        assert asked <= n + AHEAD + BATCH
    before = threading.active_count()
    answers.close()
    assert threading.active_count() < before  # nobody decodes what nobody asks for


def test_folders_are_listed_as_they_are_needed_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.jpg", "a.png", "c.PNG", "b.png", "b/c/x.png", "notes.txt", "b/none.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    wanted = sorted(p for p in tmp_path.rglob("*") if p.suffix.lower() in (".png", ".jpg"))
    assert list(listed(tmp_path)) == wanted
    (tmp_path / "gone.png").symlink_to("nowhere")
    assert tmp_path / "gone.png" in list(listed(tmp_path))
    (tmp_path / "ring").symlink_to(tmp_path, target_is_directory=True)
    assert len(list(listed(tmp_path))) == len(wanted) + 1
    for name in ("._a.png", ".cache/a.png", "__MACOSX/a.png"):  # as training leaves them out
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert len(list(listed(tmp_path))) == len(wanted) + 1
    (tmp_path / "b" / "link").symlink_to(elsewhere := tmp_path / ".elsewhere", target_is_directory=True)
    elsewhere.mkdir()
    (elsewhere / "y.png").touch()
    assert tmp_path / "b" / "link" / "y.png" in list(listed(tmp_path))  # followed, as in training
    assert list(listed(tmp_path / "b" / "link")) == [tmp_path / "b" / "link" / "y.png"]


def test_threads_decode_without_losing_the_warnings_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    Image.fromarray(np.zeros((60, 60), np.uint8)).save(tmp_path / "large.png")
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 3000
    )  # 3,600 pixels are worth a warning, which decoding makes an error
    filters, wrong = list(warnings.filters), []

    def decode_often() -> None:
        for _ in range(50):
            try:
                decode(tmp_path / "large.png")
                wrong.append("decoded")
            except DataError as error:
                if "claims more than 3,000 pixels" not in str(error):
                    wrong.append(str(error))

    threads = [threading.Thread(target=decode_often) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and warnings.filters == filters


def test_an_engine_is_timed_when_the_one_before_has_come_to_rest() -> None:
    """Threads of a runtime hold the cores for a while after its work is done."""
    ended = [0.0]

    def holds(x: torch.Tensor) -> torch.Tensor:
        ended[0] = time.perf_counter()
        return x

    def suffers(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02 if time.perf_counter() - ended[0] < 0.03 else 0.0)
        return x

    for order in ([holds, suffers], [suffers, holds]):
        assert max(engines.seconds(order, torch.zeros(1), budget=0.01)) < 0.02
