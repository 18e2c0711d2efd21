"""The report in a real Chromium, where one is installed: a script inside the page looks around, clicks, and
leaves what it found in the page, which the browser prints. No driver is needed for that."""

import base64
import html
import json
import re
import shutil
import subprocess

import pytest

from fastattn.bench import Results
from fastattn.bench.harness import measure
from fastattn.bench.report import report
from fastattn.bench.results import about

from .tiny import FakeClock, workload

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
DARK = "--blink-settings=preferredColorScheme=0"
DOT = base64.b64decode(  # a picture of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
WATCH = """<script>
const problems = [];
addEventListener("error", e => problems.push(e.message ?? e.target.outerHTML.slice(0, 99)), true);
addEventListener("securitypolicyviolation", e => problems.push("asked for " + e.blockedURI));
</script>"""
LOOK = """<script>
addEventListener("load", () => {
  const found = (() => { %s })();
  const note = document.createElement("pre");
  note.id = "found";
  note.textContent = JSON.stringify({problems, found});
  top.document.body.append(note);
});
</script></body>"""

FRAME = (
    '<!doctype html><meta charset="utf-8"><iframe style="width: %dpx; height: 844px" srcdoc="%s">'
    "</iframe>"
)


@pytest.fixture(scope="module")
def page():
    clock = FakeClock()
    ceiling = {"flops": 1e3, "bytes": 1e2, "by": "an FMA loop"}
    run = Results(about=about("cpu", True), ceilings={"float32": ceiling})
    for S in (4, 8, 16):  # 3, 6, 12 and 20 times ours: as words they would sort otherwise
        rows, absent = measure(workload(clock, (1.0, 20.0, 0.75 * S), S=S), clock, budget=0.0)
        run.rows += rows
        run.absent += absent
    return report([("one", run, [("a-picture", DOT)]), ("two", run, [])])


def look(page, folder, script, *flags, width=None):
    """What the script returns inside the page, which must have found no fault with it. A window is at
    least 500 pixels wide: what is narrower is a frame in one."""
    heard = page.replace("<head>", "<head>" + WATCH).replace("</body>", LOOK % script)
    if width is not None:
        heard = FRAME % (width, html.escape(heard))
    file = folder / "page.html"
    file.write_text(heard, encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}",
        "--hide-scrollbars", "--window-size=1280,900", *flags, "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    note = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert note, done.stderr
    told = json.loads(html.unescape(note[1]))
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert told["problems"] == [] and said == []
    return told["found"]


def test_it_opens_without_a_network_and_asks_for_nothing(page, tmp_path):
    script = """return {pictures: [...document.images].map(image => image.naturalWidth),
      fetched: performance.getEntriesByType("resource").map(entry => entry.name),
      links: [...document.links].filter(link => document.querySelector(link.hash) === null).length};"""
    found = look(page, tmp_path, script)
    assert found["pictures"] == [1] and found["links"] == 0
    assert all(name.startswith("data:") for name in found["fetched"])
    # and these eyes would see it
    worse = page.replace("<h1>", '<img src="https://example.invalid/a.png"><h1>')
    with pytest.raises(AssertionError, match="asked for"):
        look(worse, tmp_path, script)


def test_a_click_on_a_head_sorts(page, tmp_path):
    found = look(page, tmp_path, """
      const head = [...document.querySelectorAll("th")].find(th => th.textContent === "times fastattn");
      const click = () => {
        head.querySelector("button").click();
        const rows = [...head.closest("table").tBodies[0].rows];
        return [head.ariaSort, rows.map(row => row.cells[head.cellIndex].textContent)];
      };
      const other = head.closest("tr").querySelector("th");
      const [up, down] = [click(), click()];
      other.querySelector("button").click();
      return {up, down, left: head.ariaSort, other: other.ariaSort};""")  # fmt: skip
    for direction, order in (("ascending", 1), ("descending", -1)):
        sort, column = found["up" if order == 1 else "down"]
        numbers = [float(x) for x in column if x]
        assert sort == direction
        assert numbers == sorted(numbers)[::order] and numbers != sorted(numbers, key=str)[::order]
        assert "" in column and column == [x for x in column if x] + [""] * column.count("")
    assert found["left"] is None and found["other"] == "ascending"


def test_the_filter_leaves_the_rows_with_all_words(page, tmp_path):
    found = look(page, tmp_path, """
      const box = document.querySelector("input"), shown = () =>
        [...document.querySelectorAll("tbody tr")].filter(row => row.checkVisibility()).map(row => row.innerText);
      const type = words => { box.value = words; box.dispatchEvent(new Event("input")); return shown(); };
      return {all: shown().length, some: type("Double S16  naive"), none: type("nowhere"), again: type("").length,
        said: (type("peer"), document.querySelector("output").textContent)};""")  # fmt: skip
    assert len(found["some"]) == 6 and all("S16" in row and "naive" in row for row in found["some"])
    assert found["none"] == [] and found["again"] == found["all"]
    assert re.fullmatch(rf"\d+ of {found['all']} rows", found["said"])


@pytest.mark.parametrize("flags, page_is", [((), "light"), ((DARK,), "dark")])
def test_words_stand_out_from_what_they_are_on(page, tmp_path, flags, page_is):
    pairs = look(page, tmp_path, """
      const ground = at => { const c = getComputedStyle(at).backgroundColor;
        return c.endsWith(", 0)") && at.parentElement ? ground(at.parentElement) : c; };
      const texts = [...document.body.querySelectorAll("*")].filter(at => at.checkVisibility()
        && [...at.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
      const box = document.querySelector("input"), hint = getComputedStyle(box, "::placeholder").color;
      const pairs = texts.map(at => [getComputedStyle(at).color, ground(at), at.outerHTML.slice(0, 60)]);
      return [[hint, ground(box), "placeholder"], ...pairs];""", *flags)  # fmt: skip
    assert len(pairs) > 50
    assert (luminance(pairs[0][1]) < 0.5) == (page_is == "dark")
    for ink, ground, where in pairs:
        assert contrast(ink, ground) >= 4.5, (ink, ground, where)


def contrast(a, b):
    """WCAG's: 4.5 is what it asks of text."""
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour):
    parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_on_a_phone_tables_scroll_and_the_page_does_not(page, tmp_path):
    found = look(page, tmp_path, """
      const wide = [...document.querySelectorAll(".wide")];
      const sizes = [...document.querySelectorAll("th button, nav a, input")].map(at => at.getBoundingClientRect());
      return {width: innerWidth, page: document.documentElement.scrollWidth,
        inside: wide.filter(at => at.scrollWidth > at.clientWidth).length,
        letters: parseFloat(getComputedStyle(document.querySelector("td")).fontSize),
        lowest: Math.min(...sizes.map(at => at.height))};""", width=390)  # fmt: skip
    assert found["width"] == found["page"] == 390
    assert found["inside"] >= 2
    assert found["letters"] >= 12
    assert found["lowest"] >= 24  # WCAG's of what is touched
