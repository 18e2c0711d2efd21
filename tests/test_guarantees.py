"""What holds for every kernel, bit for bit: threads, neighbours in the batch, repetition, inputs."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import fastattn as fa
from fastattn.verify.cases import CASES
from fastattn.verify.judge import run

unsanitized = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer keeps memory of its own"
)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def bits(result):
    return {name: x.reshape(-1).contiguous().view(torch.uint8) for name, x in result.items()}


def identical(a, b):
    a, b = bits(a), bits(b)
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads_and_any_time(threads, dtype):
    wrong = []
    for case in CASES:
        threads(1)
        first = run(case, dtype, "cpu")
        for n in (1, 2, 3, 7):
            threads(n)
            wrong += [(case.id, n, name) for name in identical(first, run(case, dtype, "cpu"))]
    assert not wrong


@pytest.mark.parametrize("R, E, V", [(33, 100, 777), (7, 1024, 2000), (300, 64, 3000)])
def test_same_bits_of_a_linear_loss_for_any_number_of_threads(threads, R, E, V):
    """Where a BLAS splits sums by what threads there are."""
    torch.manual_seed(0)
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((R, E), (V, E), (V,))]
    target, found = torch.randint(0, V, (R,)), []
    for n in (1, 2, 3, 7):
        threads(n)
        hidden, weight, bias = leaves
        loss = fa.linear_cross_entropy(hidden, weight, target, bias=bias)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_same_bits_of_large_rows_for_any_number_of_threads(threads):
    """Rows longer, and more of them, than one thread's share."""
    torch.manual_seed(0)
    wide, tall, w = torch.randn(40, 20000), torch.randn(300_000, 4), torch.randn(20000)
    target = torch.randint(0, 4, (300_000,))
    calls = [
        lambda x, t: fa.layer_norm(x, w, w), lambda x, t: fa.rms_norm(x, w), lambda x, t: fa.softmax(x),
        lambda x, t: fa.gelu(x, bias=w), lambda x, t: fa.swiglu(x, x),
        lambda x, t: fa.cross_entropy(x, target[:40]), lambda x, t: fa.cross_entropy(t, target),
        lambda x, t: fa.cross_entropy(t, target, reduction="sum"), lambda x, t: fa.layer_norm(t, w[:4]),
    ]  # fmt: skip
    for at, call in enumerate(calls):
        found = []
        for n in (1, 2, 3, 7):
            threads(n)
            leaves = [x.detach().requires_grad_() for x in (wide, tall)]
            w.requires_grad_().grad = None
            out = call(*leaves)
            grads = torch.autograd.grad(out.square().sum() / 3, [*leaves, w], allow_unused=True)
            found.append([x for x in (out, *grads) if x is not None])
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True)), at


@pytest.mark.parametrize("Sq, Sk", [(1, 700), (5, 5), (130, 70), (200, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_does_not_see_its_neighbours_in_the_batch(Sq, Sk, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 4 if s is Sq else 2, s, 16).to(dtype) for s in (Sq, Sk, Sk))
    lengths = torch.randint(1, Sk + 1, (5,))
    weight = torch.randn(5, 4, Sq, 16).to(dtype)

    def call(rows):
        leaves = [x[rows].clone().requires_grad_() for x in (q, k, v)]
        out, lse = fa.attention(*leaves, causal=True, key_lengths=lengths[rows], return_lse=True)
        return out, lse, *torch.autograd.grad(out, leaves, weight[rows])

    together = call(slice(None))
    for b in range(5):
        for x, y in zip(call(slice(b, b + 1)), together, strict=True):
            assert torch.equal(x[0], y[b])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_do_not_see_their_neighbours(dtype):
    torch.manual_seed(0)
    x, w = torch.randn(50, 33).to(dtype), torch.randn(33).to(dtype)
    matrix = torch.randn(40, 33).to(dtype)
    target = torch.randint(0, 33, (50,))
    calls = [
        lambda x, t: fa.layer_norm(x, w, w), lambda x, t: fa.rms_norm(x, w), lambda x, t: fa.softmax(x),
        lambda x, t: fa.gelu(x, bias=w), lambda x, t: fa.swiglu(x, x),
        lambda x, t: fa.cross_entropy(x, t, reduction="none"),
        lambda x, t: fa.linear_cross_entropy(x, matrix, t, reduction="none"),
    ]  # fmt: skip
    for call in calls:
        whole = x.clone().requires_grad_()
        out = call(whole, target)
        grad = torch.autograd.grad(out.sum(), whole)[0]
        for row in (0, 7, 49):
            one = x[row : row + 1].clone().requires_grad_()
            alone = call(one, target[row : row + 1])
            assert torch.equal(alone[0], out[row])
            assert torch.equal(torch.autograd.grad(alone.sum(), one)[0][0], grad[row])


def test_inputs_stay_unchanged():
    for case in CASES:
        inputs = {n: x.float() if x.is_floating_point() else x for n, x in case.inputs().items()}
        before = {n: x.clone() for n, x in inputs.items()}
        leaves = [x.requires_grad_() for x in inputs.values() if x.is_floating_point()]
        outputs = case.call(inputs, "cpu", torch.Generator().manual_seed(0))
        torch.autograd.grad(
            sum(o.nan_to_num(neginf=0).sum() for o in outputs), leaves, allow_unused=True
        )
        for name, x in inputs.items():
            assert torch.equal(x, before[name]), (case.id, name)


def test_calls_from_many_threads_at_once():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, 60 + n, 16) for n in range(8)]
    wanted = [fa.attention(x, x, x, causal=True) for x in inputs]
    wrong = []

    def work(n):
        for _ in range(20):
            x = inputs[n].clone().requires_grad_()
            out = fa.attention(x, x, x, causal=True)
            out.sum().backward()
            if not torch.equal(out, wanted[n]):
                wrong.append(n)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_threads_that_change_during_calls(threads):
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 300 + 50 * n, 16) for n in range(4)]

    def call(x):
        leaf, bias = (
            x.clone().requires_grad_(),
            torch.zeros(1, 1, 1, x.shape[2], requires_grad=True),
        )
        out = fa.attention(leaf, leaf, leaf, causal=True, bias=bias)
        return torch.autograd.grad(out.square().sum(), (leaf, bias))

    wanted = [call(x) for x in inputs]
    wrong = []

    def work(n):
        for turn in range(8):
            torch.set_num_threads((1, 2, 3, 7)[(n + turn) % 4])
            found = call(inputs[n])
            wrong.extend(n for a, b in zip(found, wanted[n], strict=True) if not torch.equal(a, b))

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


CHILD = """
import os, torch, fastattn as fa
torch.set_num_threads(3)
x = torch.randn(2, 4, 100, 16, requires_grad=True)
def call():
    out = fa.layer_norm(fa.attention(x, x, x), backend="cpu")
    return out, torch.autograd.grad(out.cumsum(-1).sum(), x)[0]
wanted = call()
child = os.fork()
if child == 0:
    os._exit(0 if all(map(torch.equal, call(), wanted)) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_safe_after_fork():
    """Of a process whose threads have started, where torch's own attention waits for ever."""
    subprocess.run([sys.executable, "-c", CHILD], check=True, timeout=60)


MEMORY = """
import sys, torch, fastattn as fa
from fastattn.verify.models import resident_bytes
kind, S, D = sys.argv[1], 65536, 64
dtype = torch.bfloat16 if kind == "bf16" else torch.float32
Hq, Hkv = (4, 2) if kind == "heads" else (1, 1)
q, k, v, dout = (torch.randn(1, h, S, D, dtype=dtype) for h in (Hq, Hkv, Hkv, Hq))
options = {"causal": True, "window": (512, 0)}
leaves = [q, k, v]
if kind == "dropout":
    options["dropout_p"] = 0.1
if kind == "bias":
    leaves.append(torch.randn(1, 1, 1, S))
if kind == "slopes":
    leaves.append(torch.rand(Hq))
def call(q, k, v, *more):
    if kind == "packed":
        starts = torch.arange(0, q.shape[2] + 1, q.shape[2] // 8)
        packed = (x[0].transpose(0, 1) for x in (q, k, v))
        return fa.attention_varlen(*packed, starts, starts, **options).transpose(0, 1)[None]
    return fa.attention(q, k, v, **options, **({kind: more[0]} if kind == "bias" else {}),
                        **({"alibi_slopes": more[0]} if kind == "slopes" else {}))
for x in leaves: x.requires_grad_()
small = [x[..., :256, :] if x.dim() == 4 and x.shape[2] > 1 else x[..., :256] for x in leaves]
torch.autograd.grad(call(*small).sum(), small)
before = resident_bytes(reset=True)
out = call(*leaves)
grads = torch.autograd.grad(out, leaves, dout)
print(resident_bytes(peak=True) - before - sum(x.nbytes for x in (out, *grads)))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory needs Linux")
@pytest.mark.parametrize("kind", ["plain", "bf16", "heads", "dropout", "bias", "slopes", "packed"])
def test_64k_tokens_take_less_than_100_mb(kind):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, kind], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < 100e6


PACKED_MEMORY = """
import torch, fastattn as fa
from fastattn.verify.models import resident_bytes
q = torch.randn(65536, 16, 1, requires_grad=True)
def extra(lengths):
    starts = torch.tensor([0, *lengths]).cumsum(0)
    out = fa.attention_varlen(q, q, q, starts, starts, causal=True, window=(64, 0))
    before = resident_bytes(reset=True)
    torch.autograd.grad(out, q, torch.ones_like(out))
    return resident_bytes(peak=True) - before
extra([256] * 256)
print(extra([65536 - 4095] + [1] * 4095))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory needs Linux")
def test_memory_of_packed_sequences_is_that_of_their_own_lengths():
    """Not of the longest sequence times their number: 80 MB for 4 MB of queries once."""
    done = subprocess.run(
        [sys.executable, "-c", PACKED_MEMORY], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < 40e6


HEADS_MEMORY = """
import torch
from fastattn.verify.models import resident_bytes
import fastattn
ops = torch.ops.fastattn_cpu
x = torch.randn(1, 24, 32768, 64).bfloat16()
scalars = (0.125, True, 64, None, 0.0, 0.0, False, 0, 0)
results = ops.attention_fwd(x, x, x, *[None] * 9, *scalars)
before = resident_bytes(reset=True)
grads = ops.attention_bwd(x, None, x, x, x, *[None] * 9, *results, *scalars, 7)
print(resident_bytes(peak=True) - before - 3 * 2 * x.numel())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory needs Linux")
def test_sums_of_16_bit_gradients_are_not_all_held_at_once():
    """fp32 sums of the query's gradient would be 201 MB here; a round of heads takes 34 MB."""
    done = subprocess.run(
        [sys.executable, "-c", HEADS_MEMORY], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < 60e6


def test_many_short_sequences_take_time_in_proportion():
    """Finding a task's sequence by counting took a minute here, and takes a second by halving."""
    code = """
import torch, fastattn as fa
q = torch.randn(100_000, 8, 4)
starts = torch.arange(100_001)
assert torch.allclose(fa.attention_varlen(q, q, q, starts, starts), q)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


NO_MEMORY = """
import resource, torch, fastattn as fa
torch.set_num_threads(2)
D = 20000  # scratch of 100 MB a thread
q = torch.randn(1, 1, 8, D, requires_grad=True)
k = torch.randn(1, 1, 1500, 1).expand(1, 1, 1500, D).contiguous()
out = fa.attention(q, k, k[..., :8].contiguous())
size = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) * 1024
raised = 0
for megabytes in range(10, 180, 9):
    resource.setrlimit(resource.RLIMIT_AS, (size + megabytes * 1_000_000, -1))
    try:
        torch.autograd.grad(out.sum(), q, retain_graph=True)
    except RuntimeError:
        raised += 1
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert raised and torch.autograd.grad(out.sum(), q)[0].isfinite().all()
"""


@unsanitized
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_no_memory_is_an_error_and_no_deadlock():
    """A chunk that fails never takes its turn at dquery: those behind it must not wait for it."""
    subprocess.run([sys.executable, "-c", NO_MEMORY], check=True, timeout=60)


@unsanitized
def test_nothing_grows_from_call_to_call():
    code = """
import torch, fastattn as fa
from fastattn.verify.models import resident_bytes
x = torch.randn(2, 4, 300, 64, requires_grad=True)
def call():
    fa.attention(x, x, x, causal=True, dropout_p=0.1).sum().backward()
    fa.layer_norm(x, dropout_p=0.1).sum().backward()
for _ in range(20): call()
before = resident_bytes()
for _ in range(200): call()
print(resident_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 8e6
