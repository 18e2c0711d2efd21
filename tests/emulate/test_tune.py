"""Which blocks a call gets: from the committed tables, and from the user's own."""

import importlib.util
import json
import subprocess
import sys
import warnings

import pytest
import torch

from fastattn.kernels.triton import tune
from fastattn.kernels.triton.tune import Config, Key

KEY = Key("attention_fwd", 16, 128)


@pytest.fixture
def on_sm_90(monkeypatch, tmp_path):
    """As in a process that compiles for sm_90, with no table of the user's yet."""
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "target", lambda: "sm_90")
    tune.configs.cache_clear()
    yield tmp_path / "tune-sm_90.json"
    tune.configs.cache_clear()


def test_every_target_has_a_row_for_every_kernel():
    rows = tune.TABLES["sm_80"].keys()
    assert {bits for _, bits in rows} == {16, 32}
    for target, table in tune.TABLES.items():
        assert table.keys() == rows, target
        for row in table.values():
            assert len(row) == 3
            for config in row:
                assert config.block_m >= 16 and config.block_n >= 16
                assert config.warps in (4, 8) and tune.SPLIT_KEYS % config.block_n == 0


@pytest.mark.parametrize(
    ("target", "family"),
    [("sm_80", "sm_80"), ("sm_86", "sm_80"), ("sm_89", "sm_80"), ("sm_90", "sm_90"), ("sm_100", "sm_100"),
     ("sm_103", "sm_100"), ("sm_120", "sm_120"), ("sm_121", "sm_120"), ("gfx942", "gfx942"),
     ("gfx90a", "gfx942"), ("gfx950", "gfx950"), ("emulated", "emulated")],
)  # fmt: skip
def test_families(target, family):
    assert tune.family(target) == family


def test_a_few_queries_get_a_small_block(on_sm_90):
    def block(Sq, D=128):
        return tune.attention_fwd(torch.bfloat16, D, Sq, False).block_m

    assert block(1) == block(4) == 16
    assert block(5) == block(64) == 64
    assert block(65) == block(None) == tune.TABLES["sm_90"]["attention_fwd", 16][1].block_m


def test_the_user_s_table_comes_before_the_committed(on_sm_90):
    assert (
        tune.choose("attention_fwd", torch.float16, 80)
        == tune.TABLES["sm_90"]["attention_fwd", 16][1]
    )
    tune.write_table(on_sm_90, {KEY: Config(64, 32, 4, 1)}, "a GPU")
    tune.configs.cache_clear()
    assert tune.choose("attention_fwd", torch.float16, 80) == Config(64, 32, 4, 1)
    other = tune.choose("attention_fwd", torch.float16, 64)
    assert other == tune.TABLES["sm_90"]["attention_fwd", 16][0]
    # what is there already stays
    tune.write_table(on_sm_90, {KEY._replace(head=64): Config(32, 32, 4, 1)}, "another")
    assert tune.read_table(on_sm_90).keys() == {KEY, KEY._replace(head=64)}
    assert tune.read_rows(on_sm_90)["where"] == "another"


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"attention_fwd 16 128": 3}', '{"attention_fwd 16 128": [64, 32]}',
     '{"attention_fwd 16 128": [60, 32, 4, 1]}', '{"attention_fwd 16 128": [64, 32, 4, "1"]}',
     '{"atention_fwd 16 128": [64, 32, 4, 1]}', '{"attention_fwd 16 100": [64, 32, 4, 1]}', '{"x": []}'],
)  # fmt: skip
def test_a_bad_table_is_ignored_with_one_sentence(on_sm_90, text):
    on_sm_90.write_text(text)
    with pytest.warns(UserWarning, match="is ignored, it is no table of configurations") as found:
        chosen = tune.choose("attention_fwd", torch.bfloat16, 128)
    assert chosen == tune.TABLES["sm_90"]["attention_fwd", 16][1]
    assert len(found) == 1 and str(on_sm_90) in str(found[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tune.choose("attention_fwd", torch.bfloat16, 64)  # says it once


def test_emulation_never_reads_the_user_s_table(on_sm_90, monkeypatch):
    monkeypatch.setattr(tune, "target", lambda: "emulated")
    (on_sm_90.parent / "tune-emulated.json").write_text("{")
    assert (
        tune.choose("attention_fwd", torch.bfloat16, 64)
        == tune.TABLES["emulated"]["attention_fwd", 16][0]
    )


def test_the_cache_folder_is_the_platform_s(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTATTN_CACHE", raising=False)
    monkeypatch.setattr(tune.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(tune.sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert tune.cache_folder() == tmp_path / ".cache" / "fastattn"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert str(tune.cache_folder()) == "/elsewhere/fastattn"
    monkeypatch.setattr(tune.sys, "platform", "darwin")
    assert tune.cache_folder() == tmp_path / "Library" / "Caches" / "fastattn"


# ---- autotune -----------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture
def tuning(on_sm_90, monkeypatch):
    """Two kernels whose result is 1; the row for long sequences starts from 128 x 64, 8 warps, 3 stages."""
    from fastattn.kernels.triton import autotune

    def calls(device, dtype, D):
        for kernel in ("attention_fwd", "attention_fwd few"):
            yield (
                kernel,
                False,
                lambda k=kernel: torch.ones(2) if tune.choose(k, dtype, D) else None,
            )

    monkeypatch.setattr(autotune, "calls", calls)
    monkeypatch.setitem(tune.configs(), KEY, Config(128, 64, 8, 3))
    return autotune


def run_autotune(autotune, timer, **options):
    options = {"dtypes": [torch.bfloat16], "head_dims": [128], "where": "a GPU"} | options
    return autotune.autotune("cuda", timer=timer, **options)


def prefers_4_warps(call):
    config = tune.configs()[KEY]
    if config.block_n == 128:
        raise RuntimeError("out of resource: shared memory")
    return 10.0 + config.stages - (9.0 if config.warps == 4 and config.block_m > 16 else 0.0)


@needs_triton
def test_autotune_writes_what_a_timer_finds_fastest(tuning, on_sm_90, tmp_path):
    first, second = run_autotune(tuning, prefers_4_warps, paths=[tmp_path / "copy.json"])
    assert (first.key, first.after) == (KEY, Config(128, 64, 4, 3))
    assert (first.milliseconds_before, first.milliseconds) == (13.0, 4.0)
    assert first.refused == ("(128, 128, 8, 3, False): out of resource: shared memory",)
    found = json.loads(on_sm_90.read_text())
    assert found["attention_fwd 16 128"] == [128, 64, 4, 3, False] and found["where"] == "a GPU"
    assert len(found) == 3 and second.key.kernel == "attention_fwd few"
    assert (tmp_path / "copy.json").read_text() == on_sm_90.read_text()
    assert tune.choose("attention_fwd", torch.bfloat16, 128) == Config(128, 64, 4, 3)


@needs_triton
@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_autotune_takes_nothing_that_is_wrong(tuning, wrong, monkeypatch):
    given = tune.configs()[KEY]

    def calls(device, dtype, D):
        right = lambda: tune.configs()[KEY] == given  # noqa: E731
        yield (
            "attention_fwd",
            False,
            lambda: (torch.ones(2), torch.ones(2) if right() else torch.tensor([1, wrong])),
        )

    monkeypatch.setattr(tuning, "calls", calls)
    (row,) = run_autotune(tuning, lambda call: 5.0 if tune.configs()[KEY] == given else 1.0)
    assert row.after == given
    assert len(row.refused) == len(list(tuning.neighbours(given)))
    assert row.refused[0].endswith(f"not the results of {tuple(given)}")


@needs_triton
def test_autotune_ends_in_time_and_keeps_what_it_found(tuning, on_sm_90, monkeypatch):
    now = iter((0.0, 0.0, 100.0))
    monkeypatch.setattr(tuning.time, "monotonic", lambda: next(now))
    (row,) = run_autotune(tuning, prefers_4_warps, seconds=50.0)
    assert tune.read_table(on_sm_90) == {KEY: row.after}


@needs_triton
def test_a_row_that_does_not_run_is_told_and_not_written(tuning, on_sm_90):
    def dead(call):
        raise RuntimeError("an illegal memory access\nin detail")

    first, _ = run_autotune(tuning, dead)
    assert first.refused == ("(128, 64, 8, 3, False): an illegal memory access",)
    assert not on_sm_90.exists()


@needs_triton
def test_what_is_committed_comes_before_the_family_s_table_and_after_the_user_s(
    on_sm_90, monkeypatch, tmp_path
):
    monkeypatch.setattr(tune, "MEASURED", tmp_path / "measured")
    other = KEY._replace(head=64)
    committed = {KEY: Config(32, 32, 4, 1), other: Config(32, 32, 4, 1)}
    tune.write_table(tune.MEASURED / on_sm_90.name, committed, "a GPU")
    tune.write_table(on_sm_90, {KEY: Config(64, 32, 4, 1)}, "mine")
    assert tune.configs()[KEY] == Config(64, 32, 4, 1)
    assert tune.configs()[other] == Config(32, 32, 4, 1)


@needs_triton
def test_what_was_compiled_ahead_is_what_a_launch_asks_for(on_sm_90, monkeypatch, tmp_path):
    """Nothing is compiled again under a driver that knows of a GPU: ahead, and then launched."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    code = "import sys; from fastattn.emulate import ahead; from fastattn.kernels.triton import autotune"
    code += "; autotune.LENGTH = 128; ahead.main('sm_90', 'bfloat16', '1', '64')"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    kernels = sorted(p.name for p in (tmp_path / "cache").glob("*/*.cubin"))
    assert len(kernels) >= 8
    launch = "\n".join([
        "import torch; from tests.gpu import driver; driver.install()",
        "from fastattn.kernels.triton import autotune, tune; autotune.LENGTH = 128",
        "for key, given in tune.configs().items():",
        "    tune.configs()[key] = next(autotune.neighbours(given))",
        "for _, _, call in autotune.calls(torch.device('cpu'), torch.bfloat16, 64): call()",
        "print(len(driver.LAUNCHED))",
    ])  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", launch], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) > 10
    assert sorted(p.name for p in (tmp_path / "cache").glob("*/*.cubin")) == kernels
