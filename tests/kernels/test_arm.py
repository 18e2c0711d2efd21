"""The NEON kernels, run: the CPU kernels compiled for 64-bit Arm, on a processor that QEMU plays."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastattn.verify.judge import DTYPES, ratio

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
FLAGS = "-O2 -std=c++20 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi -static"
if COMPILER is None or EMULATOR is None:
    pytest.skip(
        "needs a compiler for 64-bit Arm and QEMU (g++-aarch64-linux-gnu, qemu-user)",
        allow_module_level=True,
    )


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("arm") / "arm"
    sources = ["tests/kernels/arm.cpp", "csrc/cpu/isa_generic.cpp"]
    subprocess.run([COMPILER, *FLAGS.split(), *sources, "-o", path], cwd=ROOT, check=True)
    return path


def on_arm(program, dtype, call, inputs, shapes):
    """Results of these shapes (and dtypes, where not the call's)."""
    words = [str(dtype).removeprefix("torch."), *map(str, call)]
    data = b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in inputs)
    done = subprocess.run([EMULATOR, program, *words], input=data, check=True, capture_output=True)
    memory, results = bytearray(done.stdout), []
    for shape, kind in shapes:
        x = torch.empty(shape, dtype=kind)
        part, memory = memory[: x.nbytes], memory[x.nbytes :]
        results.append(torch.frombuffer(part, dtype=kind).reshape(shape))
    assert not memory
    return results


def holds(function, found, inputs, grad):
    """The error rule for outputs and gradients of a function, against fp64 and its naive form."""
    results = []
    for cast in (torch.Tensor.double, lambda x: x):
        leaves = [cast(x).detach().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        grads = torch.autograd.grad(outputs[0], leaves, cast(grad))
        results.append([*(x.detach() for x in outputs), *grads])
    for x, truth, naive in zip(found, *results, strict=True):
        assert ratio(x, truth, naive, grad.dtype) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, H, S, D, causal", [(2, 2, 37, 19, False), (1, 2, 130, 64, True)])
def test_attention(program, dtype, B, H, S, D, causal):
    torch.manual_seed(0)
    *inputs, grad = (torch.randn(B, H, S, D).to(dtype) for _ in range(4))
    like, lse = ((B, H, S, D), dtype), ((B, H, S), torch.float32)
    call = ("attention", B, H, S, D, int(causal))
    found = on_arm(program, dtype, call, [*inputs, grad], [like, lse, like, like, like])
    hidden = torch.ones(S, S, dtype=torch.bool).triu(1) & causal

    def attention(q, k, v):
        scores = (q @ k.mT * 0.25).masked_fill(hidden, -torch.inf)
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    holds(attention, found, inputs, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R, C", [(5, 1), (33, 67), (3, 1030)])
def test_rows(program, dtype, R, C):
    torch.manual_seed(0)
    x, grad, weight = (
        torch.randn(R, C).to(dtype),
        torch.randn(R, C).to(dtype),
        torch.rand(C).to(dtype),
    )
    like = ((R, C), dtype)
    found = on_arm(program, dtype, ("norm", R, C), [x, weight, grad], [like, like, ((C,), dtype)])
    norm = lambda x, w: (torch.nn.functional.layer_norm(x, (C,), w),)  # noqa: E731
    holds(norm, found, [x, weight], grad)
    found = on_arm(program, dtype, ("softmax", R, C), [x, grad], [like, like])
    holds(lambda x: (x.softmax(-1),), found, [x], grad)
