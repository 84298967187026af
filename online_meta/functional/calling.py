"""What a model is called with, and which part of what it returns is its output."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from online_meta.registry import nearest
from online_meta.types import Tensors


class Arguments(NamedTuple):
    """The arguments of a ``forward``.

    Attributes:
        named: those that can be given by name.
        required: those of them without a default.
        open: whether it takes any further name.
    """

    named: frozenset[str]
    required: tuple[str, ...]
    open: bool

    def arrange(self, x: Tensors) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional arguments and the keywords of a call with the inputs ``x``.

        One tensor is the first argument. Named tensors are keywords, or the first argument as one dict of a ``forward``
        that has another single argument. Raises ``ValueError`` if the names are others than those of the arguments.
        """
        if isinstance(x, Tensor):
            return (x,), {}
        if (self.open or x.keys() <= self.named) and x.keys() >= {*self.required}:
            return (), x
        if len(self.named) == 1 or (len(self.required) <= 1 and not x.keys() & self.named):
            return (x,), {}
        raise ValueError(
            f"the model's forward takes {', '.join(sorted(self.named, key=self._order))}, and the task has the inputs "
            f"{', '.join(x)}: give the inputs the names of the arguments"
        )

    def _order(self, name: str) -> tuple[int, str]:
        return self.required.index(name) if name in self.required else len(self.required), name


def read_arguments(module: nn.Module) -> Arguments:
    """Return the arguments of the ``forward`` of a module; of a module of ``torch.compile``, of what it compiles."""
    own = getattr(module, "_orig_mod", module)
    parameters = inspect.signature(own.forward).parameters.values()
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = tuple(p.name for p in by_name if p.default is p.empty)
    return Arguments(frozenset(p.name for p in by_name), required, any(p.kind is p.VAR_KEYWORD for p in parameters))


def take_output(result: Any, path: str = "") -> Tensors:
    """Return the output of a model: what it returns, or the part of it that ``path`` names.

    Args:
        result: what the model returned.
        path: an attribute of an object, a key of a dict or an index of a tuple, such as "logits", or several with dots
            between them, such as "heads.0"; "" for the whole.

    Returns:
        A tensor, or a dict of tensors.

    Raises:
        ValueError: if there is no such part, or it is neither; the message says what the model returned.
    """
    found, rest = result, path
    while rest:
        parts = _list_parts(found)
        name = rest if rest in parts else rest.partition(".")[0]
        if name not in parts:
            raise ValueError(_explain_missing(result, path, found, rest, name))
        found, rest = parts[name], rest[len(name) + 1 :]
    if isinstance(found, Tensor):
        return found
    if isinstance(found, Mapping) and found and all(isinstance(one, Tensor) for one in found.values()):
        return dict(found)
    what = f"output = {path!r} of the model is" if path else "the model returns"
    raise ValueError(
        f"{what} {_describe(found)}, and an output is a tensor or a dict of tensors: name the part that is the output, "
        f"such as output = {_suggest(found, path)!r}"
    )


def _explain_missing(result: Any, path: str, found: Any, rest: str, name: str) -> str:
    if isinstance(result, Tensor):
        return f"output = {path!r}: the model returns {_describe(result)}, which is the output: leave output out"
    parts = _list_parts(found)
    at = path.removesuffix(rest).rstrip(".")
    where = f", of which {at!r} is {_describe(found)}" if at else ""
    known = f": {nearest(name, parts)}" if parts else ""
    return f"output = {path!r}: the model returns {_describe(result)}{where}, and there is no {name!r} in it{known}"


def _list_parts(found: Any) -> dict[str, Any]:
    """Return the parts of what a model returned, by the names that a path may have."""
    if isinstance(found, Tensor):
        return {}
    if isinstance(found, Mapping):
        return {str(name): one for name, one in found.items()}
    if isinstance(found, list | tuple):
        fields = {name: getattr(found, name) for name in getattr(found, "_fields", ())}
        return fields | {str(place): one for place, one in enumerate(found)}
    properties = [name for name, one in inspect.getmembers_static(type(found)) if isinstance(one, property)]
    names = [*getattr(found, "__dict__", ()), *getattr(found, "__slots__", ()), *properties]
    return {name: getattr(found, name) for name in names if not name.startswith("_") and hasattr(found, name)}


def _describe(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"a tensor of shape {tuple(found.shape)}"
    parts = _list_parts(found)
    kind = type(found).__name__
    inside = ", ".join(f"{name} ({_name_kind(one)})" for name, one in parts.items())
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}{f' with {inside}' if inside else ''}"


def _name_kind(part: Any) -> str:
    return f"tensor {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__


def _suggest(found: Any, path: str) -> str:
    """Return a path to a tensor in ``found``, or to what might be one."""
    parts = _list_parts(found)
    name = next((name for name, one in parts.items() if isinstance(one, Tensor)), next(iter(parts), "logits"))
    return f"{path}.{name}" if path else name
