"""Inner update rules, one a file; ``rules.NAME`` is the function NAME of the file NAME."""

import sys
from collections.abc import Callable

from online_meta import registry
from online_meta.types import InnerRule

# A submodule's import binds its name to the module; rebind each to the rule that the file offers.
globals().update({name: registry.load(sys.modules[__name__], name) for name in registry.names(sys.modules[__name__])})


def __getattr__(name: str) -> Callable[..., InnerRule]:
    """Explain an unknown rule."""
    raise AttributeError(
        f"no inner rule is called {name!r}: {registry.nearest(name, registry.names(sys.modules[__name__]))}"
    )
