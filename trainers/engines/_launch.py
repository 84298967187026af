"""Start the ranks of one node through torch's elastic agent, and start them all again when one dies."""

import os
import signal
import threading
import time
import uuid
from collections.abc import Sequence
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

MOST_RESTARTS = 1_000_000
GRACE_SECONDS = 2.0
POLL_SECONDS = 0.1


def launch_ranks(processes: int, command: Sequence[str]) -> bool:
    """Run ``command`` as so many ranks until all have ended well; return whether they did.

    SIGTERM and SIGINT are passed on to the ranks, which drain. When one dies, all are started again; a rank that
    outlives another by ``GRACE_SECONDS``, because it hangs, is killed, so that the new ones need not wait for it.
    """
    # Restarts need it: the agent would else keep the port of the store that died with the ranks.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, _pass_on)
    threading.Thread(target=_bury_hanging_ranks, name="bury-hanging-ranks", daemon=True).start()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=MOST_RESTARTS,
        signals_to_handle="SIGQUIT",  # The agent would not wait for the ranks to drain.
    )
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError:
        return False
    return True


def _ranks() -> list[psutil.Process]:
    return psutil.Process().children()


def _pass_on(signal_number: int, _frame: FrameType | None) -> None:
    for rank in _ranks():
        rank.send_signal(signal_number)


def _bury_hanging_ranks() -> None:
    """Ranks end together or not at all: kill those that go on when another is gone."""
    together: dict[int, psutil.Process] = {}
    broken_since: float | None = None
    while True:
        now = {rank.pid: rank for rank in _ranks() if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE}
        left = [rank for pid, rank in together.items() if pid in now]
        if left and len(left) < len(together):
            broken_since = broken_since or time.monotonic()
            if time.monotonic() - broken_since > GRACE_SECONDS:
                for rank in left:
                    rank.kill()
        else:
            together, broken_since = now, None
        time.sleep(POLL_SECONDS)
