"""Times a handful of configurations of each attention kernel on the GPU at hand, for tune.py to use.

    python -c "from fastattn.kernels.triton.autotune import autotune; print(autotune('cuda'))"

writes the fastest into the user's table, tune.user_path, which every later process reads when it
launches its first kernel. A configuration decides the order of summation, so results change in their
last bits when the table does, and only then.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError

from . import tune
from .tune import Config, Key

Timer = Callable[[Callable[[], Any]], float]
LENGTH = 4096
HEADS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float32)  # fp16 has bf16's rows


def autotune(
    device: str | torch.device = "cuda",
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    head_dims: Sequence[int] = HEADS,
    timer: Timer | None = None,
) -> Path:
    """Tries the neighbours of each committed configuration, and writes those that were faster.

    timer: milliseconds of a call; without one, triton.testing.do_bench.
    """
    timer = timer or milliseconds
    found: dict[Key, Config] = {}
    for dtype, D in itertools.product(dtypes, head_dims):
        for kernel, modified, call in calls(torch.device(device), dtype, D):
            key = tune.key_of(kernel, dtype, D, modified)
            found[key] = fastest(key, call, timer)
    path = tune.user_path(tune.target())
    tune.write_users_table(path, found)
    tune.configs.cache_clear()
    return path


def milliseconds(call: Callable[[], Any]) -> float:
    from triton import testing

    return float(testing.do_bench(call))


def fastest(key: Key, call: Callable[[], Any], timer: Timer) -> Config:
    """The one in the table, unless another is 2 % faster."""
    table, given = tune.configs(), tune.configs()[key]
    best, least = given, timer(call)
    try:
        for config in neighbours(given):
            table[key] = config
            try:
                took = timer(call)
            except (RuntimeError, TritonError):  # it does not fit the chip, or does not compile
                continue
            if took < 0.98 * least:
                best, least = config, took
    finally:
        table[key] = best
    return best


def neighbours(given: Config) -> Iterator[Config]:
    """Half and twice each number, one at a time; at least 16 to a block, 4 to 8 warps."""
    for name, low, high in (
        ("block_m", 16, 128), ("block_n", 16, 128), ("warps", 4, 8), ("stages", 1, 4),
    ):  # fmt: skip
        value = getattr(given, name)
        steps = (value - 1, value + 1) if name == "stages" else (value // 2, value * 2)
        for step in steps:
            if low <= step <= high:
                yield given._replace(**{name: step})


def calls(
    device: torch.device, dtype: torch.dtype, D: int
) -> Iterator[tuple[str, bool, Callable[[], Any]]]:
    """(kernel, modified, a call whose time is mostly that kernel's). 2 sequences, 16 heads, causal."""
    from .attention_bwd import attention_bwd
    from .attention_fwd import attention_fwd

    query, key, value, dout = (
        torch.randn(2, 16, LENGTH, D, device=device, dtype=dtype) for _ in range(4)
    )
    nothing = [None] * 8
    for modified in (False, True):
        bias = torch.zeros(1, 16, LENGTH, LENGTH, device=device, dtype=dtype) if modified else None
        spec = (D**-0.5, True, None, None, 0.0, 0.0, False, 0, 0)
        call = (query, key, value, bias, *nothing, *spec)
        yield "attention_fwd", modified, partial(attention_fwd, *call)
        backward = partial(attention_bwd, dout, None, *call[:12], *attention_fwd(*call), *spec)
        yield "attention_bwd_keys", modified, partial(backward, 0b0110)
        yield "attention_bwd_queries", modified, partial(backward, 0b0001)
        if modified:
            yield "attention_bwd_bias", False, partial(backward, 0b1000)
    one = (query[:, :, :1], key, value, None, *nothing, *spec)
    yield "attention_fwd few", False, partial(attention_fwd, *one)
