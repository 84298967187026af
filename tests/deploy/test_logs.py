"""Log lines in JSON, for everything that a process writes and every way that it ends."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import ROOT, run_cli, running_daemon

FIELDS = {"time", "level", "process", "pid", "logger", "message"}
SAYS = """
import logging, sys, threading, warnings
import torch
from deploy.logs import Origin, log_to_stderr
origin = Origin("trainer", 1, plays=True)
log_to_stderr(origin, sys.argv[1])
log = logging.getLogger("a.logger")
log.info("before %s", "it\\nopens")
origin.round = lambda: 7
log.debug("too much")
logging.getLogger("torch.distributed.elastic").warning("an agent's")
warnings.warn("take care")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
class Unfinished:
    def __del__(self):
        raise ValueError("at the end")
Unfinished()
raise KeyError("nobody catches it")
"""


def run_and_read_log(style: str) -> list[str]:
    command = [sys.executable, "-c", SAYS, style]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    return ended.stderr.splitlines()


def test_everything_a_process_logs_is_json() -> None:
    lines = [json.loads(line) for line in run_and_read_log("json")]
    levels = ["INFO", "WARNING", "WARNING", "CRITICAL", "CRITICAL", "CRITICAL"]
    assert [line["level"] for line in lines] == levels
    assert [line["round"] for line in lines] == [None, 7, 7, 7, 7, 7]
    for line in lines:
        assert line.keys() - {"exception"} == {*FIELDS, "rank", "round"}
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])
        assert (line["process"], line["rank"]) == ("trainer", 1)
    assert lines[0]["message"] == "before it\nopens"
    assert "take care" in lines[2]["message"]
    raised = [(line["message"], line["exception"].splitlines()[-1]) for line in lines if "exception" in line]
    assert raised == [
        ("ZeroDivisionError: division by zero", "ZeroDivisionError: division by zero"),
        ("ValueError: at the end", "ValueError: at the end"),
        ("KeyError: 'nobody catches it'", "KeyError: 'nobody catches it'"),
    ]
    assert all(line["exception"].startswith("Traceback") for line in lines if "exception" in line)


def test_text_names_the_rank() -> None:
    first = run_and_read_log("text")[0]
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} trainer rank 1\[\d+\] INFO before it", first)


COPIES = """
import subprocess, sys
from deploy.logs import Origin, copy_lines, log_to_stderr
log_to_stderr(Origin("daemon"), "json")
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
copy_lines("trainer", child.stdout)
"""


def test_output_of_a_native_library_is_json_too() -> None:
    child = r"""printf '%s\n' '{"a": 1}' 'terminate called' '' '{"torn": ' '[1]' >&2; printf 'no end'"""
    ended = subprocess.run(
        [sys.executable, "-c", COPIES, "sh", "-c", child], capture_output=True, text=True, cwd=ROOT, check=True
    )
    first, *others = [json.loads(line) for line in ended.stderr.splitlines()]
    assert first == {"a": 1}
    assert [line["message"] for line in others] == ["terminate called", '{"torn":', "[1]", "no end"]
    assert {(line["process"], line["logger"], line["level"]) for line in others} == {
        ("daemon", "deploy.trainer", "WARNING")
    }


def parsed(log: Path, skip: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()[skip:]]


@pytest.mark.timeout(300)
def test_a_run_can_change_its_log_format_between_starts(config: Path) -> None:
    with running_daemon(config) as daemon:
        daemon.submit(0)
        daemon.wait_until_learned(1)
        assert daemon.drain() == 0
    text = daemon.log.read_text().splitlines()
    assert all(
        re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (daemon|trainer|comparators)\[\d+\] ", line) for line in text
    )
    with running_daemon(config, "run.logs=json") as daemon:
        daemon.submit(1)
        daemon.wait_until_compared(2)
        assert daemon.drain() == 0
    lines = parsed(daemon.log, len(text))
    assert {line["process"] for line in lines} == {"daemon", "trainer", "comparators"}
    for line in lines:
        assert line.keys() - {"exception"} == FIELDS | ({"rank", "round"} if line["process"] == "trainer" else set())
    assert [(line["rank"], line["round"]) for line in lines if line["process"] == "trainer"] == [(0, 1), (0, 2)]


def test_a_failed_start_is_logged_in_json(config: Path) -> None:
    (config.parent / "run").mkdir()
    (config.parent / "run/history").write_text("not a folder")
    ended = run_cli("serve", config, "--set", "run.logs=json")
    assert ended.returncode == 78
    (line,) = map(json.loads, ended.stderr.splitlines())
    assert line["level"] == "CRITICAL"
    assert "history" in line["message"]


def test_an_unknown_log_format_is_refused(config: Path) -> None:
    ended = run_cli("check", config, "--set", "run.logs=xml")
    assert ended.returncode == 78
    assert "[run] logs = 'xml'" in ended.stderr
    assert "'text' or 'json'" in ended.stderr
