"""Show the notebooks of the tutorials with their outputs as pages of the site: a hook that mkdocs.yml names."""

import json
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


class Notebook(File):
    """A notebook among the files of the site: a page, not a file that is copied."""

    def is_documentation_page(self) -> bool:
        return True


def on_files(files: Files, config: Any) -> Files:
    """Take each notebook for a page."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            files.remove(file)
            files.append(Notebook(file.src_uri, file.src_dir, file.dest_dir, file.use_directory_urls))
    return files


def on_page_read_source(page: Page, config: Any) -> str | None:
    """Return a notebook as Markdown; None for any other page."""
    return render_notebook(page.file.content_string) if isinstance(page.file, Notebook) else None


def render_notebook(content: str) -> str:
    """Return the cells of a notebook as Markdown: texts as they are, code and printed lines fenced, plots as images."""
    return "\n\n".join(part for cell in json.loads(content)["cells"] for part in _render_cell(cell)) + "\n"


def _render_cell(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return [source]
    parts = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        if "data" in output:
            parts.append(
                f'<img alt="The plot of the cell above" src="data:image/png;base64,{output["data"]["image/png"]}">'
            )
        else:
            parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
    return parts
