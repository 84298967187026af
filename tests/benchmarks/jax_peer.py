"""JAX as a contestant: a child process that takes its turn like the others."""

from multiprocessing import get_context
from types import TracebackType
from typing import Any

import torch

from online_meta.types import Meta, MetaGrad, Params, Task
from tests.benchmarks.contestants import stack_tasks
from tests.benchmarks.jax_child import Order, serve
from tests.benchmarks.works import Work


class JaxProcess:
    """A child process that runs JAX; it inherits the CPU affinity of its parent."""

    def __init__(self, order: Any, module: str) -> None:
        """Let the child prepare an order with a ``module`` for ``serve``; raises ``RuntimeError`` if that fails."""
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, module), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.prepared: Any = self.ask(order)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> "JaxProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the child."""
        if self._process.is_alive():
            self._pipe.send(None)
            self._process.join(10)
        self._process.kill()
        self._process.join()

    def ask(self, question: Any) -> Any:
        """Return what the child runs for a question; raises ``RuntimeError`` with its reason if that fails."""
        self._pipe.send(question)
        try:
            answer = self._pipe.recv()
        except EOFError as error:
            raise RuntimeError("the JAX process ended: out of memory?") from error
        if isinstance(answer, Exception):
            raise answer
        return answer


class JaxPeer(JaxProcess):
    """A child process with one compiled program for a workload."""

    def __init__(self, work: Work, weights: Params, tasks: list[Task]) -> None:
        """Compile ``work``; raises ``RuntimeError`` with the child's reason if that fails."""
        self._names = [*weights]  # JAX returns sorted dictionaries.
        named = {name: value.numpy() for name, value in weights.items()}
        vmap = work.network == "sinusoid_mlp"  # For larger networks, vmap is slower than a loop over tasks.
        order = Order(work.network, work.loss, work.lr, work.steps, named, list_arrays(tasks), vmap)
        super().__init__(order, Order.__module__)

    def __enter__(self) -> "JaxPeer":
        return self

    def turn(self, calls: int) -> float:
        """Return the mean seconds of ``calls`` calls, measured by the child."""
        seconds: float = self.ask(calls)[0]
        return seconds

    def result(self) -> MetaGrad:
        """Return the computed meta-gradient, for comparison."""
        _, loss, grads = self.ask(1)
        return MetaGrad(torch.tensor(loss), Meta({name: torch.tensor(grads[name]) for name in self._names}, {}))


def list_arrays(tasks: list[Task]) -> tuple[Any, ...]:
    """Return the stacked NumPy arrays of tasks: support x and y, query x and y, each of shape (tasks, n, ...)."""
    support, query = stack_tasks(tasks)
    return tuple(tensor.numpy() for tensor in (*support, *query))
