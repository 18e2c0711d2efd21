"""The model of a GPU that runs csrc/cuda on a CPU: it finds what is wrong, and computes what PTX says."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastattn as fa
from fastattn.emulate import cuda_host

ROOT = Path(__file__).parent.parent.parent
CSRC = cuda_host.csrc()


@pytest.fixture(scope="module")
def kernels():
    include = [f"-I{CSRC.parent}"]
    objects = [
        cuda_host.compile_object(Path(__file__).parent / "host_kernels.cu", include),
        cuda_host.compile_object(CSRC / "host/model.cpp"),
    ]
    handle = ctypes.CDLL(str(cuda_host.link(objects)))
    handle.run_kernel.restype = ctypes.c_char_p
    handle.fastattn_host_conflicts.restype = ctypes.c_char_p
    return handle


@pytest.fixture(params=cuda_host.SCHEDULES)
def schedule(request):
    return request.param


def run(
    kernels, name, x, y, *, schedule="lockstep", block=64, grid=1, shared=1024, p=16, count=False
):
    """What the model says of this kernel: "" if nothing is wrong."""
    options = cuda_host.Options(schedule, seed=1, count_conflicts=count)
    kernels.fastattn_host_options(
        cuda_host.SCHEDULES.index(options.schedule), ctypes.c_uint64(options.seed),
        options.shared_memory, int(options.count_conflicts),
    )  # fmt: skip
    pointers = [ctypes.c_void_p(t.ctypes.data) for t in (x, y)]
    said = kernels.run_kernel(
        name.encode(), pointers[0], ctypes.c_int64(x.nbytes), pointers[1], ctypes.c_int64(y.nbytes),
        grid, block, shared, p,
    )  # fmt: skip
    return said.decode()


def floats(n, fill=None):
    """n floats at a multiple of 16 bytes: 0, 1, ... or all `fill`."""
    room = np.zeros(n + 4, dtype=np.float32)
    start = -room.ctypes.data % 16 // 4
    room[start : start + n] = np.arange(n) if fill is None else fill
    return room[start : start + n]


# ---- what is right passes, under every schedule -------------------------------------------------


@pytest.mark.parametrize("name", ["reverse", "reverse_twice", "reverse_warps"])
def test_a_right_kernel_passes(kernels, schedule, name):
    x, y = floats(64), floats(64, 0)
    assert run(kernels, name, x, y, schedule=schedule) == ""
    expected = x[::-1] + (name == "reverse_twice")
    if name == "reverse_warps":
        expected = x.reshape(2, 32)[:, ::-1].ravel()
    assert np.array_equal(y, expected)


@pytest.mark.parametrize("size", [0, 4, 8, 16])
def test_a_copy_fills_what_it_does_not_read_with_zeros(kernels, schedule, size):
    x, y = floats(256) + 1, floats(256, 7)
    x = np.ascontiguousarray(x)
    aligned = floats(256)
    aligned[:] = x
    assert run(kernels, "copy", aligned, y, schedule=schedule, p=size) == ""
    expected = aligned.reshape(64, 4)[::-1].copy()
    expected[:, size // 4 :] = 0
    assert np.array_equal(y, expected.ravel())


def test_a_warp_adds_up(kernels, schedule):
    x, y = floats(64), floats(64, 0)
    assert run(kernels, "sum_warp", x, y, schedule=schedule) == ""
    assert np.array_equal(y, np.repeat(x.reshape(2, 32).sum(1), 32))


# ---- what is wrong is found, under every schedule -----------------------------------------------

WRONG = {
    "reverse, no barrier": r"race: (reads|writes) byte \d+ of shared memory|nobody has written",
    "reverse_twice, no barrier": r"race: (reads|writes) byte \d+ of shared memory that .*, with no barrier between",
    "reverse_warps, no sync": r"race: reads byte \d+|nobody has written",
    "copy, no wait": "reads shared memory that a copy is under way to|ends with copies under way",
    "copy, no barrier": r"race: reads byte \d+|under way to|nobody has written",
    "copy, no commit": "under way to|ends with copies under way",
    "reads 1 further": "reads 4 bytes of global memory out of bounds: 0 bytes past the nearest memory of the call, of 256 bytes",
    "writes 1 further": "writes 4 bytes of global memory out of bounds: 0 bytes past",
    "reads 1 before": "reads 4 bytes of global memory out of bounds: 4 bytes before",
    "writes input": "writes to an input of the call",
    "reads shared": "reads shared memory that nobody has written, byte 0",
    "writes past shared": "writes 4 bytes at byte 256 of shared memory, of which there are 256",
    "misaligned shared": "writes 4 bytes at a misaligned shared address, byte 2",
    "unchecked": "wrote past its shared memory, unchecked",
    "sum_warp, shuffles": "divergent warp: a lane is at shuffle_xor, others at shuffle_xor",
    "sum_warp, words": "divergent warp: a lane is at (shuffle|any), others at (shuffle|any)",
    "sum_warp, barriers": r"divergent barrier: thread \d+ waits at host_kernels.cu:\d+",
    "sum_warp, lane at barrier": "deadlock: 1 threads wait at the barrier at .*, 63 threads wait for their warp in shuffle_xor|deadlock",
    "sum_warp, half": "deadlock: 32 threads ended, 32 threads wait for their warp in shuffle_xor at host_kernels.cu",
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_found(kernels, schedule, name):
    copies = name.startswith("copy")
    x, y = (floats(256), floats(256, 0)) if copies else (floats(64), floats(64, 0))
    size = {"unchecked": 300}.get(name, 16)
    said = run(kernels, name, x, y, schedule=schedule, shared=1024 if copies else 256, p=size)
    assert re.search(WRONG[name], said), said
    kernel = said.split(": ")[1].split(",")[0].removeprefix("kernel ")
    assert kernel in ("reverse", "reverse_twice", "reverse_warps", "copy", "shifted", "writes_input",
                      "shared_at", "unchecked", "sum_warp")  # fmt: skip
    assert re.search(r"block \(0, 0, 0\), thread \(\d+, 0, 0\)", said)


def test_the_process_lives_on_after_an_error(kernels):
    x, y = floats(64), floats(64, 0)
    for _ in range(100):
        assert run(kernels, "reverse, no barrier", x, y) != ""
    assert run(kernels, "reverse", x, y) == ""


@pytest.mark.parametrize("offset, right", [(0, True), (4, True), (1, False), (2, False)])
def test_sixteen_bytes_lie_at_a_multiple_of_sixteen(kernels, offset, right):
    said = run(kernels, "chunk", floats(64), floats(64, 0), p=offset)
    assert (said == "") if right else ("reads 16 bytes at a misaligned global address" in said)


@pytest.mark.parametrize(
    "shape, rule",
    [
        ({"block": 48}, "whole warps"),
        ({"block": 2048}, "at most 1024 threads"),
        ({"shared": 100 << 10}, "102400 bytes of shared memory, the limit is 101376"),
    ],
)
def test_a_launch_keeps_to_the_limits(kernels, shape, rule):
    said = run(kernels, "reverse", floats(64), floats(64, 0), **shape)
    assert rule in said and said.startswith("fastattn: kernel reverse, grid (1, 1, 1), block (")


# ---- fragments, by the formulas of the PTX ISA --------------------------------------------------


def bits16(x, kind):
    """The 16-bit formats as integers; x holds values that they have exactly."""
    if kind == "fp16":
        return x.astype(np.float16).view(np.uint16)
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def small_integers(*shape):
    return np.random.default_rng(0).integers(-8, 9, shape).astype(np.float32)


def output_fragments(D):
    """PTX, m16n8k16 and m16n8k8, c0..c3: row = groupID (+ 8 from c2 on), col = 2 threadID + (i & 1)."""
    lane, i = np.arange(32)[:, None], np.arange(4)[None]
    return D[lane // 4 + 8 * (i >= 2), lane % 4 * 2 + (i & 1)]


def as_memory(registers):
    """(32 lanes, 6 registers) as the test kernel reads them, 8 words a lane."""
    words = floats(256, 0)
    words.view(np.uint32).reshape(32, 8)[:, :6] = registers
    return words


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_16_bit_products_have_ptx_layout(kernels, kind):
    A, B = small_integers(16, 16), small_integers(16, 8)
    lane = np.arange(32)[:, None]
    group, thread = lane // 4, lane % 4
    i = np.arange(8)[None]  # a0 .. a7
    row = np.where((i < 2) | ((i >= 4) & (i < 6)), group, group + 8)
    col = thread * 2 + (i & 1) + np.where(i >= 4, 8, 0)
    j = np.arange(4)[None]  # b0 .. b3
    k = thread * 2 + (j & 1) + np.where(j >= 2, 8, 0)
    halves = np.concatenate([bits16(A[row, col], kind), bits16(B[k, group + 0 * j], kind)], axis=1)
    x, y = as_memory(np.ascontiguousarray(halves).view(np.uint32)), floats(128, 0)
    assert run(kernels, f"product {kind}", x, y, block=32) == ""
    assert np.array_equal(y.reshape(32, 4), output_fragments(A @ B))


def test_tf32_products_have_ptx_layout_and_read_19_bits(kernels):
    A, B = small_integers(16, 8), small_integers(8, 8)
    lane = np.arange(32)[:, None]
    group, thread = lane // 4, lane % 4
    i, j = np.arange(4)[None], np.arange(2)[None]
    a = A[np.where((i == 0) | (i == 2), group, group + 8), np.where(i < 2, thread, thread + 4)]
    b = B[np.where(j == 0, thread, thread + 4), group + 0 * j]
    registers = np.concatenate([a, b], axis=1).view(np.uint32) | 0x1FFF  # what is not read
    x, y = as_memory(registers), floats(128, 0)
    assert run(kernels, "product tf32", x, y, block=32) == ""
    assert np.array_equal(y.reshape(32, 4), output_fragments(A @ B))


def test_a_product_is_rounded_toward_zero(kernels):
    A, B = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
    A[:, 0], A[:, 1], B[0], B[1] = 1, -1, 1, 2.0**-26  # 1 - 2^-26, to nearest 1
    lane, i, j = np.arange(32)[:, None], np.arange(8)[None], np.arange(4)[None]
    row = np.where((i < 2) | ((i >= 4) & (i < 6)), lane // 4, lane // 4 + 8)
    a = A[row, lane % 4 * 2 + (i & 1) + np.where(i >= 4, 8, 0)]
    b = B[lane % 4 * 2 + (j & 1) + np.where(j >= 2, 8, 0), lane // 4 + 0 * j]
    halves = np.ascontiguousarray(np.concatenate([bits16(a, "bf16"), bits16(b, "bf16")], axis=1))
    y = floats(128, 0)
    assert run(kernels, "product bf16", as_memory(halves.view(np.uint32)), y, block=32) == ""
    assert (y == np.nextafter(np.float32(1), np.float32(0))).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices_has_ptx_layout(kernels, transposed):
    """PTX: thread 8 m + i addresses row i of matrix m; r[m] of lane T holds row T / 4, columns 2 (T % 4)
    and the next; with .trans, of the transposed matrix."""
    words = np.arange(256, dtype=np.uint16)
    x, y = floats(128, 0), floats(128, 0)
    x.view(np.uint16)[:] = words
    name = "matrices transposed" if transposed else "matrices"
    assert run(kernels, name, x, y, block=32, shared=32 * 16, p=16) == ""
    four = words.reshape(4, 8, 8)
    four = four.transpose(0, 2, 1) if transposed else four
    lane = np.arange(32)
    low, high = (four[:, lane // 4, lane % 4 * 2 + half].T for half in (0, 1))
    expected = low.astype(np.uint32) | high.astype(np.uint32) << 16
    assert np.array_equal(y.view(np.uint32).reshape(32, 4), expected)


# ---- bank conflicts -----------------------------------------------------------------------------


def conflicts(kernels):
    rows = [row.split() for row in kernels.fastattn_host_conflicts().decode().splitlines()]
    return {(kernel, line): (int(n), int(extra)) for kernel, line, n, extra in rows}


def counted(kernels, name, **shape):
    conflicts(kernels)
    assert (
        run(kernels, name, floats(512), floats(512, 0), block=32, shared=4096, count=True, **shape)
        == ""
    )
    return sorted(conflicts(kernels).values())


def test_a_swizzle_avoids_conflicts_and_its_absence_is_counted(kernels):
    # of each access 4 phases of 8 lanes; a column of chunks without swizzle lies in one set of banks
    assert counted(kernels, "transpose") == [(2, 0), (2, 0)]
    assert counted(kernels, "transpose, no swizzle") == [(2, 0), (2, 2 * 4 * 7)]


@pytest.mark.parametrize("stride, extra", [(16, 0), (128, 4 * 7), (64, 4 * 3), (144 - 128 + 64, 0)])
def test_conflicts_of_load_matrices(kernels, stride, extra):
    (store, load) = counted(kernels, "matrices", p=stride)
    assert store == load == (1, extra)


# ---- the package's own kernels ------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_real_kernels_do_not_depend_on_the_schedule(schedule, seed):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 33)
    q, k, v = (
        torch.randn(1, 2, 40, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )

    def results():
        out = fa.attention(q, k, v, causal=True, backend="cuda")
        return (
            fa.softmax(x, causal=True, backend="cuda"),
            out,
            *torch.autograd.grad(out.sum(), (q, k, v)),
        )

    expected = results()
    with cuda_host.options(schedule=schedule, seed=seed):
        for a, b in zip(results(), expected, strict=True):
            assert torch.equal(a, b)


def test_an_unknown_schedule_is_an_error():
    with (
        pytest.raises(
            ValueError, match="schedule must be one of lockstep, greedy, shuffled, got 'x'"
        ),
        cuda_host.options(schedule="x"),
    ):
        pass


class Mutant:
    """The package's kernels with one text of one file replaced."""

    count = 0

    def __init__(self, folder, file, old, new):
        shutil.copytree(CSRC, folder / "csrc", dirs_exist_ok=True)
        path = folder / "csrc" / file
        text = path.read_text()
        assert text.count(old) >= 1, f"{file} no longer says {old!r}"
        path.write_text(text.replace(old, new, 1))
        self.library = cuda_host.Library(cuda_host.build(folder / "csrc"), cuda_host._schemas)

    def attention(self, q, k, v):
        none = [None] * 9
        return self.library.call(
            "attention_fwd", q, k, v, *none, 0.1, True, None, None, 0.0, 0.0, False, 0, 0
        )

    def softmax(self, x):
        return self.library.call("softmax_fwd", x, None, True, 1.0)


def heads(S=150, D=64, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return [torch.randn(1, 1, S, D).to(dtype) for _ in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, old, new, sentence",
    [
        ("cuda/rows.cuh", "x[k]);\n    __syncthreads();", "x[k]);", "race|nobody has written"),
        ("cuda/rows.cuh", "    turn_ ^= 64;", "", "race: writes"),
    ],
)  # fmt: skip
def test_a_bug_in_softmax_is_found(tmp_path, file, old, new, sentence):
    mutant = Mutant(tmp_path, file, old, new)
    with pytest.raises(RuntimeError, match=sentence):
        mutant.softmax(torch.randn(4, 2000))


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, old, new, sentence",
    [
        ("cuda/attention_fwd.cuh", "      __syncthreads();  // this visit's tiles are there, and the last one's are read",
         "", "race|under way|nobody has written"),
        ("cuda/attention_fwd.cuh", "wait_copies<kStages - 2>();", "", "race|under way"),
        ("cuda/attention_fwd.cuh", "visit % kStages * 2 * kTile", "visit % (kStages + 1) * 2 * kTile",
         "of shared memory, of which there are"),
        ("cuda/attention_fwd.cuh", "        if (!row.inside) return nullptr;\n        return row_at<T>(args.out",
         "        return row_at<T>(args.out", "out of bounds"),
        ("cuda/tile.cuh", "cols - c * Cut::kEntries, 0)", "cols - c * Cut::kEntries, 1)", "out of bounds"),
    ],
)  # fmt: skip
def test_a_bug_in_attention_is_found(tmp_path, file, old, new, sentence):
    mutant = Mutant(tmp_path, file, old, new)
    with pytest.raises(RuntimeError, match=sentence):
        for schedule in cuda_host.SCHEDULES:
            with cuda_host.options(schedule=schedule, seed=1):
                mutant.attention(*heads())


def test_attention_has_no_bank_conflicts_in_its_main_loop():
    with cuda_host.options(count_conflicts=True):
        cuda_host.library().conflicts()
        fa.attention(*heads(), causal=True, backend="cuda")
        found = [c for c in cuda_host.library().conflicts() if c.kernel.startswith("attention_fwd")]
    assert sum(c.accesses for c in found) > 100
    assert [c for c in found if c.extra] == []


@pytest.mark.slow
def test_a_missing_swizzle_is_counted(tmp_path):
    mutant = Mutant(tmp_path, "cuda/tile.cuh", "(c ^ (row % 8))", "c")
    with cuda_host.options(count_conflicts=True):
        mutant.attention(*heads())
        found = mutant.library.conflicts()
    assert sum(c.extra for c in found) > sum(c.accesses for c in found)


# ---- compiling ----------------------------------------------------------------------------------


def test_without_a_compiler_the_error_says_so():
    code = (
        "import torch, fastattn as fa\n"
        "try: fa.softmax(torch.ones(2), backend='cuda')\n"
        "except ValueError as error: print(error)"
    )
    environment = {"PATH": "/nowhere", "HOME": "/nowhere", "PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "there is no C++ compiler (looked for c++, g++, clang++)" in said


def test_an_object_is_kept_by_what_it_was_made_of(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "cache"))
    header, source = tmp_path / "a.h", tmp_path / "b.cpp"
    header.write_text("int one();\n")
    source.write_text('#include "a.h"\nint one() { return 1; }\n')
    first = cuda_host.compile_object(source)
    assert cuda_host.object_of(source) == first and first.is_file()
    header.write_text("int one(); // changed\n")
    assert cuda_host.object_of(source) != first
    header.write_text("wrong")
    with pytest.raises(RuntimeError, match="its kernels did not compile"):
        cuda_host.compile_object(source)
    assert [p.name for p in (tmp_path / "cache/objects").iterdir()] == [first.name]
