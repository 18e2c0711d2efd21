"""fastattn: fused attention, normalisation, softmax and cross-entropy for PyTorch."""

from .ops import cpu as _cpu  # noqa: F401  (registers the C++ kernels)
from .ops.softmax import softmax
from .registry import use_backend

__version__ = "0.1.0"

__all__ = ["softmax", "use_backend"]
