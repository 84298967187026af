"""A process that has imported everything, and forks a child for each life: a start costs milliseconds, not seconds."""

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tests.crash.lives import find_life


def main() -> None:
    """For each line {"scenario", "parts", "folder", "stopped"} fork a child; answer with its id, then with its end."""
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            live(order)
        say({"pid": pid})
        _, status = os.waitpid(pid, 0)
        say({"status": os.waitstatus_to_exitcode(status)})


def live(order: dict[str, Any]) -> None:
    """Play parts of a life; each acknowledgement is a line in the file ``acknowledged``, written at once."""
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


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
