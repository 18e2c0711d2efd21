"""One operator boundary: schemas registered for each backend, and every way of differentiating it.

A kernel is registered as `<name>_fwd` and `<name>_bwd` under its backend's namespace. Arguments of
the backward are found by name: inputs and outputs of the forward as they are called there, `d<name>`
for the gradient of an output, and `needs`, a bit for every differentiable input that wants one.
Results that are absent, or that nobody needs, are tensors of no elements.

    torch.compile, torch.export          the registered form (torch.library.register_autograd)
    plain autograd                       an autograd.Function, 60 us the faster
    torch.func, vmap, forward-mode AD    an autograd.Function with jvp and vmap

torch.compile refuses a Function with a jvp, and a registered operator cannot have one: so all
exist, over the same kernels. A first derivative is the backward kernel's. What no kernel computes,
second derivatives and forward mode, comes from the operator's definition in plain PyTorch, at the
definition's cost in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Arguments = tuple[Any, ...]


class Operator:
    """The schemas and derivatives of one operator; `bind` gives it to a backend.

    differentiable: the forward's inputs that may have a gradient, in the backward's result order.
    outputs: how many leading results carry a gradient. The others are statistics.
    define: the definition, called as the forward is. define_backward: likewise for the backward;
    without it the definition's own derivative serves, and the backward must take every input.
    fake: shapes, called as the forward is.
    """

    names: ClassVar[set[str]] = set()  # of all operators: what a kernel's sentence begins with

    def __init__(
        self,
        name: str,
        forward: str,
        backward: str,
        *,
        differentiable: Sequence[str],
        outputs: int = 1,
        define: Callable[..., Any],
        define_backward: Callable[..., Any] | None = None,
        fake: Callable[..., Any],
    ) -> None:
        self.names.add(name)
        self.name, self.forward_text, self.backward_text = name, forward, backward
        parsed, parsed_backward = (torch._C.parse_schema(f"x::y{t}") for t in (forward, backward))
        self.inputs = [a.name for a in parsed.arguments]
        self.results = [r.name for r in parsed.returns]
        self.backward_inputs = [a.name for a in parsed_backward.arguments]
        self.differentiable = [self.inputs.index(n) for n in differentiable]
        self.outputs = outputs
        self.define = define
        self.define_backward = define_backward or self.derivative
        self.fake = fake

    def bind(self, backend: str) -> Primitive:
        """Defines the two schemas under fastattn_<backend>, with their shapes and derivatives."""
        namespace = f"fastattn_{backend}"
        torch.library.define(f"{namespace}::{self.name}_fwd", self.forward_text)
        torch.library.define(f"{namespace}::{self.name}_bwd", self.backward_text)
        ops = getattr(torch.ops, namespace)
        torch.library.register_fake(f"{namespace}::{self.name}_fwd", self.fake)
        torch.library.register_fake(f"{namespace}::{self.name}_bwd", self.fake_backward)
        backward = Primitive(
            getattr(ops, f"{self.name}_bwd").default, define=self.define_backward, outputs=None
        )
        forward = Primitive(
            getattr(ops, f"{self.name}_fwd").default,
            define=self.define,
            outputs=self.outputs,
            keep=[name in self.backward_inputs for name in (*self.inputs, *self.results)],
            vjp=lambda grads, inputs, outputs, needed: self.pull_back(
                backward, grads, inputs, outputs, needed
            ),
        )
        return forward

    def pull_back(
        self,
        backward: Primitive,
        grads: Sequence[Tensor | None],
        inputs: Arguments,
        outputs: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """The forward's inputs' gradients, by the backward kernel."""
        known = dict(zip(self.inputs, inputs, strict=True))
        known |= zip(self.results, outputs, strict=True)
        known |= {f"d{name}": g for name, g in zip(self.results, grads, strict=True)}
        known["needs"] = sum(needed[at] << bit for bit, at in enumerate(self.differentiable))
        computed = as_tuple(backward(*[known[name] for name in self.backward_inputs]))
        result: list[Tensor | None] = [None] * len(inputs)
        for at, gradient in zip(self.differentiable, computed, strict=True):
            result[at] = gradient if needed[at] else None
        return result

    def derivative(self, *backward_inputs: Any) -> tuple[Tensor, ...]:
        """The backward in plain PyTorch, as the definition's vector-Jacobian product."""
        known = dict(zip(self.backward_inputs, backward_inputs, strict=True))
        inputs = [known[name] for name in self.inputs]
        wanted = [
            at for bit, at in enumerate(self.differentiable)
            if inputs[at] is not None and known.get("needs", -1) >> bit & 1
        ]  # fmt: skip

        def run(*values: Tensor) -> tuple[Tensor, ...]:
            return as_tuple(self.define(*replaced(inputs, wanted, values)))[: self.outputs]

        outputs, pull = reverse(run, *[inputs[at] for at in wanted])
        grads = [known[f"d{name}"] for name in self.results[: self.outputs]]
        cotangents = tuple(
            torch.zeros_like(o) if g is None or g.numel() != o.numel() else g.to(o.dtype)
            for g, o in zip(grads, outputs, strict=True)
        )
        found = dict(zip(wanted, pull(cotangents), strict=True))
        return tuple(found.get(at, outputs[0].new_empty(0)) for at in self.differentiable)

    def fake_backward(self, *backward_inputs: Any) -> Any:
        known = dict(zip(self.backward_inputs, backward_inputs, strict=True))
        anchor = next(x for x in backward_inputs if isinstance(x, Tensor))
        needs = known.get("needs", -1)
        results = []
        for bit, at in enumerate(self.differentiable):
            # a backward that does not take the input itself takes a result in its shape
            names = (self.inputs[at], self.results[0], f"d{self.results[0]}")
            x = next((known[name] for name in names if name in known), None)
            results.append(
                torch.empty_like(x) if x is not None and needs >> bit & 1 else anchor.new_empty(0)
            )
        return tuple(results) if len(results) > 1 else results[0]


class Primitive:
    """A registered operator that every transformation of PyTorch can differentiate.

    vjp(grads, inputs, outputs, needed) -> a gradient or None for every input; without it, the
    definition's. outputs: how many leading results carry a gradient; None is all of them. keep: which
    inputs, then results, the vjp reads; the others are not kept alive for it.
    """

    def __init__(
        self,
        op: Any,
        *,
        define: Callable[..., Any],
        outputs: int | None,
        vjp: Callable[..., Any] | None = None,
        keep: Sequence[bool] | None = None,
    ) -> None:
        self.op, self.define, self.outputs, self.keep = op, define, outputs, keep
        self.vjp = vjp or self.define_vjp
        torch.library.register_autograd(op, self._backward, setup_context=self._save)

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.op(*inputs)
        try:
            if transforming():
                return Transformable.apply(self, *inputs)
            if torch.is_grad_enabled() and any(
                isinstance(x, Tensor) and x.requires_grad for x in inputs
            ):
                return Eager.apply(self, *inputs)
            return self.run(inputs)
        except RuntimeError as error:
            raise translated(error) from None

    def run(self, inputs: Arguments) -> Any:
        """The kernel, past the registered derivative."""
        with torch._C._AutoDispatchBelowAutograd():
            return self.op(*inputs)

    def _save(self, ctx: Any, inputs: Arguments, output: Any) -> None:
        outputs = as_tuple(output)
        keep = self.keep or [True] * (len(inputs) + len(outputs))
        kept = [x if k else None for x, k in zip((*inputs, *outputs), keep, strict=True)]
        save(ctx, kept[: len(inputs)], kept[len(inputs) :])
        if self.outputs is not None:
            ctx.mark_non_differentiable(*outputs[self.outputs :])

    def _backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, outputs = saved(ctx)
        return tuple(self.vjp(grads, inputs, outputs, ctx.needs_input_grad))

    def define_vjp(
        self,
        grads: Sequence[Tensor | None],
        inputs: Arguments,
        outputs: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients through the definition, at floating-point inputs that need one."""
        at = [i for i, x in enumerate(inputs) if needed[i] and is_floating(x)]
        results, pull = reverse(self.at(inputs, at), *[inputs[i] for i in at])
        cotangents = tuple(
            torch.zeros_like(r) if g is None else g for g, r in zip(grads, results, strict=False)
        )
        found = dict(zip(at, pull(cotangents), strict=True))
        return [found.get(i) for i in range(len(inputs))]

    def jvp(self, inputs: Arguments, tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Tangents of the differentiable outputs, as the transpose of the definition's transpose.

        Two reverse passes, because a forward pass inside a forward pass is refused by PyTorch.
        """
        at = [i for i, t in enumerate(tangents) if t is not None and is_floating(inputs[i])]
        primals = [inputs[i] for i in at]
        outputs, pull = reverse(self.at(inputs, at), *primals)
        _, push = reverse(lambda *c: pull(c), *[torch.zeros_like(o) for o in outputs])
        return push(tuple(tangents[i] for i in at))

    def at(self, inputs: Arguments, positions: Sequence[int]) -> Callable[..., tuple[Tensor, ...]]:
        """The definition's differentiable outputs as a function of some inputs."""
        return lambda *values: as_tuple(self.define(*replaced(inputs, positions, values)))[
            : self.outputs
        ]


class Eager(torch.autograd.Function):
    """A Primitive under plain autograd."""

    @staticmethod
    def forward(ctx: Any, primitive: Primitive, *inputs: Any) -> Any:
        output = primitive.run(inputs)
        ctx.primitive = primitive
        ctx.set_materialize_grads(False)  # zeros for results that nobody used
        primitive._save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        inputs, outputs = saved(ctx)
        return None, *ctx.primitive.vjp(grads, inputs, outputs, ctx.needs_input_grad[1:])


class Transformable(torch.autograd.Function):
    """A Primitive under torch.func, vmap and forward-mode AD."""

    @staticmethod
    def forward(primitive: Primitive, *inputs: Any) -> Any:
        return primitive.op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Arguments, output: Any) -> None:
        ctx.primitive = inputs[0]
        outputs = as_tuple(output)
        save(ctx, inputs[1:], outputs)
        ctx.save_for_forward(*[x for x in inputs[1:] if isinstance(x, Tensor)], *outputs)
        if ctx.primitive.outputs is not None:
            ctx.mark_non_differentiable(*outputs[ctx.primitive.outputs :])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        inputs, outputs = saved(ctx)
        return None, *ctx.primitive.vjp(grads, inputs, outputs, ctx.needs_input_grad[1:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        inputs, outputs = saved(ctx)
        found = ctx.primitive.jvp(inputs, tangents[1:])
        result = (*found, *[None] * (len(outputs) - len(found)))
        return result if len(result) > 1 else result[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], primitive: Primitive, *inputs: Any) -> Any:
        """One call an entry: a kernel is parallel inside, and every argument keeps its meaning."""

        def entry(x: Any, d: int | None, i: int) -> Any:
            if d is None:
                return x
            if info.batch_size == 0:  # zeros, for the shapes of the results
                return x.sum(d, dtype=x.dtype)
            x = x.select(d, i)
            return x.contiguous() if x.dim() == 1 else x  # lengths, which kernels read as they lie

        slices = [
            Transformable.apply(
                primitive, *[entry(x, d, i) for x, d in zip(inputs, in_dims[1:], strict=True)]
            )
            for i in range(max(info.batch_size, 1))
        ]
        if isinstance(slices[0], Tensor):
            return torch.stack(slices)[: info.batch_size], 0
        stacked = tuple(
            torch.stack(parts)[: info.batch_size] for parts in zip(*slices, strict=True)
        )
        return stacked, (0,) * len(stacked)


def transforming() -> bool:
    """Under torch.func or forward-mode AD, where a registered operator would drop tangents without a word.
    Both tests cost 0.1 us."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def translated(error: RuntimeError) -> Exception:
    """A kernel checks data and can only raise RuntimeError: its sentence becomes a ValueError."""
    for line in str(error).splitlines():
        if line.partition(": ")[0] in Operator.names:
            return ValueError(line)
    return error


def save(ctx: Any, inputs: Sequence[Any], outputs: Sequence[Tensor | None]) -> None:
    """Tensors where autograd can see them, the rest beside."""
    values = (*inputs, *outputs)
    ctx.others = tuple(None if isinstance(x, Tensor) else (x,) for x in values)
    ctx.inputs = len(inputs)
    ctx.save_for_backward(*[x for x in values if isinstance(x, Tensor)])


def saved(ctx: Any) -> tuple[Arguments, Arguments]:
    tensors = iter(ctx.saved_tensors)
    values = tuple(next(tensors) if other is None else other[0] for other in ctx.others)
    return values[: ctx.inputs], values[ctx.inputs :]


def reverse(
    function: Callable[..., Any], *primals: Tensor
) -> tuple[tuple[Tensor, ...], Callable[..., Any]]:
    """torch.func.vjp, whose outputs and pull-back nest under any other transformation."""
    outputs, pull = torch.func.vjp(function, *primals)[:2]
    return outputs, pull


def as_tuple(output: Any) -> tuple[Any, ...]:
    return (output,) if isinstance(output, Tensor) else tuple(output)


def replaced(values: Sequence[Any], positions: Sequence[int], new: Sequence[Any]) -> list[Any]:
    result = list(values)
    for at, value in zip(positions, new, strict=True):
        result[at] = value
    return result


def is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
