"""Workloads small enough for a test, and a clock that counts calls."""

import torch

from fastattn.bench.workload import NAIVE, OURS, Contestant, Cost, Refusal, Workload


class FakeClock:
    """Each contestant's call moves it on by what that contestant is said to take, and by twice that backward."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def refusing(x):
    raise Refusal("not here")


def workload(clock=None, seconds=(1.0, 2.0, 4.0), S=4, B=1, ours=None):
    """double(x): ours, naive, a peer that is right, one that is wrong, one that is absent and one that
    has no backward."""

    def taking(time, factor):
        def bind(x):
            def pass_time(seconds):
                if clock is not None:
                    clock.now += seconds

            def call():
                pass_time(time)
                out = x["x"] * factor
                if out.requires_grad:
                    out.register_hook(lambda grad: pass_time(2 * time))
                return out

            return call

        return bind

    contestants = (
        Contestant(OURS, ours or taking(seconds[0], 2.0)),
        Contestant(NAIVE, taking(seconds[1], 2.0)),
        Contestant("peer", taking(seconds[2], 2.0)),
        Contestant("wrong", taking(0.1, 2.01)),
        Contestant("absent", refusing),
        Contestant("half", taking(1.0, 2.0), backward=False),
    )
    return Workload(
        "double", "plain", {"B": B, "S": S}, torch.float32, "cpu", Cost(S, 8 * S, 2 * S, 8 * S),
        "bytes", lambda: {"x": torch.randn(B, S, dtype=torch.float64)}, contestants,
    )  # fmt: skip
