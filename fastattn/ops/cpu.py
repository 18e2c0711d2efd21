"""What the C++ CPU kernels honour, operator by operator; anything else they decline."""

from __future__ import annotations

from .. import registry
from ..kernels import native
from . import softmax


def bind() -> None:
    missing = native.load()
    if missing:
        registry.mark_unusable("cpu", missing)
        return
    registry.register(
        "softmax", "cpu", registry.Kernel(softmax.OPERATOR.bind("cpu"), softmax.FEATURES)
    )


bind()
