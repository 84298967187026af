"""Fuzz every target for its share of the minutes: ``python -m tests.fuzz --minutes 5``.

An input that breaks a target is saved in the target's corpus folder, and ``pytest tests/fuzz`` replays it.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.seeds import CORPUS
from tests.fuzz.targets import TARGETS

SECONDS_AN_INPUT = 10
MEGABYTES = 2048
LONGEST = 8192


def fuzz(target: str, seconds: int) -> bool:
    """Fuzz one target; print how many inputs it got, and return whether it passed on all of them."""
    memory = Path("/dev/shm")  # in memory if possible, because the target writes thousands of files per second
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as found:
        command = [
            *(sys.executable, "-m", "tests.fuzz.one", target),
            *(f"-max_total_time={seconds}", f"-timeout={SECONDS_AN_INPUT}", f"-rss_limit_mb={MEGABYTES}"),
            *(f"-max_len={LONGEST}", "-print_final_stats=1", "-verbosity=0"),
            f"-artifact_prefix={CORPUS / target}/",
            *(found, str(CORPUS / target)),
        ]
        # libFuzzer exits without cleanup, so the target's files are in the folder that is removed here.
        environment = {**os.environ, "TMPDIR": found}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    executed = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
    peak = re.search(r"peak_rss_mb:\s*(\d+)", done.stderr)
    counts = f"{int(executed[1]):,} inputs, {peak[1]} MB at most" if executed and peak else "no statistics"
    print(f"{target}: {counts}{'' if done.returncode == 0 else ', BROKEN'}", flush=True)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-6000:], sep="\n", flush=True)
    return done.returncode == 0


def main() -> None:
    """Fuzz the targets; exit with 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--minutes", type=float, default=5.0, help="for all targets together")
    parser.add_argument("--only", choices=TARGETS, help="one target")
    options = parser.parse_args()
    chosen = [options.only] if options.only else list(TARGETS)
    results = [fuzz(target, max(1, round(60 * options.minutes / len(chosen)))) for target in chosen]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
