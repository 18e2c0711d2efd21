"""A driver of Triton's for a GPU that is not there: what is launched is compiled and loaded as ever, and
then noted instead of run."""

import time

import torch

from fastattn.emulate.offline import NamesTarget, gpu_target

LAUNCHED = []  # (kernel, grid)


class Utils:
    def load_binary(self, name, kernel, shared, device):
        assert len(kernel) > 1000 and shared <= 232448
        return object(), name, 128, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132,
                "warpSize": 32}  # fmt: skip


class Launcher:
    def __init__(self, src, metadata):
        self.arguments = len(src.fn.arg_names)

    def __call__(
        self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments
    ):
        assert len(arguments) == self.arguments
        LAUNCHED.append((function, (x, y, z)))


class Event:
    def __init__(self, enable_timing):
        pass

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


class Interface:
    Event = Event

    @staticmethod
    def synchronize():
        pass


class FakeDriver(NamesTarget):
    utils, launcher_cls = Utils(), Launcher

    def get_device_interface(self):
        return Interface

    def get_empty_cache_for_benchmark(self):
        return torch.empty(0)

    def clear_cache(self, cache):
        pass


def install(target="sm_90"):
    import triton

    triton.runtime.driver.set_active(FakeDriver(gpu_target(target)))
