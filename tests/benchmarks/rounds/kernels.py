"""The share of rounds that is spent outside of torch's operations, from torch's own profile."""

from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


class Shares(NamedTuple):
    """Where the time of rounds goes.

    Attributes:
        seconds: of a round, while it is profiled.
        inside: seconds of a round in operations and in compiled programs that no other operation calls.
    """

    seconds: float
    inside: float

    @property
    def outside(self) -> float:
        """The share of a round that is spent elsewhere: in Python, in the journal, and in the profiler, 0 to 1."""
        return 1 - self.inside / self.seconds


def profile_rounds(play: Callable[[int], float], rounds: int) -> Shares:
    """Play ``rounds`` rounds under torch's profiler, and return where the time of one of them goes."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        start = perf_counter()
        play(rounds)
        seconds = perf_counter() - start
    inside = sum(
        event.time_range.elapsed_us()
        for event in found.events() or ()
        if event.cpu_parent is None and event.device_type == DeviceType.CPU
    )
    return Shares(seconds / rounds, inside / 1e6 / rounds)
