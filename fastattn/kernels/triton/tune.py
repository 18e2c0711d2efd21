"""Configurations of the attention kernels: a table for each family of targets, what `fastattn autotune`
found on a target where that is committed (fastattn/measured), and the user's own.

The tables below were timed on no GPU. Rows were chosen by compiling (fastattn compile): nothing spills
where that can be had, shared memory fits the smallest chip of the family, and of what is left the lowest
estimate of cycles. What a call gets depends on target, dtype, head dimension, features and Sq alone,
never on the batch, the heads or a timing while it runs: so its bits do not either.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Config(NamedTuple):
    block_m: int
    block_n: int
    warps: int
    stages: int
    specialised: bool = False  # warps of their own for loads and products (sm_100)


class Key(NamedTuple):
    """A row of a table, and its column: head dimensions up to 64, up to 128, and above."""

    kernel: str
    bits: int  # of an element: 16 or 32
    head: int  # 64, 128 or 256

    def __str__(self) -> str:
        return f"{self.kernel} {self.bits} {self.head}"


# keys of a split of decoding: long enough to hide its own start
SPLIT_KEYS = 512
# up to this many queries a block is 16 rows: one, or the four heads of a group
DECODE_QUERIES = 4
# up to this many, 64 rows
SHORT_QUERIES = 64

C = Config
Row = tuple[Config, Config, Config]


def same(config: Config) -> Row:
    return config, config, config


# kernel and bits of an element -> configurations for D <= 64, D <= 128 and above
TABLES: dict[str, dict[tuple[str, int], Row]] = {
    "sm_80": {
        ("attention_fwd", 16): (C(128, 128, 8, 2), C(128, 64, 8, 3), C(64, 32, 4, 2)),
        ("attention_fwd", 32): (C(32, 32, 4, 2), C(64, 32, 8, 2), C(32, 32, 8, 1)),
        ("attention_fwd featured", 16): (C(128, 64, 8, 2), C(128, 64, 8, 2), C(64, 32, 8, 2)),
        ("attention_fwd featured", 32): (C(32, 32, 4, 2), C(64, 32, 8, 2), C(32, 32, 8, 1)),
        ("attention_fwd few", 16): (C(16, 64, 4, 3), C(16, 64, 4, 3), C(16, 64, 4, 2)),
        ("attention_fwd few", 32): (C(16, 32, 4, 2), C(16, 32, 4, 2), C(16, 32, 4, 1)),
        ("attention_bwd_keys", 16): (C(64, 128, 8, 2), C(32, 64, 4, 2), C(32, 32, 4, 1)),
        ("attention_bwd_keys", 32): (C(32, 64, 8, 2), C(32, 32, 8, 1), C(16, 16, 8, 1)),
        ("attention_bwd_keys featured", 16): (C(32, 32, 4, 1), C(32, 64, 8, 2), C(32, 32, 4, 1)),
        ("attention_bwd_keys featured", 32): (C(32, 64, 8, 2), C(32, 32, 8, 1), C(16, 16, 8, 1)),
        ("attention_bwd_queries", 16): (C(128, 64, 8, 2), C(64, 64, 4, 2), C(64, 32, 4, 1)),
        ("attention_bwd_queries", 32): (C(64, 32, 8, 2), C(32, 32, 4, 2), C(16, 16, 4, 1)),
        ("attention_bwd_queries featured", 16): (C(64, 32, 4, 2), C(64, 32, 4, 2), C(64, 32, 8, 1)),
        ("attention_bwd_queries featured", 32): (C(32, 64, 8, 2), C(32, 32, 4, 2), C(16, 16, 4, 1)),
        ("attention_bwd_bias", 16): (C(64, 32, 4, 2), C(64, 32, 4, 2), C(64, 32, 8, 1)),
        ("attention_bwd_bias", 32): (C(32, 64, 8, 2), C(32, 32, 4, 2), C(16, 16, 4, 1)),
    },
    "sm_90": {
        ("attention_fwd", 16): (C(128, 64, 8, 3), C(128, 128, 8, 2), C(128, 64, 8, 2)),
        ("attention_fwd", 32): (C(32, 32, 4, 2), C(32, 32, 8, 1), C(16, 64, 8, 1)),
        ("attention_fwd featured", 16): (C(128, 64, 8, 2), C(128, 64, 8, 2), C(64, 64, 8, 2)),
        ("attention_fwd featured", 32): (C(32, 32, 4, 2), C(32, 32, 8, 1), C(32, 32, 8, 1)),
        ("attention_fwd few", 16): (C(16, 64, 4, 3), C(16, 64, 4, 3), C(16, 64, 4, 2)),
        ("attention_fwd few", 32): (C(16, 32, 4, 2), C(16, 32, 4, 2), C(16, 32, 8, 1)),
        ("attention_bwd_keys", 16): (C(64, 64, 4, 2), C(32, 64, 4, 2), C(32, 64, 8, 2)),
        ("attention_bwd_keys", 32): (C(32, 64, 8, 2), C(16, 32, 4, 1), C(16, 16, 8, 1)),
        ("attention_bwd_keys featured", 16): (C(32, 64, 4, 2), C(32, 128, 8, 2), C(32, 32, 4, 1)),
        ("attention_bwd_keys featured", 32): (C(32, 64, 8, 2), C(16, 32, 4, 1), C(16, 16, 8, 1)),
        ("attention_bwd_queries", 16): (C(64, 64, 4, 2), C(128, 64, 8, 2), C(64, 32, 4, 1)),
        ("attention_bwd_queries", 32): (C(64, 32, 8, 2), C(16, 32, 4, 1), C(16, 16, 4, 1)),
        ("attention_bwd_queries featured", 16): (C(64, 32, 4, 2), C(64, 32, 4, 2), C(32, 32, 4, 1)),
        ("attention_bwd_queries featured", 32): (C(32, 64, 8, 2), C(16, 32, 4, 1), C(16, 16, 4, 1)),
        ("attention_bwd_bias", 16): (C(64, 64, 8, 2), C(64, 64, 8, 2), C(64, 64, 8, 1)),
        ("attention_bwd_bias", 32): (C(32, 64, 8, 2), C(32, 32, 4, 2), C(16, 16, 4, 1)),
    },
    "sm_100": {
        ("attention_fwd", 16): (C(128, 128, 8, 2, True), C(128, 128, 8, 2, True), C(128, 64, 8, 2)),
        ("attention_fwd", 32): (C(32, 32, 4, 2), C(32, 32, 8, 1), C(16, 32, 8, 1)),
        ("attention_fwd featured", 16): (C(128, 64, 8, 2), C(128, 64, 8, 2), C(64, 64, 8, 2)),
        ("attention_fwd featured", 32): (C(32, 32, 4, 2), C(32, 32, 8, 1), C(32, 32, 8, 1)),
        ("attention_fwd few", 16): (C(16, 64, 4, 3), C(16, 64, 4, 3), C(16, 64, 4, 2)),
        ("attention_fwd few", 32): (C(16, 32, 4, 2), C(16, 32, 4, 2), C(16, 32, 8, 1)),
        ("attention_bwd_keys", 16): (C(64, 128, 8, 2), C(64, 128, 8, 2), C(32, 64, 8, 2)),
        ("attention_bwd_keys", 32): (C(32, 64, 8, 2), C(16, 32, 4, 1), C(16, 16, 8, 1)),
        ("attention_bwd_keys featured", 16): (C(64, 128, 8, 2), C(32, 128, 8, 2), C(32, 64, 8, 1)),
        ("attention_bwd_keys featured", 32): (C(32, 64, 8, 2), C(16, 32, 4, 1), C(16, 16, 8, 1)),
        ("attention_bwd_queries", 16): (C(128, 64, 8, 2), C(128, 32, 8, 2), C(64, 64, 8, 1)),
        ("attention_bwd_queries", 32): (C(64, 32, 8, 2), C(16, 32, 4, 1), C(16, 16, 4, 1)),
        ("attention_bwd_queries featured", 16): (
            C(128, 64, 8, 2),
            C(64, 64, 8, 2),
            C(64, 32, 8, 1),
        ),
        ("attention_bwd_queries featured", 32): (C(32, 64, 8, 2), C(16, 32, 4, 1), C(16, 16, 4, 1)),
        ("attention_bwd_bias", 16): (C(64, 64, 8, 2), C(64, 64, 8, 2), C(64, 64, 8, 1)),
        ("attention_bwd_bias", 32): (C(32, 64, 8, 2), C(32, 32, 4, 2), C(16, 16, 4, 1)),
    },
    "sm_120": {
        ("attention_fwd", 16): (C(128, 64, 8, 3), C(128, 64, 8, 2), C(64, 32, 8, 2)),
        ("attention_fwd", 32): (C(32, 32, 4, 2), C(32, 32, 8, 1), C(16, 64, 8, 1)),
        ("attention_fwd featured", 16): (C(128, 64, 8, 2), C(128, 64, 8, 2), C(32, 32, 4, 1)),
        ("attention_fwd featured", 32): (C(32, 32, 4, 2), C(32, 32, 8, 1), C(32, 32, 8, 1)),
        ("attention_fwd few", 16): (C(16, 64, 4, 3), C(16, 64, 4, 3), C(16, 64, 4, 2)),
        ("attention_fwd few", 32): (C(16, 32, 4, 2), C(16, 32, 4, 2), C(16, 32, 8, 1)),
        ("attention_bwd_keys", 16): (C(32, 128, 8, 2), C(64, 64, 8, 2), C(32, 32, 4, 1)),
        ("attention_bwd_keys", 32): (C(32, 64, 8, 2), C(16, 32, 4, 1), C(16, 16, 8, 1)),
        ("attention_bwd_keys featured", 16): (C(32, 32, 4, 2), C(32, 64, 4, 1), C(16, 32, 4, 1)),
        ("attention_bwd_keys featured", 32): (C(32, 64, 8, 2), C(16, 32, 4, 1), C(16, 16, 8, 1)),
        ("attention_bwd_queries", 16): (C(64, 32, 4, 2), C(64, 64, 8, 2), C(64, 32, 8, 1)),
        ("attention_bwd_queries", 32): (C(64, 32, 8, 2), C(32, 16, 4, 1), C(16, 16, 4, 1)),
        ("attention_bwd_queries featured", 16): (C(32, 32, 4, 2), C(64, 64, 8, 2), C(16, 32, 4, 1)),
        ("attention_bwd_queries featured", 32): (C(32, 64, 8, 2), C(16, 32, 4, 1), C(16, 16, 4, 1)),
        ("attention_bwd_bias", 16): (C(64, 32, 4, 2), C(64, 64, 8, 2), C(32, 32, 4, 1)),
        ("attention_bwd_bias", 32): (C(32, 64, 8, 2), C(32, 32, 4, 2), C(16, 16, 4, 1)),
    },
    "gfx942": {
        ("attention_fwd", 16): (C(128, 128, 8, 2), C(128, 64, 8, 2), C(64, 32, 4, 1)),
        ("attention_fwd", 32): (C(32, 32, 4, 1), C(32, 32, 4, 1), C(16, 16, 4, 1)),
        ("attention_fwd featured", 16): (C(64, 64, 4, 1), C(64, 64, 8, 1), C(32, 32, 4, 1)),
        ("attention_fwd featured", 32): (C(32, 32, 4, 1), C(32, 32, 4, 1), C(16, 16, 4, 1)),
        ("attention_fwd few", 16): (C(16, 64, 4, 1), C(16, 64, 4, 1), C(16, 32, 4, 1)),
        ("attention_fwd few", 32): (C(16, 32, 4, 1), C(16, 32, 4, 1), C(16, 16, 4, 1)),
        ("attention_bwd_keys", 16): (C(64, 64, 4, 1), C(32, 64, 4, 1), C(32, 32, 4, 1)),
        ("attention_bwd_keys", 32): (C(32, 32, 4, 1), C(16, 16, 4, 1), C(16, 16, 4, 1)),
        ("attention_bwd_keys featured", 16): (C(32, 32, 4, 1), C(32, 32, 4, 1), C(16, 32, 4, 1)),
        ("attention_bwd_keys featured", 32): (C(32, 32, 4, 1), C(16, 16, 4, 1), C(16, 16, 4, 1)),
        ("attention_bwd_queries", 16): (C(64, 64, 4, 1), C(64, 64, 4, 1), C(32, 32, 4, 1)),
        ("attention_bwd_queries", 32): (C(32, 32, 4, 1), C(16, 16, 4, 1), C(16, 16, 4, 1)),
        ("attention_bwd_queries featured", 16): (C(32, 32, 4, 1), C(32, 32, 4, 1), C(16, 32, 4, 1)),
        ("attention_bwd_queries featured", 32): (C(32, 32, 4, 1), C(16, 16, 4, 1), C(16, 16, 4, 1)),
        ("attention_bwd_bias", 16): (C(32, 32, 4, 1), C(32, 32, 4, 1), C(16, 32, 4, 1)),
        ("attention_bwd_bias", 32): (C(32, 32, 4, 1), C(16, 16, 4, 1), C(16, 16, 4, 1)),
    },
}
# an interpreter's cost is a number of operations: few programs, but several tiles in a small test
TABLES["emulated"] = {
    (kernel, bits): same(C(16 if kernel.endswith(" few") else 64, 32, 4, 2))
    for kernel, bits in TABLES["sm_80"]
}
TABLES["gfx950"] = TABLES["gfx942"]


@functools.cache
def target() -> str:
    """emulated, sm_80, sm_90, ..., gfx942, ...: what Triton compiles for in this process."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "emulated"
    import triton

    found = triton.runtime.driver.active.get_current_target()
    return f"sm_{found.arch}" if found.backend == "cuda" else str(found.arch)


def family(name: str) -> str:
    """The table that serves a target."""
    if not name.startswith("sm_"):
        return name if name in TABLES else "gfx942"
    arch = int(name.removeprefix("sm_"))
    return "sm_80" if arch < 90 else "sm_90" if arch < 100 else "sm_100" if arch < 120 else "sm_120"


def has_descriptors() -> bool:
    """TMA: from sm_90 on. Before it, and on AMD, the compiler makes slow pointer code of descriptors."""
    return target().startswith("sm_") and int(target().removeprefix("sm_")) >= 90


# ---- choosing -----------------------------------------------------------------------------------


def attention_fwd(dtype: torch.dtype, D: int, Sq: int | None, modified: bool) -> Config:
    """Sq: None where it is unknown."""
    if Sq is not None and Sq <= DECODE_QUERIES:
        return choose("attention_fwd few", dtype, D)
    config = choose("attention_fwd", dtype, D, modified)
    if Sq is not None and Sq <= SHORT_QUERIES and config.block_m > 64:
        config = config._replace(block_m=64, warps=min(config.warps, 4))
    return config


def attention_rows(DV: int) -> Config:
    """32 rows of 256 columns spill on sm_120."""
    return Config(32 if DV <= 128 else 16, 0, 4, 1)


def choose(kernel: str, dtype: torch.dtype, D: int, modified: bool = False) -> Config:
    """modified: with features that change scores or weights, which take registers."""
    return configs()[key_of(kernel, dtype, D, modified)]


def key_of(kernel: str, dtype: torch.dtype, D: int, modified: bool = False) -> Key:
    head = 64 if D <= 64 else 128 if D <= 128 else 256
    return Key(f"{kernel} featured" if modified else kernel, 8 * dtype.itemsize, head)


@functools.cache
def configs() -> dict[Key, Config]:
    """What this process chooses from: the table of its target's family, what was measured, the user's."""
    found = {
        Key(kernel, bits, head): config
        for (kernel, bits), row in TABLES[family(target())].items()
        for head, config in zip((64, 128, 256), row, strict=True)
    }
    if target() != "emulated":
        for folder in (MEASURED, cache_folder()):
            found |= read_table(folder / table_name(target()))
    return found


# ---- tables on file: what was measured, and the user's own ---------------------------------------

MEASURED = Path(__file__).parents[2] / "measured"  # committed


def cache_folder() -> Path:
    """FASTATTN_CACHE, or fastattn in the platform's folder for caches."""
    given = os.environ.get("FASTATTN_CACHE")
    if given:
        return Path(given)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fastattn"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "fastattn"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastattn"


def table_name(target: str) -> str:
    return f"tune-{target}.json"


def read_table(path: Path) -> dict[Key, Config]:
    """What autotune wrote; with a warning nothing, where the file is not such a table."""
    try:
        return dict(entry(key, value) for key, value in read_rows(path).items() if key != "where")
    except (OSError, ValueError, TypeError) as error:
        warnings.warn(
            f"fastattn: {path} is ignored, it is no table of configurations: {error}", stacklevel=2
        )
        return {}


def read_rows(path: Path) -> dict[str, Any]:
    """The rows of a table and "where" they were measured; none where there is no file."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}")
    return found


def entry(key: str, value: Any) -> tuple[Key, Config]:
    kernel, bits, head = key.rsplit(" ", 2)
    found, config = Key(kernel, int(bits), int(head)), Config(*value)
    if (kernel, found.bits) not in TABLES["sm_80"] or found.head not in (64, 128, 256):
        raise ValueError(f"there is no kernel {key!r}")
    if not all(type(x) is int and x > 0 for x in config[:4]):
        raise ValueError(f"blocks, warps and stages must be counts, got {value} for {key!r}")
    if any(x & (x - 1) for x in config[:3]):
        raise ValueError(f"blocks and warps must be powers of 2, got {value} for {key!r}")
    return found, config


def write_table(path: Path, table: dict[Key, Config], where: str) -> None:
    """Adds to what is there already."""
    rows = {str(key): list(config) for key, config in (read_table(path) | table).items()}
    write_rows(path, rows, where)


def write_rows(path: Path, rows: Mapping[str, Any], where: str) -> None:
    """A row a line, in order, so that a change is a line of a diff."""
    lines = [f'  "where": {json.dumps(where)}']
    lines += [f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(rows.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(unfinished, path)
