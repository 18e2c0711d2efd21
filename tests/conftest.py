"""--device: where the GPU kernels' tests put their tensors. On the CPU, the default, they are emulated."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="cpu (emulated), cuda, cuda:1, xpu ...")


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")
