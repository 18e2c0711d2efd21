"""Loads fastattn._C, the C++ extension; its operators are torch.ops.fastattn_cpu."""

from __future__ import annotations


def load() -> str | None:
    """None once the extension is loaded, else the sentence that says why it is not."""
    try:
        import fastattn._C  # noqa: F401
    except ImportError as error:
        return f"the extension fastattn._C is not there ({error}); install with: pip install ."
    return None


def isa() -> str:
    """The instruction set that the CPU kernels run with: avx512, avx2 or generic."""
    import fastattn._C

    return str(fastattn._C.isa())
