"""Run the notebooks of the tutorials: ``python -m tests.docs.notebooks`` writes their outputs again."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests.docs.pages import DOCS, ROOT
from tests.support.daemon import free_port

NOTEBOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))
PORT = "8780"
DRIVER = """
import base64, contextlib, io, json, sys, traceback
cells, found, names = json.load(sys.stdin), [], {"__name__": "__main__"}
for number, cell in enumerate(cells, 1):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            exec(compile(cell, f"cell {number}", "exec"), names)
        except BaseException:
            sys.exit(f"{output.getvalue()}code cell {number}:\\n{cell}\\n\\n{traceback.format_exc()}")
    plots = []
    pyplot = sys.modules.get("matplotlib.pyplot")
    for figure in pyplot.get_fignums() if pyplot else ():
        image = io.BytesIO()
        pyplot.figure(figure).savefig(image, format="png", dpi=80, bbox_inches="tight")
        pyplot.close(figure)
        plots.append(base64.b64encode(image.getvalue()).decode())
    found.append([output.getvalue(), plots])
json.dump(found, sys.stdout)
"""


class Output(NamedTuple):
    """What a cell gives: the ``text`` that it prints, and its ``plots`` as PNG images in base64."""

    text: str
    plots: list[str]


def read_cells(path: Path) -> list[dict[str, Any]]:
    """Return the code cells of a notebook, in order."""
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def read_output(cell: dict[str, Any]) -> Output:
    """Return the output that is stored with a cell."""
    text = "".join("".join(output.get("text", ())) for output in cell["outputs"])
    return Output(text, [output["data"]["image/png"] for output in cell["outputs"] if "data" in output])


def run_cells(path: Path, folder: Path) -> list[Output]:
    """Run the code cells of a notebook in one process and an empty folder; return what each gives.

    Raises ``AssertionError`` with the cell and the traceback if one raises. No process that a cell starts is left.
    """
    port = str(free_port())
    cells = ["".join(cell["source"]).replace(PORT, port) for cell in read_cells(path)]
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder), "MPLBACKEND": "agg"},
        start_new_session=True,
    )
    try:
        found, errors = process.communicate(json.dumps(cells))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    log = folder / "serve.log"
    assert process.returncode == 0, f"{errors}\n{log.read_text() if log.exists() else ''}"
    return [Output(text.replace(port, PORT), plots) for text, plots in json.loads(found)]


def main() -> None:
    """Run each notebook, or those that are named, and write their outputs into them."""
    for path in NOTEBOOKS:
        if sys.argv[1:] and path.stem not in sys.argv[1:]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = run_cells(path, Path(folder))
        notebook = json.loads(path.read_text(encoding="utf-8"))
        code = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
        for number, (cell, output) in enumerate(zip(code, found, strict=True), 1):
            lines = output.text.splitlines(keepends=True)
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
            cell["outputs"] += [
                {"data": {"image/png": plot}, "metadata": {}, "output_type": "display_data"} for plot in output.plots
            ]
            cell["execution_count"] = number
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
