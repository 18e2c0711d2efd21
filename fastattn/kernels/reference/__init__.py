"""The definition: every operator in plain PyTorch, a page each, in any float dtype.

Other backends are tested against these functions in fp64; they are never changed to agree with a
kernel. `accumulate` is the dtype of the arithmetic: fp32 for 16-bit inputs and the inputs' own dtype
otherwise. The error rule's naive baseline is the same function with accumulate=the storage dtype.
"""

from .activation import gelu, glu
from .attention import attention
from .cross_entropy import cross_entropy
from .linear import linear
from .norm import norm
from .rotary import rotary
from .softmax import softmax

__all__ = ["attention", "cross_entropy", "gelu", "glu", "linear", "norm", "rotary", "softmax"]
