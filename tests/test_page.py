"""The service's page in a real browser: Debian's chromium, driven by Playwright."""

from __future__ import annotations

import io
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pictures import photo
from serving import CLASSES, Asked, Running, service, small_dense, small_model, threaded

CHROMIUM = Path("/usr/bin/chromium")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}")

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]  # fmt: skip
Tab = playwright.Page if CHROMIUM.exists() else object


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("service")
    with service(small_model(tmp_path_factory.mktemp("model") / "m.safetensors"), folder, "--max-body-mb", "1") as it:
        yield it


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def tab(running: Running, browser: playwright.Browser) -> Iterator[Tab]:
    """The page as it opens; what its console complains of, or what it asks of others, fails the test."""
    context = browser.new_context()
    tab, complaints = context.new_page(), []
    home = f"http://127.0.0.1:{running.port}/"
    tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on(
        "request",
        lambda asked: None if asked.url.startswith((home, "data:", "blob:")) else complaints.append(asked.url),
    )
    tab.goto(home)
    playwright.expect(tab.locator("#about")).to_contain_text("resnet8 on photos, 6 classes: alpha")
    yield tab
    context.close()
    assert [text for text in complaints if "status of 4" not in text] == []  # chromium logs every refused request


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "<b>flower.jpg"
    photo(7, 300, 200).save(path, "JPEG")
    return path


def shown(tab: Tab) -> None:
    """The whole result is there: five classes with bars, the picture, the heat map."""
    playwright.expect(tab.locator("#heat")).to_be_visible()
    playwright.expect(tab.locator("#scores li")).to_have_count(5)
    answer = tab.locator("#answer").inner_text()
    assert answer in CLASSES and tab.locator("#scores b").first.inner_text() == answer
    scores = [float(text.split()[0]) for text in tab.locator("#scores span").all_inner_texts()]
    assert scores == sorted(scores, reverse=True) and 0 < sum(scores) <= 100.5
    widths = [bar.bounding_box()["width"] for bar in tab.locator("#scores .bar i").all()]
    whole = tab.locator("#scores .bar").first.bounding_box()["width"]
    assert [100 * width / whole for width in widths] == pytest.approx(scores, abs=1)
    for image in ("#picture", "#heat"):  # not decode(): a busy browser lets go of what it was asked to decode
        tab.wait_for_function("it => it.complete && it.naturalWidth >= 90", arg=tab.locator(image).element_handle())


def test_a_picture_is_chosen_and_explained(tab: Tab, picture: Path) -> None:
    tab.set_input_files("#file", picture)
    shown(tab)
    assert tab.locator("#name").inner_text() == picture.name  # as text
    assert "Not calibrated" in tab.locator("#calibrated").inner_text()
    tab.locator("summary").click()
    assert tab.locator("#blocks tr").count() == 3 and "layer1.0" in tab.locator("#blocks").inner_text()
    assert tab.locator("#error").is_hidden()


def test_a_text_file_gets_a_sentence_and_the_next_picture_works(tab: Tab, picture: Path) -> None:
    tab.set_input_files("#file", {"name": "notes.jpg", "mimeType": "image/jpeg", "buffer": b"no picture"})
    playwright.expect(tab.get_by_role("alert")).to_contain_text("That is not a picture that can be read (JPEG, PNG")
    assert tab.locator("#result").is_hidden()
    tab.set_input_files("#file", picture)
    shown(tab)
    assert tab.locator("#error").is_hidden()


def test_a_picture_that_is_too_large_is_not_even_sent(tab: Tab) -> None:
    tab.set_input_files("#file", {"name": "x.jpg", "mimeType": "image/jpeg", "buffer": b"x" * 1_000_000})
    playwright.expect(tab.get_by_role("alert")).to_contain_text("This picture has 1.0 MB, more than the 1 MB")


@pytest.fixture(scope="module", params=["detect", "segment"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Asked]]:
    """A service of another task, in a thread of this process."""
    with threaded(small_dense(tmp_path_factory.mktemp("model") / "m.safetensors", request.param)) as it:
        yield request.param, it


def test_boxes_and_masks_lie_over_the_picture_and_stand_in_a_table(
    dense: tuple[str, Asked], browser: playwright.Browser, picture: Path
) -> None:
    """On a phone, by night: what lies over the picture is where the service says, and nothing hangs over the page."""
    task, running = dense
    kind, content = "image/jpeg", picture.read_bytes()
    status, answer = running.post(content, kind)
    (said,) = answer["predictions"]
    assert (status, said["width"], said["height"]) == (200, 300, 200)
    refused, why = running.post(content, kind, "/explain")
    assert refused == 422 and "only a classifier's answer is" in why["error"]
    size = {"width": 360, "height": 740}
    context = browser.new_context(viewport=size, color_scheme="dark", has_touch=True, is_mobile=True)
    try:
        tab, complaints = context.new_page(), []
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(f"http://127.0.0.1:{running.port}/")
        tab.set_input_files("#file", picture)
        playwright.expect(tab.locator("#found tr").first).to_be_visible()
        assert tab.locator("#scored").is_hidden() and tab.locator("#why").is_hidden()
        assert tab.evaluate("document.activeElement.id") == "answer"
        {"detect": boxes_are_shown, "segment": mask_is_shown}[task](tab, said)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        assert complaints == []
    finally:
        context.close()


def boxes_are_shown(tab: Tab, said: dict[str, Any]) -> None:
    boxes = said["boxes"]
    playwright.expect(tab.locator("#found tr")).to_have_count(len(boxes))
    whole = tab.locator("#whole").bounding_box()
    for shown, (x1, y1, x2, _) in zip(tab.locator(".box").all()[:5], (b["box"] for b in boxes), strict=False):
        there = shown.bounding_box()
        scale = whole["width"] / 300
        found = [(there["x"] - whole["x"]) / scale, (there["y"] - whole["y"]) / scale, there["width"] / scale]
        assert found == pytest.approx([x1, y1, x2 - x1], abs=1.5)
    first = tab.locator("#found tr").first.inner_text().split()
    assert boxes[0]["class"] in first and first[-4:] == [f"{v:.0f}" for v in boxes[0]["box"]]
    assert tab.locator("#answer").inner_text().endswith(("<b>round", "square"))  # counts, and names as text
    tab.locator("#least").focus()
    tab.keyboard.press("End")  # by the keyboard: surer than 95 %
    playwright.expect(tab.locator("#answer")).to_have_text("nothing")
    assert tab.locator(".box").count() == 0 and "95" in tab.locator("#least-words").inner_text()
    tab.keyboard.press("Home")
    assert tab.locator("#found tr").count() >= len(boxes)


def mask_is_shown(tab: Tab, said: dict[str, Any]) -> None:
    assert sum(part["share"] for part in said["classes"]) == pytest.approx(1, abs=1e-4)
    with Image.open(io.BytesIO(b64decode(said["mask"].removeprefix("data:image/png;base64,")))) as mask:
        values = torch.bincount(torch.from_numpy(np.array(mask)).flatten().long(), minlength=3) / (
            mask.width * mask.height
        )
    shares = {part["class"]: part["share"] for part in said["classes"]}
    assert values.tolist() == pytest.approx([shares[c] for c in ("background", "<b>round", "square")], abs=1e-5)
    tab.wait_for_function("document.querySelector('#mask').naturalWidth > 0")
    mask_box, whole = (tab.locator(one).bounding_box() for one in ("#mask", "#whole"))
    assert mask_box == whole
    rows = [row.split() for row in tab.locator("#found tr").all_inner_texts()]
    assert rows[0][0] == said["classes"][0]["class"] and rows[0][1] == f"{100 * said['classes'][0]['share']:.1f}"


def event(tab: Tab, kind: str, field: str) -> None:
    """Drops or pastes a picture that the page draws itself."""
    tab.evaluate(
        """async ([kind, field]) => {
            const canvas = new OffscreenCanvas(90, 70);
            canvas.getContext("2d").fillRect(0, 0, 40, 70);
            const data = new DataTransfer();
            data.items.add(new File([await canvas.convertToBlob()], kind + ".png", { type: "image/png" }));
            const made = kind === "drop" ? new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true })
                                         : new ClipboardEvent(kind, { clipboardData: data, bubbles: true });
            document.querySelector(field).dispatchEvent(made);
        }""",
        [kind, field],
    )


def test_a_picture_is_dropped_or_pasted(tab: Tab) -> None:
    event(tab, "drop", "#drop")
    shown(tab)
    assert tab.locator("#name").inner_text() == "drop.png"
    event(tab, "paste", "body")
    playwright.expect(tab.locator("#name")).to_have_text("paste.png")
    shown(tab)


def test_the_keyboard_is_enough(tab: Tab, picture: Path) -> None:
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.id") == "file"
    outline = "getComputedStyle(document.querySelector('.button.primary')).outlineStyle"
    assert tab.evaluate(outline) == "solid"  # and it can be seen
    choosers: list[playwright.FileChooser] = []
    # Heard of before the key is pressed: a busy browser would otherwise open one that nobody is told of.
    tab.on("filechooser", lambda chooser: choosers.append(chooser))
    for _ in range(3):
        tab.bring_to_front()
        tab.keyboard.press("Enter")
        for _ in range(50):
            tab.wait_for_timeout(100)
            if choosers:
                break
        if choosers:
            break
    assert choosers, "Enter opened no file chooser"
    choosers[0].set_files(picture)
    shown(tab)
    assert tab.evaluate("document.activeElement.id") == "answer"  # a screen reader goes on there
    for _ in range(6):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    tab.keyboard.press("Enter")
    playwright.expect(tab.locator("#blocks")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_by_day_and_by_night(running: Running, browser: playwright.Browser, picture: Path, scheme: str) -> None:
    context = browser.new_context(
        viewport={"width": 360, "height": 740},
        color_scheme=scheme,
        has_touch=True,
        is_mobile=True,
        device_scale_factor=2,
    )
    try:
        tab = context.new_page()
        tab.goto(f"http://127.0.0.1:{running.port}/")
        camera = tab.locator("#camera")
        assert camera.get_attribute("capture") == "environment" and camera.get_attribute("accept") == "image/*"
        playwright.expect(tab.locator("#photograph")).to_be_visible()
        assert min(button.bounding_box()["height"] for button in tab.locator(".button").all()) >= 44  # for fingers
        camera.set_input_files(picture)
        shown(tab)
        tab.locator("summary").click()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360  # nothing hangs over
        with Image.open(io.BytesIO(tab.screenshot())) as screen:
            corner = screen.convert("L").getpixel((2, screen.height - 3))
        assert corner > 200 if scheme == "light" else corner < 60
    finally:
        context.close()


def test_the_list_of_operations_needs_no_network(running: Running, browser: playwright.Browser) -> None:
    context = browser.new_context()
    try:
        tab, asked = context.new_page(), []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(f"http://127.0.0.1:{running.port}/docs")
        assert "POST /explain" in tab.locator("main").inner_text()
        assert all(url.startswith((f"http://127.0.0.1:{running.port}/", "data:")) for url in asked)
    finally:
        context.close()
