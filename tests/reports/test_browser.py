"""Every kind of report page in a real headless browser: it renders, sorts, is light and dark, and
asks for nothing.

A page in `report_pages.PAGES` gets these tests by itself. Skipped where there is no browser, but a
failure in CI."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from report_pages import ORDER, PAGES, UNITS

BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PHONE, DESK = {"width": 375, "height": 800}, {"width": 1200, "height": 900}


# ---- the browser
# -------------------------------------------------------------------------------------------------


def lacking(reason: str) -> None:
    """Skips; in CI a missing browser is a failure."""
    (pytest.fail if os.environ.get("CI", "") not in ("", "0", "false") else pytest.skip)(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        lacking("playwright is not installed: pip install -e '.[test]'")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        lacking(
            f"no browser: none of {', '.join(BROWSERS)} is on the PATH (apt-get install chromium)"
        )
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {name: folder / f"{name}.html" for name in PAGES}
    for name, (make, _) in PAGES.items():
        made[name].write_text(make(), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def windows(browser) -> Iterator[Callable]:
    """windows(**context options) -> (page, seen), one for all tests that ask for the same: a new
    one for each test would start as many processes of the browser."""
    opened = {}

    def window(**options) -> tuple:
        key = repr(sorted(options.items()))
        if key not in opened:
            context = browser.new_context(**options)
            context.set_default_timeout(10_000)  # milliseconds
            seen = SimpleNamespace(complaints=[], requests=[], stopped=[])
            context.on("console", lambda message: seen.complaints.append(message.text))
            context.on("weberror", lambda error: seen.complaints.append(str(error.error)))
            context.on("request", lambda request: seen.requests.append(request.url))
            context.route(
                re.compile(r"^(?!file:|data:)"),
                lambda route: (seen.stopped.append(route.request.url), route.abort()),
            )
            opened[key] = context.new_page(), seen
        return opened[key]

    yield window
    for page, _ in opened.values():
        page.context.close()


@pytest.fixture
def visit(windows, files) -> Callable:
    """visit(name, **context options) -> (page, seen): opens it; `seen` collects complaints,
    requests (also those that the page's policy blocks), and what was on its way to the network and
    stopped here."""

    def visit(name: str, **options):
        page, seen = windows(**{"viewport": DESK, "color_scheme": "light", **options})
        page.goto("about:blank")
        page.emulate_media(media="screen")
        for noted in vars(seen).values():
            noted.clear()
        page.goto(files[name].as_uri())
        return page, seen

    return visit


def column(table, index: int) -> list[str]:
    return [
        row.locator("th, td").nth(index).inner_text() for row in table.locator("tbody tr").all()
    ]


every_page = pytest.mark.parametrize("name", PAGES)


DRAWN = """() => [...document.querySelectorAll("main svg")].map((one) => ({
  width: one.getBoundingClientRect().width,
  height: one.getBoundingClientRect().height,
  texts: one.querySelectorAll("text").length,
  role: one.getAttribute("role"),
  label: one.getAttribute("aria-label"),
}))"""


@every_page
def test_it_renders_without_a_complaint_or_a_request(visit, files, name):
    opened, seen = visit(name)
    assert opened.title() == opened.locator("h1").inner_text() != ""
    assert opened.locator("p.lead").inner_text().endswith(".")
    drawn = opened.evaluate(DRAWN)
    assert len(drawn) == PAGES[name][1]
    for one in drawn:
        assert one["width"] > 300
        assert one["height"] > 100
        assert one["texts"] > 5
        assert one["role"] == "img"
        assert one["label"]
    targets = opened.evaluate("[...document.querySelectorAll('nav a')].map((one) => one.hash)")
    assert all(opened.locator(target).count() == 1 for target in targets)
    opened.locator("#theme").click()
    opened.emulate_media(media="print")
    assert seen.requests == [files[name].as_uri()]
    assert seen.complaints == []


# The first and the last column of each table of several rows, clicked twice: the marks on the
# headings, and the rows in an order of their own.
SORTED = """() => {
  const rows = (table) => [...table.tBodies[0].rows].map((row) => row.innerText);
  return [...document.querySelectorAll("table:not(.facts)")]
    .filter((table) => table.tBodies[0].rows.length > 1)
    .map((table) => {
      const buttons = [...table.querySelectorAll("thead th button")];
      const found = {buttons: buttons.length, rows: rows(table), clicks: []};
      found.columns = table.querySelectorAll("thead th").length;
      for (const button of [buttons[0], buttons.at(-1)])
        for (const direction of ["ascending", "descending"]) {
          button.click();
          const heads = [...table.querySelectorAll("thead th")];
          const marked = heads.filter((one) => one.hasAttribute("aria-sort"));
          found.clicks.push({
            wanted: `${heads.indexOf(button.closest("th"))} ${direction}`,
            marks: marked.map((one) => `${heads.indexOf(one)} ${one.getAttribute("aria-sort")}`),
            rows: rows(table),
          });
        }
      return found;
    });
}"""


@every_page
def test_every_table_sorts_and_loses_nothing(visit, name):
    opened, seen = visit(name)
    opened.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    tables = opened.evaluate(SORTED)
    assert tables
    for table in tables:
        assert table["buttons"] == table["columns"]
        for click in table["clicks"]:
            assert click["marks"] == [click["wanted"]]
            assert sorted(click["rows"]) == sorted(table["rows"])
    assert seen.complaints == []


def test_numbers_sort_by_their_size_and_unit(visit):
    opened, _ = visit("plots")
    table = opened.locator("table:not(.facts)")
    for index, labels in enumerate(ORDER):
        button = table.locator("thead th button").nth(index)
        button.focus()
        opened.keyboard.press("Enter")
        assert "".join(column(table, 0)) == labels
        opened.keyboard.press("Space")
        unknown = [
            row[0]
            for row in UNITS
            if index and (row[index] == "-" or row[index].startswith(("not", "does")))
        ]
        known = [label for label in reversed(labels) if label not in unknown]
        # unknown stays last
        assert column(table, 0) == known + [label for label in labels if label in unknown]
        assert table.locator("thead th").nth(index).get_attribute("aria-sort") == "descending"


CONTRASTS = """() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const linear = (c) => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(linear)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const color = rgb(getComputedStyle(one).backgroundColor);
      if (color.length === 3) return color;
    }
  };
  const found = [];
  for (const one of document.querySelectorAll("body *")) {
    const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !one.checkVisibility()) continue;
    const style = getComputedStyle(one);
    const own_color = rgb(one instanceof SVGElement ? style.fill : style.color);
    const pair = [own_color, behind(one)].map(light);
    const contrast = (Math.max(...pair) + .05) / (Math.min(...pair) + .05);
    found.push([one.textContent.slice(0, 40), contrast]);
  }
  return found;
}"""


@every_page
def test_light_and_dark_are_both_readable(visit, name):
    backgrounds = {}
    for scheme in ("light", "dark"):
        opened, _ = visit(name, color_scheme=scheme)
        opened.evaluate(
            "document.querySelectorAll('details').forEach((one) => { one.open = true; })"
        )
        found = opened.evaluate(CONTRASTS)
        assert len(found) > 30
        assert [one for one in found if one[1] < 4.5] == []

        def background(media: str, opened=opened) -> str:
            opened.emulate_media(media=media)
            return opened.evaluate("getComputedStyle(document.body).backgroundColor")

        backgrounds[scheme] = background("screen")
        assert background("print") == "rgb(255, 255, 255)"  # paper is white whatever the screen is
        opened.emulate_media(media="screen")
        assert opened.locator("#theme").inner_text() == {"light": "Dark", "dark": "Light"}[scheme]
        opened.locator("#theme").click()
        backgrounds[f"{scheme}, turned"] = background("screen")
        assert [one for one in opened.evaluate(CONTRASTS) if one[1] < 4.5] == []
        assert background("print") == "rgb(255, 255, 255)"
    assert (
        backgrounds["light"]
        == backgrounds["dark, turned"]
        != backgrounds["dark"]
        == backgrounds["light, turned"]
    )


@every_page
def test_a_phone_shows_it_without_scrolling_sideways(visit, name):
    opened, _ = visit(name, viewport=PHONE)
    opened.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert opened.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    smallest = opened.evaluate("""() => {
        const size = (one) => parseFloat(getComputedStyle(one).fontSize)
            * Math.abs(one.ownerSVGElement.getScreenCTM().a);
        return Math.min(...[...document.querySelectorAll("main svg text")].map(size));
    }""")
    assert smallest >= 8  # CSS pixels


@every_page
def test_without_scripts_it_is_complete(visit, name):
    opened, _ = visit(name, java_script_enabled=False)
    assert opened.locator("main svg").count() == PAGES[name][1]
    assert opened.locator("tbody tr").count() > 3
    assert opened.locator("button:visible").count() == 0
    assert "".join(opened.locator("thead th").all_inner_texts()).strip()


def test_its_policy_stops_requests_and_foreign_scripts(visit):
    opened, seen = visit("plots")
    ran = opened.evaluate("""async () => {
        const stopped = [];
        const note = (event) => stopped.push(event.effectiveDirective);
        document.addEventListener("securitypolicyviolation", note);
        const image = new Image();
        image.src = "https://example.org/a.png";
        const script = document.createElement("script");
        script.textContent = "window.ran = true;";
        document.body.append(image, script);
        await fetch("https://example.org/").catch(() => 0);
        await new Promise((done) => setTimeout(done, 50));
        return [window.ran ?? false, ...stopped.sort()];
    }""")
    assert ran == [False, "connect-src", "img-src", "script-src-elem"]
    assert seen.stopped == []  # none came as far as the network
