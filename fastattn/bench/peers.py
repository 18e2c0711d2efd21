"""Who else can make the same call: other libraries, and torch's own ways. A peer that cannot take part
says so in a sentence, as a Refusal.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .workload import Call, Contestant, Inputs, Refusal, Setting

GPU_ONLY = ("flash_attn", "xformers", "liger_kernel")
Bind = Callable[[Inputs], Call]


def need(module: str, setting: Setting) -> None:
    """Raises Refusal where a library is not here, or not for this device."""
    if module in GPU_ONLY and not setting.on_gpu:
        raise Refusal(f"{module} has kernels for GPUs alone, and the tensors are on the CPU")
    if importlib.util.find_spec(module) is None:
        raise Refusal(f"{module} is not installed")


def needing(module: str, setting: Setting, bind: Bind) -> Bind:
    def bound(x: Inputs) -> Call:
        need(module, setting)
        return bind(x)

    return bound


def compiled(function: Callable[..., Tensor], setting: Setting, **options: Any) -> Contestant:
    """torch.compile of the naive form: minutes over all shapes, so only when it is asked for."""

    def bind(x: Inputs) -> Call:
        if not setting.compile:
            raise Refusal("compiling takes long: --compile asks for it")
        torch.compiler.reset()
        faster = torch.compile(function, dynamic=False)
        return lambda: faster(**x, **options)

    return Contestant("torch.compile", bind)


def room_for(bytes_needed: float, device: str, what: str) -> None:
    """Raises Refusal rather than let the machine run out of memory."""
    free = free_bytes(device)
    if free is not None and bytes_needed > 0.8 * free:
        raise Refusal(f"{what} take {bytes_needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


def free_bytes(device: str) -> int | None:
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            found = dict(line.split(":") for line in lines)
    except OSError:
        return None
    return int(found["MemAvailable"].split()[0]) * 1024


# ---- ONNX Runtime -------------------------------------------------------------------------------

ONNX_TYPES = {torch.float32: "FLOAT", torch.float16: "FLOAT16"}


def onnx_session(model: bytes | str) -> Any:
    """A session on as many threads as torch has. Its threads sleep as soon as a call is over, or they
    would spin in the next contestant's time."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class of their own in common
        raise Refusal(f"ONNX Runtime {onnxruntime.__version__}: {first_line(error)}") from None


def onnx_call(session: Any, x: Inputs) -> Call:
    feeds = {name: tensor.detach().contiguous().numpy() for name, tensor in x.items()}
    return lambda: torch.from_numpy(session.run(None, feeds)[0])


def onnx_type(x: Inputs, setting: Setting) -> int:
    """The element type of a model for these inputs."""
    if setting.on_gpu:
        raise Refusal("ONNX Runtime is a peer on the CPU alone")
    need("onnxruntime", setting)
    need("onnx", setting)
    import onnx

    dtype = next(tensor.dtype for tensor in x.values() if tensor.is_floating_point())
    if dtype not in ONNX_TYPES:
        raise Refusal(f"ONNX Runtime is not tried in {str(dtype).removeprefix('torch.')}")
    return int(getattr(onnx.TensorProto, ONNX_TYPES[dtype]))


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
