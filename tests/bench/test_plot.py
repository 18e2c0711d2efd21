"""Pictures and the report: of every run, whole, and in need of no network."""

import json
import re
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from fastattn.bench import Results
from fastattn.bench.harness import measure
from fastattn.bench.report import report
from fastattn.bench.results import about
from fastattn.cli import app

from .tiny import FakeClock, workload


@pytest.fixture(scope="module")
def results():
    clock = FakeClock()
    ceiling = {"flops": 1e3, "bytes": 1e2, "by": "an FMA loop"}
    found = Results(about=about("cpu", True), ceilings={"float32": ceiling})
    for S in (4, 8, 16):
        rows, absent = measure(workload(clock, S=S), clock, budget=0.0)
        found.rows += rows
        found.absent += absent
    return found


class Tags(HTMLParser):
    """Closing tags answer opening ones; what a page would fetch is kept."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.counts = [], [], {}

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.fetched += [v for n, v in attributes if n in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_file(results):
    page = report([("a <run>", results, [("picture", b"png")])])
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert tags.fetched == ["data:image/png;base64,cG5n"]
    assert not re.search(r"https?://|@import|url\(", page)
    assert "a &lt;run&gt;" in page and "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert tags.counts["tr"] == 2 + len(results.rows) + len(results.absent)
    assert page == report([("a <run>", results, [("picture", b"png")])])


def test_numbers_sort_by_their_value(results):
    page = report([("a", results, [])])
    assert 'data-value="1000.0">1000</td>' in page
    assert "left out" in page and "not here" in page


def test_plot_writes_pictures_and_a_report(results, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.json"
    path.write_text(json.dumps(results.as_json()))
    done = CliRunner().invoke(app, ["plot", str(path), "--to", str(tmp_path / "out")])
    assert done.exit_code == 0, done.stderr
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"run-double-speed.png", "run-roofline.png", "run-error.png", "report.html"} <= names
    for picture in (tmp_path / "out").glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png") == len(names) - 1


@pytest.mark.parametrize("text, sentence", [
    ("[]", "does not hold results of fastattn bench"), (None, "cannot be read"),
])  # fmt: skip
def test_wrong_files(tmp_path, text, sentence):
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    done = CliRunner().invoke(app, ["plot", str(path)])
    assert done.exit_code == 2 and sentence in done.stderr
