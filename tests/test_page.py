"""The page in a real browser, Chromium without a window: what one sees, by mouse, keyboard and on a phone."""

import re
import shutil
import time

import pytest

pytest.importorskip("fastapi", reason="serve.py's packages are optional: pip install -r requirements-serve.txt")
playwright = pytest.importorskip("playwright.sync_api", reason="without playwright no browser can be driven")

from toy_searcher import ToySearcher, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")

EVIL = """a red "red" <script>window.ran = 1</script> <img src=x onerror="window.ran = 1"> 'boat' & more"""
PASSAGES = {"<b id='x'>": EVIL, "long": "far away " * 80 + "a red boat " + "and so on " * 80, "last": "drum"}
PASSAGES |= {f"p{i}": f"boat number {i}" for i in range(8)}


class Searcher(ToySearcher):
    """One that knows a filter, and whose hits have metadata with tags in it."""

    def search(self, queries, k, quality, where=None, **settings):
        if where == "year = 1":
            return [[] for _ in queries]
        found = super().search(queries, k, quality, where=where, **settings)
        return [[hit._replace(metadata={"<i>year</i>": "<u>1</u>"}) for hit in hits] for hits in found]


@pytest.fixture(scope="module")
def searcher() -> Searcher:
    return Searcher(PASSAGES)


@pytest.fixture(scope="module")
def address(searcher):
    with serving(searcher) as client:
        yield str(client.base_url)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Open the page in a window of its own; at its end nothing must have failed, or come from elsewhere."""
    contexts, complaints = [], []

    def open_page(path: str = "", width: int = 1100, expected: str = "", **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: said.type == "error" and not expected and complaints.append(said.text))
        page.on("request", lambda asked: asked.url.startswith(address) or complaints.append(asked.url))
        page.goto(address + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def until(page, expression: str) -> None:
    """Wait until it is true (the page itself may not evaluate a string, as wait_for_function would have it)."""
    deadline = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(10)


def hits(page) -> list[str]:
    """Ids of the hits, once a search has ended."""
    until(page, "document.querySelector('#status').textContent && !document.querySelector('#hits.stale')")
    return page.locator(".hit .pid").all_inner_texts()


def focused(page) -> str:
    return page.evaluate("document.activeElement.id || document.activeElement.querySelector('.pid')?.textContent")


def test_hits_as_one_types(visit, searcher):
    page = visit()
    assert page.locator(".hit").count() == 0 and focused(page) == "q"
    assert "11 passages" in page.inner_text("#about")
    before = len(searcher.encoded)
    page.keyboard.type("red boat", delay=5)
    page.wait_for_selector(".hit")
    assert hits(page)[:2] == ["long", "<b id='x'>"] and len(hits(page)) == 10
    assert len(searcher.encoded) - before < 8  # it waits for a pause
    steps = " · ".join(rf"{step} [\d.]+" for step in ("wait", "encode", "search", "explain"))
    assert re.fullmatch(rf"10 hits in \d+ ms \({steps}\)", page.inner_text("#status"))
    coloured = page.locator(".hit").first.locator(".match").all_inner_texts()
    assert coloured == ["red", "boat"] and "…" in page.locator(".hit .text").first.inner_text()
    match = page.locator(".hit .match").first
    assert match.get_attribute("title") == "red 1.00"
    assert match.evaluate("e => getComputedStyle(e).backgroundColor") != "rgba(0, 0, 0, 0)"
    page.fill("#q", "")
    until(page, "!document.querySelector('.hit')")


def test_what_others_wrote_is_text(visit):
    page = visit("/?q=red+%3Cscript%3E")
    assert "<b id='x'>" in hits(page)
    card = page.locator(".hit", has_text="onerror")
    assert card.locator(".text").inner_text() == EVIL and card.locator(".pid").inner_text() == "<b id='x'>"
    assert card.locator("dt").inner_text() == "<i>year</i>" and card.locator("dd").inner_text() == "<u>1</u>"
    card.click()
    page.wait_for_selector("#why[open]")
    assert page.inner_text("#why-title") == "Why passage <b id='x'>?" and "onerror" in page.inner_text("#why-text")
    assert page.evaluate("window.ran") is None and page.locator("main script, main img, #x, dialog script").count() == 0


def test_why_a_passage_was_found(visit):
    page = visit("/?q=red+boat&k=1")
    assert hits(page) == ["long"]
    page.click(".hit .text")
    page.wait_for_selector("#why[open]")
    assert page.inner_text("#why-sum").startswith("score 3.00 = 3.00 from 3 tokens")
    assert page.locator("#map tbody th").all_inner_texts() == ["[CLS]1.00", "red1.00", "boat1.00"]
    best = page.locator("#map td.best")
    assert best.all_inner_texts() == ["1.00"] * 3
    columns = page.locator("#map thead th").all_inner_texts()
    assert columns == ["", "[CLS]", "⋯", "red", "boat", "⋯"]
    page.check("#all")
    assert page.locator("#map thead th").count() == 1 + 1 + 160 + 3 + 240
    rows = [row.split() for row in page.locator("#matches tbody tr").all_inner_texts()]
    assert rows == [["[CLS]", "[CLS]", "1.000"], ["red", "red", "1.000"], ["boat", "boat", "1.000"]]
    assert page.locator("#matches tfoot").inner_text().split() == ["score", "3.000"]
    assert page.locator("#why-text ruby rt").all_inner_texts() == ["[CLS]", "red", "boat"]
    page.click("#close")
    assert not page.locator("#why").is_visible()


def test_by_keyboard(visit):
    page = visit("/?q=boat&k=3")
    first, second, third = hits(page)
    for key, at in (("ArrowDown", first), ("ArrowDown", second), ("ArrowDown", third), ("ArrowDown", third)):
        page.keyboard.press(key)
        assert focused(page) == at
    page.keyboard.press("ArrowUp")
    assert focused(page) == second
    outline = page.locator(".hit").nth(1).evaluate("e => getComputedStyle(e).boxShadow")
    assert outline != page.locator(".hit").nth(0).evaluate("e => getComputedStyle(e).boxShadow")
    page.keyboard.press("Enter")
    page.wait_for_selector("#why[open]")
    assert second in page.inner_text("#why-title")
    page.keyboard.press("Escape")
    assert not page.locator("#why").is_visible() and focused(page) == second
    page.keyboard.press("/")
    assert focused(page) == "q" and page.input_value("#q") == "boat"
    page.keyboard.type("/")
    assert page.input_value("#q").count("/") == 1  # in the box it is a letter
    page.keyboard.press("Tab")
    assert focused(page) == "quality"


def test_filter_quality_and_number(visit, searcher):
    page = visit("/?q=boat", expected="422")
    hits(page)
    page.fill("#where", "nothing = 'x")
    page.wait_for_selector("#error:visible")
    assert page.inner_text("#error").startswith("where: no such field in") and page.locator(".hit").count() == 10
    page.fill("#where", "year = 1")
    until(page, "document.querySelector('#status').textContent.startsWith('0 hits')")
    assert not page.locator("#error").is_visible()
    page.fill("#where", "")
    page.click("#fields button")
    assert page.input_value("#where") == "year " and focused(page) == "where"
    page.fill("#where", "")
    page.select_option("#quality", "best")
    page.fill("#k", "2")
    until(page, "document.querySelectorAll('.hit').length == 2")
    _, settings = searcher.searched[-1]
    assert settings["quality"] == "best" and settings["k"] == 2
    assert page.url.endswith("/?q=boat&quality=best&k=2")  # to be sent to a colleague
    again = visit("/?q=boat&quality=best&k=2&where=year+%3D+1")
    assert hits(again) == [] and again.input_value("#quality") == "best" and again.input_value("#where") == "year = 1"


def test_a_stale_answer_is_dropped(visit, searcher):
    page = visit()
    searcher.go_on.clear()
    try:
        page.keyboard.type("red")
        asked = len(searcher.encoded)
        deadline = time.monotonic() + 20
        while len(searcher.encoded) <= asked and time.monotonic() < deadline:
            page.wait_for_timeout(10)
        page.fill("#q", "drum")
        until(page, "document.title.startsWith('drum')")
    finally:
        searcher.go_on.set()
    page.wait_for_selector(".hit")
    assert hits(page)[0] == "last"


@pytest.mark.parametrize("width", [360, 1100])
def test_nothing_is_wider_than_the_window(visit, width):
    page = visit("/?q=red+boat", width=width, has_touch=True)
    hits(page)
    sizes = "[document.documentElement.scrollWidth, document.querySelector('#why').scrollWidth]"
    assert page.evaluate(sizes)[0] <= width
    page.tap(".hit >> nth=0")
    page.wait_for_selector("#why[open]")
    page.check("#all")
    whole, dialog = page.evaluate(sizes)
    assert whole <= width and dialog <= width
    region = page.locator(".scroll").first  # the map scrolls within itself
    assert region.evaluate("e => e.scrollWidth > e.clientWidth")


def brightness(page) -> int:
    return sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]))


def test_light_and_dark(visit):
    assert brightness(visit(color_scheme="light")) > 600
    page = visit(color_scheme="dark")
    assert brightness(page) < 150
    page.click("#theme")
    assert brightness(page) > 600
    page.reload()
    assert brightness(page) > 600  # it is remembered


def test_the_interface_is_shown(visit):
    page = visit("/docs")
    page.wait_for_selector(".opblock")
    assert page.locator(".opblock").count() == 8
