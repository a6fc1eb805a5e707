"""Takes the picture of the web demo that the README shows, in a headless Chromium.

    python examples/app_screenshot.py --output docs/images/app.png

Needs the extra `app`, playwright and a Chromium. The photo is the first of the examples.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

from ig_captioner import DEFAULT_CHECKPOINT, demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/images/app.png"))
    parser.add_argument("--width", type=int, default=1100, help="of the window, in pixels; 390 is a phone's")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    app = demo.build_app(DEFAULT_CHECKPOINT)
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": options.width, "height": 800})
        page.goto(demo.serve(app))
        page.locator("#examples .gallery-item").first.click()
        page.wait_for_selector("#tokens .ig-token")
        page.evaluate("document.fonts.ready")
        page.evaluate("document.activeElement.blur()")
        page.screenshot(path=options.output, full_page=True, animations="disabled")
        browser.close()
    app.close()
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
