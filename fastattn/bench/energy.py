"""Joules of a call, where the machine tells them: RAPL on a CPU, NVML or nvidia-smi on an NVIDIA GPU.

A counter is read before and after a block of one contestant's calls and nothing else, some time after
the rounds that are timed; the difference over the number of calls is a row's. So it is of the whole
package or board: with what idling takes, the waiting between calls, and whatever else ran there. A
block is long against the steps of the counter. Backward alone cannot be told from the forward pass before it.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Protocol

import torch

POWERCAP = Path("/sys/class/powercap")
FEWEST = 5  # samples of power, or there is no average


class Meter(Protocol):
    """name: what is counted. seconds: how long a block should be, at the least."""

    name: str
    seconds: float

    def start(self) -> None: ...
    def stop(self) -> float | None:
        """Joules since start(); None where too little was seen."""


def find_meter(device: str) -> Meter | str:
    """What counts joules of this device, or a sentence that says why nothing does."""
    kind = torch.device(device).type
    if kind == "cpu":
        return rapl(POWERCAP)
    if kind != "cuda" or torch.version.hip:
        return "none: only RAPL, NVML and nvidia-smi are asked for energy"
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return nvml(uuid) or smi(uuid)


class Rapl:
    """Microjoules in files of Linux, AMD's too, that start again from 0 at their range. Steps of 1 ms."""

    seconds = 0.2

    def __init__(self, zones: list[Path]) -> None:
        names = ", ".join((zone / "name").read_text().strip() for zone in zones)
        self.name, self.zones = f"RAPL: {names}", zones
        self.ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
        self.start()

    def start(self) -> None:
        self.before = self.read()

    def stop(self) -> float:
        rows = zip(self.before, self.read(), self.ranges, strict=True)
        return sum((after - before) % (most + 1) for before, after, most in rows) / 1e6

    def read(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self.zones]


def rapl(folder: Path) -> Meter | str:
    """Packages, and memory where it is counted apart; cores and graphics are parts of a package, and
    "psys" has everything once more."""
    zones = [
        zone
        for zone in sorted(folder.glob("intel-rapl:*"))
        if (zone / "name").read_text().strip().startswith(("package", "dram"))
    ]
    if not zones:
        return f"none: {folder} counts no processor's energy"
    try:
        return Rapl(zones)
    except PermissionError:
        return f"none: {zones[0]}/energy_uj is readable by root alone"
    except OSError as error:
        return f"none: {zones[0]}: {error.strerror}"


class Nvml:
    """Millijoules since the driver was loaded, from Volta on. Steps of 20 to 100 ms."""

    seconds = 1.0
    name = "NVML: energy of the board"

    def __init__(self, module: Any, uuid: str) -> None:
        module.nvmlInit()
        handle = module.nvmlDeviceGetHandleByUUID(uuid)
        self.read = lambda: float(module.nvmlDeviceGetTotalEnergyConsumption(handle))
        self.start()

    def start(self) -> None:
        self.before = self.read()

    def stop(self) -> float:
        return (self.read() - self.before) / 1e3


def nvml(uuid: str) -> Meter | None:
    """None where nvidia-ml-py is not installed, or this GPU does not count."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        return Nvml(pynvml, uuid)
    except pynvml.NVMLError:
        return None


class Smi:
    """Watts of the board, many a second, times seconds. Each is a mean over the second before it (Ampere
    and later), so those of the first third tell of what ran before."""

    seconds = 3.0
    name = "nvidia-smi: mean power of the board times seconds"

    def __init__(self, uuid: str) -> None:
        self.command = [
            "nvidia-smi",
            "-i",
            uuid,
            "--query-gpu=power.draw",
            "--format=csv,noheader,nounits",
        ]

    def start(self) -> None:
        command = [*self.command, "-lms", "50"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.at = time.perf_counter()

    def stop(self) -> float | None:
        seconds = time.perf_counter() - self.at
        self.process.terminate()
        watts = numbers(self.process.communicate()[0])
        watts = watts[len(watts) // 3 :]
        return seconds * sum(watts) / len(watts) if len(watts) >= FEWEST else None

    def once(self) -> list[float]:
        return numbers(subprocess.run(self.command, capture_output=True, text=True).stdout)


def smi(uuid: str) -> Meter | str:
    if shutil.which("nvidia-smi") is None:
        return "none: neither nvidia-ml-py nor nvidia-smi is here"
    meter = Smi(uuid)
    return meter if meter.once() else "none: nvidia-smi does not tell this GPU's power"


def numbers(text: str) -> list[float]:
    """Of the lines that hold one; "[N/A]" and a line that was cut hold none."""
    found = []
    for line in text.splitlines():
        try:
            found.append(float(line))
        except ValueError:
            continue
    return found
