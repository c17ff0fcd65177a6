"""The house: which floor may import which, no cycles, and rooms of a size that can be read (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"

# Every floor, and the floors it stands on. A module may import from its own floor and from all that lies below.
# A new package, or a new module beside the packages, needs a place here.
HOUSE = {
    "bottom": {"errors", "preprocessing", "records", "runtime", "world"},  # the modules that are this floor
    "nn": {"bottom"},
    "models": {"nn"},
    "data": {"bottom"},
    "evaluation": {"models", "data"},
    "tasks": {"evaluation"},
    "training": {"tasks"},
    "studies": {"training"},
    "use": {"evaluation"},
    "residuum": {"studies", "use"},  # the package itself: the public names
    "cli": {"residuum"},
    "__main__": {"cli"},
}
MODULE_LINES = 400
FUNCTION_LINES = 70  # docstring apart: the command line's holds the help


def floor(module: str) -> str:
    """residuum.nn.blocks -> nn; residuum.errors -> bottom; residuum -> residuum."""
    room = [*module.split("."), module][1]
    return "bottom" if room in HOUSE["bottom"] else room


def below(name: str) -> set[str]:
    """The floors that a floor may import from, its own among them."""
    return {name} if name == "bottom" else {name}.union(*map(below, HOUSE[name]))


def modules(source: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    files = {file.relative_to(source).with_suffix(""): file for file in sorted(source.rglob("*.py"))}
    return {".".join(path.parts).removesuffix(".__init__"): file for path, file in files.items()}


def names_imported(module: str, file: Path) -> Iterator[tuple[int, str, str]]:
    """(line, module, name in it) of all that a file imports: in functions, under TYPE_CHECKING, and lazily by a string."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((node.lineno, home, alias.name) for alias in node.names)
        elif isinstance(node, ast.Constant) and (name := re.fullmatch(r"(residuum(?:\.\w+)+)(:\w+)?", str(node.value))):
            yield node.lineno, name[1], ""


def imports(module: str, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, module) of all that a module imports from the package."""
    for line, home, name in names_imported(module, known[module]):
        if home.split(".")[0] == "residuum" and not name.startswith("__"):  # residuum.__version__ lives on no floor
            yield line, f"{home}.{name}" if f"{home}.{name}" in known else home


def wrong_imports(source: Path) -> Iterator[str]:
    known = modules(source)
    for module in known:
        here = floor(module)
        if here not in HOUSE:
            yield f"{module}: the house has no floor {here!r}; give it a place in HOUSE of tests/test_house.py"
            continue
        for line, target in imports(module, known):
            if floor(target) not in below(here):
                yield f"{module}:{line} imports {target}, but {here} does not stand on {floor(target)}"


def cycles(source: Path) -> Iterator[str]:
    known = modules(source)
    graph = TopologicalSorter({module: {target for _, target in imports(module, known)} for module in known})
    try:
        graph.prepare()
    except CycleError as error:
        yield "import cycle: " + " <- ".join(error.args[1])


def function_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From `def` to the end, docstring apart."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        assert docstring.end_lineno is not None
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def ill_shaped(source: Path) -> Iterator[str]:
    for module, file in modules(source).items():
        if file.name == "utils.py":
            yield f"{module}: name a module after what it holds, not utils"
        text = file.read_text()
        if (n := len(text.splitlines())) > MODULE_LINES:
            yield f"{module}: {n} lines, more than {MODULE_LINES}"
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and (n := function_lines(node)) > FUNCTION_LINES
            ):
                yield f"{module}:{node.lineno} {node.name}: {n} lines, more than {FUNCTION_LINES}"


@pytest.mark.parametrize("rule", [wrong_imports, cycles, ill_shaped])
def test_the_house_stands(rule: Callable[[Path], Iterator[str]]) -> None:
    assert len(modules(SOURCE)) > 10
    assert "\n".join(rule(SOURCE)) == ""


OFFENCES = {
    "upwards": (
        {"nn/blocks.py": "import torch\nimport residuum.models.spec"},
        "residuum.nn.blocks:2 imports residuum.models.spec, but nn does not stand on models",
    ),
    "sideways": (
        {"data/folder.py": "from residuum.models.spec import names"},
        "residuum.data.folder:1 imports residuum.models.spec, but data does not stand on models",
    ),
    "the package for a name": (
        {"models/spec.py": "from residuum import data"},
        "residuum.models.spec:1 imports residuum, but models does not stand on residuum",
    ),
    "the package for a module": (
        {"models/spec.py": "from residuum import use", "use/__init__.py": ""},
        "residuum.models.spec:1 imports residuum.use, but models does not stand on use",
    ),
    "inside a function": (
        {"use/export.py": "def export():\n    from residuum.training import loop"},
        "residuum.use.export:2 imports residuum.training, but use does not stand on training",
    ),
    "for types only": (
        {"errors.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from residuum.nn import blocks"},
        "residuum.errors:3 imports residuum.nn, but bottom does not stand on nn",
    ),
    "relative": (
        {"tasks/__init__.py": "from ..training.loop import train"},
        "residuum.tasks:1 imports residuum.training.loop, but tasks does not stand on training",
    ),
    "by a string": (
        {"training/loop.py": "from importlib import import_module\nimport_module('residuum.cli.main')"},
        "residuum.training.loop:2 imports residuum.cli.main, but training does not stand on cli",
    ),
    "a floor unheard of": (
        {"helpers/many.py": ""},
        "residuum.helpers.many: the house has no floor 'helpers'; give it a place in HOUSE of tests/test_house.py",
    ),
    "a cycle": (
        {"nn/a.py": "from residuum.nn import b", "nn/b.py": "def f():\n    from residuum.nn.a import g"},
        "import cycle: residuum.nn.a <- residuum.nn.b <- residuum.nn.a",
    ),
    "utils": ({"nn/utils.py": ""}, "residuum.nn.utils: name a module after what it holds, not utils"),
    "a long module": ({"nn/a.py": "pass\n" * 401}, "residuum.nn.a: 401 lines, more than 400"),
    "a long function": (
        {"nn/a.py": "class A:\n    async def f(self):\n        '''Not\n        counted.'''\n" + "        pass\n" * 70},
        "residuum.nn.a:2 f: 71 lines, more than 70",
    ),
}


@pytest.mark.parametrize(("files", "message"), OFFENCES.values(), ids=OFFENCES)
def test_offences_are_found(files: dict[str, str], message: str, tmp_path: Path) -> None:
    write(tmp_path, files)
    assert [*wrong_imports(tmp_path), *cycles(tmp_path), *ill_shaped(tmp_path)] == [message]


def test_what_is_allowed_is_no_offence(tmp_path: Path) -> None:
    files = {
        "__init__.py": "import residuum.training.loop",
        "records.py": "from residuum import __version__\nfrom residuum.errors import RunError",
        "training/loop.py": "from . import step\nfrom residuum.nn.blocks import Block\nimport residuums",
        "training/step.py": "def f():\n    '''Docstring.'''\n" + "    pass\n" * 69,
        "cli/main.py": "import residuum\nlazy = 'residuum.use.predict:predict'",
        "__main__.py": "from residuum.cli.main import main",
    }
    write(tmp_path, files)
    assert [*wrong_imports(tmp_path), *cycles(tmp_path), *ill_shaped(tmp_path)] == []


def write(source: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = source / "residuum" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
