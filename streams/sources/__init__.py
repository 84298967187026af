"""The registry of sources of tasks: each file of this folder without a leading underscore is one kind of source.

The kind is the name of the file: ``[[source]] kind = "<file>"``. A file defines

``Settings``
    A frozen dataclass with the options of the kind. Values from the configuration are checked against the annotations
    (types, ``Annotated`` ranges, ``Literal`` choices), and ``__post_init__`` may raise ``ValueError`` for a wrong
    combination. The docstring describes each option under "Attributes:".

``create_source(settings, spec, name, seed) -> TaskSource | NeedsLeader | None``
    Returns the source. ``spec`` (``streams.spec.TaskSpec``) is the shape of the run's tasks, ``name`` the unique name
    of this source in the run, and ``seed`` the seed of the run. It returns None if clients push the tasks and nothing
    is read, and ``streams.segmenting.by_leader.NeedsLeader`` if the source needs access to the run's leader. It raises
    ``ValueError`` for invalid options, ``ImportError`` for a missing package and ``OSError`` for an unreadable file. It
    does not connect to a server.

``SPEC``
    Optional: the ``TaskSpec`` of a source that generates its tasks. ``create_source`` then raises ``ValueError`` if
    ``spec`` differs (``streams.spec.require_same``).

``oracle(settings) -> Oracle``
    Optional: returns the exact Bayes predictor of a source that generates its tasks. The
    comparator ``bayes`` measures regret against it. It computes in float64, and its prediction is a distribution of
    each target given the support set, which may be empty, and given how the source draws its tasks. It raises
    ``ValueError`` for settings or tasks that it has no exact answer to.

A ``TaskSource`` (``streams.types``) keeps this contract:

``read(after) -> Iterator[Arrival | None]``
    Yields the arrivals after the position ``after``, a ``cursor`` of an earlier arrival; None means from the start. It
    yields None when there is nothing now and never blocks for long; an exhausted source keeps yielding None. It may
    yield an arrival again, with the same id and body, but it must not omit one. It raises when the connection is lost;
    it is then called again with the last committed position. It raises ``ValueError`` for a position that it never
    gave. An arrival that is not a task has a ``rejection`` and the bytes as received. One thread reads a source.

``ack(arrivals)``
    Optional (``streams.types.Acknowledges``): receives arrivals that are durable or were rejected for good, without
    their bodies. It is called in the reading thread, between two steps of ``read``. It may be called late or not at
    all, so an arrival that was not acknowledged must be yielded again.

``lag(after) -> int | None``
    Optional (``streams.types.ReportsLag``): returns the number of entries that wait after the position, None if it is
    unknown. It is called in another thread than ``read``, so it needs its own connection.

``save_in(folder, erased)``
    Optional (``streams.types.SavesState``): saves what it has learned from the rows read in a folder of the run, so
    that a restart need not read them all again. Rows of an erased entity, up to the position of the erasure, count for
    nothing.

``omissions() -> Sequence[str]``
    Optional (``streams.types.ReportsOmissions``): says what the source ignores now, and why. It is called in another
    thread than ``read``.

``listen_for_gaps(listener)``
    Optional (``streams.types.ReportsGaps``): a source whose broker deletes entries, by age or size, notices entries
    that were deleted before they were read, logs them once with their range, and calls the listener with each ``Gap``.
"""

from collections.abc import Callable

from online_meta.types import Batch, Prediction, Tensors

Oracle = Callable[[Batch, Tensors], Prediction]
"""(support set, inputs of the query set) -> the distribution of their targets, exactly, given how a source draws tasks.

It is the exact Bayes predictor: no answer has a smaller mean negative log-likelihood on tasks of the source.
"""

FUNCTION = "create_source"
