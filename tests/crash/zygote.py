"""A process that has imported everything and forks a child for each life, so that a start takes milliseconds."""

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tests.crash.lives import find_life


def main() -> None:
    """For each line {"scenario", "parts", "folder", "stopped"}, fork a child; answer with its id, then its status."""
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            live(order)
        send({"pid": pid})
        _, status = os.waitpid(pid, 0)
        send({"status": os.waitstatus_to_exitcode(status)})


def live(order: dict[str, Any]) -> None:
    """Run parts of a life. Each acknowledgement is one line, written at once to the file ``acknowledged``."""
    code = 70
    try:
        descriptor = os.open(order["acknowledged"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if order["stopped"]:
            os.kill(os.getpid(), signal.SIGSTOP)
        for part in order["parts"]:
            find_life(order["scenario"]).part(part)(
                Path(order["folder"]), lambda said: os.writev(descriptor, [json.dumps(said).encode() + b"\n"]) and None
            )
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def send(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
