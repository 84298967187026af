"""The command line: ``online-meta`` and ``python -m online_meta``."""

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution, requires

EXTRA = "daemon"


def main() -> None:
    """Run the command line; exit with 78 and say what to install if packages of the extra "daemon" are missing."""
    if missing := list_missing_packages():
        names = ", ".join(missing)
        sys.stderr.write(f"error: the command line needs {names}: pip install 'online-meta[{EXTRA}]'\n")
        sys.exit(78)
    from deploy.cli import main as run

    run()


def list_missing_packages() -> list[str]:
    """Return the packages of the extra "daemon" that are not installed."""
    try:
        lines = requires("online-meta") or []
    except PackageNotFoundError:  # it runs from its sources, without being installed
        return []
    needed = [re.split(r"[^\w.-]", line)[0] for line in lines if re.search(rf"extra == .{EXTRA}.$", line)]
    return [name for name in needed if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
