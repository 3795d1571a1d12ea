"""The page in a real browser: on a screen and a phone, light and dark, and printed."""

import dataclasses
from contextlib import ExitStack

import pytest
from browser import CHROMIUM, BrowserError, browser

from optimum_fista.run.evaluation.evaluation_file import Evaluation
from optimum_fista.run.evaluation.perplexity import PerplexityResult
from optimum_fista.run.html_report.page import read_contents, render_page
from optimum_fista.run.memory import MemoryPeak

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
    shots, colours = [], []
    for dark in (False, True):
        page.open(file, dark=dark)
        shots.append(page.screenshot())
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert all(shot.startswith(b"\x89PNG") for shot in shots)
    assert shots[0] != shots[1]
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
