"""CUDA's attention kernels by the table of cases: on the model of a GPU, or launched with --device cuda."""

import re
import shutil
from typing import NamedTuple

import pytest
import torch

import fastattn as fa
from fastattn.emulate import cuda_host
from fastattn.verify.cases import attention
from fastattn.verify.judge import DTYPES, judge, run

from . import pick

BY_ID = {case.id: case for case in pick.of("attention")}
LARGE = [case for case in BY_ID.values() if case.name == "300x520"]  # as long as twenty others
OTHERS = [case for case in BY_ID.values() if case not in LARGE]


def check(case, dtype, device):
    verdict = judge(case, dtype, "cuda", device)
    assert not verdict.failed, verdict.explain()
    if verdict.declined is not None:
        assert "cuda: heads of up to 256 channels, got 320" in verdict.declined


@pick.in_one_dtype(OTHERS)
def test_case(case, dtype, device):
    check(case, dtype, device)


@pytest.mark.slow
@pick.in_the_others(OTHERS)
def test_case_in_another_dtype(case, dtype, device):
    check(case, dtype, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=pick.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=pick.name)
def test_large_case(case, dtype, device):
    check(case, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=pick.name)
@pytest.mark.parametrize("D, Dv", [(256, 1), (1, 256), (129, 200), (72, 128)])
def test_wide_heads(D, Dv, dtype, device):
    case = attention("wide", f"{D} {Dv}", D=D, Dv=Dv, Sq=40, Sk=70, causal=True, B=1, Hq=2, Hkv=1)
    check(case, dtype, device)


@pytest.mark.parametrize("Sq", [1, 20])
def test_pages_that_are_not_multiples_of_16_bytes_apart(Sq, device):
    torch.manual_seed(0)
    options = {"dtype": torch.bfloat16, "device": device}
    cache = fa.KVCache(1, 1, 16, max_length=40, page_size=8, **options)
    pages = torch.zeros(2, len(cache.key), 8 * 16 + 1, **options)[..., :-1].unflatten(
        -1, (8, 1, 16)
    )
    cache._pool.key, cache._pool.value = pages
    cache.append(torch.randn(1, 1, 37, 16, **options), torch.randn(1, 1, 37, 16, **options))
    q = torch.randn(1, 2, Sq, 16, **options)
    found, wanted = (fa.attention_decode(q, cache, backend=b) for b in ("cuda", "reference"))
    torch.testing.assert_close(found, wanted, atol=8e-3, rtol=0)


# ---- what only the model of a GPU can tell --------------------------------------------------------


# of each kernel and form a call that takes a second
small = pick.named(
    "attention-combined-everything", "attention-packed-cross,_all", "attention-causal-131x67",
    "attention-few_queries-Sq=1_Sk=1500", "attention-head_dimension-D=111",
    "attention-grouped_queries-8:2_Sq=33",
)  # fmt: skip


@small
@pytest.mark.parametrize("schedule", ["greedy", "shuffled"])
def test_same_bits_in_any_order_of_the_threads(case, schedule):
    first = run(case, torch.bfloat16, "cuda")
    with cuda_host.options(schedule=schedule, seed=1):
        again = run(case, torch.bfloat16, "cuda")
    assert all(torch.equal(first[n].nan_to_num(), again[n].nan_to_num()) for n in first)


def enclosing_function(line):
    """The function of csrc/cuda that a line, "tile.cuh:120", is in."""
    file, number = line.split(":")
    text = (cuda_host.csrc() / "cuda" / file).read_text().splitlines()
    found = (
        re.match(r"FASTATTN_DEVICE .*?(\w+)\(", above) or re.match(r" {4}(\w+_kernel)\(", above)
        for above in reversed(text[: int(number)])
    )
    return next(f[1] for f in found if f)


@pytest.mark.parametrize("dtype, D", [(torch.bfloat16, 64), (torch.float16, 128), (torch.bfloat16, 256),
                                      (torch.float32, 64)], ids=pick.name)  # fmt: skip
def test_main_loops_have_no_bank_conflicts(dtype, D):
    case = attention(
        "conflicts", "", B=1, Hq=1, Sq=70, Sk=140, D=D, causal=True, slopes="h", bias="1hqk"
    )
    cuda_host.library().conflicts()
    with cuda_host.options(count_conflicts=True):
        run(case, dtype, "cuda")
    counted = cuda_host.library().conflicts()
    where = {enclosing_function(c.line) for c in counted if c.extra}
    assert where <= {"write_rows", "attention_bwd_bias_kernel"}  # once, at a block's end
    assert {"dot_rows", "write_rows"} <= {enclosing_function(c.line) for c in counted}


# ---- bugs, seeded ---------------------------------------------------------------------------------


class Bug(NamedTuple):
    """wrong in place of right, an expression, or with a semicolon in it the line that it is on."""

    file: str
    right: str
    wrong: str
    case: str
    dtype: torch.dtype = torch.bfloat16


CAUSAL, LONG = "causal-131x67", "causal-300x520"
FORWARD, BACKWARD = "attention_fwd.cuh", "attention_bwd.cu"
BUGS = {
    "no barrier in the forward's loop": Bug(FORWARD, "__syncthreads();  // this visit's tiles", "", CAUSAL),
    "no wait in the forward's loop": Bug(FORWARD, "wait_copies<kStages - 2>();", "", CAUSAL),
    "no wait for the queries": Bug(FORWARD, "wait_copies<kStages - 1>();", "", "head_dimension-D=128"),
    "two visits in a stage": Bug(FORWARD, "visit % kStages * 2 * kTile", "visit / 2 % kStages * 2 * kTile", LONG),
    "a copy for a later visit": Bug(FORWARD, "copy(visit + kStages - 1);", "copy(visit + kStages);", LONG),
    "nothing is rescaled": Bug(FORWARD, "x *= alpha[r]", "x *= 1.f", LONG),
    "the sum is not rescaled": Bug(FORWARD, "fmaf(state.row_sum[r], alpha[r], sum)", "state.row_sum[r] + sum", LONG),
    "the sum of a lane alone": Bug(FORWARD, "row_sum_of(state.row_sum[r])", "state.row_sum[r]", CAUSAL),
    "lse without the sum": Bug(FORWARD, "high + tail", "high", CAUSAL),
    "a row too many": Bug(FORWARD, "query < s.Sq", "query <= s.Sq", CAUSAL),
    "a maximum of half a row": Bug("tile.cuh", "return fmaxf(x, shuffle_xor(x, 2));", "return x;",
                                   "large_logits-scale=100.0"),
    "rows of eight, twice": Bug("tile.cuh", "first + lane_index() % 16", "first + lane_index() % 8", CAUSAL),
    "halves of k exchanged": Bug("tile.cuh", "lane / 8 % 2", "1 - lane / 8 % 2", CAUSAL),
    "values as keys are read": Bug("tile.cuh", "load_matrices_transposed(b, cursor.chunk(16 * k, n / 2));",
                                   "load_matrices(b, cursor.chunk(16 * k, n / 2));", CAUSAL),
    "weights of another key": Bug("tile.cuh", "2 * k + i / 2", "2 * k + 1 - i / 2", CAUSAL),
    "a weight of another lane": Bug("tile.cuh", "lane_index() / 4 * 4 + holder", "holder", CAUSAL, torch.float32),
    "a key too many": Bug("scores.cuh", "middle + args.window_right + 1", "middle + args.window_right + 2", CAUSAL),
    "a query too many": Bug("scores.cuh", "middle + args.window_left + 1", "middle + args.window_left + 2",
                            "window-(3,_5)"),
    "an edge is not masked": Bug("scores.cuh", "all.end / size", "(all.end + size - 1) / size", LONG),
    "a key past the length": Bug("scores.cuh", "first + r < s.Sk", "first + r <= s.Sk", "key_lengths-plain"),
    "words of the other lane": Bug("scores.cuh", "odd ? theirs[c] : mine[c]", "odd ? mine[c] : theirs[c]",
                                   "dropout-p=0.5"),
    "words of another key": Bug("scores.cuh", "pick(got, lane ^ entry)", "pick(got, entry)", "dropout-p=0.5"),
    "a split is forgotten": Bug("attention_decode.cu", "split < splits", "split < splits - 1", "few_queries-grouped"),
    "a split is not rescaled": Bug("attention_decode.cu", "row_sum * mine", "row_sum", "few_queries-grouped"),
    "no barrier for dK and dV": Bug(BACKWARD, "__syncthreads();  // this turn's tiles", "", CAUSAL),
    "no barrier for dQ": Bug(BACKWARD, "__syncthreads();  // this visit's tiles", "", CAUSAL),
    "one head of a group": Bug(BACKWARD, "group * walk.count()", "walk.count()", "grouped_queries-8:2_Sq=33"),
    "delta is added": Bug("attention_bwd.cuh", "row.delta", "-row.delta", CAUSAL),
    "lse rounded to fp32": Bug("attention_bwd.cuh", "row.lse_low", "0.f", "large_logits-scale=1000.0", torch.float32),
    "a row of the bias too many": Bug("attention_bwd_bias.cu", "row_tile += tiles.row_programs", "++row_tile",
                                      "bias-several_tiles"),
}  # fmt: skip


def seeded(text, number, bug):
    """The text with the bug in it, for when it is the one that is asked for."""
    assert text.count(bug.right) == 1, f"{bug.file} no longer says {bug.right!r} once"
    if ";" not in bug.right:
        return text.replace(bug.right, f"(bug({number}) ? ({bug.wrong}) : ({bug.right}))")
    line = next(line for line in text.splitlines() if bug.right in line)
    return text.replace(line, f"if (bug({number})) {{ {bug.wrong} }} else {{\n{line}\n}}")


@pytest.fixture(scope="module")
def buggy(tmp_path_factory):
    """The kernels with every bug in them; seed_bug(number) makes one show."""
    root = tmp_path_factory.mktemp("bugs") / "csrc"
    shutil.copytree(cuda_host.csrc(), root)
    for number, bug in enumerate(BUGS.values(), 1):
        path = root / "cuda" / bug.file
        path.write_text(seeded(path.read_text(), number, bug))
    with (root / "common/target.h").open("a") as header:
        header.write(
            "inline int seeded_bug = 0;\ninline bool bug(int n) { return n == seeded_bug; }\n"
        )
    with (root / "host/model.cpp").open("a") as model:
        export = '__attribute__((visibility("default")))'
        model.write(f'extern "C" {export} void seed_bug(int n) {{ seeded_bug = n; }}\n')
    return cuda_host.Library(cuda_host.build(root), cuda_host._schemas)


def is_right(case, dtype):
    try:
        return judge(case, dtype, "cuda").passed
    except RuntimeError:  # the model does not let a thread do that
        return False


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_caught(name, buggy, monkeypatch):
    bug = BUGS[name]
    monkeypatch.setattr(cuda_host, "_library", buggy)
    case = BY_ID[f"attention-{bug.case}"]
    buggy.handle.seed_bug(0)
    assert is_right(case, bug.dtype)
    buggy.handle.seed_bug(list(BUGS).index(name) + 1)
    assert not is_right(case, bug.dtype)
