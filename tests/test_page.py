"""The service's page in a real browser: Debian's chromium, driven by Playwright."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from pictures import photo
from PIL import Image
from serving import CLASSES, Running, service, small_model

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
