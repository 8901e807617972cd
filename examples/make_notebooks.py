"""Make each walk-through's notebook from its script: python examples/make_notebooks.py

`# %%` starts a code cell, `# %% [markdown]` a text cell. The metadata asks Colab for its free GPU.
The badges and the clone name OWNER/Chinese-Guanaco: put your repository's name in its place, in examples/*.py
and in both READMEs (tests/test_examples.py holds them alike), then run this.
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
    metadata = {
        "accelerator": "GPU",
        "colab": {"gpuType": "T4", "provenance": []},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return v4.new_notebook(cells=cells, metadata=metadata)


def main() -> None:
    for script in SCRIPTS:
        notebook = build_notebook((FOLDER / script).read_text(encoding="utf-8"))
        path = FOLDER / script.replace(".py", ".ipynb")
        path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
