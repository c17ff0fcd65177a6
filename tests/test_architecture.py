"""The architecture: which layer may import which, no import cycles, and the size of modules and functions."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"

# Every layer, and the layers directly below it. A module may import from its own layer and from all layers below.
# A new package, or a new module beside the packages, needs an entry layer.
LAYERS = {
    "bottom": {
        "compiled",
        "errors",
        "pixels",
        "migrate_v01",
        "peer_words",
        "progress",
        "tensor_file",
        "preprocessing",
        "process_place",
        "shared_context",
        "run_folder",
        "stopping",
        "device",
        "graph_capture",
        "out_of_memory",
        "distributed",
        "random",
        "formatting",
    },
    "nn": {"bottom"},
    "models": {"nn"},
    "data": {"bottom"},
    "evaluation": {"models", "data"},
    "training": {"inference"},
    "studies": {"training"},
    "inference": {"evaluation"},
    "serve": {"inference"},
    "resnetlab": {"studies", "serve"},  # the package itself: the public names
    "cli": {"resnetlab"},
    "__main__": {"cli"},
}
MODULE_LINES = 500
FUNCTION_LINES = 70  # without the docstring, which holds the help of a command
PARAMETERS = 6  # without self; more belong into a value object
# Commands, whose parameters are their options, and functions that people call from Python with the options they want
MANY_PARAMETERS = re.compile(
    r"resnetlab\.(cli\.\w+\.(train|evaluate|predict|explain|embed|audit|check|neighbours|serve|study|import_|export|plan)"
    r"|training\.python_api\.train|inference\.build\.build|evaluation\.evaluate\.evaluate"
    r"|inference\.predict\.export|inference\.audit\.audit_labels)"
)


def layer_of(module: str) -> str:
    """resnetlab.nn.blocks -> nn; resnetlab.errors -> bottom; resnetlab -> resnetlab."""
    part = [*module.split("."), module][1]
    return "bottom" if part in LAYERS["bottom"] else part


def layers_below(name: str) -> set[str]:
    """The layers that a layer may import from, including itself."""
    return {name} if name == "bottom" else {name}.union(*map(layers_below, LAYERS[name]))


@cache
def nodes(text: str) -> list[ast.AST]:
    """All nodes of a module's source, which several rules look at."""
    return list(ast.walk(ast.parse(text)))


@pytest.fixture(scope="module", autouse=True)
def forget_nodes() -> Iterator[None]:
    """Half a million objects would slow down whatever tests come after these."""
    yield
    nodes.cache_clear()


def modules(source: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    files = {file.relative_to(source).with_suffix(""): file for file in sorted(source.rglob("*.py"))}
    return {".".join(path.parts).removesuffix(".__init__"): file for path, file in files.items()}


def names_imported(module: str, file: Path) -> Iterator[tuple[int, str, str]]:
    """(line, module, name in it) of all imports of a file: in functions, under TYPE_CHECKING, and lazily by a string."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in nodes(file.read_text()):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((node.lineno, home, alias.name) for alias in node.names)
        elif isinstance(node, ast.Constant) and (
            name := re.fullmatch(r"(resnetlab(?:\.\w+)+)(:\w+)?", str(node.value))
        ):
            yield node.lineno, name[1], ""


def imports(module: str, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, module) of all imports of a module from the package."""
    for line, home, name in names_imported(module, known[module]):
        if home.split(".")[0] == "resnetlab" and not name.startswith("__"):  # resnetlab.__version__ belongs to no layer
            yield line, f"{home}.{name}" if f"{home}.{name}" in known else home


def wrong_imports(source: Path) -> Iterator[str]:
    known = modules(source)
    for module in known:
        layer = layer_of(module)
        if layer not in LAYERS:
            yield f"{module}: there is no layer {layer!r}; add it to LAYERS in tests/test_architecture.py"
            continue
        for line, target in imports(module, known):
            if layer_of(target) not in layers_below(layer):
                yield f"{module}:{line} imports {target}, but {layer} is not above {layer_of(target)}"


def cycles(source: Path) -> Iterator[str]:
    known = modules(source)
    graph = TopologicalSorter({module: {target for _, target in imports(module, known)} for module in known})
    try:
        graph.prepare()
    except CycleError as error:
        yield "import cycle: " + " <- ".join(error.args[1])


def function_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        assert docstring.end_lineno is not None
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def oversized(source: Path) -> Iterator[str]:
    for module, file in modules(source).items():
        if file.name == "utils.py":
            yield f"{module}: name a module after its content, not utils"
        text = file.read_text()
        if (n := len(text.splitlines())) > MODULE_LINES:
            yield f"{module}: {n} lines, more than {MODULE_LINES}"
        for node in nodes(text):
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and (n := function_lines(node)) > FUNCTION_LINES
            ):
                yield f"{module}:{node.lineno} {node.name}: {n} lines, more than {FUNCTION_LINES}"


def with_many_parameters(source: Path) -> Iterator[str]:
    for module, file in modules(source).items():
        for node in nodes(file.read_text()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                n = sum(parameter.arg not in ("self", "cls") for parameter in parameters)
                if n > PARAMETERS and not MANY_PARAMETERS.fullmatch(f"{module}.{node.name}"):
                    yield f"{module}:{node.lineno} {node.name}: {n} parameters, more than {PARAMETERS}"


RULES = (wrong_imports, cycles, oversized, with_many_parameters)


@pytest.mark.parametrize("rule", RULES)
def test_the_architecture_holds(rule: Callable[[Path], Iterator[str]]) -> None:
    assert len(modules(SOURCE)) > 10
    assert "\n".join(rule(SOURCE)) == ""


VIOLATIONS = {
    "upwards": (
        {"nn/blocks.py": "import torch\nimport resnetlab.models.spec"},
        "resnetlab.nn.blocks:2 imports resnetlab.models.spec, but nn is not above models",
    ),
    "sideways": (
        {"data/folder.py": "from resnetlab.models.spec import names"},
        "resnetlab.data.folder:1 imports resnetlab.models.spec, but data is not above models",
    ),
    "the package for a name": (
        {"models/spec.py": "from resnetlab import data"},
        "resnetlab.models.spec:1 imports resnetlab, but models is not above resnetlab",
    ),
    "the package for a module": (
        {"models/spec.py": "from resnetlab import inference", "inference/__init__.py": ""},
        "resnetlab.models.spec:1 imports resnetlab.inference, but models is not above inference",
    ),
    "inside a function": (
        {"inference/state_dict_export.py": "def export():\n    from resnetlab.training import loop"},
        "resnetlab.inference.state_dict_export:2 imports resnetlab.training, but inference is not above training",
    ),
    "for types only": (
        {"errors.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from resnetlab.nn import blocks"},
        "resnetlab.errors:3 imports resnetlab.nn, but bottom is not above nn",
    ),
    "relative": (
        {"evaluation/__init__.py": "from ..training.loop import train"},
        "resnetlab.evaluation:1 imports resnetlab.training.loop, but evaluation is not above training",
    ),
    "by a string": (
        {"training/train.py": "from importlib import import_module\nimport_module('resnetlab.cli.main')"},
        "resnetlab.training.train:2 imports resnetlab.cli.main, but training is not above cli",
    ),
    "an unknown layer": (
        {"helpers/many.py": ""},
        "resnetlab.helpers.many: there is no layer 'helpers'; add it to LAYERS in tests/test_architecture.py",
    ),
    "a cycle": (
        {"nn/a.py": "from resnetlab.nn import b", "nn/b.py": "def f():\n    from resnetlab.nn.a import g"},
        "import cycle: resnetlab.nn.a <- resnetlab.nn.b <- resnetlab.nn.a",
    ),
    "utils": ({"nn/utils.py": ""}, "resnetlab.nn.utils: name a module after its content, not utils"),
    "a long module": ({"nn/a.py": "pass\n" * 501}, "resnetlab.nn.a: 501 lines, more than 500"),
    "a long function": (
        {"nn/a.py": "class A:\n    async def f(self):\n        '''Not\n        counted.'''\n" + "        pass\n" * 70},
        "resnetlab.nn.a:2 f: 71 lines, more than 70",
    ),
    "many parameters": (
        {"cli/train.py": "def train(a, b, /, c, *, d, e, f, g): ...\n\ndef show(self, a, b, /, c, *, d, e, f, g): ..."},
        "resnetlab.cli.train:3 show: 7 parameters, more than 6",
    ),
}


@pytest.mark.parametrize(("files", "message"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_violations_are_found(files: dict[str, str], message: str, tmp_path: Path) -> None:
    write(tmp_path, files)
    assert [message for rule in RULES for message in rule(tmp_path)] == [message]


def test_allowed_imports_pass(tmp_path: Path) -> None:
    files = {
        "__init__.py": "import resnetlab.training.train",
        "run_folder.py": "from resnetlab import __version__\nfrom resnetlab.errors import RunError",
        "training/train.py": "from . import step\nfrom resnetlab.nn.blocks import Block\nimport resnetlabs",
        "training/step.py": "def f():\n    '''Docstring.'''\n" + "    pass\n" * 69,
        "cli/main.py": "import resnetlab\nlazy = 'resnetlab.inference.predict:predict'",
        "__main__.py": "from resnetlab.cli.main import main",
    }
    write(tmp_path, files)
    assert [message for rule in RULES for message in rule(tmp_path)] == []


def write(source: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = source / "resnetlab" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_a_name_means_one_thing() -> None:
    """At most 40 top-level names, underscores apart, are defined in more than one file."""
    homes: dict[str, set[str]] = {}
    for module, file in modules(SOURCE).items():
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                homes.setdefault(node.name.lstrip("_"), set()).add(module)
    several = sorted(name for name, found in homes.items() if len(found) > 1)
    assert len(several) <= 40, several


def test_commands_print_through_one_place() -> None:
    """Names of files and classes may contain escapes of the terminal, which `console` escapes; JSON does so itself."""
    found = []
    for path in (SOURCE / "resnetlab" / "cli").glob("*.py"):
        if path.name not in ("console.py", "prediction_output.py"):
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            prints = [call for call in calls if ast.unparse(call.func) in ("print", "sys.stdout.write")]
            found += [
                f"{path.name}:{call.lineno}"
                for call in prints
                if not all(isinstance(a, ast.Constant) for a in call.args)
            ]
    assert found == []
