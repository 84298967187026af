"""Run JAX in a separate process, which waits on a pipe for its turn."""

import os
import time
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
"""The environment in which JAX computes with one thread; it has to be set before JAX is imported."""


class Order(NamedTuple):
    """What to differentiate, as plain data: names from ``jax_networks``, arrays, and whether to use ``vmap``."""

    network: str
    loss: str
    lr: float
    steps: int
    weights: dict[str, np.ndarray]
    tasks: tuple[np.ndarray, ...]
    vmap: bool


def serve(pipe: Connection, module: str) -> None:
    """Prepare the first message, run what was prepared for each later one, and end on None.

    The module has ``prepare(order)``, which returns what ``run(prepared, asked)`` needs and an answer. Both may import
    JAX, and so may the module, which is imported here.
    """
    os.environ |= SETTINGS
    program, prepared = import_module(module), None
    while (asked := pipe.recv()) is not None:
        try:
            if prepared is None:
                prepared, answer = program.prepare(asked)
            else:
                answer = program.run(prepared, asked)
        except Exception as error:  # The parent process shows it in the table.
            answer = RuntimeError(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        pipe.send(answer)


def prepare(order: Order) -> tuple[Any, dict[str, float]]:
    """Compile; return the compiled function, the seconds of compiling, and the bytes that one call takes."""
    import jax
    import jax.numpy as jnp

    from tests.benchmarks.jax_networks import query_loss

    loss = query_loss(order.network, order.loss, order.lr, order.steps)
    weights = {name: jnp.asarray(value) for name, value in order.weights.items()}
    tasks = tuple(map(jnp.asarray, order.tasks))
    count = len(tasks[0])

    def mean(p: Any, *stacked: Any) -> Any:
        return jax.vmap(loss, (None, 0, 0, 0, 0))(p, *stacked).mean()

    def add(total: Any, p: Any, *task: Any) -> Any:
        return jax.tree.map(lambda a, b: a + b / count, total, jax.value_and_grad(loss)(p, *task))

    began = time.perf_counter()
    if order.vmap:
        compiled = jax.jit(jax.value_and_grad(mean)).lower(weights, *tasks).compile()
    else:
        nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, weights))
        rows = [tuple(array[k] for array in tasks) for k in range(count)]
        compiled = jax.jit(add).lower(nothing, weights, *rows[0]).compile()
    seconds = time.perf_counter() - began

    def call() -> Any:
        if order.vmap:
            return compiled(weights, *tasks)
        total = nothing
        for row in rows:
            total = compiled(total, weights, *row)
        return total

    memory = compiled.memory_analysis()
    return call, {"compile": seconds, "bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes}


def run(call: Any, count: int) -> tuple[float, float, dict[str, np.ndarray]]:
    """Return the mean seconds of ``count`` calls, the loss, and the gradient."""
    import jax

    began = time.perf_counter()
    for _ in range(count):
        found = jax.block_until_ready(call())
    seconds = (time.perf_counter() - began) / count
    loss, grads = found
    return seconds, float(loss), {name: np.asarray(value) for name, value in grads.items()}
