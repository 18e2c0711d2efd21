"""softmax(q k^T / sqrt(D)) v over whole sequences.

4 B H S² D operations forward (half of them when causal) and 2.5 times that backward; a batch holds the
same tokens whatever S is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fastattn as fa

from ..peers import compiled, needing, onnx_call, onnx_session, onnx_type, room_for
from ..workload import (
    NAIVE,
    OURS,
    Call,
    Contestant,
    Cost,
    Inputs,
    Refusal,
    Setting,
    Workload,
    direct,
)

JUDGED_SCORES = 2**26  # of the truth, at a time: half a gigabyte in fp64


def naive(query: Tensor, key: Tensor, value: Tensor, causal: bool, first: int = 0) -> Tensor:
    """first: the position of the first query, where not all of them are here."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if causal:
        i = torch.arange(first, first + query.shape[2], device=query.device)[:, None]
        scores = scores.masked_fill(i < torch.arange(key.shape[2], device=query.device), -torch.inf)
    return scores.softmax(-1) @ value


def naive_in_parts(x: Inputs, causal: bool) -> Tensor:
    """The same, some queries at a time and forgotten in between."""
    query, key, value = x["query"], x["key"], x["value"]
    at_once = JUDGED_SCORES // key.shape[2]
    if query.shape[2] <= at_once:
        return naive(query, key, value, causal)
    parts = [
        checkpoint(naive, rows, key, value, causal, at * at_once, use_reentrant=False)
        for at, rows in enumerate(query.split(at_once, 2))
    ]
    return torch.cat(parts, 2)


def workloads(setting: Setting) -> Iterator[Workload]:
    width = setting.pick(128, 768, 2048)
    tokens = setting.pick(1024, 4096, 16384)
    lengths = setting.pick(
        (512, 1024, 2048),
        (512, 1024, 2048, 4096, 8192, 16384),
        (512, 1024, 2048, 4096, 8192, 16384),
    )
    for D in setting.pick((64,), (64, 128), (64, 128)):
        for causal in (False, True):
            for S in lengths:
                yield workload(setting, max(tokens // S, 1), width // D, S, D, causal)


def workload(setting: Setting, B: int, H: int, S: int, D: int, causal: bool) -> Workload:
    def make(B: int = B, H: int = H) -> Inputs:
        names = ("query", "key", "value")
        return {name: torch.randn(B, H, S, D, dtype=torch.float64) for name in names}

    tensor = B * H * S * D * setting.dtype.itemsize
    flops = 4.0 * B * H * S * S * D * (0.5 if causal else 1.0)
    return Workload(
        "attention", "causal" if causal else "full", {"B": B, "H": H, "S": S, "D": D},
        setting.dtype, setting.device, Cost(flops, 4 * tensor, 2.5 * flops, 8 * tensor), "flops",
        make, tuple(contestants(setting, causal)), make_judged=lambda: make(1, 1),
        judged_naive=lambda x: naive_in_parts(x, causal),
    )  # fmt: skip


def contestants(setting: Setting, causal: bool) -> Iterator[Contestant]:
    yield Contestant(OURS, direct(fa.attention, causal=causal))
    yield Contestant(NAIVE, with_room(setting, direct(naive, causal=causal)))
    for name, backend in sdpa_backends(setting).items():
        bind = direct_positional(F.scaled_dot_product_attention, is_causal=causal)
        if name == "math":
            bind = with_room(setting, bind)
        yield Contestant(f"sdpa {name}", bind, context=partial(sdpa_kernel, backend))
    yield compiled(naive, setting, causal=causal)
    yield Contestant("flex_attention", lambda x: flex(x, setting, causal), setting.on_gpu)
    yield Contestant(
        "onnxruntime", lambda x: onnx(x, setting, causal), backward=False, weighs=False
    )
    yield Contestant("flash-attn", needing("flash_attn", setting, lambda x: flash(x, causal)))
    yield Contestant("xformers", needing("xformers", setting, lambda x: xformers(x, causal)))


def sdpa_backends(setting: Setting) -> dict[str, SDPBackend]:
    """Those that the device has."""
    found = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    if setting.on_gpu:
        found |= {
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION,
        }
    return found


def direct_positional(function: Callable[..., Tensor], **options: bool) -> Callable[[Inputs], Call]:
    return lambda x: lambda: function(x["query"], x["key"], x["value"], **options)


def with_room(setting: Setting, bind: Callable[[Inputs], Call]) -> Callable[[Inputs], Call]:
    """Scores, weights and two gradients of them are held at once."""

    def bound(x: Inputs) -> Call:
        B, H, S, _ = x["query"].shape
        scores = 4.0 * B * H * S * S * x["query"].element_size()
        room_for(scores, setting.device, "scores of all queries and keys")
        return bind(x)

    return bound


def flex(x: Inputs, setting: Setting, causal: bool) -> Call:
    if not setting.compile:
        raise Refusal("it is only fast compiled, which takes long: --compile asks for it")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    S, device = x["query"].shape[2], setting.device
    visible = lambda b, h, i, j: i >= j  # noqa: E731
    mask = create_block_mask(visible, None, None, S, S, device=device) if causal else None
    run = torch.compile(flex_attention, dynamic=False)
    q, k, v = x["query"], x["key"], x["value"]
    if not setting.on_gpu:  # there it has no backward, and refuses tensors that ask for one
        q, k, v = q.detach(), k.detach(), v.detach()
    return lambda: run(q, k, v, block_mask=mask)


def flash(x: Inputs, causal: bool) -> Call:
    """(B, S, H, D) with any strides: ours, seen so. Copies would have a copy of each gradient behind them."""
    from flash_attn import flash_attn_func

    q, k, v = (x[name].transpose(1, 2) for name in ("query", "key", "value"))
    return lambda: flash_attn_func(q, k, v, causal=causal).transpose(1, 2)


def xformers(x: Inputs, causal: bool) -> Call:
    """As flash-attn's: (B, S, H, D), where the channels of a head lie together."""
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    q, k, v = (x[name].transpose(1, 2) for name in ("query", "key", "value"))
    mask = LowerTriangularMask() if causal else None
    return lambda: memory_efficient_attention(q, k, v, attn_bias=mask).transpose(1, 2)


def onnx(x: Inputs, setting: Setting, causal: bool) -> Call:
    """ONNX's own Attention, of operator set 23."""
    kind = onnx_type(x, setting)
    from onnx import helper

    names = ["query", "key", "value"]
    node = helper.make_node("Attention", names, ["out"], is_causal=int(causal))
    ends = [
        helper.make_tensor_value_info(name, kind, list(x["query"].shape))
        for name in (*names, "out")
    ]
    graph = helper.make_graph([node], "attention", ends[:3], ends[3:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return onnx_call(onnx_session(model.SerializeToString()), x)
