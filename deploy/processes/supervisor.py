"""Supervise a child process: start it, restart it when it dies, stop it at the end."""

import logging
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import BinaryIO

from deploy.exits import BROKEN, DONE

FIRST_DELAY_SECONDS = 0.2
LONGEST_DELAY_SECONDS = 10.0
HEALTHY_SECONDS = 10.0
COPY_SECONDS = 5.0
log = logging.getLogger(__name__)


class SupervisedProcess:
    """A child process that is restarted, with growing delays, until ``stop``.

    Args:
        name: of the child, for log messages.
        command: command line of the child.
        on_broken: called when the child ends with exit code 70; the child is then not restarted.
        copy: called in a thread with the name and the child's output; None lets the child inherit the output streams
            of this process.
        open_input: returns the end of a connection that becomes the child's standard input, each time that it starts;
            by default, that is a pipe.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        on_broken: Callable[[], None] | None = None,
        copy: Callable[[str, BinaryIO], None] | None = None,
        open_input: Callable[[], socket.socket] | None = None,
    ) -> None:
        """Start the child and a thread that watches it."""
        self.name = name
        self._copy, self._open_input = copy, open_input
        self._copying: threading.Thread | None = None
        self._on_broken = on_broken
        self.restarts = 0
        self._command = list(command)
        self._stopping = threading.Event()
        self._starting = threading.Lock()
        self._process = self._start()
        self._thread = threading.Thread(target=self._watch, name=f"supervise-{name}", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """The process id of the current or last child."""
        return self._process.pid

    def alive(self) -> bool:
        """Return whether the child is running."""
        return self._process.poll() is None

    def ask_to_stop(self, by: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal so that the child drains, and do not restart it; return at once."""
        with self._starting:
            first = not self._stopping.is_set()
            self._stopping.set()
            if first and self.alive():
                self._process.send_signal(by)

    def stop(self, timeout_seconds: float) -> int:
        """Ask the child to stop; kill it after ``timeout_seconds``; return its exit code."""
        self.ask_to_stop()
        try:
            code = self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            log.error("the %s did not drain in time; killing it", self.name)
            self._process.kill()
            code = self._process.wait()
        self._thread.join()
        if self._copying is not None:
            self._copying.join(COPY_SECONDS)
        return code

    def _start(self) -> "subprocess.Popen[bytes]":
        # The child ends when its standard input closes, which happens whenever this process ends. In a process group of
        # its own, it gets no signal of a terminal: this process stops its children in order.
        if self._open_input is None:
            return self._start_with(subprocess.PIPE)
        with self._open_input() as given:
            return self._start_with(given.fileno())

    def _start_with(self, given: int) -> "subprocess.Popen[bytes]":
        """Start the child with a standard input."""
        if self._copy is None:
            return subprocess.Popen(self._command, stdin=given, process_group=0)
        child = subprocess.Popen(
            self._command, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0
        )
        self._copying = threading.Thread(target=self._copy, args=(self.name, child.stdout), daemon=True)
        self._copying.start()
        return child

    def _watch(self) -> None:
        delay = FIRST_DELAY_SECONDS
        start_time = time.monotonic()
        while True:
            code = self._process.wait()
            if self._stopping.is_set() or code == DONE:
                return
            if code == BROKEN and self._on_broken is not None:
                log.error("the %s (pid %d) ended with exit code %d; not restarting it", self.name, self.pid, code)
                self._on_broken()
                return
            delay = FIRST_DELAY_SECONDS if time.monotonic() - start_time > HEALTHY_SECONDS else delay
            log.error(
                "the %s (pid %d) ended with exit code %d; restarting it in %.1f s", self.name, self.pid, code, delay
            )
            if self._stopping.wait(delay):
                return
            delay = min(delay * 2, LONGEST_DELAY_SECONDS)
            with self._starting:
                if self._stopping.is_set():
                    return
                self._process, start_time = self._start(), time.monotonic()
                self.restarts += 1
