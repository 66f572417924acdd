"""What the tests import is installed by `pip install ".[dev]"`, not by chance where they were written."""

import ast
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def imported(path: Path) -> set[str]:
    """Top-level names of all packages that a file imports, or skips without."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "importorskip":
            found |= {name.value for name in node.args if isinstance(name, ast.Constant)}
    return {name.partition(".")[0] for name in found}


def closure(requirements: list[str]) -> set[str]:
    """Names of all distributions that pip installs for the requirements, here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    seen: set[tuple[str, str]] = set()
    left = [(Requirement(line), "") for line in requirements]
    while left:
        requirement, extra = left.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in {"", *requirement.extras} - {extra for of, extra in seen if of == name}:
            seen.add((name, wanted))
            if name == canonicalize_name(project["name"]):
                lines = project["optional-dependencies"][wanted] if wanted else project["dependencies"]
            else:
                lines = _requires(name)
            left += [(Requirement(line), wanted) for line in lines]
    return {name for name, _ in seen}


def _requires(name: str) -> list[str]:
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []


def test_packages_that_tests_import_are_installed_by_the_dev_extra():
    declared = closure(["upstep_fast[dev]"])
    assert {"torch", "pytest", "scikit-learn", "botocore"} <= declared
    installed = packages_distributions()
    names = {name for path in (ROOT / "tests").rglob("*.py") for name in imported(path)} - {"upstep_fast"}
    undeclared = {
        name: installed[name]
        for name in names & installed.keys()
        if not {canonicalize_name(distribution) for distribution in installed[name]} & declared
    }
    assert not undeclared
