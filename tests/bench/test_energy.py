"""Joules: read from fakes of what machines have, and absent with a reason elsewhere."""

import stat
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch

from fastattn.bench import energy, run_bench
from fastattn.bench.harness import measure

from .tiny import FakeClock, workload


def zone(folder, path, name, energy=1_000_000, most=262_143_328_850):
    where = folder / path
    where.mkdir(parents=True)
    for file, text in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", most)):
        (where / file).write_text(f"{text}\n")
    return where


@pytest.fixture
def powercap(tmp_path):
    """Two sockets, cores inside one, memory apart, everything together once more."""
    zone(tmp_path, "intel-rapl:0", "package-0")
    zone(tmp_path, "intel-rapl:0:0", "core")
    zone(tmp_path, "intel-rapl:0:1", "dram")
    zone(tmp_path, "intel-rapl:1", "package-1", energy=900, most=999)
    zone(tmp_path, "intel-rapl:2", "psys")
    zone(tmp_path, "intel-rapl-mmio:0", "package-0")
    return tmp_path


def test_rapl_adds_packages_and_memory_and_starts_again_at_its_range(powercap):
    meter = energy.rapl(powercap)
    assert meter.name == "RAPL: package-0, dram, package-1"
    meter.start()
    (powercap / "intel-rapl:0/energy_uj").write_text("3000000\n")
    (powercap / "intel-rapl:0:0/energy_uj").write_text("9000000\n")
    (powercap / "intel-rapl:1/energy_uj").write_text("100\n")
    assert meter.stop() == pytest.approx(2.0 + 200e-6)


def test_a_machine_that_counts_nothing_says_so(tmp_path, powercap, monkeypatch):
    missing = tmp_path / "missing"
    assert energy.rapl(missing) == f"none: {missing} counts no processor's energy"

    def refused(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(energy.Rapl, "read", refused)
    assert energy.rapl(powercap).endswith("intel-rapl:0/energy_uj is readable by root alone")


class Counter:
    """5 W, by the clock of the tests."""

    name, seconds = "a counter", 10.0

    def __init__(self, clock):
        self.clock = clock

    def start(self):
        self.at = self.clock()

    def stop(self):
        return 5.0 * (self.clock() - self.at)


def test_a_row_s_joules_are_those_of_a_call_and_backward_alone_has_none():
    clock = FakeClock()
    rows, _ = measure(workload(clock), clock, budget=0.0, meter=Counter(clock))
    found = {(row.contestant, row.direction): row.joules for row in rows}
    # forward takes 1 s and 2 s, forward and backward three times that
    assert found["fastattn", "forward"] == 5.0 and found["naive", "forward"] == 10.0
    assert found["fastattn", "both"] == 15.0 and found["fastattn", "backward"] is None


@pytest.mark.parametrize("asked", [True, False])
def test_a_run_tells_what_counted_or_why_nothing_did(asked, monkeypatch, powercap):
    monkeypatch.setattr("fastattn.bench.FAMILIES", {"double": lambda setting: iter(())})
    monkeypatch.setattr("fastattn.bench.ceiling", lambda device, dtype: {})
    monkeypatch.setattr(energy, "POWERCAP", powercap)
    told = run_bench(energy=asked).about["energy"]
    assert told == ("RAPL: package-0, dram, package-1" if asked else "none: it was not asked for")


# ---- GPUs ---------------------------------------------------------------------------------------

UUID = "0f0f-1"


@pytest.fixture
def gpu(monkeypatch):
    """One of NVIDIA's, of which neither NVML nor nvidia-smi is here yet."""
    properties = types.SimpleNamespace(uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    find = energy.importlib.util.find_spec
    there = lambda name: find(name) if sys.modules.get(name, find) else None  # noqa: E731
    monkeypatch.setattr(energy.importlib.util, "find_spec", there)
    monkeypatch.setenv("PATH", "/nowhere")


def test_nvml_counts_this_board(gpu, monkeypatch):
    module = types.ModuleType("pynvml")
    module.__spec__ = ModuleSpec("pynvml", None)
    counts = iter((1000, 2000, 4500))
    module.NVMLError, module.nvmlInit = OSError, lambda: None
    module.nvmlDeviceGetHandleByUUID = {f"GPU-{UUID}": "handle"}.__getitem__
    module.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next(counts)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    meter = energy.find_meter("cuda")
    meter.start()
    assert meter.name.startswith("NVML") and meter.stop() == 2.5

    def unsupported(handle):
        raise OSError("Not Supported")

    module.nvmlDeviceGetTotalEnergyConsumption = unsupported
    assert energy.find_meter("cuda") == "none: neither nvidia-ml-py nor nvidia-smi is here"


def fake_smi(folder, watts, monkeypatch):
    """Says `watts` once, or every 50 ms where it is asked to go on."""
    script = folder / "nvidia-smi"
    script.write_text(
        f"#!{sys.executable}\nimport sys, time\nassert '-i GPU-{UUID}' in ' '.join(sys.argv)\n"
        f"while True:\n    print({watts!r}, flush=True)\n    time.sleep(0.01)\n"
        "    if '-lms' not in sys.argv: break\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))


def test_nvidia_smi_gives_mean_power_times_seconds(gpu, tmp_path, monkeypatch):
    fake_smi(tmp_path, "250.00", monkeypatch)
    meter = energy.find_meter("cuda")
    assert meter.name.startswith("nvidia-smi")
    meter.start()
    said = [meter.process.stdout.readline() for _ in range(20)]
    assert said == ["250.00\n"] * 20  # it runs: a meter's own reading is of what comes after
    energy.time.sleep(1.0)
    start = energy.time.perf_counter()
    seconds = start - meter.at
    assert meter.stop() == pytest.approx(250.0 * seconds, rel=0.2)
    meter.start()
    meter.process.kill()
    assert meter.stop() is None  # too few samples


def test_power_that_is_not_told_is_absent(gpu, tmp_path, monkeypatch):
    fake_smi(tmp_path, "[N/A]", monkeypatch)
    assert energy.find_meter("cuda") == "none: nvidia-smi does not tell this GPU's power"
    assert energy.numbers("250.0\n[N/A]\n12") == [250.0, 12.0]


def test_other_gpus_have_no_meter(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert energy.find_meter("cuda").startswith("none: only RAPL, NVML and nvidia-smi")
