"""Imports go one way: kernels <- emulate <- registry <- ops <- nn <- models <- integrations <- verify <- train,
bench <- cli."""

import ast
from pathlib import Path

import fastattn

PACKAGE = Path(fastattn.__file__).parent
LAYERS = [
    "kernels",
    "emulate",
    "registry",
    "ops",
    "nn",
    "models",
    "integrations",
    "verify",
    "train",
    "bench",
    "cli",
]


def imported_modules(path: Path) -> set[str]:
    """Dotted names below fastattn that this file imports, wherever in the file."""
    here = path.relative_to(PACKAGE.parent).with_suffix("").parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # `from . import x` in fastattn/ops/softmax.py names fastattn.ops
            base = list(here[: -node.level]) if node.level else []
            module = ".".join(base + (node.module or "").split("."))
            names |= {f"{module}.{alias.name}".replace("..", ".") for alias in node.names}
    return {name for name in names if name.startswith("fastattn.")}


def layer(module: str) -> str:
    return module.split(".")[1]


def files() -> list[Path]:
    return [p for p in PACKAGE.rglob("*.py") if layer_of_file(p) in LAYERS]


def layer_of_file(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_go_to_lower_layers_only():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in files()
        for name in imported_modules(path)
        if layer(name) in LAYERS and LAYERS.index(layer(name)) > LAYERS.index(layer_of_file(path))
    ]
    assert not wrong


def test_kernels_import_no_other_kernel():
    kernels = PACKAGE / "kernels"
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in kernels.rglob("*.py")
        if path != kernels / "__init__.py"
        for name in imported_modules(path)
        if layer(name) == "kernels" and name.split(".")[2] not in path.relative_to(kernels).parts[0]
    ]
    assert not wrong


def test_the_test_sees_the_imports():
    assert "fastattn.registry" in imported_modules(PACKAGE / "ops" / "attention.py")
    assert "fastattn.kernels.reference" in imported_modules(PACKAGE / "ops" / "attention.py")
    assert "fastattn._C" in imported_modules(PACKAGE / "kernels" / "native.py")
