"""The floor plan as the code has it: the rooms of utils/ and what each module imports."""

import ast

from helpers import ROOT

# Each room may import those before it. The ground files come first; commands of utils/ and eval/ look at all.
ORDER = "console prompts arguments run fast decode models data chat flags train merge".split()
ROOMS = [name for name in ORDER if (ROOT / "utils" / name).is_dir()]


def name_module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {name_module(path): path for folder in ("utils", "eval") for path in (ROOT / folder).rglob("*.py")}


def find_imports(path):
    """Modules of this repository that a file imports anywhere but for its annotations alone."""
    tree, found = ast.parse(path.read_text()), set()
    unused = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in unused:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


IMPORTS = {name: find_imports(path) for name, path in MODULES.items()}


def find_room(module):
    """The room or ground file of a module of utils; None for commands, packages' own pages and eval."""
    package, *rest = module.split(".")
    return rest[0] if package == "utils" and rest and rest[0] in ORDER else None
