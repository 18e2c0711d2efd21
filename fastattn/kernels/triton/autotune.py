"""Times a handful of configurations of each attention kernel on the GPU at hand, for tune.py to use.

The fastest go into the user's table, which every later process reads when it launches its first kernel.
A configuration decides the order of summation, so results change in their last bits when the table does,
and only then. One whose results are not those of the configuration it would replace is never taken.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError

from . import tune
from .tune import Config, Key

Timer = Callable[[Callable[[], Any]], float]
LENGTH = 4096
HEADS = (128, 64, 256)  # what is used most comes first
DTYPES = (torch.bfloat16, torch.float32)  # fp16 has bf16's rows
FASTER = 0.98  # of the time of the configuration in the table: less is noise
FAILURES = (RuntimeError, TritonError)  # it does not fit the chip, or does not compile
# Two orders of summation in fp32, rounded to bf16, differ by 1 ulp, 2^-8; a wrong tile by its size.
AGREES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}


class Tuned(NamedTuple):
    """What became of a row of the table. Milliseconds before and after; refused: a sentence for every
    configuration that did not run here, or was wrong."""

    key: Key
    before: Config
    after: Config
    milliseconds_before: float
    milliseconds: float
    refused: tuple[str, ...] = ()


def autotune(
    device: str | torch.device = "cuda",
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    head_dims: Sequence[int] = HEADS,
    timer: Timer | None = None,
    seconds: float = float("inf"),
    where: str = "",
    paths: Sequence[Path] = (),
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> list[Tuned]:
    """Tries the neighbours of each configuration, and writes the fastest into the user's table and `paths`.

    timer: milliseconds of a call; without one, triton.testing.do_bench. Ends after `seconds`, between two
    rows; a row is written as soon as it is known, so that what is found is kept whatever comes after.
    """
    timer, end = timer or milliseconds, time.monotonic() + seconds
    found: list[Tuned] = []
    paths = (tune.cache_folder() / tune.table_name(tune.target()), *paths)
    forms = list(itertools.product(dtypes, head_dims))
    for at, (dtype, D) in enumerate(forms):
        for kernel, modified, call in calls(torch.device(device), dtype, D):
            if time.monotonic() >= end:
                return found
            key = tune.key_of(kernel, dtype, D, modified)
            progress(str(key), at / len(forms))
            found.append(fastest(key, call, timer))
            if found[-1].milliseconds < float("inf"):
                for path in paths:
                    tune.write_table(path, {key: found[-1].after}, where)
    return found


def milliseconds(call: Callable[[], Any]) -> float:
    from triton import testing

    return float(testing.do_bench(call, warmup=10, rep=50, return_mode="median"))


def fastest(key: Key, call: Callable[[], Any], timer: Timer) -> Tuned:
    """The one in the table, unless another is faster and agrees with it. This process goes on with it."""
    table, given = tune.configs(), tune.configs()[key]
    try:
        wanted, first = call(), timer(call)
    except FAILURES as error:
        return Tuned(key, given, given, float("inf"), float("inf"), (refusal(given, error),))
    best, least, refused = given, first, []
    try:
        for config in neighbours(given):
            table[key] = config
            try:
                if not agree(call(), wanted):
                    refused.append(f"{tuple(config)}: not the results of {tuple(given)}")
                    continue
                took = timer(call)
            except FAILURES as error:
                refused.append(refusal(config, error))
                continue
            if took < FASTER * least:
                best, least = config, took
    finally:
        table[key] = best
    return Tuned(key, given, best, first, least, tuple(refused))


def refusal(config: Config, error: BaseException) -> str:
    return f"{tuple(config)}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"


def agree(found: Any, wanted: Any) -> bool:
    """Tensors, or tuples of them, that differ by what another order of summation can do."""
    if isinstance(wanted, (tuple, list)):
        return all(agree(x, y) for x, y in zip(found, wanted, strict=True))
    if not isinstance(wanted, Tensor) or not wanted.is_floating_point():
        return True
    largest = wanted.abs().max().float().clamp(min=1e-30)
    # not <=: NaN is no agreement
    return bool((found - wanted).abs().max().float() <= AGREES[wanted.dtype] * largest)


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


def outputs(arguments: tuple[Any, ...]) -> Any:
    """out and lse; what rounding lse left is another number in any order of summation."""
    from .attention_fwd import attention_fwd

    return attention_fwd(*arguments)[:2]


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
        yield "attention_fwd", modified, partial(outputs, call)
        backward = partial(attention_bwd, dout, None, *call[:12], *attention_fwd(*call), *spec)
        yield "attention_bwd_keys", modified, partial(backward, 0b0110)
        yield "attention_bwd_queries", modified, partial(backward, 0b0001)
        if modified:
            yield "attention_bwd_bias", False, partial(backward, 0b1000)
    one = (query.narrow(2, 0, 1), key, value, None, *nothing, *spec)
    yield "attention_fwd few", False, partial(outputs, one)
