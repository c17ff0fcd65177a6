"""The report is one page that needs nothing but itself, says what was measured on what, and survives hostile names."""

from __future__ import annotations

import ast
import inspect
import io
import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from resnetlab.evaluation import figures
from resnetlab.evaluation.metrics import ClassificationMetrics, wilson_interval
from resnetlab.training import curves, report
from resnetlab.training.curves import curve_points, learning_rate_changes
from resnetlab.training.result import ClassificationResult

SPEED = {"images_per_second": 900.0, "seconds": 3.2}
TRAIN = [
    {"kind": "train", "step": s, "loss": 9 / s, "error": 4.5 / s, "lr": 0.1 if s <= 50 else 0.01} | SPEED
    for s in range(10, 101, 10)
]
HELD_OUT = [{"kind": "held_out", "step": s, "top1_error": 5 / s, "loss": 8 / s} for s in (50, 100)]
HOSTILE = ("<script>alert(1)</script>", '"quo\'ted" & $x_1^2$ {{ 7 * 7 }}', "日本語", "\udcff\x07 no text")


class Page(HTMLParser):
    """What a browser finds in a page: elements in order, the text, and whether every element is closed."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += " ".join(data.split()) + " " if data.strip() else ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def evaluation(confusion: list[list[int]], classes: tuple[str, ...] | None = None) -> ClassificationMetrics:
    """Metrics with this confusion matrix; the later an image, the more confident the network."""
    counts = torch.tensor(confusion)
    k = len(counts)
    pairs = [(i, j) for i in range(k) for j in range(k) for _ in range(int(counts[i, j]))]
    labels, predicted = torch.tensor(pairs).T
    logits = torch.nn.functional.one_hot(predicted, k) * torch.linspace(2, 6, len(pairs))[:, None]
    return ClassificationMetrics.from_scores(
        classes or tuple(f"class {i}" for i in range(k)), logits.softmax(1), labels
    )


def random_images(n: int, channels: int = 1, side: int = 8) -> Tensor:
    return torch.randint(
        0, 256, (n, side, side, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def render(evaluated: ClassificationMetrics, images: Tensor | None = None, **changes: Any) -> str:
    held_out = changes.pop("held_out_error", 0.05)
    result = ClassificationResult(
        run="runs/digits",
        model="runs/my digits/model.safetensors",
        report="runs/my digits/report.html",
        top1_error=evaluated.top1_error,
        top1_interval=(0.0, 1.0),
        top5_error=evaluated.top5_error,
        held_out_error=held_out,
        n=evaluated.n,
        split="test",
        steps=100,
        seconds=14.23,
        images_per_second=2731.4,
        parameters=174_970,
        budget=None,
    )
    recipe = {"name": "quick", "data": "digits", "batch": 64, "lr": 0.1, "milestones": [50]}
    overlays = changes.pop("overlays", ())
    description = report.RunDescription(
        title="resnet14 on digits",
        recipe=recipe | {"val_images": 0 if held_out is None else 144},
        differences={},
        budget=None,
        metrics=TRAIN + HELD_OUT if held_out is not None else TRAIN,
        environment={"torch": "2.11.0", "gpu": None},
    )
    images = random_images(evaluated.n) if images is None else images
    return report.render_report(replace(description, **changes), result, evaluated, images, overlays)


USUAL = evaluation([[97, 2, 1], [0, 100, 0], [5, 0, 95]])  # 8 of 300 wrong


def test_shows_the_results() -> None:
    text = Page(render(USUAL)).text
    assert "resnet14 on digits: 2.7 % test error" in text  # the title
    assert "8 of 300 test images are wrong; 95 % interval 1.4 to 5.2 % ." in text
    assert [round(100 * v, 1) for v in wilson_interval(8 / 300, 300)] == [1.4, 5.2]
    for tile in ("parameters 174,970", "steps 100 of 64 images", "time 14.2 s", "images a second 2,731"):
        assert tile in text
    assert "held-out error 5.0 % 144 images not trained on" in text
    assert "read once, after the last step, with the weights of that step; nothing was chosen on it." in text
    assert f"cross entropy {USUAL.loss:.4f}" in text
    assert "class 2 5 of 100 5.0 % class 0" in text  # the table of classes
    assert "class 2 class 0 5 of 100 class 0 class 1 2 of 100 class 0 class 2 1 of 100" in text  # the confused pairs
    assert "resnetlab predict 'runs/my digits/model.safetensors' IMAGE..." in text


def test_needs_nothing_but_itself() -> None:
    html = render(USUAL)
    page = Page(html)
    links = [
        value for _, attributes in page.elements for key, value in attributes.items() if key.endswith(("src", "href"))
    ]
    assert links and all(value and value.startswith(("data:image/", "#")) for value in links)
    assert not re.findall(r"url\((?!#)|@import", html)
    assert (
        "//"
        not in html.replace('xmlns="http://www.w3.org/2000/svg"', "").replace("data:image/png;base64,", "")[
            : html.index("<img")
        ]
    )
    assert set(re.findall(r"https?://[^\"' ]*", html)) == {"http://www.w3.org/2000/svg"}
    assert not page.all("script") and not page.all("link")


def test_is_a_page_for_everybody() -> None:
    page = Page(render(USUAL))
    assert page.all("html") == [{"lang": "en"}]
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert (
        all(image["alt"] for image in page.all("img")) and len(page.all("img")) == 8 + 3
    )  # mistakes, and a typical image of each class
    assert all(svg["aria-label"] and svg["role"] == "img" for svg in page.all("svg"))
    assert all(header["scope"] in ("row", "col") for header in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = [value[1:] for _, attributes in page.elements if (value := attributes.get("href")) and value.startswith("#")]
    assert used and set(used) <= set(ids)


def test_colours_follow_the_page() -> None:
    html = render(USUAL)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "prefers-color-scheme: dark" in style
    assert not re.findall(r"#[0-9a-f]{6}", html.replace(style, ""))
    assert set(re.findall(r"var\((--[a-z-]+)\)", html)) <= set(re.findall(r"(--[a-z-]+):", style))


def test_equal_input_gives_equal_text() -> None:
    assert render(USUAL) == render(USUAL)


def test_a_short_run_is_labelled_everywhere() -> None:
    label = "100 of the 600 steps of quick (16.7%)"
    page = Page(render(USUAL, budget=label))
    assert page.text.count(label) == 2 + len(page.all("section"))  # title, warning, and every section
    assert "Not the recipe’s own length" in page.text
    assert label not in render(USUAL)


def test_marks_what_differs_from_the_named_recipe() -> None:
    page = Page(
        render(
            USUAL,
            differences={"lr": 0.2, "milestones": [350, 500], "data": "a (b)"},
        )
    )
    assert "Marked: 3 values that differ from quick." in page.text
    assert (
        "lr 0.1 not 0.2" in page.text
        and "milestones 50 not 350, 500" in page.text
        and "data digits not a (b)" in page.text
    )
    assert sum(row.get("class") == "changed" for row in page.all("tr")) == 3


@pytest.mark.parametrize("metrics", [[], TRAIN[:1], HELD_OUT[:1], TRAIN[:1] + HELD_OUT[:1], TRAIN])
def test_any_number_of_recorded_lines(metrics: list[dict[str, Any]]) -> None:
    page = Page(render(USUAL, metrics=metrics))
    assert len(page.all("svg")) == (5 if metrics else 1)  # two curves, each wide and narrow; the matrix
    assert ("no curve to draw" in page.text) == (not metrics)


def test_a_loss_of_zero_and_one_that_is_not_finite() -> None:
    odd = [TRAIN[0] | {"loss": 0.0, "error": 0.0}, TRAIN[1] | {"loss": float("nan"), "error": float("inf")}]
    assert "nan" not in " ".join(svg["viewbox"] or "" for svg in Page(render(USUAL, metrics=odd)).all("svg"))


def test_notes_that_nothing_was_held_out() -> None:
    text = Page(render(USUAL, held_out_error=None)).text
    assert "Nothing was held out of the training split, and nothing was chosen." in text
    assert "held-out error none every training image was trained on" in text
    assert (
        "held out of the training split" in Page(render(USUAL)).text.split("Top-1 error by step")[1][:200]
    )  # the legend
    assert "held out of the training split" not in text.split("Top-1 error by step")[1][:200]


def test_no_mistakes() -> None:
    page = Page(render(evaluation([[7, 0], [0, 0]])))  # and no image at all of the second class
    assert "0.0 % test error" in page.text and "None: all 7 test images are correct." in page.text
    assert "class 1 0 of 0 – –" in page.text
    assert all("a typical" in (image["alt"] or "") for image in page.all("img"))


def test_two_hundred_classes() -> None:
    confusion = torch.eye(200, dtype=torch.long) * 9
    confusion[150, 7] = 4
    page = Page(render(evaluation(confusion.tolist())))
    assert len(page.all("svg")) == 4  # the curves; no matrix of 200 classes
    assert "class 150 class 7 4 of 13" in page.text and "The 24 of 200 classes with the highest error" in page.text
    assert "class 199 0 of 9 0.0 % –" in page.text  # folded away, not left out


def test_hostile_names() -> None:
    confusion = (torch.eye(4, dtype=torch.long) * 3 + 1).tolist()
    html = render(
        evaluation(confusion, HOSTILE), title=HOSTILE[0], environment={"cpu": HOSTILE[0]}, recipe={"name": HOSTILE[1]}
    )
    html.encode()  # can be written
    page = Page(html)
    assert not page.all("script")
    assert HOSTILE[0] in page.text and HOSTILE[1] in page.text and HOSTILE[2] in page.text
    assert all(HOSTILE[0] not in part for part in re.findall(r"<[^>]*>", html))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (2, "L"), (4, "L")])
def test_images_are_shown_as_they_are(channels: int, mode: str) -> None:
    image = random_images(1, channels)[0]
    shown = Image.open(io.BytesIO(b64decode(figures.image_uri(image).partition("base64,")[2])))
    assert shown.mode == mode and shown.size == (8, 8)
    expected = image if channels == 3 else image[..., 0]
    assert list(shown.tobytes()) == expected.flatten().tolist()


def test_large_images_are_made_small() -> None:
    uri = figures.image_uri(random_images(1, 3, side=600)[0])
    assert uri.startswith("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(b64decode(uri.partition("base64,")[2]))).size == (256, 256)


def test_the_most_confident_mistakes_come_first() -> None:
    worst = figures.worst_mistakes(USUAL, random_images(300), limit=4)
    assert [(m.true, m.predicted) for m in worst] == [("class 2", "class 0")] * 4
    assert [m.index for m in worst] == [204, 203, 202, 201]
    assert worst[0].confidence == pytest.approx(float(USUAL.scores[204, 0]))
    assert worst[0].true_confidence == pytest.approx(float(USUAL.scores[204, 2]))
    assert worst[0].uri == figures.image_uri(random_images(300)[204]) and worst[0].small


def test_a_typical_image_of_each_class() -> None:
    """The correct image nearest to the mean of its class's log scores; a class without a correct image has none."""
    scores = torch.tensor([[0.9, 0.05, 0.05], [0.5, 0.25, 0.25], [0.7, 0.15, 0.15], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4]])
    metrics = ClassificationMetrics.from_scores(("a", "b", "c"), scores, torch.tensor([0, 0, 0, 1, 1]))
    found = figures.class_prototypes(metrics, random_images(5), limit=5)
    assert [(p.name, p.index) for p in found] == [("a", 2), ("b", 3)] and found[0].confidence == pytest.approx(0.7)
    assert [p.name for p in figures.class_prototypes(metrics, random_images(5), limit=1)] == ["a"]


def test_the_matrix_has_every_count() -> None:
    svg = Page(figures.confusion_svg(USUAL.classes, USUAL.confusion))
    for text in ("class 0 taken for class 1: 2 of 100 2", "class 2 taken for class 2: 95 of 100 95"):
        assert text in svg.text
    assert "292 of 300" in (svg.all("svg")[0]["aria-label"] or "")
    assert len(svg.all("rect")) == 9 and len(svg.all("title")) == 6  # three cells are empty


def test_long_curves_are_averaged() -> None:
    lines = [{"step": s, "error": float(s % 2)} for s in range(1, 2001)]
    points = curve_points(lines, "error")
    assert len(points) == 500 and points[0] == (4.0, 0.5) and points[-1] == (2000.0, 0.5)


def test_the_learning_rate_changes_at_its_milestone() -> None:
    assert learning_rate_changes(TRAIN, [50]) == [(0.0, 0.1), (50.0, 0.01)]
    assert learning_rate_changes([line | {"step": line["step"] + 3} for line in TRAIN], [55]) == [
        (0.0, 0.1),
        (55.0, 0.01),
    ]
    assert learning_rate_changes(TRAIN, []) == [(0.0, 0.1), (50.0, 0.01)]  # the end of a warm-up
    assert learning_rate_changes([], [50]) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(14.23, "14.2 s"), (60, "1 min 0 s"), (192.4, "3 min 12 s"), (3599.7, "1 h 0 min"), (7980, "2 h 13 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert report.format_page_duration(seconds).replace("\u00a0", " ") == text


def test_the_users_matplotlibrc_is_ignored() -> None:
    import matplotlib

    html = render(USUAL)
    with matplotlib.rc_context(
        {"font.size": 40, "svg.fonttype": "path", "axes.facecolor": "red", "path.sketch": (1, 100, 2)}
    ):
        assert render(USUAL) == html
        assert matplotlib.rcParams["font.size"] == 40


@pytest.mark.parametrize("module", [report, curves, figures])
def test_plotting_is_imported_where_it_is_used(module: ModuleType) -> None:
    tree = ast.parse(inspect.getsource(module))
    imported = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imported and not re.findall("matplotlib|jinja2|PIL", " ".join(imported))
