"""Drop-in torch.nn modules: subclasses with torch's constructor, state_dict and meaning.

Only forward differs, so a module can be swapped for its namesake and share its weights.
"""

from .attention import MultiheadAttention
from .cross_entropy import CrossEntropyLoss
from .norm import LayerNorm, RMSNorm
from .softmax import Softmax
from .transformer import TransformerEncoderLayer

__all__ = [
    "CrossEntropyLoss",
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "Softmax",
    "TransformerEncoderLayer",
]
