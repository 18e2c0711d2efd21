"""What the backends for GPUs share: the width of a head that they take, and appending to a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cache import KVCache

WIDEST = 256  # channels of a head: more would not fit the registers of a block


def attention_declines(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> str | None:
    widest = max(query.shape[-1], value.shape[-1])
    return f"heads of up to {WIDEST} channels, got {widest}" if widest > WIDEST else None


def appending(cache_append_: Callable[..., Any]) -> Callable[..., None]:
    """KVCache.append after its checks: keys are turned on their way into the cache, by the backend's
    operator."""

    def append(
        store: KVCache,
        key: Tensor,
        value: Tensor,
        counts: list[int],
        tables: tuple[Tensor, Tensor, bool] | None,
    ) -> None:
        store.take_pages(counts)
        cos, sin, interleaved = tables or (None, None, False)
        new = torch.tensor(counts, dtype=torch.int32, device=key.device)
        cache_append_(store.key, store.value, key, value, store.lengths, new, store.page_table, cos,
                      sin, interleaved)  # fmt: skip

    return append
