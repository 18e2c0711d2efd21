"""Drop-in torch.nn modules: subclasses with torch's constructor, state_dict and meaning.

Only forward differs, so a module can be swapped for its namesake and share its weights. One has no
namesake: QuantizedLinear, which quantize() puts in a Linear's place.
"""

from .attention import MultiheadAttention
from .cross_entropy import CrossEntropyLoss
from .linear import QuantizationReport, QuantizedLinear, quantize
from .norm import LayerNorm, RMSNorm
from .softmax import Softmax
from .transformer import TransformerEncoderLayer

__all__ = [
    "CrossEntropyLoss",
    "LayerNorm",
    "MultiheadAttention",
    "QuantizationReport",
    "QuantizedLinear",
    "RMSNorm",
    "Softmax",
    "TransformerEncoderLayer",
    "quantize",
]
