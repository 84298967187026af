"""Command-line entry point for ``online-meta`` and ``python -m online_meta``."""

import sys


def main() -> None:
    """Run the command line.

    If the daemon's dependencies are missing, print the install command and exit with status 78.
    """
    try:
        from deploy.cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("deploy", "online_meta", "streams", "trainers"):
            raise
        package = error.name.split(".")[0]
        sys.stderr.write(f"error: the command line needs {package}: pip install 'online-meta[daemon]'\n")
        sys.exit(78)
    run()


if __name__ == "__main__":
    main()
