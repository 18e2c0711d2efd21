"""BERT and GPT-2 on real text, of fused modules and of naive PyTorch with the same weights.

Logits, loss and every parameter's gradient by the error rule against the naive model in fp64; the loss
curves of some training steps; time, and peak memory in a process of its own.
"""

from __future__ import annotations

import importlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from ..models import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
from .judge import ratio
from .naive import State, bert_masked_lm, gpt2_lm

MASK_TOKEN = 256  # after the 256 bytes
BATCH, LENGTH = 4, 256
HIDDEN, LAYERS, HEADS = 256, 4, 4
STEPS = 30
CURVE_BOUND = 0.01  # two fp32 runs of 30 steps drift apart by rounding alone, about 1e-4
NAMES = ("BERT masked LM", "GPT-2 LM")
Progress = Callable[[str, float], None]


@dataclass
class ModelReport:
    """What the fused model and its naive twin did. Errors are over the allowance: at most 1 is right.
    Times are medians of interleaved rounds in seconds; memory is what one step takes, in bytes."""

    name: str
    parameters: int
    logits_error: float
    loss_error: float
    gradient_error: float
    worst_gradient: str
    losses: dict[str, list[float]] = field(default_factory=dict)
    forward_seconds: dict[str, float] = field(default_factory=dict)
    step_seconds: dict[str, float] = field(default_factory=dict)
    step_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def curve_difference(self) -> float:
        """The largest relative difference of the two losses at any step."""
        pairs = zip(self.losses["fused"], self.losses["naive"], strict=True)
        return max(abs(a - b) / b for a, b in pairs)

    @property
    def checks(self) -> dict[str, bool]:
        curve = self.losses["fused"]
        return {
            "logits": self.logits_error <= 1,
            "loss": self.loss_error <= 1,
            "gradients": self.gradient_error <= 1,
            "curves lie on each other": self.curve_difference <= CURVE_BOUND,
            "loss fell": curve[-1] < 0.9 * curve[0],
        }


class Twin:
    """A fused model, and the same weights for the naive function."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name = name
        if name == NAMES[0]:
            config = BertConfig(
                vocab_size=MASK_TOKEN + 1, hidden_size=HIDDEN, num_hidden_layers=LAYERS,
                num_attention_heads=HEADS, intermediate_size=4 * HIDDEN, max_position_embeddings=LENGTH,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=None,
            )  # fmt: skip
            self.model: BertForMaskedLM | GPT2LMHeadModel = BertForMaskedLM(config)
            self.function, self.eps = bert_masked_lm, config.layer_norm_eps
        else:
            gpt = GPT2Config(
                vocab_size=MASK_TOKEN + 1, n_positions=LENGTH, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )  # fmt: skip
            self.model = GPT2LMHeadModel(gpt)
            self.function, self.eps = gpt2_lm, gpt.layer_norm_epsilon

    def state(self, dtype: torch.dtype) -> State:
        """A copy of the weights, each to be differentiated; tied ones once."""
        named = self.model.named_parameters()
        return {n: p.detach().clone().to(dtype).requires_grad_() for n, p in named}

    def fused(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(ids, labels=labels)
        assert out.loss is not None
        return out.loss, out.logits

    def naive(self, state: State, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        renamed = {
            n.replace("predictions.decoder.bias", "predictions.bias"): p for n, p in state.items()
        }
        return self.function(renamed, HEADS, self.eps, ids, labels)


def read_text(file: str | None) -> bytes:
    """A file's bytes, or the documentation that comes with every Python."""
    if file is not None:
        text = Path(file).read_bytes()
        if len(text) <= LENGTH:
            raise ValueError(f"the text must have more than {LENGTH} bytes, got {len(text)}")
        return text
    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def batch(text: bytes, name: str, step: int) -> tuple[Tensor, Tensor]:
    """(ids, labels) of (BATCH, LENGTH) bytes; for BERT 15 % are to be predicted, of which 80 % are
    hidden, 10 % are other bytes and 10 % stay (Devlin et al. 2018)."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, len(text) - LENGTH, (BATCH,), generator=generator).tolist()
    ids = torch.tensor([list(text[s : s + LENGTH]) for s in starts])
    if name != NAMES[0]:
        return ids, ids
    chosen = torch.rand(ids.shape, generator=generator) < 0.15
    kind = torch.rand(ids.shape, generator=generator)
    other = torch.randint(0, 256, ids.shape, generator=generator)
    hidden = torch.where(kind < 0.8, MASK_TOKEN, torch.where(kind < 0.9, other, ids))
    return torch.where(chosen, hidden, ids), torch.where(chosen, ids, -100)


def check_models(text: str | None, progress: Progress, steps: int = STEPS) -> list[ModelReport]:
    """A report a model; text: a file, or None for Python's documentation. progress(what, share done)."""
    data = read_text(text)
    reports = []
    for at, name in enumerate(NAMES):
        tell = lambda what, share, at=at, name=name: progress(  # noqa: E731
            f"{name}: {what}", (at + share) / len(NAMES)
        )
        tell("logits and gradients", 0.0)
        report = compare(name, data)
        train(report, data, steps, tell)
        tell("time", 0.8)
        measure_time(report, data)
        tell("memory", 0.9)
        for form in ("fused", "naive"):
            report.step_bytes[form] = measure_memory(name, form, text)
        reports.append(report)
    return reports


def compare(name: str, data: bytes) -> ModelReport:
    twin = Twin(name)
    ids, labels = batch(data, name, 0)
    results = []
    for dtype in (None, torch.float32, torch.float64):
        if dtype is None:
            parameters = dict(twin.model.named_parameters())
            loss, logits = twin.fused(ids, labels)
        else:
            parameters = twin.state(dtype)  # type: ignore[assignment]
            loss, logits = twin.naive(parameters, ids, labels)  # type: ignore[arg-type]
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        none = torch.tensor(torch.nan)  # fails the rule
        found = {n: none if g is None else g for n, g in zip(parameters, grads, strict=True)}
        results.append((loss.detach(), logits.detach(), found))
    fused, naive, truth = results
    over = lambda a, b, c: ratio(a, c, b, torch.float32)  # noqa: E731
    gradients = {n: over(fused[2][n], naive[2][n], truth[2][n]) for n in truth[2]}
    worst = max(gradients, key=lambda n: gradients[n])
    return ModelReport(
        name, sum(p.numel() for p in twin.model.parameters()),
        logits_error=over(fused[1], naive[1], truth[1]), loss_error=over(fused[0], naive[0], truth[0]),
        gradient_error=gradients[worst], worst_gradient=worst,
    )  # fmt: skip


def train(report: ModelReport, data: bytes, steps: int, tell: Progress) -> None:
    """The two loss curves: AdamW on the same batches."""
    twin = Twin(report.name)
    state = twin.state(torch.float32)
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "fused": lambda i, t: twin.fused(i, t)[0],
        "naive": lambda i, t: twin.naive(state, i, t)[0],
    }
    weights: dict[str, list[Tensor]] = {
        "fused": list(twin.model.parameters()),
        "naive": list(state.values()),
    }
    optimizers = {form: torch.optim.AdamW(weights[form], lr=1e-3) for form in losses}
    for step in range(steps):
        tell("training", 0.1 + 0.7 * step / steps)
        ids, labels = batch(data, report.name, step)
        for form, function in losses.items():
            loss = function(ids, labels)
            optimizers[form].zero_grad()
            loss.backward()
            optimizers[form].step()
            report.losses.setdefault(form, []).append(loss.item())


def measure_time(report: ModelReport, data: bytes, rounds: int = 5) -> None:
    twin = Twin(report.name)
    state = twin.state(torch.float32)
    ids, labels = batch(data, report.name, 0)
    calls = {
        "fused": lambda: twin.fused(ids, labels),
        "naive": lambda: twin.naive(state, ids, labels),
    }
    seconds: dict[tuple[str, bool], list[float]] = {}
    for _ in range(rounds):  # interleaved: what disturbs one disturbs the other
        for form, call in calls.items():
            for backward in (False, True):
                start = time.perf_counter()
                with torch.set_grad_enabled(backward):
                    loss, _ = call()
                if backward:
                    loss.backward()
                seconds.setdefault((form, backward), []).append(time.perf_counter() - start)
    for form in calls:
        report.forward_seconds[form] = median(seconds[form, False])
        report.step_seconds[form] = median(seconds[form, True])


# ---- memory: one step in a fresh process --------------------------------------------------------


def measure_memory(name: str, form: str, text: str | None) -> int:
    code = f"from {__name__} import step_bytes; print(step_bytes({name!r}, {form!r}, {text!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def step_bytes(name: str, form: str, text: str | None) -> int:
    """How far the resident set grows over a forward and backward, weights and inputs excluded."""
    twin = Twin(name)
    state = twin.state(torch.float32)
    ids, labels = batch(read_text(text), name, 0)

    def step(rows: int, length: int) -> None:
        i, t = ids[:rows, :length], labels[:rows, :length]
        loss, _ = twin.fused(i, t) if form == "fused" else twin.naive(state, i, t)
        loss.backward()

    step(1, 32)  # code, thread pools and the gradients are there afterwards
    before = resident_bytes(reset=True)
    step(BATCH, LENGTH)
    return resident_bytes(peak=True) - before


def resident_bytes(peak: bool = False, reset: bool = False) -> int:
    """Memory of this process, now or at its peak. Linux can reset the peak; elsewhere all is the peak of
    the process so far, which is only right where the step is the largest thing that it does."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    key = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
