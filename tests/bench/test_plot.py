"""Pictures and the report: of every run, whole, and in need of no network."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastattn.bench import Results
from fastattn.bench.pictures import pictures
from fastattn.bench.report import report
from fastattn.bench.results import read_checks
from fastattn.cli import app
from fastattn.cli.plot import report_names
from fastattn.verify.cases import CASES


class Tags(HTMLParser):
    """Closing tags answer opening ones; what a page would fetch is kept."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.counts = [], [], {}

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        found = [v for n, v in attributes if n in ("src", "href")]
        self.fetched += [v for v in found if not v.startswith("#")]
        if tag not in ("meta", "img", "input"):
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
    heads, summaries, growth = 4, 2, len(results.growth())
    lines = len(results.rows) + len(results.absent)
    assert tags.counts["tr"] == heads + summaries + growth + lines
    assert page == report([("a <run>", results, [("picture", b"png")])])


def test_numbers_sort_by_their_value(results):
    page = report([("a", results, [])])
    assert 'data-value="1000.0">1000</td>' in page
    assert "left out" in page and "not here" in page


def test_plot_writes_pictures_and_a_report(run_file, checks, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["plot", str(run_file), str(checks), "--to", str(out)])
    assert done.exit_code == 0, done.stderr
    names = {p.name for p in out.iterdir()}
    speeds = {f"run-double-{d}-float32.png" for d in ("forward", "backward", "both")}
    others = {"run-double-memory-float32.png", "run-roofline.png", "run-errors.png"}
    assert names == speeds | others | {"verify-accuracy.png", "report.html"}
    for picture in out.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 4000
    assert (out / "report.html").read_text().count("data:image/png") == len(names) - 1


def test_of_calls_with_one_length_there_is_a_picture_of_everyone_against_us(results):
    pytest.importorskip("matplotlib")
    few = Results([row for row in results.rows if row.sizes["S"] == 4], [], results.ceilings)
    assert list(pictures(few)) == ["peers-float32", "roofline", "errors"]
    assert pictures(few)["peers-float32"]().startswith(b"\x89PNG")


def test_the_report_has_the_errors_of_every_backend(checks):
    found = read_checks(checks)
    assert [(c.backend, c.worst, c.passed, c.declined) for c in found.cases] == [
        ("cpu", 0.5, True, None), ("triton", None, False, None), ("cuda", None, False, "not this"),
    ]  # fmt: skip
    page = report([("verify", found, [])])
    where = f"<td>{CASES[0].operator}</td><td>{CASES[0].feature}</td>"
    assert [line for line in page.splitlines() if where in line] == [
        f"<tr>{where}<td>{backend}</td><td>{dtype}</td>"
        + "".join(f'<td class="number" data-value="{n}">{n}</td>' for n in counts)
        + end
        for backend, dtype, counts, end in (
            ("cpu", "float32", (1, 0, 0), '<td class="number" data-value="0.5">0.5</td></tr>'),
            ("triton", "float32", (0, 1, 0), "<td>infinite</td></tr>"),
            ("cuda", "bfloat16", (0, 0, 1), "<td></td></tr>"),
        )
    ]


def test_names_of_runs():
    a, b, c = (Path(name) for name in ("cpu.json", "x/verify.json", "y/verify.json"))
    assert list(report_names([a, b, c]).values()) == ["cpu", "x-verify", "y-verify"]
    with pytest.raises(ValueError, match="names that differ, got z/x/"):
        report_names([Path("z/x/verify.json"), b])


@pytest.mark.parametrize("text, sentence", [
    ("[]", "does not hold results of fastattn bench"), (None, "cannot be read"),
])  # fmt: skip
def test_wrong_files(tmp_path, text, sentence):
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    done = CliRunner().invoke(app, ["plot", str(path)])
    assert done.exit_code == 2 and sentence in done.stderr
