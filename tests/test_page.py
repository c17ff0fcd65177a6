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

from images import photo
from service import (
    CLASSES,
    ServiceClient,
    service_in_thread,
    write_annotated_model,
    write_classifier,
)

CHROMIUM = Path("/usr/bin/chromium")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
playwright.expect.set_options(timeout=60_000)  # a prediction takes seconds where other programs have the cores
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}")

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]  # fmt: skip
Tab = playwright.Page if CHROMIUM.exists() else object


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceClient]:
    model = write_classifier(tmp_path_factory.mktemp("model") / "m.safetensors")
    with service_in_thread(model, max_body=1_000_000) as it:
        yield it


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def tab(running: ServiceClient, browser: playwright.Browser) -> Iterator[Tab]:
    """The page as it opens; an error on its console or a request to another host fails the test."""
    context = browser.new_context()
    tab, errors = context.new_page(), []
    home = f"http://127.0.0.1:{running.port}/"
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on(
        "request",
        lambda request: None if request.url.startswith((home, "data:", "blob:")) else errors.append(request.url),
    )
    tab.goto(home)
    playwright.expect(tab.locator("#about")).to_contain_text("resnet8 on photos, 6 classes: alpha")
    yield tab
    context.close()
    assert [text for text in errors if "status of 4" not in text] == []  # chromium logs every refused request


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "<b>flower.jpg"
    photo(7, 300, 200).save(path, "JPEG")
    return path


def check_result(tab: Tab) -> None:
    """Checks the whole result: five classes with bars, the image and the heat map."""
    playwright.expect(tab.locator("#heat")).to_be_visible()
    playwright.expect(tab.locator("#scores li")).to_have_count(5)
    answer = tab.locator("#answer").inner_text()
    assert answer in CLASSES and tab.locator("#scores b").first.inner_text() == answer
    scores = [float(text.split()[0]) for text in tab.locator("#scores span").all_inner_texts()]
    assert scores == sorted(scores, reverse=True) and 0 < sum(scores) <= 100.5
    widths = [bar.bounding_box()["width"] for bar in tab.locator("#scores .bar i").all()]
    whole = tab.locator("#scores .bar").first.bounding_box()["width"]
    assert [100 * width / whole for width in widths] == pytest.approx(scores, abs=1)
    for image in ("#image", "#heat"):  # not decode(): a busy browser may drop the request to decode
        tab.wait_for_function("it => it.complete && it.naturalWidth >= 90", arg=tab.locator(image).element_handle())


def test_an_image_is_chosen_and_explained(tab: Tab, image: Path) -> None:
    tab.set_input_files("#file", image)
    check_result(tab)
    assert tab.locator("#name").inner_text() == image.name  # as text
    assert "Not calibrated" in tab.locator("#calibrated").inner_text()
    tab.locator("summary").click()
    assert tab.locator("#blocks tr").count() == 3 and "layer1.0" in tab.locator("#blocks").inner_text()
    assert tab.locator("#error").is_hidden()


def test_a_text_file_is_refused_and_the_next_image_works(tab: Tab, image: Path) -> None:
    tab.set_input_files("#file", {"name": "notes.jpg", "mimeType": "image/jpeg", "buffer": b"no image"})
    playwright.expect(tab.get_by_role("alert")).to_contain_text("This is not an image that can be read (JPEG, PNG")
    assert tab.locator("#result").is_hidden()
    tab.set_input_files("#file", image)
    check_result(tab)
    assert tab.locator("#error").is_hidden()


def test_an_image_that_is_too_large_is_not_even_sent(tab: Tab) -> None:
    tab.set_input_files("#file", {"name": "x.jpg", "mimeType": "image/jpeg", "buffer": b"x" * 1_000_000})
    playwright.expect(tab.get_by_role("alert")).to_contain_text("This image has 1.0 MB, more than the limit of 1 MB")


@pytest.fixture(scope="module", params=["detect", "segment"])
def annotated_service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, ServiceClient]]:
    """A service of another task, in a thread of this process."""
    with service_in_thread(
        write_annotated_model(tmp_path_factory.mktemp("model") / "m.safetensors", request.param)
    ) as it:
        yield request.param, it


def test_boxes_and_masks_are_drawn_over_the_image_and_listed_in_a_table(
    annotated_service: tuple[str, ServiceClient], browser: playwright.Browser, image: Path
) -> None:
    """On a phone, by night: what lies over the image is where the service says, and nothing hangs over the page."""
    task, running = annotated_service
    kind, content = "image/jpeg", image.read_bytes()
    status, answer = running.post(content, kind)
    (prediction,) = answer["predictions"]
    assert (status, prediction["width"], prediction["height"]) == (200, 300, 200)
    refused, why = running.post(content, kind, "/explain")
    assert refused == 422 and "only a classifier's prediction can" in why["error"]
    size = {"width": 360, "height": 740}
    context = browser.new_context(viewport=size, color_scheme="dark", has_touch=True, is_mobile=True)
    try:
        tab, errors = context.new_page(), []
        tab.on("console", lambda message: errors.append(message.text))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(f"http://127.0.0.1:{running.port}/")
        tab.set_input_files("#file", image)
        playwright.expect(tab.locator("#table-body tr").first).to_be_visible()
        assert tab.locator("#scored").is_hidden() and tab.locator("#why").is_hidden()
        assert tab.evaluate("document.activeElement.id") == "answer"
        {"detect": check_boxes, "segment": check_mask}[task](tab, prediction)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        assert errors == []
    finally:
        context.close()


def check_boxes(tab: Tab, prediction: dict[str, Any]) -> None:
    boxes = prediction["boxes"]
    playwright.expect(tab.locator("#table-body tr")).to_have_count(len(boxes))
    whole = tab.locator("#annotated-image").bounding_box()
    for frame, (x1, y1, x2, _) in zip(tab.locator(".box").all()[:5], (b["box"] for b in boxes), strict=False):
        there = frame.bounding_box()
        scale = whole["width"] / 300
        found = [(there["x"] - whole["x"]) / scale, (there["y"] - whole["y"]) / scale, there["width"] / scale]
        assert found == pytest.approx([x1, y1, x2 - x1], abs=1.5)
    first = tab.locator("#table-body tr").first.inner_text().split()
    assert boxes[0]["class"] in first and first[-4:] == [f"{v:.0f}" for v in boxes[0]["box"]]
    assert tab.locator("#answer").inner_text().endswith(("<b>round", "square"))  # counts, and names as text
    tab.locator("#min-score").focus()
    tab.keyboard.press("End")  # by the keyboard: at least 95 %
    playwright.expect(tab.locator("#answer")).to_have_text("nothing")
    assert tab.locator(".box").count() == 0 and "95" in tab.locator("#min-score-value").inner_text()
    tab.keyboard.press("Home")
    assert tab.locator("#table-body tr").count() >= len(boxes)


def check_mask(tab: Tab, prediction: dict[str, Any]) -> None:
    assert sum(part["share"] for part in prediction["classes"]) == pytest.approx(1, abs=1e-4)
    with Image.open(io.BytesIO(b64decode(prediction["mask"].removeprefix("data:image/png;base64,")))) as mask:
        values = torch.bincount(torch.from_numpy(np.array(mask)).flatten().long(), minlength=3) / (
            mask.width * mask.height
        )
    shares = {part["class"]: part["share"] for part in prediction["classes"]}
    assert values.tolist() == pytest.approx([shares[c] for c in ("background", "<b>round", "square")], abs=1e-5)
    tab.wait_for_function("document.querySelector('#mask').naturalWidth > 0")
    mask_box, whole = (tab.locator(one).bounding_box() for one in ("#mask", "#annotated-image"))
    assert mask_box == whole
    rows = [row.split() for row in tab.locator("#table-body tr").all_inner_texts()]
    assert (
        rows[0][0] == prediction["classes"][0]["class"]
        and rows[0][1] == f"{100 * prediction['classes'][0]['share']:.1f}"
    )


def dispatch(tab: Tab, kind: str, field: str) -> None:
    """Drops or pastes an image that the page draws itself."""
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


def test_an_image_is_dropped_or_pasted(tab: Tab) -> None:
    dispatch(tab, "drop", "#drop")
    check_result(tab)
    assert tab.locator("#name").inner_text() == "drop.png"
    dispatch(tab, "paste", "body")
    playwright.expect(tab.locator("#name")).to_have_text("paste.png")
    check_result(tab)


def test_the_keyboard_is_enough(tab: Tab, image: Path) -> None:
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.id") == "file"
    outline = "getComputedStyle(document.querySelector('.button.primary')).outlineStyle"
    assert tab.evaluate(outline) == "solid"  # and it can be seen
    choosers: list[playwright.FileChooser] = []
    # Registered before the key is pressed; otherwise a busy browser could open one without the event.
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
    choosers[0].set_files(image)
    check_result(tab)
    assert tab.evaluate("document.activeElement.id") == "answer"  # where a screen reader continues
    for _ in range(6):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    tab.keyboard.press("Enter")
    playwright.expect(tab.locator("#blocks")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_in_light_and_dark_mode(
    running: ServiceClient, browser: playwright.Browser, image: Path, scheme: str
) -> None:
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
        camera.set_input_files(image)
        check_result(tab)
        tab.locator("summary").click()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360  # nothing overflows
        with Image.open(io.BytesIO(tab.screenshot())) as screen:
            corner = screen.convert("L").getpixel((2, screen.height - 3))
        assert corner > 200 if scheme == "light" else corner < 60
    finally:
        context.close()


def test_the_list_of_operations_needs_no_network(running: ServiceClient, browser: playwright.Browser) -> None:
    context = browser.new_context()
    try:
        tab, asked = context.new_page(), []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(f"http://127.0.0.1:{running.port}/docs")
        assert "POST /explain" in tab.locator("main").inner_text()
        assert all(url.startswith((f"http://127.0.0.1:{running.port}/", "data:")) for url in asked)
    finally:
        context.close()
