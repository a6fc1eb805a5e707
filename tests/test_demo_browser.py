"""The web demo in a real browser: what a visitor does, wide and on a phone, and what goes wrong for visitors.

Needs playwright and a Chromium (`chromium` of the distribution will do); nothing else is asked of the network than the
demo's own server.
"""

import io
import re
import shutil
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from ig_captioner import DEFAULT_CHECKPOINT
from ig_captioner.demo.inputs import MAX_BYTES
from ig_captioner.demo.scores import Captioner, large_set


demo = pytest.importorskip("ig_captioner.demo.app", reason="needs gradio", exc_type=ImportError)
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("the tests drive a real browser: no chromium or google-chrome on the PATH", allow_module_level=True)

pytestmark = pytest.mark.slow
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
LABELS = ["cat", "dog", 'it\'s "odd" <b>${1 + 1}</b> {{value}}', "שלום 🐱", "a photo", "woman"]
TIMEOUT = 60_000  # ms; much for slow machines
LARGE_SET_TAB = f"{len(large_set())} names"
ROWS = ".ig-row:not(.ig-titles)"


@pytest.fixture(scope="module")
def photo() -> PIL.Image.Image:
    noise = np.random.default_rng(3).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((600, 400), PIL.Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def png(photo) -> bytes:
    file = io.BytesIO()
    photo.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return Captioner(DEFAULT_CHECKPOINT, "cpu")


@pytest.fixture(scope="module")
def url():
    app = demo.build_app(DEFAULT_CHECKPOINT, "cpu")
    yield demo.serve(app)
    app.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[WIDE, PHONE], ids=["wide", "phone"])
def page(request, browser, url):
    """The demo, opened. In the end the console must hold no error, and no other server must have been asked."""
    context = browser.new_context(viewport=request.param, has_touch=request.param is PHONE)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on("request", lambda sent: None if sent.url.startswith((url, "data:", "blob:")) else problems.append(sent.url))
    page.expected_problems = ()
    page.goto(url)
    page.wait_for_selector("#photo input[type=file]", state="attached")
    yield page
    assert not [problem for problem in problems if not any(known in problem for known in page.expected_problems)]
    context.close()


def upload(page, content: bytes, name: str = "photo.png", kind: str = "image/png") -> None:
    page.set_input_files("#photo input[type=file]", {"name": name, "mimeType": kind, "buffer": content})


def classify(page, labels: list[str]) -> None:
    """Pastes labels over those that are there: typing thousands of lines would take minutes."""
    page.evaluate("text => navigator.clipboard.writeText(text)", "\n".join(labels))
    page.click("#labels textarea")
    page.keyboard.press("Control+A")
    page.keyboard.press("Control+V" if labels else "Delete")
    page.click("#run")


def wait_for_labels(page, labels: list[str], where: str = "#bars") -> None:
    """Until these labels are shown in this order."""
    page.wait_for_function(
        "([rows, labels]) => JSON.stringify([...document.querySelectorAll(rows)].map(x => x.textContent)) === labels",
        arg=[f"{where} {ROWS} .ig-label", page.evaluate("JSON.stringify", labels)],
    )


def toast(page) -> str:
    """The message that pops up; it is closed."""
    message = page.wait_for_selector(".toast-body")
    text = message.inner_text()
    page.click(".toast-close")
    page.wait_for_selector(".toast-body", state="detached")
    return text


def set_slider(page, value: float) -> None:
    page.fill("#weight input[type=number]", f"{value}")
    page.press("#weight input[type=number]", "Enter")


def order(captioner, photo, labels, prior_weight: float) -> list[str]:
    scores = captioner.classify(captioner.read(photo), labels, ["a photo of a {}."])
    return [row.label for row in scores.ranked(prior_weight)]


def test_upload_classify_slide(page, captioner, photo, png):
    page.fill("#labels textarea", "\n".join(LABELS))
    upload(page, png)  # classifies by itself
    wait_for_labels(page, order(captioner, photo, LABELS, captioner.prior_weight))
    other = ["cat", "dog", "woman", "frog in the snow"]
    classify(page, other)
    wait_for_labels(page, order(captioner, photo, other, captioner.prior_weight))
    orders = [order(captioner, photo, other, weight) for weight in (0, 1.5, 1)]
    assert orders[0] != orders[1] != orders[2]
    for weight, expected in zip((0, 1.5, 1), orders, strict=True):
        set_slider(page, weight)
        wait_for_labels(page, expected)
    page.locator("#weight input[type=range]").focus()
    page.keyboard.press("Home")
    wait_for_labels(page, orders[0])


def test_tokens_caption_large_set_and_code(page, captioner, photo, png, tmp_path, monkeypatch):
    page.fill("#labels textarea", "\n".join(LABELS))
    upload(page, png)
    wait_for_labels(page, order(captioner, photo, LABELS, captioner.prior_weight))
    page.click("#choice input")
    page.get_by_role("option", name="woman").click()
    page.wait_for_selector("#tokens .ig-token:has-text('woman')")
    page.get_by_role("tab", name="Caption").click()
    page.wait_for_selector(f"#caption .ig-quote:has-text('{captioner.caption(captioner.read(photo)).text}')")
    page.get_by_role("tab", name=LARGE_SET_TAB).click()
    page.click("#run-large")
    scores = captioner.classify_large_set(captioner.read(photo), ["a photo of a {}."])
    for weight in (1, 0):
        set_slider(page, weight)
        wait_for_labels(page, [row.label for row in scores.ranked(weight, 20)], "#large-bars")
    page.get_by_role("tab", name="As code").click()
    page.wait_for_selector("#code .cm-content:has-text('prior_weight=0')")
    code = page.inner_text("#code .cm-content")
    monkeypatch.chdir(tmp_path)
    photo.save("photo.jpg", format="PNG")
    names: dict = {}
    exec(compile(code, "code", "exec"), names)
    assert [row["label"] for row in names["predictions"]] == order(captioner, photo, LABELS, 0)


def test_errors_say_what_is_wrong(page, captioner, photo, png):
    page.click("#run")
    assert "Choose a photo first" in toast(page)
    upload(page, b"this is no image", "text.png")
    assert "no photo that can be read" in toast(page)
    assert not page.query_selector(f"#bars {ROWS}")
    page.wait_for_selector("#photo input[type=file]", state="attached")  # the refused photo is not shown
    upload(page, png)
    page.wait_for_selector(f"#bars {ROWS}")
    for labels, message in (
        ([], "no labels"),
        ([str(i) for i in range(10_000)], "10,000 labels are too many: 1,000 at most"),
        (["<img src=x onerror=alert(1)>" * 30], "<img src=x onerror=alert(1)>"),
    ):
        classify(page, labels)
        assert message in toast(page)
    page.fill("#url input", "http://169.254.169.254/latest/meta-data/")
    page.click("#url button")
    assert "not on the public internet" in toast(page)
    assert page.input_value("#url input").startswith("http://169.254")
    classify(page, ["cat", "dog"])  # the photo is still there
    wait_for_labels(page, order(captioner, photo, ["cat", "dog"], captioner.prior_weight))
    page.fill("#labels textarea", "cat")
    page.wait_for_selector("#stale:has-text('Labels changed: press Classify.')")


def test_an_example_brings_the_results_in_sight(page):
    page.locator("#examples .gallery-item").first.click()
    page.wait_for_selector("#tokens .ig-token")
    page.wait_for_function("document.getElementById('bars').getBoundingClientRect().top < innerHeight / 2")


def huge_png() -> bytes:
    """36 megapixels in a few kilobytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header, rows = struct.pack(">IIBBBBB", 9000, 9000, 1, 0, 0, 0, 0), zlib.compress(bytes(1126 * 9000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_huge_photos(page, captioner, photo, png):
    upload(page, huge_png())
    assert "more than 64 megapixels" in toast(page)
    page.wait_for_selector("#photo input[type=file]", state="attached")
    page.expected_problems = ("413",)  # the browser's own line about the refused upload
    upload(page, png + bytes(MAX_BYTES))
    assert re.search("size", toast(page))


def test_paste(page, captioner, photo, png):
    page.evaluate(
        """async bytes => navigator.clipboard.write([new ClipboardItem(
            {"image/png": new Blob([new Uint8Array(bytes)], {type: "image/png"})})])""",
        list(png),
    )
    page.click("#photo button[aria-label='Paste from clipboard']")
    page.wait_for_selector(f"#bars {ROWS}")


def test_the_page_fits_its_window(page, png):
    upload(page, png)
    page.wait_for_selector(f"#bars {ROWS}")
    width = page.viewport_size["width"]
    for tab in ("Labels", "Caption", LARGE_SET_TAB, "As code"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("tab", name="Labels").click()
    for part in ("#photo", "#url", "#labels", "#template", "#run", "#weight", "#bars", "#choice", "#tokens"):
        box = page.locator(part).bounding_box()
        assert box["width"] > 100 and box["x"] >= 0 and box["x"] + box["width"] <= width, part
    for cell in page.query_selector_all("#bars .ig-number, #bars .ig-score, #bars .ig-label"):
        box = cell.bounding_box()
        assert box is None or box["x"] + box["width"] <= width
