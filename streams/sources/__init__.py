"""Sources of tasks, one kind a file: the folder is the registry.

A file offers ``Settings``, a frozen dataclass of the options of ``[[source]] kind = "<file>"``, and
``create_source(settings, spec, name, seed) -> TaskSource | None``; None where tasks are pushed and nothing is read.
"""

FUNCTION = "create_source"
