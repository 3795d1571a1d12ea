"""The page in a real browser: on a screen and a phone, light and dark."""

import dataclasses
import json
import os
import select
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from optimum_fista.evaluate.evaluation_file import Evaluation
from optimum_fista.evaluate.perplexity import PerplexityResult
from optimum_fista.memory import MemoryPeak
from optimum_fista.page.render import read_contents, render_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
FLAGS += ["--remote-debugging-pipe", "--hide-scrollbars"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


class Page:
    """The one page of a browser, which takes commands from its file descriptor 3 and answers on 4."""

    def __init__(self, profile: Path) -> None:
        (theirs_in, self._commands), (self._answers, theirs_out) = os.pipe(), os.pipe()

        def take_pipes() -> None:
            for old, new in ((theirs_in, 13), (theirs_out, 14), (13, 3), (14, 4)):  # 13, 14: above those overwritten
                os.dup2(old, new)

        command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        quiet = {"stderr": subprocess.DEVNULL, "close_fds": False}
        self.process = subprocess.Popen(command, preexec_fn=take_pipes, **quiet)
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._number, self._session, self.events = b"", 0, {}, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": found["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        return answer["result"]

    def open(self, file: Path, *, width: int = 1000, dark: bool = False) -> None:
        """Show a file and wait until it is loaded."""
        screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=file.resolve().as_uri())
        while not self.told("Page.loadEventFired"):
            self.events.append(self._read())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def told(self, *methods: str) -> list[dict[str, Any]]:
        """Events since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") in methods]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], 60)
            part = os.read(self._answers, 1 << 20) if ready else b""
            if not part:
                raise OSError("the browser has ended, or does not answer")
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    try:
        started = Page(tmp_path_factory.mktemp("profile"))
    except OSError as error:
        pytest.skip(f"Chromium does not start: {error}")
    yield started
    started.process.terminate()
    started.process.wait(30)


@pytest.fixture(scope="module")
def file(saved, tmp_path_factory):
    """A page with all that a page can have, and long words."""
    contents = read_contents(saved.folder)
    memory = MemoryPeak(3 << 30, 2 << 30, 1 << 30)
    layers = [dataclasses.replace(layer, hidden_state_error=0.125, memory=memory) for layer in contents.report.layers]
    long = "<script>document.title = 'run'</script>" + 40 * "long"
    operators = [dataclasses.replace(o, converged=False, message=long) for o in contents.report.operators]
    texts = {"warnings": [long], "left_dense": {long: long}, "model": contents.report.model | {"name": f"org/{long}"}}
    report = dataclasses.replace(contents.report, layers=layers, operators=operators, **texts)
    measured = (Evaluation(long, PerplexityResult(9.0, 1, 1, 2, 1.0, long)),)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(dataclasses.replace(contents, report=report, evaluations=measured)))
    return path


@pytest.mark.parametrize("width", [320, 1440])
def test_it_fits_the_width_without_an_error_or_a_request(page, file, width):
    page.open(file, width=width)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("innerWidth") == width
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert page.told("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown") == []
    requested = [event["request"]["url"] for event in page.told("Network.requestWillBeSent")]
    assert requested == [file.resolve().as_uri()]
    assert page.evaluate("document.title").endswith("pruning report")  # no script has run


def test_a_table_that_is_too_wide_shows_that_it_scrolls(page, file):
    page.open(file, width=320)
    wide = "[...document.querySelectorAll('.box')].filter(b => b.scrollWidth > b.clientWidth).map(getComputedStyle)"
    attached = page.evaluate(f"{wide}.map(style => style.backgroundAttachment)")
    assert attached
    assert all(value.startswith("local, local, scroll, scroll") for value in attached)  # shadows that stay at the edges


@pytest.mark.parametrize("dark", [False, True])
def test_dark_mode_is_dark_and_texts_in_cells_can_be_read(page, file, dark):
    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[4:-1].split(",")]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    page.open(file, dark=dark)
    assert (luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.1) == dark
    cells = "[...document.querySelectorAll('.heat td')].map(getComputedStyle)"
    pairs = page.evaluate(f"{cells}.map(style => [style.backgroundColor, style.color])")
    assert len({fill for fill, _ in pairs}) > 3
    for pair in pairs:
        low, high = sorted(map(luminance, pair))
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair
