"""install(): this tree under the name flash_attn, in this process."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import sys
from collections.abc import Iterable
from typing import Any

OURS = __package__
NAME = "flash_attn"


def install() -> None:
    """Makes `import flash_attn`, and every module below it, mean fastattn's, for the rest of this process.

    Call it before the libraries that look for flash-attn are imported: many look once, and remember.
    importlib.metadata then knows a distribution flash-attn of this version, too, which transformers asks
    for. What cannot hold: transformers takes attn_implementation="flash_attention_2" only where a GPU is, as
    do others that ask torch.cuda first. Raises RuntimeError if another flash_attn has been imported already.
    """
    package = importlib.import_module(OURS)
    present = sys.modules.get(NAME)
    if present is package:
        return
    if present is not None:
        where = getattr(present, "__file__", None) or "somewhere"
        raise RuntimeError(
            f"flash_attn.install: another flash_attn is imported already, from {where}: install before"
        )
    for info in pkgutil.walk_packages(package.__path__, f"{OURS}."):
        importlib.import_module(info.name)
    sys.modules.update(aliases())
    sys.meta_path.append(Finder())


def uninstall() -> None:
    """Takes the name flash_attn back; who has imported from it keeps what it has."""
    for name, module in aliases().items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Finder)]


def aliases() -> dict[str, Any]:
    """flash_attn and what is below it -> our modules."""
    return {
        NAME + name.removeprefix(OURS): module
        for name, module in sys.modules.items()
        if name == OURS or name.startswith(f"{OURS}.")
    }


class Distribution(importlib.metadata.Distribution):
    """What importlib.metadata reads of an installed distribution."""

    def read_text(self, filename: str) -> str | None:
        version = importlib.import_module(OURS).__version__
        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {version}\n",
            "top_level.txt": f"{NAME}\n",
        }
        return texts.get(filename)

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(
            f"{path}: flash-attn is fastattn's here, and has no files of its own"
        )


class Finder(importlib.metadata.DistributionFinder):
    """Finds that distribution, and no module."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterable[Distribution]:
        name = getattr(context, "name", None)
        if name is None or name.lower().replace("_", "-") == "flash-attn":
            yield Distribution()
