"""The house: who may know whom, how long a file and a function may be, and that every script answers --help at once."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

LIBRARY = sorted((ROOT / "nanocolbert").rglob("*.py"))
ROOTS = sorted(ROOT.glob("*.py"))
SCRIPTS = [*ROOTS, *sorted((ROOT / "scripts").glob("*.py"))]
OTHERS = [path for folder in ("scripts", "bench", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]

LINES = {"root": 420, "nanocolbert": 420, "others": 500}  # of a file
FUNCTION_LINES = 60  # but of a test's table of cases

# What a module, or a wing's modules, may know beside themselves; all are of nanocolbert.
GROUND = ("cli", "progress", "compute")
MAY_KNOW = {
    "cli": (),
    "progress": ("cli",),
    "compute": ("cli",),
    "storage": ("cli",),
    "text": (*GROUND, "storage"),
    "config": (*GROUND, "storage", "text"),
    "framing": (*GROUND, "storage", "text", "config"),
    "maxsim": (*GROUND, "storage"),
    "encoder": (*GROUND, "storage", "text", "config"),
    "checkpoints": (*GROUND, "storage", "text", "config", "encoder"),
    "index": (*GROUND, "storage", "maxsim"),
    "server": ("cli",),
    "training": (*GROUND, "storage", "maxsim", "text", "config", "encoder"),
    "indexing": (*GROUND, "storage", "text", "checkpoints", "index"),
    "explain": (*GROUND, "storage", "maxsim", "text", "config"),
}
MAY_KNOW = {f"nanocolbert.{name}": {f"nanocolbert.{other}" for other in others} for name, others in MAY_KNOW.items()}


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_of(path): path for path in (*ROOTS, *LIBRARY)}


def begins(module: str, name: str) -> bool:
    return module == name or module.startswith(name + ".")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def known(path: Path) -> frozenset[str]:
    """Modules of ours that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = {
                f"{node.module}.{alias.name}" for alias in node.names
            }  # modules of a package, or names in a module
            found |= names & MODULES.keys() or {node.module}
    return frozenset(found & MODULES.keys())


@pytest.mark.parametrize("path", LIBRARY, ids=module_of)
def test_who_knows_whom(path):
    module = module_of(path)
    if path.name == "__init__.py":
        assert not known(path)  # a package that imports its files would make each know all
        return
    rule = next((name for name in MAY_KNOW if begins(module, name)), None)
    assert rule, f"say in MAY_KNOW what {module} may know"
    strangers = {other for other in known(path) if not any(begins(other, name) for name in (rule, *MAY_KNOW[rule]))}
    assert not strangers, f"{module} is not to know {', '.join(sorted(strangers))}"


def test_rules_are_of_what_is_there():
    names = {name for rule, others in MAY_KNOW.items() for name in (rule, *others)}
    gone = {name for name in names if not any(begins(module, name) for module in MODULES)}
    assert not gone, gone


def test_no_two_files_import_each_other():
    """Nor three in a circle: imports within functions count."""
    finished, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module not in finished:
            path.append(module)
            for other in sorted(known(MODULES[module])):
                visit(other)
            finished.add(path.pop())

    for module in MODULES:
        visit(module)
    assert finished == MODULES.keys()


@pytest.mark.parametrize("path", [*ROOTS, *LIBRARY, *OTHERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_read_in_one_go(path):
    kind = "root" if path in ROOTS else "nanocolbert" if path in LIBRARY else "others"
    n = len(path.read_text().splitlines())
    assert n <= LINES[kind], f"{path.relative_to(ROOT)}: {n} lines, {LINES[kind]} at most: split it"
    if ROOT / "tests" in path.parents:
        return
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    long = {name: n for name, n in long.items() if n > FUNCTION_LINES}
    assert not long, f"{path.relative_to(ROOT)}: functions of more than {FUNCTION_LINES} lines: {long}"


SLOW = ("torch", "transformers", "numba", "faiss")
HELP = f"""
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("slow:", *{{*{SLOW!r}}} & set(sys.modules))
"""


@pytest.mark.parametrize(
    "script",
    [path for path in SCRIPTS if '__name__ == "__main__"' in path.read_text()],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_help_waits_for_no_import(script):
    done = subprocess.run([sys.executable, "-c", HELP, script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "slow:"
