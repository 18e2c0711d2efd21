"""What results of kernels are made of."""

from __future__ import annotations

import os
import re

import pytest
import torch

import fastattn as fa

THP = "/sys/kernel/mm/transparent_hugepage/enabled"


def flags_of(address: int) -> set[str]:
    """Linux's flags of the mapping that an address lies in: hg, to be had in huge pages."""
    inside = False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
            if found:
                inside = int(found[1], 16) <= address < int(found[2], 16)
            elif inside and line.startswith("VmFlags:"):
                return set(line.split()[1:])
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(not os.path.exists(THP), reason="this system has no huge pages")
def test_large_results_are_asked_for_in_huge_pages() -> None:
    x = torch.randn(4, 1 << 20)
    for y in (fa.softmax(x), fa.gelu(x), fa.swiglu(x, x), fa.layer_norm(x)):
        assert "hg" in flags_of(y.data_ptr() + y.nbytes // 2)
