"""``python -m docs.record_demo``: record the demo in motion, as docs/demo.gif.

It starts `make demo`, opens one page on each of its two servers in a headless Chromium, and uses
them. Needs the extras demo, browser and bench (for Pillow), and Chromium.
"""

from __future__ import annotations

import io
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw
from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from playwright.sync_api import Page

OUTPUT = Path(__file__).parent / "demo.gif"
WIDTH, HEIGHT = 430, 560  # pixels of a page
GAP = 10  # pixels around the pages
BAR = 26  # pixels above each page, for its address
COLOURS = 128
KEY = 70  # milliseconds for a key
PAUSE = 1500  # milliseconds after something has arrived
CONNECTED = "#status[data-state=open]"


@contextmanager
def running_demo() -> Iterator[list[str]]:
    """Run the demo, and yield the addresses of its servers."""
    command = [sys.executable, "-m", "example.demo", "--port", "8001"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    addresses: list[str] = []
    try:
        for line in process.stdout:
            addresses += re.findall(r"^ +server [AB]: (http://\S+)", line)
            if len(addresses) == 2:
                break
        yield addresses
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


class Recorder:
    """The frames of the picture: both pages beside each other."""

    def __init__(self, pages: list[Page]) -> None:
        self._pages = pages
        self._frames: list[Image.Image] = []
        self._durations: list[int] = []

    def frame(self, milliseconds: int) -> None:
        """Take a frame, which is shown for this time."""
        size = (2 * WIDTH + 3 * GAP, HEIGHT + BAR + 2 * GAP)
        picture = Image.new("RGB", size, "#d8dde3")
        draw = ImageDraw.Draw(picture)
        for index, page in enumerate(self._pages):
            left = GAP + index * (WIDTH + GAP)
            draw.rectangle((left, GAP, left + WIDTH - 1, GAP + BAR), fill="#f6f7f9")
            draw.text((left + 10, GAP + 7), page.url, fill="#4b5563")
            shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            picture.paste(shot, (left, GAP + BAR))
        self._frames.append(picture)
        self._durations.append(milliseconds)

    def type(self, page: Page, selector: str, text: str) -> None:
        """Type a text, with a frame for each few letters."""
        page.click(selector)
        for start in range(0, len(text), 3):
            page.keyboard.type(text[start : start + 3])
            self.frame(3 * KEY)

    def save(self, path: Path) -> None:
        """Write the animation. All frames share the colours of the last one, which has them all."""
        palette = self._frames[-1].quantize(COLOURS)
        frames = [
            frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in self._frames
        ]
        frames[0].save(
            path,
            save_all=True,
            append_images=frames[1:],
            duration=self._durations,
            loop=0,
            optimize=True,
        )


def use(recorder: Recorder, ann: Page, bob: Page) -> None:
    """Talk, and send an announcement."""

    def arrives(text: str) -> None:
        for page in (ann, bob):
            page.wait_for_selector(f"#messages >> text={text}")
        recorder.frame(PAUSE)

    recorder.frame(800)
    for page, other in ((ann, "Bob"), (bob, "Ann")):
        text = f"Hello {other}, I am on another server"
        recorder.type(page, "#text", text)
        page.keyboard.press("Enter")
        arrives(text)
    text = "Dinner is ready"
    recorder.type(ann, "#announcement", text)
    ann.click("#announce button >> nth=0")
    ann.wait_for_selector(CONNECTED)
    bob.wait_for_selector(f"#messages >> text={text}")
    bob.wait_for_timeout(300)
    recorder.frame(2 * PAUSE)


def main() -> None:
    """Record the demo."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with running_demo() as addresses, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        pages = []
        for address, name in zip(addresses, ("Ann", "Bob"), strict=True):
            page = browser.new_page(
                viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light"
            )
            page.goto(address)
            page.wait_for_selector(CONNECTED)
            page.fill("#name", name)
            page.keyboard.press("Enter")
            pages.append(page)
        for page in pages:
            page.wait_for_selector("#here:has-text('2 here')")
        pages[0].wait_for_timeout(500)
        recorder = Recorder(pages)
        use(recorder, *pages)
        browser.close()
    recorder.save(OUTPUT)
    print(f"{OUTPUT}: {OUTPUT.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
