"""Record a pure function of tensors as a flat program of the same operations, without the function's Python code."""

import logging
import math
import operator
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from functools import cache
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from online_meta.types import Outcome

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

ALIASING_OPERATIONS = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def record_operations(program: Callable[..., tuple[Tensor, ...]], leaves: tuple[Tensor, ...]) -> GraphModule:
    """Return the operations that a program executes for inputs of these shapes, as a program.

    Equal computations are merged, so that they are executed once.

    Args:
        program: a function of tensors.
        leaves: its inputs, of which none may be another one: the record would be wrong.

    Returns:
        A module with the program's arguments and results, whatever the values of its inputs are.

    Raises:
        Exception: the program's own error if its Python code depends on the values of tensors.
    """
    functional = torch.func.functionalize(program)
    graph, root = _record_plainly(functional, leaves), nn.Module()
    if graph is None:
        from torch.fx.experimental.proxy_tensor import make_fx  # It takes a second to import.

        root = make_fx(functional)(*leaves)
        graph = root.graph
    return GraphModule(root, _merge_equal_calls(graph))


LAYOUT = "layout"
"""The key under which the nodes of a graph have the ``Layout`` of their results, if it is known."""


class Layout(NamedTuple):
    """The shape and the dtype of a tensor, and whether it is contiguous."""

    shape: list[int]
    dtype: torch.dtype
    contiguous: bool


class _Unusual(Exception):
    """An operation that ``make_fx`` treats in a way of its own."""


class _OperationRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that records each operation as a call in a graph, under the name that ``make_fx`` would give it.

    ``make_fx`` also computes the metadata of each result, which takes most of its time and which nothing here reads.
    """

    def __init__(self, leaves: tuple[Tensor, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph, self._nodes = Graph(), WeakTensorKeyDictionary()
        for at, leaf in enumerate(leaves):
            self._note(leaf, self.graph.placeholder(f"arg{at}_1"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.promote_types.default:  # It returns a dtype, and so a constant.
            return func(*args)
        if func.namespace != "aten" or func._schema.is_mutable or torch.Tag.data_dependent_output in func.tags:
            raise _Unusual(str(func))
        given, options = tree_map_only(Tensor, self.find, ([*args], kwargs or {}))
        found = func(*args, **(kwargs or {}))
        name = self.graph._target_to_str(func.overloadpacket.__name__)
        node = self.graph.create_node("call_function", func, tuple(given), options, name)
        if isinstance(found, Tensor):
            self._note(found, node)
        elif isinstance(found, tuple | list):
            for at, part in enumerate(found):
                taken = self.graph.call_function(operator.getitem, (node, at))
                if isinstance(part, Tensor):
                    self._note(part, taken)
        else:
            raise _Unusual(str(func))
        return found

    def _note(self, tensor: Tensor, node: Node) -> None:
        self._nodes[tensor] = node
        node.meta[LAYOUT] = Layout([*tensor.shape], tensor.dtype, tensor.is_contiguous())

    def find(self, tensor: Tensor) -> Node:
        """Return the node whose result a tensor is."""
        node: Node | None = self._nodes.get(tensor)  # type: ignore[no-untyped-call]
        if node is None or type(tensor) is not Tensor:  # A constant, or a wrapper.
            raise _Unusual("a tensor that no recorded operation has made")
        return node


def _record_plainly(program: Callable[..., tuple[Tensor, ...]], leaves: tuple[Tensor, ...]) -> Graph | None:
    """Return the graph that ``make_fx`` records, in a sixth of the time; None if only ``make_fx`` can record it."""
    recorder = _OperationRecorder(leaves)
    try:
        with recorder:
            results = program(*leaves)
        recorder.graph.output(tuple(map(recorder.find, results)))
    except Exception:  # make_fx raises the program's own error, if it has one.
        return None
    return recorder.graph


class _ValuesRefused(TorchFunctionMode):
    """A mode in which no tensor gives its values to other code, from which they would come back as constants."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING_METHODS:
            raise RuntimeError(f"{func.__name__} reads the values of a tensor")
        return func(*args, **(kwargs or {}))


READING_METHODS = (
    Tensor.numpy,
    Tensor.tolist,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.data_ptr,
    Tensor.untyped_storage,
)


def _merge_equal_calls(graph: Graph) -> Graph:
    """Remove repeated computations from a graph; calls that only alias a tensor are looked through.

    A graph with in-place operations is returned unchanged: equal calls may see different values there.
    """
    calls = [node for node in graph.nodes if node.op == "call_function"]
    if any(getattr(node.target, "_schema", None) and node.target._schema.is_mutable for node in calls):
        return graph
    seen: dict[Any, Node] = {}
    for node in calls:
        first = node.args[0] if node.target in ALIASING_OPERATIONS else seen.setdefault(_call_key(node), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return graph


def _call_key(node: Node) -> Any:
    """Return a hashable key that determines a call's result; 1 and 1.0 differ."""

    def frozen(argument: Any) -> Any:
        return (type(argument), tuple(map(frozen, argument)) if isinstance(argument, list | tuple) else argument)

    return node.target, frozen(node.args), tuple((name, frozen(value)) for name, value in sorted(node.kwargs.items()))


def _simplify(graph: Graph) -> None:
    """Remove operations that move numbers or views to and fro, where the results keep their bits.

    These are pairs of views of which the second undoes the first, parts of a vector that are joined again, a sum's
    dimension of one row that a view removes, and repeated tensors of ones.
    """
    ones: dict[Any, Node] = {}
    for node in graph.nodes:
        same = _find_same(node, ones)
        if same is not None:
            node.replace_all_uses_with(same)
    graph.eliminate_dead_code()


def _find_same(node: Node, ones: dict[Any, Node]) -> Node | None:
    """Return a node before this one that has the same result, or a new one that finds it sooner; None if not known."""
    aten = torch.ops.aten
    inner: Any = node.args[0] if node.args else None
    if node.target is aten.cat.default:
        return _find_whole(node)
    if not isinstance(inner, Node):
        return None
    undone = node.target is aten.select.int and inner.target is aten.unsqueeze.default
    if undone and node.args[1:] == (inner.args[1], 0):
        return inner.args[0]  # type: ignore[return-value]  # a node
    if node.target is aten.t.default and inner.target is aten.t.default:
        return inner.args[0]  # type: ignore[return-value]  # a node
    if node.target is aten.ones_like.default and LAYOUT in node.meta:
        return ones.setdefault((str(node.meta[LAYOUT]), str(node.kwargs)), node)
    return _skip_views(node, inner) if node.target in VIEWS and LAYOUT in node.meta else None


VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


def _skip_views(node: Node, inner: Node) -> Node | None:
    """Return what a view shows, without the views between; None if there are none."""
    shape, base = node.meta[LAYOUT].shape, inner
    while base.target in VIEWS:
        base = base.args[0]  # type: ignore[assignment]  # a node
    found: Layout | None = base.meta.get(LAYOUT)
    if found is None or not found.contiguous:
        return None
    if found.shape == shape:
        return base
    if base.target is torch.ops.aten.sum.dim_IntList and base.args[1:] == ([0], True) and found.shape[1:] == shape:
        target, arguments = base.target, (base.args[0], [0])
    elif base is not inner or node.target is not VIEWS[0]:
        target, arguments = VIEWS[0], (base, shape)
    else:
        return None
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, arguments)
    new.meta[LAYOUT] = node.meta[LAYOUT]
    return new


def _find_whole(node: Node) -> Node | None:
    """Return the vector whose parts, in their order, a node joins; None if they are not all parts of one."""
    parts: Any = node.args[0]
    split = parts[0].args[0] if parts and parts[0].target is operator.getitem else None
    if split is None or split.target is not torch.ops.aten.split_with_sizes.default:
        return None
    whole, sizes = split.args[0], split.args[1]
    layout = whole.meta.get(LAYOUT)
    if len(node.args) + len(split.args) > 3 or len(parts) != len(sizes) or whole.op == "placeholder":
        return None  # The result of a program must not be one of its inputs where it was a copy.
    in_order = all(part.target is operator.getitem and part.args == (split, at) for at, part in enumerate(parts))
    return whole if in_order and layout is not None and len(layout.shape) == 1 and layout.contiguous else None


WARM_UP_CALLS = 3
"""TorchScript arranges a program anew in its first two calls, which may take much longer than all others."""


def _run_without_python(graph: GraphModule, leaves: tuple[Tensor, ...]) -> Callable[..., Any]:
    """Return a function that runs a program's operations one after another, without Python between them if it can.

    TorchScript is not developed any more, but its interpreter is the one of torch that executes operations as they are,
    in half of the time of Python. On other devices than the CPU it might fuse operations, and so change bits. Torch's
    static interpreter takes a third of the time, but it writes beyond its memory for some programs, such as a stack of
    one strided tensor, which ends the process.
    """
    if any(leaf.device.type != "cpu" for leaf in leaves) or not hasattr(torch.jit, "trace"):
        return graph.forward
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            script: Callable[..., Any] = torch.jit.trace(graph, leaves, check_trace=False)  # type: ignore[no-untyped-call]
        for _ in range(WARM_UP_CALLS):
            script(*leaves)
    except RuntimeError as error:  # It does not have every operation, such as a view as another dtype.
        log.debug("run by Python: %s", error)
        return graph.forward
    return script


RECORD_AFTER_CALLS = 16
"""A function is recorded for a kind of arguments after as many calls. To record takes some 20 times as long as one."""

SLOW_CALL = 50_000.0
"""A function is not recorded if all its calls take longer: whoever waits for it would wait for seconds.

The unit is the time of a small addition, here and below, so that slow machines record the same functions as quick ones.
"""

SLOW_OPERATION = 30.0
"""If the operations take longer than this on average, to skip Python code does not make them faster."""

COMPARED_CALLS = 3
"""The number of calls in which a record must return the function's own bits before it is used alone."""

MOST_KINDS = 64
"""The most kinds of arguments that a recorder counts. It records nothing for kinds that come after these."""


@cache
def time_addition() -> float:
    """Return the processor time, in seconds, that this machine takes to add two small tensors."""
    one, batch = torch.zeros(1), 100
    taken = []
    with torch.no_grad():
        for _ in range(6):
            began = time.thread_time()
            for _ in range(batch):
                torch.add(one, one)
            taken.append((time.thread_time() - began) / batch)
    return max(min(taken), 1e-7)  # A coarse clock may see none.


class _Recorded(NamedTuple):
    """A recorded program, the structure of its results, and the number of calls in which it was right."""

    program: Callable[..., Any]
    structure: Any
    compared: int = 0


class _Calls(NamedTuple):
    """The number of calls of one kind, and the least processor time that one of them has taken, in seconds."""

    number: int = 0
    shortest: float = math.inf


class Recorder(Generic[Arguments, Result]):
    """A pure function that is recorded for each kind of arguments once it has taken some time, and computes the same.

    Two calls are of one kind if their arguments differ only in the values of their tensors. A record executes the same
    operations on the same numbers, so its results have the same bits. It is compared with the function in its first
    calls; if it differs, or the function cannot be recorded, that kind of calls is computed by the function for good.

    The function must depend on nothing but its arguments, and draw no random numbers; arguments are trees of tensors in
    dicts and tuples, and hashable values. It is called without gradients.
    """

    def __init__(
        self,
        function: Callable[Arguments, Result],
        record_after: int | None = None,
        slow: float = SLOW_CALL,
        *,
        executor: Executor | None = None,
    ) -> None:
        """Start without records.

        Args:
            function: to call.
            record_after: calls of a kind before it is recorded; None for ``RECORD_AFTER_CALLS``.
            slow: processor time of a call above which nothing is recorded, in times of a small addition.
            executor: whose thread records, so that no call waits for it; None to record within a call. PyTorch's
                recording replaces functions of the whole process meanwhile: nothing else may be recorded or compiled
                at the same time, so that all recorders of a process share one thread.
        """
        self._function, self._slow, self._executor = function, slow, executor
        self._record_after = RECORD_AFTER_CALLS if record_after is None else record_after
        self._calls: dict[Any, _Calls] = {}
        self._records: dict[Any, _Recorded | None] = {}
        self._lock = threading.Lock()  # Calls from several threads must not record at once.

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Return what the function returns."""
        leaves: list[Tensor] = []
        try:
            kind = (flatten(args, leaves), *[(leaf.shape, leaf.dtype) for leaf in leaves])
            record = self._records.get(kind)
        except TypeError:  # A value that cannot be hashed.
            return self._function(*args, **kwargs)
        if kwargs or not all(map(_is_plain, leaves)):
            return self._function(*args, **kwargs)
        if record is not None:
            if record.compared < COMPARED_CALLS:
                return self._compare(kind, record, leaves, *args, **kwargs)
            with torch.no_grad():
                found: Result = unflatten(record.structure, iter(record.program(*leaves)))
            return found
        if kind in self._records or len(self._calls) > MOST_KINDS:
            return self._function(*args, **kwargs)
        return self._call_and_count(kind, *args, **kwargs)

    def _call_and_count(self, kind: Any, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Call the function, and record it if it was called often enough."""
        began = time.thread_time()
        found = self._function(*args, **kwargs)
        taken, before = time.thread_time() - began, self._calls.get(kind, _Calls())
        calls = self._calls[kind] = _Calls(before.number + 1, min(before.shortest, taken))
        if calls.number >= self._record_after and len(self._calls) <= MOST_KINDS:
            with self._lock:
                if kind not in self._records:
                    self._records[kind] = None
                    if calls.shortest <= self._slow * time_addition():
                        self._start_record(kind, args, calls.shortest)
        return found

    def _start_record(self, kind: Any, args: Any, seconds: float) -> None:
        def record() -> None:
            self._records[kind] = self._record(args, seconds)

        if self._executor is not None:
            self._executor.submit(record)
        else:
            record()

    def _record(self, args: Any, seconds: float) -> _Recorded | None:
        """Return a record of the function, or None if it would not be faster; a call takes ``seconds``."""
        leaves: list[Tensor] = []
        structure = flatten(args, leaves)
        results: list[Any] = []
        function: Callable[..., Any] = self._function

        def program(*given: Tensor) -> tuple[Tensor, ...]:
            found: list[Tensor] = []
            results.append(flatten(function(*unflatten(structure, iter(given))), found))
            return tuple(found)

        try:
            with torch.no_grad():
                copies = tuple(leaf.detach().clone() for leaf in leaves)
                with _ValuesRefused():
                    graph = record_operations(program, copies)
                if seconds > SLOW_OPERATION * time_addition() * len(graph.graph.nodes):
                    return None
                _simplify(graph.graph)
                graph.recompile()
                runnable = _run_without_python(graph, copies)
        except Exception as error:  # The function's Python code may depend on values; it is called then as before.
            log.debug("not recorded: %s: %s", type(error).__name__, error)
            return None
        return _Recorded(runnable, results[-1])

    def _compare(
        self, kind: Any, record: _Recorded, leaves: list[Tensor], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Return the function's result, after comparing that of the record with it."""
        found = self._function(*args, **kwargs)
        own: list[Tensor] = []
        structure = flatten(found, own)
        with torch.no_grad():
            recorded = [*record.program(*leaves)]
        same = structure == record.structure and all(_has_same_bits(*pair) for pair in zip(own, recorded, strict=True))
        self._records[kind] = record._replace(compared=record.compared + 1) if same else None
        return found


log = logging.getLogger(__name__)


def _is_plain(leaf: Tensor) -> bool:
    return leaf.is_contiguous() and not leaf.requires_grad and type(leaf) is Tensor


def _has_same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(part.contiguous().view(-1).view(torch.uint8) for part in (one, other)))


class _Leaf:
    """Stands for a tensor in a structure."""


def flatten(tree: Any, leaves: list[Tensor]) -> Any:
    """Return the structure of a tree, which is hashable if its other values are, and add its tensors to ``leaves``."""
    if isinstance(tree, Tensor):
        leaves.append(tree)
        return _Leaf
    if isinstance(tree, dict):
        return dict, tuple(tree), tuple([flatten(value, leaves) for value in tree.values()])
    if isinstance(tree, tuple | list) and type(tree) is not Outcome:  # It holds no tensors.
        return type(tree), None, tuple([flatten(value, leaves) for value in tree])
    return None, type(tree), tree  # 1 and 1.0 are equal, but give other results.


def unflatten(structure: Any, leaves: Iterator[Tensor]) -> Any:
    """Return the tree of a structure and its tensors."""
    if structure is _Leaf:
        return next(leaves)
    kind, names, parts = structure
    if kind is None:
        return parts
    values = [unflatten(part, leaves) for part in parts]
    if kind is dict:
        return dict(zip(names, values, strict=True))
    return kind(*values) if hasattr(kind, "_fields") else kind(values)
