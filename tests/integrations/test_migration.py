"""The README's table for who comes from another library: its lines, left and right, name the same things."""

import re
from pathlib import Path

import pytest

from fastattn.integrations import flash_attn

README = Path(__file__).parents[2] / "README.md"
ROWS = re.findall(r"^\| flash-attn \| `(.+?)` \| `(.+?)` \|$", README.read_text(), re.MULTILINE)


def test_the_table_is_read():
    assert len(ROWS) == 9


@pytest.mark.parametrize("theirs, ours", ROWS, ids=[theirs for theirs, _ in ROWS])
def test_line(theirs, ours):
    left, right = {}, {}
    exec(ours, right)
    flash_attn.install()
    try:
        exec(theirs, left)
    finally:
        flash_attn.uninstall()
    names = theirs.partition(" import ")[2].split(", ")
    assert names and all(left[name] is right[name] for name in names)
