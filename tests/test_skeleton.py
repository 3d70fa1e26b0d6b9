"""What holds for the package as a whole: one version, docstrings, and who may import whom."""

import ast
import configparser
import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import chunk_grpo_nb

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "chunk_grpo_nb"
MATHS = (
    "schedules",
    "sde",
    "dynamics",
    "chunks",
    "boundaries",
    "online",
    "selection",
    "chunking",
    "advantages",
    "objective",
    "trust_regions",
)
HEAVY = ("diffusers", "transformers", "accelerate", "peft", "torchvision", "datasets")
ROOMS = (
    "",
    "models",
    "rewards",
    "shapes",
    "training",
    "analysis",
)  # a room imports from those before it


def name_of(path: Path) -> str:
    """Name of a module inside the package, such as `training.trainer`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


FILES = {name_of(p): p for p in sorted(PACKAGE.rglob("*.py")) if p.stem[0] != "_"}
MODULES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def room_of(module: str) -> int:
    """Place of a module's room in ROOMS."""
    return ROOMS.index(module.rpartition(".")[0])


def python(code: str) -> subprocess.CompletedProcess:
    """Run `code` in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def absolute(node: ast.ImportFrom, module: str) -> str:
    """The full name of what a `from ... import` statement in `module` imports from."""
    if not node.level:
        return node.module
    parents = ["chunk_grpo_nb", *module.split(".")][: -node.level]
    return ".".join([*parents, *filter(None, [node.module])])


def imports(tree: ast.AST, module: str) -> set[str]:
    """Every module that `tree`, a part of `module`, imports, at the top or inside functions."""
    found = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = absolute(node, module)
            names = {f"{base}.{alias.name}".removeprefix("chunk_grpo_nb.") for alias in node.names}
            found |= {f"chunk_grpo_nb.{name}" for name in names & set(MODULES)} or {base}
    return found


def own_imports(tree: ast.AST, module: str) -> set[str]:
    """The modules of this package that `tree`, a part of `module`, imports."""
    return {name.removeprefix("chunk_grpo_nb.") for name in imports(tree, module)} & set(MODULES)


def test_one_version():
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    version = parser["DEFAULT"]["version"]
    assert chunk_grpo_nb.__version__ == version
    assert importlib.metadata.version("chunk_grpo_nb") == version
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8").replace(
        '"', ""
    )


def test_no_torchvision_in_what_we_install():
    pins = (ROOT / "ci" / "constraints.txt").read_text(encoding="utf-8")
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert "torchvision" not in pins + settings
    assert re.search(r"^torch==[\d.]+$", pins, re.M), "torch is pinned without a +cpu or +cu suffix"


def test_constraints_pin_every_requirement():
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    keys = [
        "requirements",
        *(f"{extra}_requirements" for extra in ("notebooks", "dev", "eval", "track")),
    ]
    wanted = {
        re.split(r"[<>=\[]", line)[0].lower()
        for key in keys
        for line in parser["DEFAULT"][key].split()
    }
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
def test_rooms_import_from_rooms_above_only(module):
    for other in own_imports(MODULES[module], module):
        assert room_of(other) <= room_of(module), (
            f"{module} imports {other}, of a room below its own"
        )
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and absolute(node, module) == "chunk_grpo_nb":
            named = {alias.name for alias in node.names}
            assert named <= set(MODULES), (
                f"{module} imports {named} from the package, not from the module that defines it"
            )


def test_no_two_modules_import_each_other():
    arrows = {name: own_imports(tree, name) for name, tree in MODULES.items()}

    def reached(name: str, seen: frozenset = frozenset()) -> set[str]:
        return set().union(
            *({o} | reached(o, seen | {o}) for o in arrows[name] if o not in seen), set()
        )

    circular = sorted(name for name in MODULES if name in reached(name))
    assert circular == []


def test_notebooks_lie_in_the_folder_of_their_room():
    for name, path in FILES.items():
        notebook = re.search(
            r"File to edit: [./]*nbs/(\S+)\.ipynb", path.read_text(encoding="utf-8")
        )[1]
        folder, leaf = notebook.split("/")
        assert folder in (["maths", "data"] if room_of(name) == 0 else [name.split(".")[0]]), name
        assert re.fullmatch(r"\d\d_" + name.split(".")[-1], leaf), (
            f"{name} is exported by {notebook}"
        )


def test_notebooks_are_titled_by_their_module():
    for name, path in FILES.items():
        notebook = re.search(r"File to edit: [./]*(nbs/\S+)", path.read_text(encoding="utf-8"))[1]
        cells = json.loads((ROOT / notebook.rstrip(".")).read_text(encoding="utf-8"))["cells"]
        title = "".join(cells[0]["source"]).splitlines()[0]
        assert title == f"# {name.split('.')[-1]}", f"{notebook} is titled {title!r}"


def test_only_the_training_room_knows_accelerate():
    knows = {
        name
        for name, tree in MODULES.items()
        if any(i.split(".")[0] == "accelerate" for i in imports(tree, name))
    }
    assert {name.split(".")[0] for name in knows} <= {"training"}


def public(tree: ast.Module) -> list[ast.AST]:
    """Public functions and classes of a module, with the public methods of those classes."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    top = [node for node in tree.body if isinstance(node, kinds) and node.name[0] != "_"]
    return top + [
        node
        for owner in top
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, ast.FunctionDef) and node.name[0] != "_"
    ]


@pytest.mark.parametrize("module", MODULES)
def test_everything_offered_is_there(module):
    loaded = importlib.import_module(f"chunk_grpo_nb.{module}")
    assert [name for name in loaded.__all__ if not hasattr(loaded, name)] == []


@pytest.mark.parametrize("module", MODULES)
def test_public_symbols_are_documented(module):
    tree = MODULES[module]
    assert ast.get_docstring(tree), (
        f"{module} has no docstring: its notebook needs '> one line' under the title"
    )
    for node in public(tree):
        assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_read_in_one_sitting(module):
    lines = len(FILES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= 450, f"{module} has {lines} lines, at most 450: split its notebook"


SOURCES = [*FILES.values(), *sorted(ROOT.glob("tests/*.py")), *sorted(ROOT.glob("ci/*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{node.name} has {lines} lines, at most 60"


@pytest.mark.parametrize(
    "folder", sorted({path.parent.name for path in (ROOT / "nbs").glob("*/[0-9][0-9]_*.ipynb")})
)
def test_notebooks_are_numbered_without_twins_or_gaps(folder):
    found = sorted(int(path.name[:2]) for path in (ROOT / "nbs" / folder).glob("[0-9]*.ipynb"))
    assert found == list(range(found[0], found[0] + len(found)))
