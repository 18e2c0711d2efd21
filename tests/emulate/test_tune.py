"""Which blocks a call gets: from the committed tables, and from the user's own."""

import importlib.util
import json
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
    tune.write_users_table(on_sm_90, {KEY: Config(64, 32, 4, 1)})
    tune.configs.cache_clear()
    assert tune.choose("attention_fwd", torch.float16, 80) == Config(64, 32, 4, 1)
    other = tune.choose("attention_fwd", torch.float16, 64)
    assert other == tune.TABLES["sm_90"]["attention_fwd", 16][0]
    # what is there already stays
    tune.write_users_table(on_sm_90, {KEY._replace(head=64): Config(32, 32, 4, 1)})
    assert tune.users_table(on_sm_90).keys() == {KEY, KEY._replace(head=64)}


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


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_autotune_writes_what_a_timer_finds_fastest(on_sm_90, monkeypatch):
    from fastattn.kernels.triton import autotune

    def calls(device, dtype, D):
        for kernel in ("attention_fwd", "attention_fwd few"):
            yield kernel, False, lambda k=kernel: tune.choose(k, dtype, D)

    def timer(call):
        config = call()
        if config.block_n == 128:
            raise RuntimeError("out of resource: shared memory")
        return 10.0 + config.stages - (9.0 if config.warps == 4 and config.block_m > 16 else 0.0)

    given = tune.choose("attention_fwd", torch.bfloat16, 128)
    monkeypatch.setattr(autotune, "calls", calls)
    monkeypatch.setitem(tune.configs(), KEY, Config(128, 64, 8, 3))
    path = autotune.autotune("cuda", dtypes=[torch.bfloat16], head_dims=[128], timer=timer)
    assert path == on_sm_90
    found = json.loads(path.read_text())
    assert found["attention_fwd 16 128"] == [128, 64, 4, 3, False]
    assert len(found) == 2
    assert tune.choose("attention_fwd", torch.bfloat16, 128) == Config(128, 64, 4, 3) != given
