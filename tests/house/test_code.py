"""Rules that every file of the packages keeps."""

import ast
import re

import pytest

from tests.house.sources import FLOORS, ROOT, Module, dotted, imports, modules

MODULES = list(modules().values())
MOST_LINES_OF_A_FILE = 500
MOST_LINES_OF_A_FUNCTION = 60
VAGUE = {"manager", "managers", "util", "utils", "helper", "helpers", "base", "mixin"}
PICKLING = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLING_CALLS = {"torch.load", "torch.save", "numpy.load", "np.load", "pandas.read_pickle"}
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv"}
MAY_READ_THE_ENVIRONMENT = ("deploy/cli.py", "deploy/commands/", "trainers/distributed/", "trainers/engines/")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def long_functions(module):
    """Return the functions that are too long, with place and length."""
    functions = [node for node in ast.walk(module.tree) if isinstance(node, DEFINITIONS[:2])]
    lengths = [(node, (node.end_lineno or 0) - node.lineno + 1) for node in functions]
    return [f"{module.place}:{f.lineno} {f.name}: {n} lines" for f, n in lengths if n > MOST_LINES_OF_A_FUNCTION]


def words(name):
    """Return the words of a snake_case or CamelCase name, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)}


def vague_names(module):
    """Return the vague names of the file, its classes and its functions."""
    names = [module.path.stem, *(node.name for node in ast.walk(module.tree) if isinstance(node, DEFINITIONS))]
    return [f"{module.place}: {name}" for name in names if words(name) & VAGUE]


def pickling(module):
    """Return imports and calls through which untrusted bytes could run code."""
    imported = [found.target for found in imports(module, {}) if found.target.split(".")[0] in PICKLING]
    called = [dotted(node.func) for node in ast.walk(module.tree) if isinstance(node, ast.Call)]
    return imported + [call for call in called if call in PICKLING_CALLS]


def environment_reads(module):
    """Return the lines that read or change the process environment."""
    if module.place.startswith(MAY_READ_THE_ENVIRONMENT):
        return []
    nodes = [node for node in ast.walk(module.tree) if dotted(node) in ENVIRONMENT]
    froms = [node for node in ast.walk(module.tree) if isinstance(node, ast.ImportFrom) and node.module == "os"]
    taken = [node for node in froms if any(f"os.{alias.name}" in ENVIRONMENT for alias in node.names)]
    return [f"{module.place}:{node.lineno}" for node in [*nodes, *taken]]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.place)
def test_a_file_is_short_well_named_and_free_of_pickle_and_environment(module):
    lines = len(module.path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES_OF_A_FILE, f"{module.place} has {lines} lines: give each idea a file of its own"
    assert long_functions(module) == []
    assert vague_names(module) == []
    assert pickling(module) == []
    assert environment_reads(module) == []


@pytest.mark.parametrize("floor", FLOORS)
def test_a_package_declares_its_types(floor):
    assert (ROOT / floor / "py.typed").is_file()


@pytest.fixture
def make_module(tmp_path):
    """Return a function that makes a module from code, at a place of the project."""

    def write(code, place="streams/formats/wire.py"):
        path = tmp_path / place
        path.parent.mkdir(parents=True)
        path.write_text(code)
        return Module(place.removesuffix(".py").replace("/", "."), path, place)

    return write


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (long_functions, "def long():\n" + "    pass\n" * MOST_LINES_OF_A_FUNCTION),
        (long_functions, "class A:\n    async def long(self):\n" + "        pass\n" * MOST_LINES_OF_A_FUNCTION),
        (vague_names, "class TaskManager: ..."),
        (vague_names, "class HTTPMixin: ..."),
        (vague_names, "class BaseSource: ..."),
        (vague_names, "def read_helper(): ..."),
        (pickling, "import pickle"),
        (pickling, "def late():\n    from joblib import dump"),
        (pickling, "import torch\ntorch.load('x')"),
        (environment_reads, "import os\nos.environ['A']"),
        (environment_reads, "import os\nos.environ.get('A')"),
        (environment_reads, "import os\nos.getenv('A')"),
        (environment_reads, "from os import environ"),
    ],
)
def test_a_violation_is_caught(make_module, check, code):
    assert len(check(make_module(code))) == 1


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (long_functions, "def long():\n" + "    pass\n" * (MOST_LINES_OF_A_FUNCTION - 1)),
        (vague_names, "class Database: ...\ndef rebase(): ..."),
        (pickling, "from safetensors.torch import load\nload(b'')"),
        (environment_reads, "import os\nos.replace('a', 'b')"),
    ],
)
def test_valid_code_is_accepted(make_module, check, code):
    assert check(make_module(code)) == []


def test_a_file_name_can_be_vague(make_module):
    assert vague_names(make_module("", "streams/utils.py")) == ["streams/utils.py: utils"]


def test_the_command_line_may_read_the_environment(make_module):
    assert environment_reads(make_module("import os\nos.environ['A']", "deploy/commands/serve.py")) == []
