"""CUDA's row kernels by the table of cases and beyond it: on the model of a GPU here, or on one with
--device cuda."""

import pytest
import torch

import fastattn as fa
from fastattn.emulate import cuda_host
from fastattn.kernels.reference.philox import keep_mask
from fastattn.verify.cases import rows_case
from fastattn.verify.judge import DTYPES, judge, run

from . import pick

NORMS = (fa.layer_norm, fa.rms_norm)
ROWS = pick.of("layer_norm", "rms_norm", "softmax", "cross_entropy", "linear_cross_entropy", "gelu",
               "geglu", "swiglu", "rotary")  # fmt: skip
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=pick.name)


def check(case, dtype, device):
    verdict = judge(case, dtype, "cuda", device)
    assert verdict.passed, verdict.declined or verdict.explain()


@pick.in_one_dtype(ROWS)
def test_case(case, dtype, device):
    check(case, dtype, device)


@pytest.mark.slow
@pick.in_the_others(ROWS)
def test_case_in_another_dtype(case, dtype, device):
    check(case, dtype, device)


# ---- rows that no case has -------------------------------------------------------------------


def norm_case(norm, R, C, names=("weight", "bias", "residual"), **options):
    shapes = {name: (R, C) if name in ("x", "residual") else (C,) for name in ("x", *names)}
    if norm is fa.rms_norm:
        shapes.pop("bias", None)
    call = lambda x, b, g: norm(**x, backend=b, generator=g, **options)  # noqa: E731
    return rows_case(norm.__name__, "shape", f"{R}x{C}", shapes, call)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("C", [1030, 8200, 16384, 20001])
def test_norm_of_rows_on_either_side_of_each_kernels_limit(norm, C, device):
    """Several warps a row; sums over rows apart; the longest in registers; longer ones."""
    check(norm_case(norm, 3, C, dropout_p=0.2, return_residual=True), torch.bfloat16, device)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("C", [1030, 8200, 16384, 20001])
def test_norm_of_fp32_rows_on_either_side_of_each_kernels_limit(norm, C, device):
    check(norm_case(norm, 3, C, dropout_p=0.2, return_residual=True), torch.float32, device)


@every_dtype
def test_norm_of_many_rows(dtype, device):
    """Chunks of rows: more than one of a block's, and the last one not full."""
    check(norm_case(fa.layer_norm, 2113, 24, ("weight", "bias")), dtype, device)


@every_dtype
def test_bias_of_gelu_over_many_rows(dtype, device):
    shapes = {"x": (2113, 20), "bias": (20,)}
    call = lambda x, b, g: fa.gelu(**x, backend=b)  # noqa: E731
    check(rows_case("gelu", "bias", "many rows", shapes, call), dtype, device)


@pytest.mark.parametrize("V", [8192, 20000, 20001])
def test_cross_entropy_of_many_classes(V, device):
    """Far from zero, where the backward makes up for what fp32 takes from lse."""

    def call(x, b, g):
        target = torch.tensor([0, V - 1, 77], device=x["logits"].device)
        return fa.cross_entropy(**x, target=target, label_smoothing=0.1, z_loss=0.01, backend=b)

    case = rows_case("cross_entropy", "large", str(V), {"logits": (3, V)}, call, size=9.0, shift=40)
    for dtype in DTYPES:
        check(case, dtype, device)


# Functions of rows (R, 48) of one tensor, whose rows do not know of each other.
ROWWISE = {
    "layer_norm": lambda x: fa.layer_norm(x, backend="cuda"),
    "rms_norm": lambda x: fa.rms_norm(x, residual=2 * x, backend="cuda"),
    "softmax": lambda x: fa.softmax(x, scale=0.7, backend="cuda"),
    "gelu": lambda x: fa.gelu(x, bias=x.detach().new_ones(x.shape[-1]), backend="cuda"),
    "swiglu": lambda x: fa.swiglu(x, x, backend="cuda"),
    "cross_entropy": lambda x: fa.cross_entropy(
        x, torch.full((len(x),), 3, device=x.device), label_smoothing=0.1, reduction="none", backend="cuda"
    ),
    "rotary": lambda x: fa.rotary(
        x[None, None], x.detach()[:, :20].float(), x.detach()[:, 20:40].float(), backend="cuda"
    ),
}  # fmt: skip
rowwise = pytest.mark.parametrize("function", ROWWISE.values(), ids=ROWWISE)


def with_gradient(function, x):
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y.float().square().sum(), x)[0]


@rowwise
@every_dtype
def test_a_rows_bits_depend_neither_on_its_neighbours_nor_on_where_it_lies(function, dtype, device):
    """Alone, among others, and with its first column at every place of 16 bytes."""
    torch.manual_seed(0)
    wide = torch.randn(48, 61, device=device).to(dtype)
    for columns in (48, 45):  # whole units of 16 bytes, and not
        x = wide[:, :columns].contiguous()
        together = with_gradient(function, x)
        shifted = torch.zeros_like(wide)
        for shift in (1, 3, 4, 8):
            shifted[:, shift : shift + columns] = x
            moved = with_gradient(function, shifted[:, shift : shift + columns])
            assert all(torch.equal(a, b) for a, b in zip(together, moved, strict=True))
        if function is ROWWISE["rotary"]:
            continue  # its angles are its position's
        for rows in (slice(0, 1), slice(7, 8), slice(20, 37)):
            alone = with_gradient(function, x[rows])
            assert all(torch.equal(a[rows], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "softmax", "gelu", "swiglu"])
def test_rows_of_many_dimensions_and_strides(name, device):
    torch.manual_seed(0)
    x = torch.randn(5, 3, 2, 48, device=device).permute(2, 0, 1, 3)[:, 1:]
    found = with_gradient(ROWWISE[name], x)
    wanted = with_gradient(ROWWISE[name], x.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_no_rows_and_no_columns(device):
    for shape in ((0, 8), (0,), (3, 0)):
        for function in (ROWWISE["layer_norm"], ROWWISE["softmax"], ROWWISE["swiglu"]):
            y, dx = with_gradient(function, torch.zeros(shape, device=device))
            assert y.shape == dx.shape == shape
    x, w, b = (torch.ones(s, device=device, requires_grad=True) for s in ((0, 8), (8,), (8,)))
    for y in (fa.layer_norm(x, w, b, backend="cuda"), fa.gelu(x, bias=b, backend="cuda")):
        assert torch.autograd.grad(y.sum(), b)[0].eq(0).all()
    stuck = fa.layer_norm(torch.zeros(3, 0, device=device), backend="cuda")
    assert stuck.shape == (3, 0)


# ---- what the numbers mean ---------------------------------------------------------------------


@pytest.mark.parametrize("C", [4, 70, 1030, 16400])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_drops_what_the_reference_drops(C, p, device):
    """Of ones, the sum that comes back is 0 where dropped; and so is the gradient."""
    x = torch.ones(3, C, device=device, requires_grad=True)
    generator = torch.Generator(device).manual_seed(3)
    options = {"dropout_p": p, "return_residual": True, "backend": "cuda"}
    _, z = fa.layer_norm(x, generator=generator, **options)
    (dx,) = torch.autograd.grad(z.sum(), x)
    generator.manual_seed(3)
    philox = torch.randint(0, 2**31, (2,), dtype=torch.int64, device=device, generator=generator)
    rows = torch.arange(3, device=device)
    kept = keep_mask(rows, torch.zeros_like(rows), C, philox, p)
    assert torch.equal(z != 0, kept) and torch.equal(dx != 0, kept)


def test_the_gradient_over_the_logits_is_the_gradient(device):
    torch.manual_seed(0)
    for V in (50, 4096):
        x = 5 * torch.randn(7, V, device=device)
        target = torch.tensor([1, -100, 3, 4, 49, 0, -100], device=device)
        grads = []
        for in_place in (False, True):
            leaf = x.clone().requires_grad_()
            logits = leaf * 1
            loss = fa.cross_entropy(
                logits, target, z_loss=0.01, inplace_backward=in_place, backend="cuda"
            )
            grads.append(torch.autograd.grad(loss, leaf)[0])
        assert torch.equal(*grads)
        assert grads[0][1].eq(0).all()


@pytest.mark.parametrize("V", [50, 4096])
def test_the_gradient_far_from_zero_makes_up_for_what_fp32_took_from_lse(V, device):
    torch.manual_seed(0)
    x = (3 * torch.randn(4, V, device=device) + 1e4).requires_grad_()
    target = torch.arange(4, device=device)
    loss = fa.cross_entropy(x, target, reduction="sum", backend="cuda")
    (found,) = torch.autograd.grad(loss, x)
    wanted = x.detach().double().softmax(-1) - torch.eye(V, device=device)[:4]
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=0)


def test_infinite_and_undefined_logits_are_the_references(device):
    inf, nan = torch.inf, torch.nan
    rows = [
        [0.0, 1, 2],
        [-inf, 1, 2],
        [inf, 1, 2],
        [nan, 1, 2],
        [-inf, -inf, -inf],
        [-inf, -inf, 5],
    ]
    x = torch.tensor(rows, device=device).repeat_interleave(2, 0)
    target = torch.tensor([0, 2] * len(rows), device=device)
    for smoothing in (0.0, 0.1):
        options = {"label_smoothing": smoothing, "reduction": "none"}
        found, wanted = (
            fa.cross_entropy(x, target, **options, backend=b) for b in ("cuda", "reference")
        )
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6, equal_nan=True)
    for norm in NORMS:
        found, wanted = (norm(x, backend=b) for b in ("cuda", "reference"))
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6, equal_nan=True)


def test_weights_of_a_third_dtype(device):
    torch.manual_seed(0)
    x = torch.randn(3, 40, device=device).bfloat16()
    w, r = torch.randn(40, device=device).half(), torch.randn(3, 40, device=device).half()
    results = []
    for backend in ("cuda", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, w, r)]
        y, z = fa.rms_norm(*leaves[:2], residual=leaves[2], return_residual=True, backend=backend)
        grads = torch.autograd.grad(y.float().sum() + z.float().square().sum(), leaves)
        results.append([y, z, *grads])
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, atol=2e-2, rtol=1e-2)


# ---- on the model of a GPU ---------------------------------------------------------------------

small = pick.named(
    "layer_norm-residual-C=33", "rms_norm-dropout-p=0.3", "softmax-causal-20x33",
    "cross_entropy-z_loss-0.01", "gelu-tanh_and_bias-C=33", "swiglu-plain-C=33",
    "rotary-interleaved,_learned-positions",
)  # fmt: skip


def same_bits_under_every_schedule(case):
    first = run(case, torch.bfloat16, "cuda")
    for schedule, seed in (("greedy", 1), ("shuffled", 2), ("shuffled", 3)):
        with cuda_host.options(schedule=schedule, seed=seed):
            again = run(case, torch.bfloat16, "cuda")
        assert all(torch.equal(first[n].nan_to_num(), again[n].nan_to_num()) for n in first)


@small
def test_same_bits_under_every_schedule(case):
    same_bits_under_every_schedule(case)


@pytest.mark.parametrize("norm", NORMS)
def test_same_bits_under_every_schedule_of_a_row_among_warps(norm):
    same_bits_under_every_schedule(norm_case(norm, 70, 1030))


def test_no_bank_conflicts():
    cuda_host.library().conflicts()
    with cuda_host.options(count_conflicts=True):
        for case in (norm_case(fa.layer_norm, 70, 1030), norm_case(fa.layer_norm, 2, 20001)):
            run(case, torch.bfloat16, "cuda")
        x = torch.randn(2, 3000, requires_grad=True)
        fa.cross_entropy(
            fa.softmax(x, backend="cuda"), torch.zeros(2).long(), backend="cuda"
        ).backward()
        tables = [torch.ones(4, 6, requires_grad=True) for _ in range(2)]
        positions = torch.tensor([3, 0, 3])
        fa.rotary(
            torch.ones(1, 2, 3, 12), *tables, positions=positions, backend="cuda"
        ).sum().backward()
    counted = cuda_host.library().conflicts()
    assert {line.kernel for line in counted} >= {
        "norm_fwd",
        "norm_bwd",
        "sum_chunks",
        "rotary_tables",
    }
    assert [line for line in counted if line.extra] == []
