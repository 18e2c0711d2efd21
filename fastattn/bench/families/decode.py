"""One new token a sequence against a cache of Sk: the keys and values are read once, so bytes count.

2 B Hkv Sk D numbers are read, for 4 B Hq Sk D operations.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn as fa

from ..peers import compiled, needing
from ..workload import NAIVE, OURS, Call, Contestant, Cost, Inputs, Setting, Workload, direct


def naive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """key, value (B, Hkv, Sk, D), repeated for the heads that share them."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value


def workloads(setting: Setting) -> Iterator[Workload]:
    lengths = setting.pick((1024, 4096), (512, 2048, 8192, 16384), (512, 2048, 8192, 32768))
    B = setting.pick(1, 1, 16)
    for Hq, Hkv, D in setting.pick(
        ((12, 12, 64), (16, 4, 128)), *[((12, 12, 64), (32, 8, 128))] * 2
    ):
        for S in lengths:
            yield workload(setting, B, Hq, Hkv, S, D)


def workload(setting: Setting, B: int, Hq: int, Hkv: int, S: int, D: int) -> Workload:
    def make() -> Inputs:
        rand = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
        return {
            "query": rand(B, Hq, 1, D),
            "key": rand(B, Hkv, S, D),
            "value": rand(B, Hkv, S, D),
        }

    sizes = {"B": B, "H": Hq, "Hkv": Hkv, "S": S, "D": D}
    read = 2 * B * (Hkv * S + Hq) * D * setting.dtype.itemsize
    return Workload(
        "decode", "grouped" if Hq != Hkv else "one token", sizes, setting.dtype, setting.device,
        Cost(4.0 * B * Hq * S * D, read, 0, 0), "bytes", make, tuple(contestants(setting)),
        directions=("forward",),
    )  # fmt: skip


def contestants(setting: Setting) -> Iterator[Contestant]:
    yield Contestant(OURS, cached, backward=False)
    yield Contestant(NAIVE, lambda x: direct(naive)(own(x)), backward=False)
    yield Contestant("sdpa", sdpa, backward=False)
    yield compiled(naive, setting)
    yield Contestant("flash-attn", needing("flash_attn", setting, flash), backward=False)


def cached(x: Inputs) -> Call:
    B, Hkv, S, D = x["key"].shape
    key = x["key"]
    cache = fa.KVCache(B, Hkv, D, max_length=S, dtype=key.dtype, device=key.device)
    cache.append(key.detach(), x["value"].detach())
    return lambda: fa.attention_decode(x["query"], cache)


def own(x: Inputs) -> Inputs:
    """A cache of its own for everyone, or those who share one would find it in the processor's caches."""
    return {name: tensor.detach().clone() for name, tensor in x.items()}


def sdpa(x: Inputs) -> Call:
    x = own(x)
    grouped = x["query"].shape[1] != x["key"].shape[1]
    q, k, v = x["query"], x["key"], x["value"]
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)


def flash(x: Inputs) -> Call:
    from flash_attn import flash_attn_with_kvcache

    q, k, v = (x[name].transpose(1, 2).contiguous() for name in ("query", "key", "value"))
    return lambda: flash_attn_with_kvcache(q, k, v).transpose(1, 2)
