"""The shape of the package: imports in one direction, a test file for each module, an import without side effects."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import steer_adapter


ROOT = Path(steer_adapter.__file__).parent
TESTS = Path(__file__).parent
# Each imports only from itself and from those before it.
ORDER = [
    "errors", "version", "extras", "shapes", "decoder", "operations", "merging", "files", "tuner", "sharing",
    "log_probs", "verify", "data", "learn", "evaluate", "interop", "cli", "demo",
]  # fmt: skip
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The parts of the package that a module imports, at its top or inside functions."""
    found = set()
    package = ["steer_adapter", *path.parent.parts]
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "steer_adapter" else [module]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("steer_adapter.")}
    return found


@pytest.mark.parametrize("path", [p for p in MODULES if p != Path("__init__.py")], ids=str)
def test_imports_go_one_way(path):
    own = path.parts[0].removesuffix(".py")
    assert own in ORDER
    allowed = ORDER[: ORDER.index(own) + 1]
    assert imported(path) - set(allowed) - {"__version__"} == set()


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.name not in ("__init__.py", "__main__.py", "version.py")], ids=str
)
def test_every_module_has_a_test_file(path):
    if path == Path("errors.py"):
        return  # nothing but classes, raised and matched in all the others
    assert (TESTS / path.parent / f"test_{path.name}").exists()


def test_importing_loads_no_extra_and_changes_nothing_of_others():
    script = (
        "import peft, transformers, threading, warnings, sys; from peft.tuners.tuners_utils import BaseTuner; "
        "before = list(warnings.filters), dict(vars(BaseTuner)), threading.Thread.start; import steer_adapter; "
        "assert before == (warnings.filters, dict(vars(BaseTuner)), threading.Thread.start); "
        "loaded = {'trl', 'datasets', 'matplotlib'} & set(sys.modules); assert not loaded, loaded; "
        "from peft import PeftType; assert PeftType('STEER')"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_exported_names_exist():
    for name in steer_adapter.__all__:
        assert getattr(steer_adapter, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        steer_adapter.Nothing  # noqa: B018
