"""The rules of the house, held by a test: floors, sizes of files and functions, docstrings, forbidden things.

A longer file or function has its reason in the lists below.
"""

import ast
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FLOORS = {
    **dict.fromkeys(["batch", "document", "config", "flags"], 0),
    "parallel": 1,
    **dict.fromkeys(["models", "objectives", "data", "optim"], 2),
    "experiment": 3,
    **dict.fromkeys(["training", "decoding", "interop"], 4),
    **dict.fromkeys(["evaluation", "tuning", "compression", "scaling"], 5),
    **dict.fromkeys(["train", "generate", "evaluate", "prepare", "convert", "plan", "report", "replay"], 6),
}
PROGRAMS = [name for name, floor in FLOORS.items() if floor == 6]
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS, MAX_PROGRAM = 400, 60, 8, 80
# path -> reason
LONG_FILES: dict[str, str] = {}
# "path:function" -> reason
LONG_FUNCTIONS: dict[str, str] = {}

FILES = sorted((ROOT / "lm").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def _name(path):
    return str(path.relative_to(ROOT))


def _room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "lm" else None


def _imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ([f"lm.{a.name}" for a in node.names] if node.module == "lm" else [node.module])
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_file_keeps_the_rules(path):
    tree, text = TREES[path], path.read_text(encoding="utf-8")
    lines = text.count("\n")
    limit = MAX_PROGRAM if path.parent.name == "lm" and path.stem in PROGRAMS else MAX_FILE
    assert lines <= limit or _name(path) in LONG_FILES, f"{lines} lines"
    assert ast.get_docstring(tree), "no module docstring"
    here = _room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module in _imports(tree):
        there = _room(module)
        if here in (None, "__init__") or there in (None, here):
            continue
        assert FLOORS[there] < FLOORS[here], f"lm.{here} imports {module}, which is not on a floor below"
    assert not re.search(r"\bTODO\b|\bFIXME\b|NotImplementedError|\bimport pickle\b", text)
    assert not re.search(r"# (type|pyright): ignore(\[[\w, -]*\])?\s*$", text, re.MULTILINE), (
        "an ignore without its reason"
    )


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_functions_are_short_and_documented(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            assert size <= MAX_FUNCTION or f"{_name(path)}:{node.name}" in LONG_FUNCTIONS, f"{node.name}: {size} lines"
            count = len(node.args.args) + len(node.args.kwonlyargs) - (node.args.args[:1] == ["self"])
            assert count <= MAX_PARAMETERS + 1, f"{node.name} has {count} parameters"
    for node in TREES[path].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            documented = ast.get_docstring(node) or "__doc__" in ast.unparse(node)
            assert documented, f"{node.name} is public and has no docstring"


@pytest.mark.parametrize("room", ["data", "objectives"])
def test_host_side_rooms_import_no_jax(room):
    for path in FILES:
        if room in path.relative_to(ROOT).parts:
            assert not any(m.split(".")[0] in ("jax", "flax", "optax") for m in _imports(TREES[path])), _name(path)


def test_linen_is_named_only_in_models():
    for path in FILES:
        if any(module.startswith("flax") for module in _imports(TREES[path])):
            assert path.parent.name == "models", _name(path)


def test_nothing_committed_names_a_machine():
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False)
    names = [n for n in listed.stdout.splitlines() if not n.endswith((".png", ".npz"))]
    for name in names:
        path = ROOT / name
        if path.exists() and path != pathlib.Path(__file__):
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not re.search(r"/work/|/tmp/wt|/root/|pypi\.org|/opt/wheels", text), name
