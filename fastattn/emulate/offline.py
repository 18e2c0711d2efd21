"""Every GPU kernel compiled for real, with no GPU and no driver: what the launchers would launch.

Launchers run on fake tensors under a driver that only names a target, and each launch becomes a compile
of the same specialisation. Triton keeps one target a process, so every target has a worker:

    python -m fastattn.emulate.offline sm_90 < jobs

reads a job a line and answers with a line of what it compiled. Nothing here is run, so nothing is timed.
budgets.json holds what the main loops may have: `broken` names what does not keep to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import machine_code

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
DTYPES = ("bfloat16", "float16", "float32")
HEADS = (64, 96, 128, 256)
PROCESSES = 2


class Job(NamedTuple):
    """A call of a launcher. width: the head dimension, or the columns of a row operator."""

    operator: str
    dtype: str
    width: int
    form: str


class Compiled(NamedTuple):
    """One kernel. loop: instructions of its main loop, by class, and "total"; mma, copies: by name."""

    target: str
    job: Job
    kernel: str
    config: str = ""
    registers: int = 0
    stack: int = 0
    shared: int = 0
    tensor_memory: int = 0
    loop: dict[str, int] = {}  # noqa: RUF012
    mma: dict[str, int] = {}  # noqa: RUF012
    copies: dict[str, int] = {}  # noqa: RUF012
    cycles: float = 0.0  # estimated, of 64 x 64 scores
    seconds: float = 0.0
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.target} {self.kernel} {self.job.dtype} {self.job.width} {self.job.form}"


# ---- the calls ----------------------------------------------------------------------------------

ATTENTION_FORMS = ("full", "causal", "window", "featured", "packed", "decode", "paged")
ROW_WIDTHS = {
    "norm": (768, 4096, 16384, 32768),
    "softmax": (768, 4096, 16384, 32768),
    "cross_entropy": (32000, 50257),
    "gelu": (3072,),
    "glu": (11008,),
    "rotary": (64, 128),
}


def jobs(
    operators: Sequence[str] = (), dtypes: Sequence[str] = DTYPES, quick: bool = False
) -> list[Job]:
    """What launchers can choose; quick: bf16 attention with heads of 64 and 128, features with 64."""
    found = []
    for dtype in ("bfloat16",) if quick else dtypes:
        for way in ("fwd", "bwd"):
            for D in (64, 128) if quick else HEADS:
                forms = attention_forms(way, dtype, D, quick)
                found += [Job(f"attention_{way}", dtype, D, form) for form in forms]
            for name, widths in {} if quick else ROW_WIDTHS.items():
                found += [Job(f"{name}_{way}", dtype, width, "") for width in widths]
        if not quick:
            found += [Job("cache_append_", dtype, 128, form) for form in ("dense", "paged")]
            found += [Job("rotary_tables_bwd", dtype, width, "") for width in ROW_WIDTHS["rotary"]]
    return [job for job in found if not operators or job.operator in operators]


def attention_forms(way: str, dtype: str, D: int, quick: bool) -> tuple[str, ...]:
    """Every form in bf16. fp16 differs in conversions alone, 96 in masked columns; decoding and pages
    are forward only."""
    if quick:
        return ("full", "causal", "featured") if D == 64 else ("full", "causal")
    if D == 96:
        return ("causal",)
    if dtype == "float16":
        return ("full", "causal")
    if dtype == "float32":
        forms = ("causal", "featured", "packed")
        return (*forms, "decode") if way == "fwd" else forms
    return ATTENTION_FORMS if way == "fwd" else ATTENTION_FORMS[:5]


def empty(job: Job, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype or getattr(torch, job.dtype))


def attention_arguments(job: Job) -> tuple[list[Any], list[Any]]:
    """The schema's tensors and scalars: 2 sequences of 1024, 8 heads over 4."""
    B, Hq, Hkv, S, D, f32, i32 = 2, 8, 4, 1024, job.width, torch.float32, torch.int32
    Sq = 1 if job.form in ("decode", "paged") else S
    query, key, value = empty(job, B, Hq, Sq, D), empty(job, B, Hkv, S, D), empty(job, B, Hkv, S, D)
    optional: list[Any] = [None] * 9
    scalars: list[Any] = [D**-0.5, job.form != "full", None, None, 0.0, 0.0, False, 0, 0]
    if job.form == "featured":
        philox = empty(job, 2, dtype=torch.int64)
        mask = empty(job, B, 1, S, S, dtype=torch.bool)
        slopes, sinks, lengths = (
            empty(job, Hq, dtype=f32),
            empty(job, Hq, dtype=f32),
            empty(job, B, dtype=i32),
        )
        optional = [empty(job, 1, Hq, S, S), mask, slopes, sinks, None, None, lengths, None, philox]
        scalars[2], scalars[4:6] = 256, (30.0, 0.1)
    if job.form == "window":
        scalars[2] = 256
    if job.form == "packed":
        query, key, value = (
            x.transpose(1, 2).reshape(B * S, x.shape[1], D) for x in (query, key, value)
        )
        optional[4:6] = (empty(job, B + 1, dtype=i32) for _ in range(2))
        scalars[7:] = S, S
    if job.form == "paged":
        key, value = (empty(job, 64, 64, Hkv, D) for _ in range(2))
        optional[6:8] = empty(job, B, dtype=i32), empty(job, B, S // 64, dtype=i32)
        scalars[6] = True
    return [query, key, value, *optional], scalars


def attention_fwd(job: Job, launch: Callable[..., Any]) -> None:
    tensors, scalars = attention_arguments(job)
    launch(*tensors, *scalars)


def attention_bwd(job: Job, launch: Callable[..., Any]) -> None:
    tensors, scalars = attention_arguments(job)
    query = tensors[0]
    shape = query.shape[:-1] if job.form != "packed" else query.shape[1::-1]
    lse, low = (empty(job, *shape, dtype=torch.float32) for _ in range(2))
    needs = 0b011111 if job.form == "featured" else 0b000111  # no kernel has that of the sinks
    launch(
        torch.empty_like(query), None, *tensors, torch.empty_like(query), lse, low, *scalars, needs
    )


def norm_fwd(job: Job, launch: Callable[..., Any]) -> None:
    """layer_norm with everything, rms_norm with nothing but its weight."""
    x, weight, philox = (
        empty(job, 4096, job.width),
        empty(job, job.width),
        empty(job, 2, dtype=torch.int64),
    )
    launch(x, x, weight, weight, philox, False, 1e-5, 0.0, 0.1, True)
    launch(x, None, weight, None, None, True, 1e-5, 0.0, 0.0, False)


def norm_bwd(job: Job, launch: Callable[..., Any]) -> None:
    x, weight, philox = (
        empty(job, 4096, job.width),
        empty(job, job.width),
        empty(job, 2, dtype=torch.int64),
    )
    stat, none = empty(job, 4096, dtype=torch.float32), empty(job, 0, dtype=torch.float32)
    launch(x, x, x, x, weight, weight, philox, stat, stat, False, 1e-5, 0.0, 0.1, True, 15)
    launch(x, None, x, None, weight, None, None, none, stat, True, 1e-5, 0.0, 0.0, False, 15)


def softmax_fwd(job: Job, launch: Callable[..., Any]) -> None:
    x = empty(job, 2, 8, 512, job.width)
    launch(x, empty(job, 2, 8, 512, job.width, dtype=torch.bool), True, 1.0)
    launch(x, None, False, 1.0)


def softmax_bwd(job: Job, launch: Callable[..., Any]) -> None:
    x = empty(job, 2, 8, 512, job.width)
    launch(x, x, True, 1.0)


def cross_entropy_fwd(job: Job, launch: Callable[..., Any]) -> None:
    launch(empty(job, 2048, job.width), empty(job, 2048, dtype=torch.int64), -100, 0.1, 1e-4)


def cross_entropy_bwd(job: Job, launch: Callable[..., Any]) -> None:
    row = empty(job, 2048, dtype=torch.float32)
    logits, target = empty(job, 2048, job.width), empty(job, 2048, dtype=torch.int64)
    launch(row, logits, target, row, -100, 0.1, 1e-4)


def gelu_fwd(job: Job, launch: Callable[..., Any]) -> None:
    for tanh in (False, True):
        launch(empty(job, 2048, job.width), empty(job, job.width), tanh)


def gelu_bwd(job: Job, launch: Callable[..., Any]) -> None:
    x = empty(job, 2048, job.width)
    for tanh in (False, True):
        launch(x, x, empty(job, job.width), tanh, 3)


def glu_fwd(job: Job, launch: Callable[..., Any]) -> None:
    x = empty(job, 2048, job.width)
    for gelu in (False, True):
        launch(x, x, gelu, True)


def glu_bwd(job: Job, launch: Callable[..., Any]) -> None:
    x = empty(job, 2048, job.width)
    for gelu in (False, True):
        launch(x, x, x, gelu, True)


def rotary_fwd(job: Job, launch: Callable[..., Any]) -> None:
    table = empty(job, 2048, job.width // 2, dtype=torch.float32)
    for interleaved in (False, True):
        launch(empty(job, 2, 8, 1024, job.width), table, table, None, interleaved, False)


def rotary_bwd(job: Job, launch: Callable[..., Any]) -> None:
    positions, table = empty(job, 2, 1024, dtype=torch.int64), empty(job, 2048, job.width // 2)
    launch(empty(job, 2, 8, 1024, job.width), table, table, positions, False, False)


def rotary_tables_bwd(job: Job, launch: Callable[..., Any]) -> None:
    positions, table = empty(job, 2, 1024, dtype=torch.int64), empty(job, 2048, job.width // 2)
    x = empty(job, 2, 8, 1024, job.width)
    launch(x, x, table, table, None, False, False, 6)
    launch(x, x, table, table, positions, True, False, 6)


def cache_append_(job: Job, launch: Callable[..., Any]) -> None:
    paged, new = job.form == "paged", empty(job, 2, 4, 8, job.width)
    store = empty(job, 64, 64, 4, job.width) if paged else empty(job, 2, 4, 1024, job.width)
    lengths, counts = (empty(job, 2, dtype=torch.int32) for _ in range(2))
    pages = empty(job, 2, 16, dtype=torch.int32) if paged else None
    angles = empty(job, 1024, job.width // 2, dtype=torch.float32)
    launch(store, store, new, new, lengths, counts, pages, angles, angles, False)


CALLS: dict[str, Callable[[Job, Callable[..., Any]], None]] = {
    call.__name__: call
    for call in (
        attention_fwd, attention_bwd, norm_fwd, norm_bwd, softmax_fwd, softmax_bwd, cross_entropy_fwd,
        cross_entropy_bwd, gelu_fwd, gelu_bwd, glu_fwd, glu_bwd, rotary_fwd, rotary_bwd,
        rotary_tables_bwd, cache_append_,
    )
}  # fmt: skip


# ---- in the worker ------------------------------------------------------------------------------


class NamesTarget:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def is_active() -> bool:
        return True


def gpu_target(name: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


class Launch(NamedTuple):
    kernel: str
    compiled: Any = None
    warps: int = 4
    seconds: float = 0.0
    error: str = ""


@contextlib.contextmanager
def launches_compile(found: list[Launch]) -> Iterator[None]:
    """Inside, kernel[grid](...) compiles, and adds what came of it."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.runtime.jit import KernelInterface

    def compiles(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            start, result, wrong = time.perf_counter(), None, ""
            try:
                result = kernel.warmup(*arguments, grid=grid, **options)
            except Exception as error:  # a compiler's errors are of every type
                wrong = explained(error)
            seconds = time.perf_counter() - start
            name, warps = kernel.fn.__name__, options.get("num_warps", 4)
            found.append(Launch(name, result, warps, seconds, wrong))

        return launch

    before = KernelInterface.__getitem__
    KernelInterface.__getitem__ = compiles
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        KernelInterface.__getitem__ = before


def explained(error: BaseException) -> str:
    """Where and what: a CompilationError shows the line of a kernel, and its cause that of what it calls."""
    text = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
    return text if error.__cause__ is None else f"{text}\n{explained(error.__cause__)}"


# how many products of BLOCK_M x BLOCK_N x D a turn of the main loop has
PRODUCTS = {
    "attention_fwd_kernel": 2,
    "attention_bwd_delta_kernel": 2,
    "attention_bwd_keys_kernel": 4,
    "attention_bwd_queries_kernel": 3,
    "attention_bwd_bias_kernel": 2,
}


def compile_job(target: str, job: Job) -> list[Compiled]:
    from ..kernels import triton as kernels

    found: list[Launch] = []
    with launches_compile(found):
        try:
            CALLS[job.operator](job, kernels.launcher(job.operator))
        except Exception as error:  # a launcher's own, which must not end the other jobs
            found.append(Launch(job.operator, error=explained(error)))
    return [
        Compiled(target, job, x.kernel, error=x.error) if x.error else measured(target, job, x)
        for x in found
    ]


def measured(target: str, job: Job, launch: Launch) -> Compiled:
    compiled, kernel, warps = launch.compiled, launch.kernel, launch.warps
    code = machine_code.read(compiled)
    constants = {
        compiled.src.fn.arg_names[at[0]]: value
        for at, value in compiled.src.constants.items() if len(at) == 1
    }  # fmt: skip
    blocks = [
        constants[n] for n in ("BLOCK_M", "BLOCK_N", "BLOCK_R", "BLOCK_C") if constants.get(n)
    ]
    tile = constants.get("BLOCK_M", 0) * constants.get("BLOCK_N", 0)
    products = PRODUCTS.get(kernel, 0) * tile * (1 << (job.width - 1).bit_length())
    estimate = 0.0
    if products:
        by_tensor_cores = products * weight(target, kernel, job.dtype, constants)
        turn = machine_code.cycles(code, target, warps, by_tensor_cores)
        estimate = turn * 64 * 64 / tile
    return Compiled(
        target, job, kernel, f"{'x'.join(map(str, blocks))} w{warps} s{compiled.metadata.num_stages}",
        code.registers, code.stack, code.shared, code.tensor_memory,
        {kind: code.count(kind) for kind in machine_code.CLASSES} | {"total": code.total},
        code.named("mma"), code.named("async"), round(estimate, 1), round(launch.seconds, 2),
    )  # fmt: skip


def weight(target: str, kernel: str, dtype: str, constants: dict[str, Any]) -> int:
    """How many times longer than in the tables of chips tensor cores take; 0 where they do nothing."""
    if dtype == "float32":  # IEEE products: NVIDIA's FP32 units, AMD's matrix cores
        return 8 if target.startswith("gfx") else 0
    rows = constants["BLOCK_N" if kernel == "attention_bwd_keys_kernel" else "BLOCK_M"]
    return 2 if target == "sm_100" and rows == 64 else 1  # 64 rows fill half of them


def main() -> None:
    import triton

    target = sys.argv[1]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a compiler prints must not look like an answer
    triton.runtime.driver.set_active(NamesTarget(gpu_target(target)))
    for line in sys.stdin:
        print(json.dumps(compile_job(target, Job(*json.loads(line)))), file=answers, flush=True)


# ---- in the parent ------------------------------------------------------------------------------

Progress = Callable[[str, float], None]


def compile_all(
    targets: Sequence[str], wanted: Sequence[Job], progress: Progress | None = None
) -> list[Compiled]:
    """All jobs for all targets, two processes at a time, in this order."""
    shards = [(t, wanted[at::PROCESSES]) for t in targets for at in range(PROCESSES)]
    done, total = [], max(1, len(wanted) * len(targets))

    def one(shard: tuple[str, Sequence[Job]]) -> list[Compiled]:
        found = []
        for result in answers(*shard):
            found += result
            done.append(shard)
            if progress:
                progress(result[0].name if result else shard[0], len(done) / total)
        return found

    with ThreadPoolExecutor(PROCESSES) as pool:
        rows = [row for part in pool.map(one, shards) for row in part]
    order = {(t, job): (i, j) for i, t in enumerate(targets) for j, job in enumerate(wanted)}
    return sorted(rows, key=lambda row: order[row.target, row.job])


def answers(target: str, wanted: Sequence[Job]) -> Iterator[list[Compiled]]:
    """What a worker makes of each job; one that kills it is a failure, and a new worker goes on."""
    at = 0
    while at < len(wanted):
        with worker(target, wanted[at:]) as process:
            assert process.stdout is not None
            for line in process.stdout:
                yield [Compiled(t, Job(*job), *rest) for t, job, *rest in json.loads(line)]
                at += 1
        if at < len(wanted):
            error = f"the compiling process died, exit code {process.returncode}"
            yield [Compiled(target, wanted[at], wanted[at].operator, error=error)]
            at += 1


def worker(target: str, wanted: Sequence[Job]) -> subprocess.Popen[str]:
    """Its compiler's dumps go nowhere: what it raises comes back as an answer."""
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    environment.pop("TRITON_INTERPRET", None)
    environment["FASTATTN_CACHE"] = os.devnull  # the committed tables, not the user's own
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, target], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write("".join(json.dumps(job) + "\n" for job in wanted))
    process.stdin.close()
    return process


# ---- budgets ------------------------------------------------------------------------------------

ALLOWED_GROWTH = 1.05


def budgets() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("budgets.json").read_text()
    found: dict[str, Any] = json.loads(text)
    return found


def broken(rows: Sequence[Compiled], held: dict[str, Any], triton: str) -> list[str]:
    """A sentence for every failure, and for every rule or budget that a kernel does not keep."""
    sentences = []
    for row in rows:
        if row.error:
            sentences.append(f"{row.name}: does not compile: {row.error}")
            continue
        allowed = held["loops"].get(row.name, {})
        sentences += [f"{row.name} ({row.config}): {wrong}" for wrong in misfits(row)]
        sentences += [
            f"{row.name} ({row.config}): {wrong}"
            for wrong in excesses(row, allowed, held["triton"] == triton)
        ]
    return sentences


def misfits(row: Compiled) -> Iterator[str]:
    """What no launch could hold, and instructions that a kernel is there for."""
    chip = machine_code.CHIPS[row.target]
    if row.shared > chip.shared:
        yield f"{row.shared} bytes of shared memory, there are {chip.shared}"
    if row.tensor_memory > machine_code.TENSOR_MEMORY:
        yield f"{row.tensor_memory} columns of tensor memory, there are {machine_code.TENSOR_MEMORY}"
    if row.kernel not in PRODUCTS:
        return
    wanted = tensor_instructions(row)
    if wanted and not any(name.startswith(wanted) for name in row.mma):
        yield f"no {' or '.join(wanted)} in the main loop, but {row.mma or 'no tensor cores'}"
    if loads_by_tma(row) and "UTMALDG" not in row.copies:
        yield f"no UTMALDG in the main loop, but {row.copies or 'no asynchronous copy'}"


def tensor_instructions(row: Compiled) -> tuple[str, ...]:
    """Fewer than 64 rows are too few for the warpgroups of sm_90 and the tensor memory of sm_100."""
    if row.target.startswith("gfx"):
        return ("v_mfma",)
    if row.job.dtype == "float32":
        return ()
    m, n = row.config.split(" ")[0].split("x")
    rows = int(n if row.kernel == "attention_bwd_keys_kernel" else m)
    whole = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(row.target, "HMMA")
    return (whole,) if rows >= 64 else (whole, "HMMA")


def loads_by_tma(row: Compiled) -> bool:
    tma = row.target in ("sm_90", "sm_100", "sm_120")
    described = row.job.dtype != "float32" and row.job.form != "paged"
    return tma and described and row.kernel == "attention_fwd_kernel"


def excesses(row: Compiled, allowed: dict[str, int], same_triton: bool) -> Iterator[str]:
    """Of the budgets; how long a loop is belongs to one version of Triton."""
    if row.loop["local"] > allowed.get("local", 0):
        yield f"{row.loop['local']} spills in the main loop, {allowed.get('local', 0)} are allowed"
    most = allowed.get("total", 0) * ALLOWED_GROWTH
    if same_triton and "total" in allowed and row.loop["total"] > most:
        yield f"{row.loop['total']} instructions in the main loop, it had {allowed['total']}"


def recorded(rows: Sequence[Compiled], triton: str) -> dict[str, Any]:
    """Budgets that these rows just keep; a job may launch a kernel more than once."""
    loops: dict[str, dict[str, int]] = {}
    for row in rows:
        found = loops.setdefault(row.name, {})
        for kind in ("total", "local"):
            if row.loop.get(kind):
                found[kind] = max(row.loop[kind], found.get(kind, 0))
    return {"triton": triton, "loops": dict(sorted(loops.items()))}


def as_text(held: dict[str, Any]) -> str:
    """JSON with a loop a line, for diffs to be read."""
    loops = ",\n".join(f'"{name}": {json.dumps(loop)}' for name, loop in held["loops"].items())
    return f'{{\n"triton": "{held["triton"]}",\n"loops": {{\n{loops}\n}}\n}}\n'


if __name__ == "__main__":
    main()
