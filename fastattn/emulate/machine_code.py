"""What a compiled kernel is made of: registers, spills, memory, and the instructions of its main loop.

NVIDIA's from the cubin, by the cuobjdump inside Triton's wheel; AMD's from the amdgcn text. The main loop
is the innermost loop that holds the products; of several, the shortest, which masks nothing. Warps with
roles of their own (sm_100) have such a loop each. `cycles`
is an estimate made from rates in data sheets: it ranks configurations of one kernel on one target, and
is no measurement.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """Per multiprocessor and clock, and what one has. cycles: of a scheduler, per warp instruction."""

    products: int  # multiply-adds of 16-bit elements by tensor cores
    fp32_cycles: int
    integer_cycles: int
    special_cycles: int  # exp2 and the like
    shared: int  # bytes that a block may have, on the smallest chip that the target's code runs on
    shared_all: int
    registers: int = 65536
    warps: int = 64


CHIPS = {
    "sm_80": Chip(1024, 2, 2, 8, 101376, 167936),
    "sm_90": Chip(2048, 1, 2, 8, 232448, 233472),
    "sm_100": Chip(4096, 1, 2, 8, 232448, 233472),
    "sm_120": Chip(512, 1, 2, 8, 101376, 102400, warps=48),
    "gfx942": Chip(1024, 4, 4, 16, 65536, 65536, registers=131072, warps=32),
    "gfx950": Chip(2048, 4, 4, 16, 163840, 163840, registers=131072, warps=32),
}
TENSOR_MEMORY = 512  # columns of sm_100
BARRIER_CYCLES = 30

# classes of instructions, by what stands before the first dot (NVIDIA), or by a prefix (AMD)
CLASSES = {
    "mma": ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "QGMMA", "OMMA", "v_mfma", "v_wmma"),
    "async": ("LDGSTS", "UTMALDG", "buffer_load_lds", "global_load_lds"),
    "special": ("MUFU", "v_exp", "v_log", "v_rcp", "v_rsq", "v_sqrt"),
    "fp32": ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2",
             "v_fma", "v_fmac", "v_mul_f32", "v_add_f32", "v_sub_f32", "v_pk_fma", "v_pk_mul", "v_pk_add"),
    "barrier": ("BAR", "SYNCS", "WARPSYNC", "s_barrier"),
    "local": ("LDL", "STL", "scratch_load", "scratch_store"),
}  # fmt: skip
INTEGER = {
    "FMNMX", "FMNMX3", "FSEL", "FSETP", "ISETP", "SEL", "LOP3", "IADD3", "PRMT", "F2FP", "SHF", "LEA",
    "PLOP3", "VOTE", "IADD", "VIADD", "VIMNMX",
}  # fmt: skip
PACKED = {"FFMA2", "FMUL2", "FADD2"}


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str


class Code(NamedTuple):
    """registers, stack bytes, shared bytes, tensor memory columns, warps of all roles; for each role the
    counts of its main loop by name, the role that computes softmax first."""

    registers: int
    stack: int
    shared: int
    tensor_memory: int
    warps: int
    roles: list[Counter[str]]

    @property
    def loop(self) -> Counter[str]:
        return sum(self.roles, Counter())

    def count(self, kind: str) -> int:
        return sum(n for name, n in self.loop.items() if is_a(name, kind))

    @property
    def total(self) -> int:
        return sum(self.loop.values())

    def named(self, kind: str) -> dict[str, int]:
        """Counts of a class by what stands before the first dot."""
        found: Counter[str] = Counter()
        for name, n in self.loop.items():
            if is_a(name, kind):
                found[base(name)] += n
        return dict(found)


def base(name: str) -> str:
    return name.split(".")[0]


def is_a(name: str, kind: str) -> bool:
    if name[0].isupper():
        return base(name) in CLASSES[kind]
    return name.startswith(tuple(c for c in CLASSES[kind] if c[0].islower()))


def read(compiled: Any) -> Code:
    """compiled: Triton's CompiledKernel, which need not have been loaded."""
    return read_amd(compiled) if "amdgcn" in compiled.asm else read_nvidia(compiled)


# ---- NVIDIA -------------------------------------------------------------------------------------

SASS = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)\s*(.*?);")


@functools.cache
def cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def read_nvidia(compiled: Any) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [cuobjdump(), "--dump-resource-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if used is None:
        raise RuntimeError(f"cuobjdump names no registers of {compiled.name}")
    found = [Instruction(int(m[1], 16), m[2], m[3]) for m in SASS.finditer(text)]
    jumps = [(int(m[1], 16), i.address) for i in found if (m := jump_target(i))]
    meta = compiled.metadata
    tensor_memory = getattr(meta, "tmem_size", None) or 0
    roles = main_loops(found, jumps)
    return Code(int(used[1]), int(used[2]), meta.shared, tensor_memory, meta.num_warps, roles)


def jump_target(instruction: Instruction) -> re.Match[str] | None:
    return (
        re.search(r"0x([0-9a-f]+)", instruction.operands)
        if base(instruction.name) == "BRA"
        else None
    )


# ---- AMD ----------------------------------------------------------------------------------------


def read_amd(compiled: Any) -> Code:
    text = compiled.asm["amdgcn"]
    found, labels = [], {}
    for address, line in enumerate(text.splitlines()):
        words = line.split(";")[0].split()
        if words and words[0].endswith(":"):
            labels[words[0][:-1]] = address
        elif words and re.match(r"[a-z]+_", words[0]):
            found.append(Instruction(address, words[0], " ".join(words[1:])))
    jumps = [
        (labels[i.operands], i.address)
        for i in found
        if i.name.startswith(("s_cbranch", "s_branch")) and i.operands in labels
    ]
    stack = max(
        amd_number(text, "private_segment_fixed_size"), 4 * amd_number(text, "vgpr_spill_count")
    )
    registers = amd_number(text, "vgpr_count")
    meta = compiled.metadata
    return Code(registers, stack, meta.shared, 0, meta.num_warps, main_loops(found, jumps))


def amd_number(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", text)
    return int(found[1]) if found else 0


# ---- the main loop ------------------------------------------------------------------------------


def main_loops(code: list[Instruction], jumps: list[tuple[int, int]]) -> list[Counter[str]]:
    """Of each role of warps; mostly there is one. The whole kernel's instructions where there is no loop."""
    loops = [Counter(i.name for i in code if a <= i.address <= b) for a, b in innermost(jumps)]
    loops = loops or [Counter(i.name for i in code)]
    if not any(base(i.name) == "USETMAXREG" for i in code):
        return [main_loop(loops)]
    roles: dict[tuple[bool, ...], Counter[str]] = {}
    for loop in sorted(loops, key=lambda x: sum(x.values()), reverse=True):
        role = (work(loop, "special") >= 8, work(loop, "mma") > 0, work(loop, "async") > 0)
        if any(role) or work(loop, "fp32") >= 8:  # the others wait at a barrier
            roles[role] = loop  # the shortest comes last
    return [roles[role] for role in sorted(roles, reverse=True)]


def main_loop(loops: list[Counter[str]]) -> Counter[str]:
    kind = "mma" if any(work(loop, "mma") for loop in loops) else "fp32"
    most = max(work(loop, kind) for loop in loops)
    return min((x for x in loops if 2 * work(x, kind) >= most), key=lambda x: sum(x.values()))


def innermost(jumps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(first, last) addresses of what a jump back repeats, and which holds no other such."""
    back = {jump for jump in jumps if jump[0] < jump[1]}
    return [
        (a, b) for a, b in back if not any(o != (a, b) and o[0] >= a and o[1] <= b for o in back)
    ]


def work(loop: Counter[str], kind: str) -> int:
    return sum(n for name, n in loop.items() if is_a(name, kind))


# ---- an estimate --------------------------------------------------------------------------------


class Pipes(NamedTuple):
    """Clocks of a scheduler that the warps of a role keep each pipe busy in a turn; chain: of one warp."""

    mma: float
    special: float
    fp32: float
    integer: float
    issued: float
    copied: float
    chain: float


def cycles(code: Code, target: str, warps: int, products: int) -> float:
    """Estimated clocks of a multiprocessor for one turn of the main loop, blocks side by side.

    products: multiply-adds of 16-bit elements in a turn, 0 if FP32 units do them. Warps of a scheduler
    hide one another, so a turn takes the time of the busiest pipe, or one warp's way through all of them
    over the blocks that share the multiprocessor. warps: of the first role; the others have 4 at most.
    """
    chip, amd = CHIPS[target], target.startswith("gfx")
    roles = [
        pipes(
            loop,
            chip,
            4 if at else warps,
            products if len(code.roles) == 1 or work(loop, "mma") else 0,
        )
        for at, loop in enumerate(code.roles)
    ]
    busiest = max(sum(role[at] for role in roles) for at in range(len(Pipes._fields) - 1))
    chain = max(role.chain for role in roles)
    return max(busiest, chain / resident(code, chip, amd))


def pipes(loop: Counter[str], chip: Chip, warps: int, products: int) -> Pipes:
    here = warps / 4  # warps of a scheduler
    mma = products / chip.products
    special = work(loop, "special") * chip.special_cycles * here
    packed = sum(n for name, n in loop.items() if base(name) in PACKED)
    fp32 = (work(loop, "fp32") + packed) * chip.fp32_cycles * here
    integer = sum(n for name, n in loop.items() if is_integer(name)) * chip.integer_cycles * here
    issued = sum(loop.values()) * here
    local = work(loop, "local") * warps  # 128 bytes each, and in the way of everything else
    copied = shared_bytes(loop) * warps / 128 + local
    chain = (mma + special + max(fp32, integer, issued) + local) / here
    chain += work(loop, "barrier") * BARRIER_CYCLES
    return Pipes(mma, special, fp32, integer, issued, copied, chain)


def is_integer(name: str) -> bool:
    if name[0].isupper():
        return base(name) in INTEGER
    return name.startswith("v_") and not any(is_a(name, k) for k in ("mma", "special", "fp32"))


def shared_bytes(loop: Counter[str]) -> int:
    """What one warp moves between shared memory and registers."""
    moved = 0
    for name, n in loop.items():
        words = name.split(".")
        if words[0] in ("LDSM", "LDS", "STS", "STSM"):
            wide = "128" in words or "4" in words
            half = "64" in words or "2" in words
            moved += n * (512 if wide else 256 if half else 128)
    return moved


def resident(code: Code, chip: Chip, amd: bool) -> int:
    """Blocks that fit a multiprocessor."""
    lanes, warps = 64 if amd else 32, code.warps
    by_registers = chip.registers // max(1, (code.registers + 7) // 8 * 8 * lanes * warps)
    by_shared = chip.shared_all // max(1, code.shared + 1024)
    return max(1, min(by_registers, by_shared, chip.warps // warps, 16))
