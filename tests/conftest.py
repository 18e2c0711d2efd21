"""--device: where the GPU kernels' tests put their tensors. On the CPU, the default, they are emulated.
--seconds: after so long what is left is skipped, and the report tells."""

import time

import pytest

from fastattn.kernels import native


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="cpu (emulated), cuda, cuda:1, xpu ...")
    parser.addoption("--seconds", type=float, help="after so long skip the rest")


def pytest_sessionstart(session):
    session.began = time.monotonic()


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


def pytest_collection_modifyitems(config, items):
    """On a GPU, the tests that put tensors there, of the backends that this build has for it."""
    if config.getoption("--device") == "cpu":
        return
    kept = [item for item in items if "device" in item.fixturenames]
    if not native.cuda_architectures():
        kept = [item for item in kept if not is_cuda_s(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def is_cuda_s(item):
    own = getattr(item, "callspec", None)
    return "test_cuda" in item.path.name or (own and own.params.get("backend") == "cuda")


def pytest_runtest_setup(item):
    seconds = item.config.getoption("--seconds")
    if seconds is not None and time.monotonic() - item.session.began >= seconds:
        pytest.skip(f"{seconds:.0f} s are over")
