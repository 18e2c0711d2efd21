"""flash_attn.modules.block: a mixer and an MLP with dropout, residual sums and norms between them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import rms_norm
from ..ops.triton import layer_norm
from ..ops.triton.layer_norm import layer_norm_fn
from .mha import MHA
from .mlp import Mlp

RMS_NORMS = (rms_norm.RMSNorm, layer_norm.RMSNorm)
Make = Callable[..., nn.Module]


class StochasticDepth(nn.Module):
    """In training a row of the batch is dropped whole with probability p, and the others divided by 1 - p.
    Huang et al. 2016, arXiv:1603.09382; as torchvision's in mode "row"."""

    def __init__(self, p: float, mode: str = "row") -> None:
        super().__init__()
        if mode != "row" or not 0 <= p <= 1:
            raise ValueError(
                f"StochasticDepth: p must be in [0, 1] and mode 'row', got {p} and {mode!r}"
            )
        self.p, self.mode = p, mode

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) >= self.p
        return torch.where(kept, x / (1 - self.p) if self.p < 1 else x, 0.0)


class Block(nn.Module):
    """Prenorm: dropout, add, norm, mixer, dropout, add, norm, MLP, returning (hidden_states, residual): the
    sums come first, so that they fuse with the norms. Postnorm: mixer, dropout, add, norm, MLP, dropout, add,
    norm, returning hidden_states.

    mixer_cls, mlp_cls, norm_cls: called with dim; an nn.Identity as MLP ends the block after the mixer.
    return_residual: mixer and MLP return (out, their input). residual_in_fp32: only with prenorm.
    fused_dropout_add_ln: dropout, sum and norm as one, for nn.LayerNorm or RMSNorm. sequence_parallel,
    mark_shared_params: mark the norms' parameters for who synchronises them.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Make | None = None,
        mlp_cls: Make | None = None,
        norm_cls: Make = nn.LayerNorm,
        dropout_cls: Make = nn.Dropout,
        prenorm: bool = True,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        drop_path1: float = 0.0,
        drop_path2: float = 0.0,
        fused_dropout_add_ln: bool = False,
        return_residual: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ) -> None:
        super().__init__()
        if residual_in_fp32 and not prenorm:
            raise ValueError("Block: residual_in_fp32 needs prenorm=True")
        self.prenorm, self.return_residual = prenorm, return_residual
        self.fused_dropout_add_ln, self.residual_in_fp32 = fused_dropout_add_ln, residual_in_fp32
        self.mixer = (mixer_cls or partial(MHA, num_heads=dim // 64))(dim)
        self.dropout1, self.drop_path1 = dropout_cls(resid_dropout1), StochasticDepth(drop_path1)
        self.norm1 = norm_cls(dim)
        self.mlp = (mlp_cls or partial(Mlp, hidden_features=4 * dim))(dim)
        if not isinstance(self.mlp, nn.Identity):
            self.dropout2, self.drop_path2 = (
                dropout_cls(resid_dropout2),
                StochasticDepth(drop_path2),
            )
            self.norm2 = norm_cls(dim)
        if fused_dropout_add_ln:
            check_fusible("Block", self.norm1, self.dropout1)
        mark(self, sequence_parallel, mark_shared_params)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: Any = None, **kwargs: Any
    ) -> Any:
        mixer: Any = self.mixer
        return mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        mixer_subset: Any = None,
        mixer_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """hidden_states (B, S, dim) and, with prenorm, the residual of the block before, None in the first.

        mixer_subset: of a cross-attention, which tokens ask, and stay. mixer_kwargs: for the mixer.
        """
        kwargs = {} if mixer_kwargs is None else dict(mixer_kwargs)
        if self.prenorm:
            if mixer_subset is not None:
                kwargs["mixer_subset"] = mixer_subset
            return self.forward_prenorm(hidden_states, residual, mixer_subset, kwargs)
        if residual is not None or mixer_subset is not None:
            raise ValueError("Block: residual and mixer_subset need prenorm=True")
        out = self.mixer(hidden_states, **kwargs)
        out, hidden_states = out if self.return_residual else (out, hidden_states)
        hidden_states = self.add_norm(1, out, hidden_states)[0]
        if isinstance(self.mlp, nn.Identity):
            return hidden_states
        out = self.mlp(hidden_states)
        out, hidden_states = out if self.return_residual else (out, hidden_states)
        return self.add_norm(2, out, hidden_states)[0]

    def forward_prenorm(
        self, x: Tensor, residual: Tensor | None, subset: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.add_norm(1, x, residual)
        x = self.mixer(x, **kwargs)
        if subset is not None:
            residual = residual[:, subset]
        if not isinstance(self.mlp, nn.Identity):
            x, residual = self.add_norm(2, x, residual)
            x = self.mlp(x)
        return x, residual

    def add_norm(self, which: int, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm(z), z) for z = drop_path(dropout(x)) + residual."""
        dropout, drop_path, norm = (
            getattr(self, f"{part}{which}") for part in ("dropout", "drop_path", "norm")
        )
        if not self.fused_dropout_add_ln:
            x = drop_path(dropout(x))
            z = x if residual is None else x + residual
            return normed(norm, z), z.to(torch.float32) if self.residual_in_fp32 else z
        rowscale = None
        if drop_path.p > 0 and self.training:
            rowscale = drop_path(torch.ones(x.shape[:-1], device=x.device, dtype=x.dtype))
        return layer_norm_fn(
            x, norm.weight, norm.bias, residual, eps=norm.eps,
            dropout_p=dropout.p if self.training else 0.0, rowscale=rowscale, prenorm=True,
            residual_in_fp32=self.residual_in_fp32, is_rms_norm=isinstance(norm, RMS_NORMS),
        )  # fmt: skip


class ParallelBlock(nn.Module):
    """The mixer and the MLP side by side, as in GPT-J and PaLM: dropout, add, norm, then both at once.

    tied_norm: one norm for both. The other arguments as in Block.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Make | None = None,
        mlp_cls: Make | None = None,
        norm_cls: Make = nn.LayerNorm,
        dropout_cls: Make = nn.Dropout,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        tied_norm: bool = False,
        fused_dropout_add_ln: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ) -> None:
        super().__init__()
        self.tied_norm, self.residual_in_fp32 = tied_norm, residual_in_fp32
        self.fused_dropout_add_ln = fused_dropout_add_ln
        self.mixer = (mixer_cls or partial(MHA, num_heads=dim // 64))(dim)
        self.dropout1, self.norm1 = dropout_cls(resid_dropout1), norm_cls(dim)
        self.mlp = (mlp_cls or partial(Mlp, hidden_features=4 * dim))(dim)
        self.dropout2 = dropout_cls(resid_dropout2)
        if not tied_norm:
            self.norm2 = norm_cls(dim)
        if fused_dropout_add_ln:
            check_fusible("ParallelBlock", self.norm1, self.dropout1)
            if resid_dropout1 != resid_dropout2:
                raise ValueError(
                    "ParallelBlock: fused_dropout_add_ln has one dropout for both branches, got "
                    f"resid_dropout1 {resid_dropout1} and resid_dropout2 {resid_dropout2}"
                )
        mark(self, sequence_parallel, mark_shared_params)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: Any = None, **kwargs: Any
    ) -> Any:
        mixer: Any = self.mixer
        return mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        hidden_states1: Tensor,
        hidden_states2: Tensor | None = None,
        residual: Tensor | None = None,
        mixer_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What mixer and MLP of the block before returned, and its residual; the first block gets one tensor.

        Returns the same three: (mixer's, MLP's, residual), (B, S, dim) each.
        """
        if self.fused_dropout_add_ln:
            for_mixer, for_mlp, residual = self.fused_add_norm(
                hidden_states1, hidden_states2, residual
            )
        else:
            parts = [self.dropout1(hidden_states1)]
            parts += [] if hidden_states2 is None else [self.dropout2(hidden_states2)]
            residual = sum(parts) if residual is None else residual + sum(parts)
            for_mixer = for_mlp = normed(self.norm1, residual)
            if not self.tied_norm:
                for_mlp = normed(self.norm2, residual)
            residual = residual.to(torch.float32) if self.residual_in_fp32 else residual
        return self.mixer(for_mixer, **(mixer_kwargs or {})), self.mlp(for_mlp), residual

    def fused_add_norm(
        self, x: Tensor, x1: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        first: Any = self.norm1
        dropout: Any = self.dropout1
        second: Any = None if self.tied_norm else self.norm2
        found = layer_norm_fn(
            x, first.weight, first.bias, residual, x1,
            None if second is None else second.weight, None if second is None else second.bias,
            eps=first.eps, dropout_p=dropout.p if self.training else 0.0, prenorm=True,
            residual_in_fp32=self.residual_in_fp32, is_rms_norm=isinstance(first, RMS_NORMS),
        )  # fmt: skip
        return found if second is not None else (found[0], found[0], found[1])


def normed(norm: Any, z: Tensor) -> Tensor:
    return norm(z.to(norm.weight.dtype))


def check_fusible(name: str, norm: nn.Module, dropout: nn.Module) -> None:
    if not isinstance(norm, (nn.LayerNorm, *RMS_NORMS)) or not isinstance(dropout, nn.Dropout):
        raise ValueError(
            f"{name}: fused_dropout_add_ln needs nn.LayerNorm or RMSNorm, and nn.Dropout, got "
            f"{type(norm).__name__} and {type(dropout).__name__}"
        )


def mark(module: nn.Module, sequence_parallel: bool, shared: bool) -> None:
    """Norm parameters by the attributes that flash-attn's distributed helpers look for."""
    for name, parameter in module.named_parameters():
        if name.startswith(("norm1.", "norm2.")):
            marks = {"_sequence_parallel": sequence_parallel, "_shared_params": shared}
            for attribute in (a for a, wanted in marks.items() if wanted):
                setattr(parameter, attribute, True)
