"""Facts about the package as a whole: one version, docstrings, and who may import whom."""

import ast
import configparser
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import chunk_grpo_nb

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "chunk_grpo_nb"
MATHS = ("schedules", "sde", "dynamics", "chunking", "advantages", "objective")
HEAVY = ("diffusers", "transformers", "accelerate", "peft", "torchvision", "datasets")
MODULES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.glob("*.py")) if path.stem[0] != "_"}


def python(code: str) -> subprocess.CompletedProcess:
    """Run `code` in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def imports(tree: ast.AST) -> set[str]:
    """Every module that `tree` imports, at the top or inside functions; `from chunk_grpo_nb import name` counts as `chunk_grpo_nb.__init__`."""
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)):
        own = node.level > 0 or node.module == "chunk_grpo_nb"
        named = [node.module] if node.module not in (None, "chunk_grpo_nb") else [a.name if a.name in MODULES else "__init__" for a in node.names]
        found |= {f"chunk_grpo_nb.{name}" if own else name for name in named}
    return found


def number(module: str) -> str:
    """Number of the notebook that exports `module`."""
    head = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    return re.search(r"File to edit: \.\./nbs/(\w+)\.ipynb", head)[1]


def test_one_version():
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    version = parser["DEFAULT"]["version"]
    assert chunk_grpo_nb.__version__ == version
    assert importlib.metadata.version("chunk_grpo_nb") == version
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8").replace('"', "")


def test_no_torchvision_in_what_we_install():
    pins = (ROOT / "ci" / "constraints.txt").read_text(encoding="utf-8")
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert "torchvision" not in pins + settings
    assert re.search(r"^torch==[\d.]+$", pins, re.M), "torch is pinned without a +cpu or +cu suffix"


def test_constraints_pin_every_requirement():
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    keys = ["requirements", *(f"{extra}_requirements" for extra in ("notebooks", "dev", "eval", "track"))]
    wanted = {re.split(r"[<>=\[]", line)[0].lower() for key in keys for line in parser["DEFAULT"][key].split()}
    lines = (ROOT / "ci" / "constraints.txt").read_text(encoding="utf-8").lower().splitlines()
    assert wanted <= {line.split("==")[0] for line in lines}


def test_maths_room_needs_torch_only():
    there = [name for name in MATHS if name in MODULES]
    blocked = [*HEAVY, "pandas", "matplotlib", "seaborn", "PIL", "scipy", "papermill", "IPython"]
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    code += "".join(f"import chunk_grpo_nb.{name}\n" for name in there)
    run = python(code)
    assert run.returncode == 0, run.stderr
    assert set(there) == set(MATHS)


def test_nothing_heavy_at_import():
    code = "import sys\n" + "".join(f"import chunk_grpo_nb.{name}\n" for name in MODULES)
    run = python(code + f"print([name for name in {HEAVY} if name in sys.modules])")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]", f"imported at the top of some module: {run.stdout}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_upwards(module):
    """At the top, a module imports from lower-numbered notebooks only; inside functions, from its own room (the tens of the number) and those above."""
    tree, own = MODULES[module], number(module)
    top = imports(ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], []))
    for name in imports(tree):
        assert name != "chunk_grpo_nb.__init__", f"{module} imports from the package instead of from the module that defines it"
        if name.startswith("chunk_grpo_nb."):
            other = number(name.split(".")[1])
            assert other < own if name in top else other[0] <= own[0], f"{module} imports {name}, which comes after it"


def test_only_the_trainer_knows_accelerate():
    knows = {name for name, tree in MODULES.items() if any(i.split(".")[0] == "accelerate" for i in imports(tree))}
    assert knows <= {"trainer"}


def public(tree: ast.Module) -> list[ast.AST]:
    """Public functions and classes of a module, with the public methods of those classes."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    top = [node for node in tree.body if isinstance(node, kinds) and node.name[0] != "_"]
    return top + [node for owner in top if isinstance(owner, ast.ClassDef) for node in owner.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]


@pytest.mark.parametrize("module", MODULES)
def test_public_symbols_are_documented_and_short(module):
    tree = MODULES[module]
    assert ast.get_docstring(tree), f"{module} has no docstring: its notebook needs '> one line' under the title"
    for node in public(tree):
        assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"
        lines = node.end_lineno - node.lineno + 1
        assert isinstance(node, ast.ClassDef) or lines <= 60, f"{module}.{node.name} has {lines} lines, at most 60"
