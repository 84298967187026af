"""Inner update rules, one a file; ``rules.NAME`` is the function NAME of the file NAME."""

import sys
from collections.abc import Callable

from online_meta import registry
from online_meta.types import InnerRule

# A submodule's import binds its name to the module; rebind each to the rule that the file offers.
_rules = sys.modules[__name__]
globals().update({name: registry.load(_rules, name) for name in registry.file_names(_rules)})


def __getattr__(name: str) -> Callable[..., InnerRule]:
    """Return a rule that another package offers; raise ``AttributeError`` that explains an unknown one."""
    if name in registry.names(_rules):
        rule: Callable[..., InnerRule] = registry.load(_rules, name)
        return rule
    raise AttributeError(f"no inner rule is called {name!r}: {registry.nearest(name, registry.names(_rules))}")
