"""Parts of the README that a command writes, each between <!-- NAME: ... --> and <!-- end of NAME -->."""

from __future__ import annotations

import re
from pathlib import Path


def read_part(path: Path, name: str) -> str:
    return split(path, name)[1]


def write_part(path: Path, name: str, new: str) -> None:
    before, _, after = split(path, name)
    path.write_text(before + new.rstrip("\n") + "\n" + after, encoding="utf-8")


def split(path: Path, name: str) -> tuple[str, str, str]:
    """The text up to the part, with its opening mark; the part; and what follows."""
    marks = rf"(.*<!-- {name}: [^\n]* -->\n)(.*?)(<!-- end of {name} -->.*)"
    found = re.fullmatch(marks, path.read_text(encoding="utf-8"), re.DOTALL)
    if found is None:
        raise ValueError(
            f"{path} has no lines <!-- {name}: ... --> and <!-- end of {name} --> to write between"
        )
    return found[1], found[2], found[3]
