"""fastattn: fused attention, normalisation, softmax and cross-entropy for PyTorch."""

from .integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from .nn.linear import quantize
from .ops import cpu as _cpu  # noqa: F401  (registers the C++ kernels)
from .ops import cuda as _cuda  # noqa: F401  (registers the CUDA kernels)
from .ops import triton as _triton  # noqa: F401  (registers the Triton kernels)
from .ops.activation import geglu, gelu, swiglu
from .ops.attention import attention, attention_varlen, explain
from .ops.backends import backends
from .ops.cache import KVCache, attention_decode
from .ops.cross_entropy import cross_entropy
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.merge import merge
from .ops.norm import layer_norm, rms_norm
from .ops.rotary import rotary
from .ops.sdpa import scaled_dot_product_attention
from .ops.softmax import softmax
from .registry import use_backend

__version__ = "0.1.0"

__all__ = [
    "KVCache",
    "attention",
    "attention_decode",
    "attention_varlen",
    "backends",
    "cross_entropy",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "geglu",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "merge",
    "quantize",
    "rms_norm",
    "rotary",
    "scaled_dot_product_attention",
    "softmax",
    "swiglu",
    "use_backend",
]
