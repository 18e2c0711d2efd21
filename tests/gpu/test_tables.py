"""Who serves a GPU's call: from what was measured, and how that is measured."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import fastattn as fa
from fastattn import bench, registry
from fastattn.bench import backends
from fastattn.bench.harness import Absent, Row
from fastattn.bench.workload import Setting
from fastattn.cli import app
from fastattn.kernels.triton import tune


def call(operator="attention", dtype=torch.bfloat16, features=()):
    return registry.Call(operator, operator, "cuda", dtype, frozenset(features), ())


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """As on an H100 of which nothing is known yet; gives the committed file and the user's."""
    monkeypatch.setattr(registry.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(registry.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(registry.torch.version, "hip", None)
    monkeypatch.setattr(tune, "target", lambda: "sm_90")
    monkeypatch.setattr(tune, "MEASURED", tmp_path / "measured")
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "_unusable", {})
    registry.measured.cache_clear()
    yield [tmp_path / folder / "backends-sm_90.json" for folder in ("measured", "cache")]
    registry.measured.cache_clear()


def test_the_order_is_the_table_s_and_the_user_s_goes_before_the_committed(tables):
    assert registry.order(call()) == ("cuda", "triton", "reference")
    tune.write_rows(tables[0], {"attention 16": "triton", "norm 32": "triton"}, "an H100")
    tune.write_rows(tables[1], {"norm 32": "cuda"}, "mine")
    registry.measured.cache_clear()
    assert registry.order(call()) == ("triton", "cuda", "reference")
    assert registry.order(call(dtype=torch.float16))[0] == "triton"
    assert registry.order(call(dtype=torch.float32))[0] == "cuda"
    assert registry.order(call("norm", torch.float32))[0] == "cuda"
    # decoding has a row of its own
    assert registry.order(call(features={"causal", "diagonal_at_length"}))[0] == "cuda"


def test_amd_s_gpus_have_tables_of_their_own(tables, monkeypatch):
    found = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(registry.torch.version, "hip", "7.0")
    monkeypatch.setattr(registry.torch.cuda, "get_device_properties", lambda: found)
    assert registry.gpu_target() == "gfx942"


def test_compiling_takes_the_choice_for_a_constant(monkeypatch):
    monkeypatch.setattr(registry, "measured", lambda: {"attention 16": "triton"})

    @torch.compile(backend="eager", fullgraph=True)
    def first(x):
        return x + 1 if registry.first_on_gpu("attention 16") == "triton" else x

    assert first(torch.zeros(1)) == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"attention 16": "rocm"}'])
def test_a_bad_table_is_ignored_with_one_sentence(tables, text):
    tables[0].parent.mkdir()
    tables[0].write_text(text)
    with pytest.warns(UserWarning, match="is ignored, it is no table of backends") as found:
        assert registry.order(call())[0] == "cuda"
        registry.order(call())
    assert len(found) == 1


def test_explain_says_where_it_was_measured(tables, monkeypatch):
    x = torch.zeros(1, 1, 4, 8)
    as_on_a_gpu = lambda name, tensors, spec: call(dtype=torch.float32)  # noqa: E731
    monkeypatch.setattr("fastattn.ops.attention.request", as_on_a_gpu)
    monkeypatch.setattr(registry, "reason_against", lambda name, asked: None)
    assert f"cuda is asked before triton: {registry.UNMEASURED}" in fa.explain(x, x, x)
    tune.write_rows(tables[0], {"attention 32": "triton"}, "an H100")
    registry.measured.cache_clear()
    assert "triton is asked before cuda: measured on an H100" in fa.explain(x, x, x)


# ---- measuring ----------------------------------------------------------------------------------


def row(workload, name, direction, seconds):
    return Row(workload.family, workload.case, workload.sizes, "bfloat16", direction, name, seconds,
               seconds, seconds, 5, 1.0, 1.0, "bytes", None, 0.5)  # fmt: skip


def measuring(seconds):
    """seconds(workload, backend): of a call both ways, forward a millionth of it; a sentence: it is wrong."""

    def measure(workload, budget):
        rows, absent = [], []
        for contestant in workload.contestants:
            found = seconds(workload, contestant.name)
            if isinstance(found, str):
                absent.append(Absent("", "", {}, "bfloat16", contestant.name, found, True))
                continue
            rows += [row(workload, contestant.name, d, s) for d, s in
                     (("forward", found * 1e-6), ("both", found))]  # fmt: skip
        return rows, absent

    return measure


@pytest.fixture(scope="module")
def chosen():
    return backends.workloads("cpu", [torch.bfloat16, torch.float32], quick=True)


def test_every_operator_has_workloads(chosen):
    names = {backends.row_of(w).partition(" ")[0] for w in chosen}
    assert names == {"attention", "decode", "norm", "softmax", "cross_entropy", "linear_cross_entropy",
                     "gelu", "glu"}  # fmt: skip
    # rows that calls look for
    assert {name for name in names if name != "decode"} <= set(registry.operators("reference"))
    both = backends.on_both(chosen[0])
    assert [c.name for c in both.contestants] == ["cuda", "triton", "naive"]
    with both.contestants[1].context():
        assert registry.wanted(None) == "triton"


def test_the_faster_goes_first_and_the_wrong_does_not(chosen):
    def seconds(workload, name):
        if workload.family == "softmax" and name != "naive":
            return f"wrong: {workload.family}"
        if workload.family == "norm" and name == "triton":
            return "wrong"
        slower = name == ("cuda" if workload.family.startswith("attention") else "triton")
        return 3.0 if slower else 1.0

    found = {c.row: c for c in backends.compare_backends(chosen, measuring(seconds))}
    assert found["attention 16"].first == "triton"
    assert found["attention 16"].cuda_over_triton == pytest.approx(3.0)
    assert found["decode 32"].first == "cuda"
    assert found["norm 16"][1:3] == ("cuda", None) and found["norm 16"].reasons == (
        "triton: wrong",
    )
    assert "softmax 16" not in found  # nobody is right: nothing is said
    rows = backends.as_rows(list(found.values()))
    assert rows["cross_entropy_inplace 16"] == rows["cross_entropy 16"] == "cuda"


def test_time_that_is_over_ends_it(chosen):
    assert backends.compare_backends(chosen, measuring(lambda *_: 1.0), seconds=0.0) == []


def test_the_command_writes_what_is_committed(tables, monkeypatch, tmp_path, chosen):
    command = importlib.import_module("fastattn.cli.autotune")
    monkeypatch.setattr(command, "known_gpu", lambda device: None)
    monkeypatch.setattr(command.rivals, "workloads", lambda *_: chosen)
    measure = measuring(lambda w, name: 1.0 if name == "triton" else 2.0)
    monkeypatch.setattr(bench, "measured", lambda w, clock, budget: measure(w, budget))
    arguments = [
        "autotune",
        "backends",
        "--device",
        "cpu",
        "--save",
        str(tmp_path / "new"),
        "--json",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["backends"]) == 16 and "16 of backends" in done.stderr
    assert (tmp_path / "new" / tables[1].name).read_text() == tables[1].read_text()
    assert registry.order(call()) == ("triton", "cuda", "reference")


# ---- an end in time -----------------------------------------------------------------------------


def test_bench_ends_in_time_and_names_what_it_did_not_reach(monkeypatch):
    found = bench.in_turns(
        bench.workloads(["norm", "softmax"], [Setting(torch.float32, quick=True)])
    )
    assert [w.family for w in found[:4]] == ["norm", "softmax"] * 2
    monkeypatch.setattr(bench, "ceiling", lambda device, dtype: {})
    now = iter((0.0, 1.0, 99.0))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(now, 99.0))
    ran = []
    monkeypatch.setattr(bench, "measure", lambda w, *_: ran.append(w.name) or ([], []))
    about = bench.run_bench(["norm", "softmax"], quick=True, seconds=9.0, energy=False).about
    assert ran == [found[0].name] and about["not_reached"] == [w.name for w in found[1:]]


def test_a_workload_that_cannot_be_judged_is_told(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB\nmore")

    monkeypatch.setattr(bench, "measure", full)
    (workload, *_) = bench.workloads(["norm"], [Setting(torch.float32, quick=True)])
    rows, (absent,) = bench.measured(workload)
    assert not rows and absent.wrong
    assert absent.reason == "nobody is judged: CUDA out of memory. Tried to allocate 8 GiB"
