"""The page in a real browser: on a screen and a phone, light and dark, and printed."""

import base64
import dataclasses
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from optimum_fista.run.evaluation.evaluation_file import Evaluation
from optimum_fista.run.evaluation.perplexity import PerplexityResult
from optimum_fista.run.html_report.page import read_contents, render_page
from optimum_fista.run.memory import MemoryPeak

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""Its path; `None` if it is not installed."""


_PATIENCE = 60


class BrowserError(RuntimeError):
    """The browser has ended, does not answer, or refuses a command."""


class Page:
    """The one page of a browser."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._buffer, self._number, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        try:
            os.write(self._commands, json.dumps(message).encode() + b"\0")
        except BrokenPipeError as error:
            raise BrowserError("the browser has ended") from error
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def open(self, file: Path, *, width: int = 1000, dark: bool = False) -> None:
        """Show a file and wait until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=file.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def told(self, *methods: str) -> list[dict[str, Any]]:
        """Events since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") in methods]

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], _PATIENCE)
            part = os.read(self._answers, 1 << 20) if ready else b""
            if not part:
                raise BrowserError("the browser has ended" if ready else f"no answer in {_PATIENCE} s")
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        return dict(json.loads(message))


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """Start Chromium with a profile of its own, and end it."""
    commands, answers = os.pipe(), os.pipe()

    def take_pipes() -> None:
        os.dup2(commands[0], 13)  # above those that dup2 overwrites
        os.dup2(answers[1], 14)
        os.dup2(13, 3)
        os.dup2(14, 4)

    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--hide-scrollbars", "about:blank"]
    process = subprocess.Popen(
        [str(CHROMIUM), *flags], stderr=subprocess.DEVNULL, close_fds=False, preexec_fn=take_pipes
    )
    os.close(commands[0])
    os.close(answers[1])
    try:
        yield Page(commands[1], answers[0])
    finally:
        process.terminate()
        process.wait(30)
        os.close(commands[1])
        os.close(answers[0])


pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with ExitStack() as stack:
        try:
            started = stack.enter_context(browser(tmp_path_factory.mktemp("profile")))
        except BrowserError as error:
            pytest.skip(f"Chromium does not start: {error}")
        yield started


@pytest.fixture(scope="module")
def file(saved, tmp_path_factory):
    """A page with all that a page can have, and long words."""
    contents = read_contents(saved.folder)
    memory = MemoryPeak(3 << 30, 2 << 30, 1 << 30)
    layers = [dataclasses.replace(layer, hidden_state_error=0.125, memory=memory) for layer in contents.report.layers]
    long = "<script>document.title = 'run'</script>" + 40 * "long"
    operators = [dataclasses.replace(o, converged=False, message=long) for o in contents.report.operators]
    model = contents.report.model | {"name": f"org/{long}"}
    report = dataclasses.replace(
        contents.report, layers=layers, operators=operators, warnings=[long], left_dense={long: long}, model=model
    )
    contents = dataclasses.replace(
        contents,
        report=report,
        evaluations=(Evaluation(long, PerplexityResult(9.0, 1, 1, 2, 1.0, long)),),
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(contents))
    return path


@pytest.mark.parametrize("width", [320, 1440])
def test_it_fits_the_width_without_an_error_or_a_request(page, file, width):
    page.open(file, width=width)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("innerWidth") == width
    assert page.evaluate(OVERFLOW) == 0
    assert page.told("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown") == []
    requested = [event["request"]["url"] for event in page.told("Network.requestWillBeSent")]
    assert requested == [file.resolve().as_uri()]
    assert page.evaluate("document.title").endswith("pruning report")  # no script has run


def test_the_heat_map_is_drawn_where_it_should_be(page, file):
    page.open(file)
    boxes = page.evaluate(
        "[...document.querySelector('.heat').querySelectorAll('rect')]"
        ".map(r => r.getBoundingClientRect()).map(b => [b.x, b.y, b.width, b.height])"
    )
    assert len(boxes) == 14
    assert len({(round(x), round(y)) for x, y, _, _ in boxes}) == 14
    assert all(width > 44 and height > 10 for _, _, width, height in boxes)
    colours = page.evaluate(
        "[...new Set([...document.querySelectorAll('.heat rect')].map(r => getComputedStyle(r).fill))].length"
    )
    assert colours > 3


@pytest.mark.parametrize("width", [320, 1440])
def test_lines_are_inside_their_boxes_and_tell_each_other_apart(page, file, width):
    page.open(file, width=width)
    outside = page.evaluate(
        "[...document.querySelectorAll('.chart circle, .steps circle, .steps text, .chart text')].filter(c => {"
        "const [a, b] = [c, c.closest('.box')].map(e => e.getBoundingClientRect());"
        "return a.left < b.left || a.right > b.right || a.top < b.top || a.bottom > b.bottom}).length"
    )
    assert outside == 0
    strokes = "[...document.querySelectorAll('.legend line')].map(l => getComputedStyle(l)).map(s => "
    assert len(set(page.evaluate(f"{strokes}s.stroke)"))) == 3
    assert len(set(page.evaluate(f"{strokes}s.strokeDasharray)"))) == 3


def test_dark_mode_is_dark(page, file):
    colours = []
    for dark in (False, True):
        page.open(file, dark=dark)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    light, dark = ([int(part) for part in colour[4:-1].split(",")] for colour in colours)
    assert min(light) > 230
    assert max(dark) < 40


@pytest.mark.parametrize("dark", [False, True])
def test_texts_in_cells_can_be_read(page, file, dark):
    page.open(file, dark=dark)
    pairs = page.evaluate(
        "[...document.querySelectorAll('.heat rect')].map(r => "
        "[getComputedStyle(r).fill, getComputedStyle(r.nextElementSibling).fill])"
    )

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[4:-1].split(",")]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for pair in pairs:
        low, high = sorted(map(luminance, pair))
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair
