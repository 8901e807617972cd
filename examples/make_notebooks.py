"""Make each walk-through's notebook from its script: python examples/make_notebooks.py

`# %%` starts a code cell, `# %% [markdown]` a text cell.
"""

from pathlib import Path

import nbformat
from nbformat import v4

FOLDER = Path(__file__).parent
SCRIPTS = ("basic_4bit.py", "finetune.py")


def build_notebook(source: str) -> nbformat.NotebookNode:
    cells = []
    for i, block in enumerate(source.split("# %%")[1:]):
        if block.startswith(" [markdown]\n"):
            lines = block.removeprefix(" [markdown]\n").strip().splitlines()
            cell = v4.new_markdown_cell("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))
        else:
            cell = v4.new_code_cell(block.strip().replace("  # noqa: E402", ""))
        cell.id = f"cell-{i}"  # nbformat's own would be random
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def main() -> None:
    for script in SCRIPTS:
        notebook = build_notebook((FOLDER / script).read_text(encoding="utf-8"))
        path = FOLDER / script.replace(".py", ".ipynb")
        path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
