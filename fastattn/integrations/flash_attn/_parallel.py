"""Tensor parallelism, which is not here: a process group of one process changes nothing, others raise."""

from __future__ import annotations

from typing import Any


def alone(name: str, process_group: Any) -> None:
    if process_group is not None and process_group.size() != 1:
        raise RuntimeError(
            f"{name}: tensor parallelism is not supported: process_group has {process_group.size()} processes"
        )
