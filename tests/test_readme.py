"""The README's Python runs as it stands, in order, in one namespace."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_examples_run(capsys):
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, namespace)
    printed = capsys.readouterr().out
    assert "serves this call" in printed and "9 linear layers in int8" in printed
    assert namespace["out"].shape == (2, 8, 128, 64)
    assert namespace["tokens"].shape == (1, 10)
