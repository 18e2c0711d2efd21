"""What the models share: ids looked up, masks made, attention with its weights on request, activations.

owner is the name of the class that errors speak of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.attention import explicit_attention
from ..ops.activation import gelu
from ..ops.attention import attention
from ..ops.checks import dtype_name, is_tensor

# transformers' names of activations: gelu's fused forms, and what follows the bias by itself
GELU_FORMS = {
    "gelu": "none",
    "gelu_python": "none",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_python_tanh": "tanh",
    "gelu_fast": "tanh",
    "gelu_accurate": "tanh",
}
OTHER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
ACTIVATIONS = (*GELU_FORMS, *OTHER_ACTIVATIONS)


def activated(name: str, dense: nn.Module, x: Tensor) -> Tensor:
    """The activation of dense(x), fused with its bias where dense can leave that out."""
    if type(dense) is nn.Linear:
        return activate(name, F.linear(x, dense.weight), dense.bias)
    if hasattr(dense, "product"):  # Conv1D, QuantizedLinear
        return activate(name, dense.product(x), dense.bias)  # type: ignore[operator, arg-type]
    return activate(name, dense(x), None)


def activate(name: str, x: Tensor, bias: Tensor | None) -> Tensor:
    """The activation of x + bias, fused where it is a gelu."""
    if name in GELU_FORMS:
        return gelu(x, bias=bias, approximate=GELU_FORMS[name])
    return OTHER_ACTIVATIONS[name](x if bias is None else x + bias)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    dropout_p: float,
    causal: bool = False,
    scale: float | None = None,
    weights: list[Tensor] | None = None,
) -> Tensor:
    """attention under a mask of attention_mask_of; a list gets the weights, which costs the whole matrix."""
    kind = mask_argument(mask)
    if weights is None:
        return attention(q, k, v, **kind, causal=causal, scale=scale, dropout_p=dropout_p)
    out, seen = explicit_attention(q, k, v, **kind, causal=causal, scale=scale, dropout_p=dropout_p)
    weights.append(seen)
    return out


def mask_argument(mask: Tensor | None) -> dict[str, Any]:
    """attention's argument for a mask: bool ones say who may attend, float ones are added."""
    if mask is None:
        return {}
    return {"mask": mask} if mask.dtype == torch.bool else {"bias": mask}


def attention_mask_of(
    owner: str, attention_mask: Tensor | None, B: int, H: int, Sq: int, Sk: int
) -> Tensor | None:
    """None, or a mask of four dimensions: bool, True may attend, or float, added to the scores.

    attention_mask: (B, Sk) or (B, Sq, Sk) of 1 and 0, or four dimensions that broadcast to
    (B, H, Sq, Sk), bool or float.
    """
    if attention_mask is None:
        return None
    is_tensor(owner, attention_mask=attention_mask)
    shape, kind = tuple(attention_mask.shape), attention_mask.dtype
    if len(shape) == 4:
        if any(have not in (1, want) for have, want in zip(shape, (B, H, Sq, Sk), strict=True)):
            raise ValueError(
                f"{owner}: a 4-D attention_mask must broadcast to (B, H, Sq, Sk) = {(B, H, Sq, Sk)}, "
                f"got {shape}"
            )
        if kind != torch.bool and not kind.is_floating_point:
            raise TypeError(
                f"{owner}: a 4-D attention_mask must be bool (True may attend) or float (added), "
                f"got {dtype_name(kind)}"
            )
        return attention_mask
    if shape not in ((B, Sk), (B, Sq, Sk)):
        raise ValueError(
            f"{owner}: attention_mask must be (B, Sk) = {(B, Sk)}, (B, Sq, Sk) = {(B, Sq, Sk)} or 4-D, "
            f"got {shape}"
        )
    if kind.is_floating_point and reads_data(attention_mask):
        wrong = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
        if len(wrong):
            raise ValueError(
                f"{owner}: attention_mask must be 1 for a token and 0 for padding, got {wrong[0]:g}; one "
                "that is added to scores must have four dimensions"
            )
    mask = attention_mask.bool()
    return mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]


NO_COMPILED_PACKING = (
    "skip_padding: how many tokens a mask keeps is data, so they are found outside of compiled graphs: "
    "compile without fullgraph=True, or set skip_padding to False"
)


class Packing(NamedTuple):
    """Where the tokens of a padded batch are. places: (total,) int64 among B * S, in order; cu_seqlens:
    (B + 1,) int32 of sequences without their padding, which may be empty; longest: of their lengths."""

    places: Tensor
    cu_seqlens: Tensor
    longest: int
    shape: tuple[int, int]


@torch.compiler.disable(reason=NO_COMPILED_PACKING)
def packing_of(owner: str, mask: Tensor | None, shape: tuple[int, int]) -> Packing | None:
    """Of a mask of attention_mask_of that says who is padding; None without one. A GPU is waited for."""
    if mask is None:
        return None
    B, S = shape
    if mask.dtype != torch.bool or mask.shape != (B, 1, 1, S):
        raise ValueError(
            f"{owner}: skip_padding needs an attention_mask of (B, S) = {shape}, 1 for a token and 0 for "
            f"padding, got one of {tuple(mask.shape)}, which may say more than that; set skip_padding to "
            "False"
        )
    kept = mask.view(B, S)
    lengths = kept.sum(1, dtype=torch.int32)
    cu_seqlens = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if B else 0
    return Packing(kept.flatten().nonzero()[:, 0], cu_seqlens, longest, shape)


def packed(x: Tensor, packing: Packing | None) -> Tensor:
    """The tokens (total, ...) of x (B, S, ...); x itself without a packing."""
    return x if packing is None else x.flatten(0, 1).index_select(0, packing.places)


def padded(x: Tensor, packing: Packing | None) -> Tensor:
    """(B, S, ...) of tokens x (total, ...), 0 at padding; x itself without a packing."""
    if packing is None:
        return x
    B, S = packing.shape
    return x.new_zeros(B * S, *x.shape[1:]).index_copy(0, packing.places, x).unflatten(0, (B, S))


def reads_data(x: Tensor) -> bool:
    """Whether a check of values costs nothing but its time: it would synchronise a GPU, or break a trace."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def embedded(
    owner: str, table: nn.Embedding, input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> Tensor:
    """The one that is given of input_ids (B, S), looked up, and inputs_embeds: (B, S, E)."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(f"{owner}: give either input_ids or inputs_embeds")
    if inputs_embeds is not None:
        is_tensor(owner, inputs_embeds=inputs_embeds)
        E = table.embedding_dim
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != E:
            raise ValueError(
                f"{owner}: inputs_embeds must be (B, S, {E}), got {tuple(inputs_embeds.shape)}"
            )
        return inputs_embeds
    is_tensor(owner, input_ids=input_ids)
    assert input_ids is not None
    if input_ids.dim() != 2:
        raise ValueError(f"{owner}: input_ids must be (B, S), got {tuple(input_ids.shape)}")
    return look_up(owner, "input_ids", table, input_ids, input_ids.shape)


def look_up(
    owner: str, name: str, table: nn.Embedding, ids: Tensor, shape: torch.Size | tuple[int, ...]
) -> Tensor:
    """table(ids); ids (B, S), (1, S) or (S,)."""
    is_tensor(owner, **{name: ids})
    if tuple(ids.shape) not in (tuple(shape), (1, shape[1]), (shape[1],)):
        raise ValueError(
            f"{owner}: {name} must be (B, S) = {tuple(shape)} or (1, S), got {tuple(ids.shape)}"
        )
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{owner}: {name} must be int32 or int64, got {dtype_name(ids.dtype)}")
    try:
        return table(ids)
    except IndexError:
        n = table.num_embeddings
        wrong = int(ids[(ids < 0) | (ids >= n)][0])
        raise ValueError(f"{owner}: {name} must be in [0, {n}), got {wrong}") from None


def class_labels(owner: str, labels: Tensor, *shapes: tuple[int, ...]) -> Tensor:
    """labels as int64, of one of the shapes."""
    is_tensor(owner, labels=labels)
    if tuple(labels.shape) not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"{owner}: labels must be {wanted}, got {tuple(labels.shape)}")
    if labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{owner}: labels must be int32 or int64, got {dtype_name(labels.dtype)}")
    return labels.long()
