"""cross_entropy in place, and linear_cross_entropy in chunks, against torch's own."""

import pytest
import torch
import torch.nn.functional as F

import fastattn as fa
from fastattn.kernels import chunked, native
from fastattn.verify.judge import ratio

torch.manual_seed(0)
R, E, V = 37, 16, 50
HIDDEN, WEIGHT, BIAS = torch.randn(R, E), torch.randn(V, E), torch.randn(V)
TARGET = torch.randint(0, V, (R,))
TARGET[3] = -100


def test_in_place_gradient_takes_the_logits_memory():
    logits = torch.randn(R, V, requires_grad=True)
    x = logits * 1.0
    loss = fa.cross_entropy(x, TARGET, label_smoothing=0.1, inplace_backward=True)
    gradient = []
    x.register_hook(gradient.append)
    loss.backward()
    assert gradient[0].data_ptr() == x.data_ptr()
    wanted = torch.autograd.grad(F.cross_entropy(logits, TARGET, label_smoothing=0.1), logits)[0]
    torch.testing.assert_close(logits.grad, wanted, atol=1e-7, rtol=1e-5)


def test_in_place_tells_whoever_else_saved_the_logits():
    x = torch.randn(R, V, requires_grad=True).clone()
    other = x.square().sum()  # saves x
    fa.cross_entropy(x, TARGET, inplace_backward=True).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_in_place_serves_one_backward():
    x = torch.randn(R, V, requires_grad=True) * 1.0
    loss = fa.cross_entropy(x, TARGET, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward has used up the logits"):
        loss.backward()


def test_in_place_where_rows_share_memory():
    """Expanded logits are no place for a gradient a row."""
    row = torch.randn(1, V, requires_grad=True)
    losses = [
        fa.cross_entropy(row.expand(R, V), TARGET, reduction="sum", inplace_backward=inplace)
        for inplace in (True, False)
    ]
    for a, b in zip(*(torch.autograd.grad(loss, row) for loss in losses), strict=True):
        torch.testing.assert_close(a, b)
    assert (
        fa.cross_entropy(row.expand(0, V), TARGET[:0], reduction="sum", inplace_backward=True) == 0
    )


def test_inputs_stay_unchanged_unless_asked():
    x = torch.randn(R, V, requires_grad=True)
    before = x.detach().clone()
    fa.cross_entropy(x, TARGET).backward()
    assert torch.equal(x, before)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [None, BIAS], ids=["", "bias"])
@pytest.mark.parametrize("chunk", [chunked.CHUNK, 20 * V])
def test_linear_cross_entropy(reduction, bias, chunk, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", chunk)  # 37 rows: one chunk, or 19 and 18
    inputs = [x.clone().requires_grad_() for x in (HIDDEN, WEIGHT, bias) if x is not None]
    weights = torch.rand(R) if reduction == "none" else torch.tensor(3.0)

    def ours(hidden, weight, *b):
        return fa.linear_cross_entropy(
            hidden,
            weight,
            TARGET,
            bias=b[0] if b else None,
            label_smoothing=0.1,
            reduction=reduction,
        )

    def theirs(hidden, weight, *b):
        return F.cross_entropy(
            F.linear(hidden, weight, *b), TARGET, label_smoothing=0.1, reduction=reduction
        )

    doubles = [x.detach().double().requires_grad_() for x in inputs]
    torch.testing.assert_close(ours(*inputs).double(), theirs(*doubles), atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad((ours(*inputs) * weights).sum(), inputs)
    wanted = torch.autograd.grad((theirs(*doubles) * weights).sum(), doubles)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_of_no_rows(reduction, backend):
    inputs = [x.clone().requires_grad_() for x in (HIDDEN[:0], WEIGHT, BIAS)]
    hidden, weight, bias = inputs
    loss = fa.linear_cross_entropy(
        hidden, weight, TARGET[:0], bias=bias, reduction=reduction, backend=backend
    )
    wanted = F.cross_entropy(F.linear(hidden, weight, bias), TARGET[:0], reduction=reduction)
    torch.testing.assert_close(loss, wanted, equal_nan=True)
    found, expected = (torch.autograd.grad(x.sum(), inputs) for x in (loss, wanted))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_cross_entropy_in_16_bits(dtype):
    hidden, weight = (x.to(dtype).requires_grad_() for x in (HIDDEN, WEIGHT))
    loss = fa.linear_cross_entropy(hidden, weight, TARGET)
    naive = F.cross_entropy(F.linear(hidden, weight), TARGET)
    truth = F.cross_entropy(F.linear(hidden.double(), weight.double()), TARGET)
    assert abs(loss - truth) <= 2 * abs(naive - truth) + 1e-2
    for a, b in zip(
        *(torch.autograd.grad(x, (hidden, weight)) for x in (loss, truth)), strict=True
    ):
        assert a.dtype == dtype and (a.double() - b.double()).abs().max() < 1e-2 * (
            1 + b.abs().max()
        )


def test_linear_cross_entropy_without_gradients_computes_none():
    loss = fa.linear_cross_entropy(HIDDEN, WEIGHT, TARGET)
    torch.testing.assert_close(loss, F.cross_entropy(HIDDEN @ WEIGHT.t(), TARGET))
    with pytest.raises(
        ValueError, match=r"hidden must be \(..., E\) and weight \(V, E\), got hidden \(37, 16\)"
    ):
        fa.linear_cross_entropy(HIDDEN, WEIGHT.t(), TARGET)


def test_linear_cross_entropy_compiles_and_has_second_derivatives():
    hidden, weight = (x.double().requires_grad_() for x in (HIDDEN, WEIGHT))
    call = lambda h, w: fa.linear_cross_entropy(h, w, TARGET)  # noqa: E731
    first = torch.autograd.grad(call(hidden, weight), (hidden, weight), create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in first), (hidden, weight))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    small = [x.float().detach().requires_grad_() for x in (hidden, weight)]
    torch.testing.assert_close(compiled(*small), call(*small))
    found = torch.autograd.grad(compiled(*small), small)
    for a, b in zip(found, first, strict=True):
        torch.testing.assert_close(a.double(), b.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_float16_sums_of_many_rows_are_scaled_before_they_are_rounded(bias):
    """The gradient of the sum of 70000 losses passes 65504; that of their mean, which is asked for, is 1."""
    torch.manual_seed(0)
    hidden = torch.full((70000, 8), 2.0, dtype=torch.float16)
    leaves = [(torch.randn(4, 8) * 0.01).half().requires_grad_()]
    leaves += [torch.zeros(4, dtype=torch.float16, requires_grad=True)] if bias else []
    target = torch.zeros(70000, dtype=torch.int64)
    loss = fa.linear_cross_entropy(hidden, leaves[0], target, bias=leaves[1] if bias else None)
    doubles = [x.double() for x in leaves]
    truth = F.cross_entropy(F.linear(hidden.double(), *doubles), target)
    found, wanted = (torch.autograd.grad(x, leaves) for x in (loss, truth))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float16
        torch.testing.assert_close(a.float(), b.float(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("operator", ["cross_entropy", "linear_cross_entropy"])
def test_no_target_is_a_mean_of_nan_and_a_gradient_of_zero(operator):
    x, weight = torch.randn(4, 9, requires_grad=True), torch.randn(11, 9, requires_grad=True)
    inputs = (x,) if operator == "cross_entropy" else (x, weight)
    loss = getattr(fa, operator)(*inputs, torch.full((4,), 3), ignore_index=3, backend="cpu")
    assert loss.isnan()
    for gradient in torch.autograd.grad(loss, inputs):
        assert (gradient == 0).all()


@pytest.mark.parametrize("isa", [i.name for i in native.isas() if i.runs_here])
def test_products_of_any_size_and_layout(isa):
    matmul, add = torch.ops.fastattn_cpu.matmul, torch.ops.fastattn_cpu.matmul_add_
    torch.manual_seed(0)
    with native.use_isa(isa):
        for M, K, N in (
            (1, 1, 1),
            (5, 0, 7),
            (0, 3, 2),
            (7, 300, 50),
            (33, 257, 100),
            (200, 513, 25),
        ):
            for turned in range(8):
                a, b = torch.randn(M, K).double(), torch.randn(K, N).double()
                bias = torch.randn(N).double()
                truth = a @ b + bias
                x = a.float() if turned & 1 else a.float().mT.contiguous().mT
                y = b.float() if turned & 2 else b.float().mT.contiguous().mT
                y = torch.stack([y, y], -1)[..., 0] if turned & 4 else y
                naive = x @ y + bias.float()
                assert ratio(matmul(x, y, bias.float()), truth, naive, torch.float32) <= 1
                out = torch.ones(M, N + 3)[:, :N]
                add(out, x, y)
                assert ratio(out - 1 + bias.float(), truth, naive, torch.float32) <= 1
