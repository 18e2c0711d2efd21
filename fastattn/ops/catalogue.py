"""The operators that every compiled backend has, and the features of each that it honours. Anything else is
declined; a backend that cannot have all of it binds less."""

from __future__ import annotations

from . import activation, attention, cross_entropy, norm, rotary, softmax
from .operator import Operator

KERNELS: list[tuple[Operator, frozenset[str]]] = [
    (attention.OPERATOR, attention.FEATURES),
    (norm.OPERATOR, norm.FEATURES),
    (softmax.OPERATOR, softmax.FEATURES),
    (cross_entropy.OPERATOR, frozenset()),
    (activation.GELU, frozenset({"bias"})),
    (activation.GLU, frozenset()),
    (rotary.OPERATOR, rotary.FEATURES),
    (rotary.TABLES_OPERATOR, rotary.FEATURES),
]
