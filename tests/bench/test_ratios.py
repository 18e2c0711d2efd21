"""The CPU kernels against torch's, with wide margins: a fall to half of what was measured shows here.

Ratios of interleaved rounds on one thread, never times; on a busy machine a case has three tries.
"""

import os

import pytest
import torch

from fastattn.bench.ceiling import device_clock
from fastattn.bench.families import activation, attention, attention_features, decode, norm, softmax
from fastattn.bench.harness import measure
from fastattn.bench.targets import against_torch
from fastattn.bench.workload import NAIVE, OURS, Setting

# (workload, direction, dtype, the least ratio): about half of the ratio on a machine with AVX-512
FP32, FP16 = torch.float32, torch.float16
CASES = {
    "attention": (attention.workload, (1, 4, 256, 64, False), "both", FP32, 0.6),
    "causal": (attention.workload, (1, 4, 512, 64, True), "both", FP32, 0.8),
    "half precision": (attention.workload, (1, 4, 256, 64, False), "both", FP16, 0.8),
    "bias": (attention_features.workload, ("bias", 1, 8, 512, 64, 64), "both", FP32, 0.7),
    "dropout": (attention_features.workload, ("dropout", 1, 4, 256, 64, 64), "both", FP32, 0.8),
    "window": (attention_features.workload, ("window", 1, 2, 1024, 64, 64), "forward", FP32, 2.0),
    "decode": (decode.workload, (1, 12, 12, 2048, 64), "forward", FP32, 0.5),
    "decode grouped": (decode.workload, (1, 16, 4, 1024, 128), "forward", FP16, 3.0),
    "rms_norm": (norm.workload, ("rms_norm", 1024, 768), "both", FP32, 1.2),
    "layer_norm": (norm.workload, ("layer_norm", 1024, 768), "forward", FP32, 0.5),
    "causal softmax": (softmax.workload, ((12, 256, 256), True), "forward", FP32, 1.5),
    "gelu": (activation.workload, ("gelu tanh bias", 512, 1024), "forward", FP32, 2.0),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer slows one side only"
)
@pytest.mark.parametrize("case", CASES)
def test_nothing_has_become_much_slower_than_torch(case):
    make, arguments, direction, dtype, least = CASES[case]
    workload = against_torch(make(Setting(dtype), *arguments), direction)
    ratios = []
    while len(ratios) < 3 and max(ratios, default=0.0) < least:
        rows, absent = measure(workload, device_clock("cpu"), budget=0.2)
        assert not [a for a in absent if a.wrong]
        found = next(row for row in rows if row.contestant == OURS)
        ratios.append(min(ratio for name, ratio in found.ratios.items() if name != NAIVE))
    assert max(ratios) >= least, (
        f"torch takes {max(ratios):.2f} times as long, {least} is asked for"
    )
