"""A file a family: its workloads, smallest first."""

from collections.abc import Callable, Iterator

from ..workload import Setting, Workload
from . import (
    activation,
    attention,
    attention_features,
    cross_entropy,
    decode,
    generation,
    inference,
    linear_cross_entropy,
    models,
    norm,
    softmax,
)

FAMILIES: dict[str, Callable[[Setting], Iterator[Workload]]] = {
    "attention": attention.workloads,
    "attention_features": attention_features.workloads,
    "decode": decode.workloads,
    "norm": norm.workloads,
    "softmax": softmax.workloads,
    "cross_entropy": cross_entropy.workloads,
    "linear_cross_entropy": linear_cross_entropy.workloads,
    "activation": activation.workloads,
    "models": models.workloads,
    "inference": inference.workloads,
    "generation": generation.workloads,
}
MODELS = ("models", "inference", "generation")  # made of the operators that the others time
