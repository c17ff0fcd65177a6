"""The command `resnetlab`: its subcommands and its error handling."""

from __future__ import annotations

import difflib
import io
import os
import re
import sys
import warnings
from collections.abc import Sequence
from inspect import getdoc
from itertools import takewhile
from pathlib import Path

from cyclopts import (
    App,
    CycloptsError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

import resnetlab
from resnetlab.cli import annotated, catalogue, console, data, features, runs, weights
from resnetlab.cli.evaluate import evaluate
from resnetlab.cli.explain import explain
from resnetlab.cli.inspect import inspect
from resnetlab.cli.launch import train_process
from resnetlab.cli.peer_options import understand
from resnetlab.cli.plan import plan
from resnetlab.cli.predict import predict
from resnetlab.cli.push import push, strip
from resnetlab.cli.serve import serve
from resnetlab.cli.study import study
from resnetlab.cli.train import train
from resnetlab.errors import NoSpaceError, ResNetLabError, first_line
from resnetlab.stopping import check_stop, end_on_stop_signals

app = App(
    name="resnetlab",
    help="Residual networks: train, evaluate and deploy them.\n\nStart with: `resnetlab train`",
    version=resnetlab.__version__,
    print_error=False,
    exit_on_error=False,
    help_format="markdown",
    result_action="return_value",
)
app.command(train)
app.command(train_process, name="_train-process", show=False)
for command in (
    evaluate,
    predict,
    explain,
    features.embed,
    features.neighbours,
    push,
    strip,
    serve,
    inspect,
    study,
    plan,
):
    app.command(command)
app.command(weights.import_, name="import")
app.command(weights.export)

data_app = App(name="data", help="Check data and labels; pack them into shards.")
data_app.command(data.check)
data_app.command(data.pack)
data_app.command(features.audit)
app.command(data_app)
app.command(runs.app)
app.command(catalogue.models)
app.command(catalogue.recipes)
app.command(catalogue.doctor)
app.register_install_completion_command(help="Install completion of commands and options for this shell.")

detect = App(name="detect", help="Detect objects: train a detector on boxes, evaluate it, use it.")
segment = App(name="segment", help="Label every pixel: train a segmenter on masks, evaluate it, use it.")
for name in ("train", "evaluate", "predict", "export"):
    detect.command(getattr(annotated, f"detect_{name}"), name=name)
    segment.command(getattr(annotated, f"segment_{name}"), name=name)
detect.command(annotated.detect_localise, name="localise")
app.command(detect)
app.command(segment)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0, 1 (failed), 2 (wrong request) or 128 + signal (stopped)."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # in UTF-8 file names are printed as their bytes
        is_utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")
    with end_on_stop_signals():  # the first process of a container has no default action for SIGTERM
        sys.exit(run_command(sys.argv[1:] if arguments is None else arguments))


def run_command(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code. Errors become one sentence on standard error."""
    before, ResNetLabError.on_command_line = ResNetLabError.on_command_line, True
    try:
        return _run_command(arguments)
    finally:
        ResNetLabError.on_command_line = before


def _run_command(arguments: Sequence[str]) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = console.WarningPrinter()
            understood = understand(app, [_expand_home(argument) for argument in arguments])
            check_stop()
            app(understood or ["--help"])
        if sys.stdout is not None:
            sys.stdout.flush()
        check_stop()
    except CycloptsError as error:
        console.log_error(_explain(error))
        return 2
    except ResNetLabError as error:
        unexplained = isinstance(error, NoSpaceError) and not error.hint
        console.log_error(f"{_find_command_name(arguments)}: {error}" if unexplained else str(error))
        return error.exit_code
    except KeyboardInterrupt:
        console.log_error("interrupted.")
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, UnicodeError) as error:  # without a better message from the command
        console.log_error(f"{error.__class__.__name__}: {error}")
        return 1
    except BaseException as error:
        if (code := getattr(error, "exit_code", None)) is not None:
            console.log_error(str(error))
            return int(code)
        if not _lacks_memory(error):
            raise
        command = _find_command_name(arguments)
        run = " A run that had started goes on with resnetlab train --resume RUN." if "train" in command else ""
        console.log_error(
            f"{command}: there is not enough memory ({first_line(error)}); end other programs, or take smaller images.{run}"
        )
        return 1
    return 0


def _lacks_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from resnetlab.out_of_memory import is_out_of_memory

    return is_out_of_memory(error)


def _explain(error: CycloptsError) -> str:
    """The sentence of an error in a command line: what is missing, with the command's example, or what is not understood."""
    name = " ".join(error.command_chain or ())
    command = app
    for word in error.command_chain or ():
        command = command[word]
    if isinstance(error, UnknownOptionError) and name:
        return _explain_option(error, name)
    unused = isinstance(error, UnusedCliTokensError | UnknownCommandError) and error.unused_tokens
    found = error.argument if isinstance(error, MissingArgumentError) else None
    if not name or not (unused or found):
        shown = f"resnetlab {name} --help".replace("  ", " ")
        return f"{' '.join(str(error).split())} (`{shown}` lists what there is)"
    if found is not None and found.name == "--data" and (meant := _find_data(error, name)):
        return f"{name} needs --data; did you mean: {meant}"
    needs = f"{name} does not take {' '.join(map(repr, unused or []))}"
    if command.default_command is None:  # a group, such as data
        own = [each for each in command if not each.startswith("-")]
        needs, command = f"{name} has no command {(unused or [''])[0]!r}, but {', '.join(own)}", command[own[0]]
    if found is not None:
        needs = f"{name} needs {found.name}" if found.required else f"{found.name} needs a value"
    example = re.search(r"^Example: `([^`]+)`", getdoc(command.default_command) or "", re.MULTILINE)
    return f"{needs}; for example: {example[1]}" if example else f"{needs}."


def _explain_option(error: UnknownOptionError, name: str) -> str:
    """The sentence of an unknown option: a misspelt one is named, one that merely looks alike is not."""
    option = (error.token.keyword or error.token.value).partition("=")[0]
    names = [each[2:] for argument in error.argument_collection for each in argument.names if each.startswith("--")]
    near = difflib.get_close_matches(option.lstrip("-"), names, n=1, cutoff=0.7)
    hint = f"did you mean --{near[0]}?" if near else f"`resnetlab {name} --help` lists the options."
    return f"{name} has no option {option}; {hint}"


def _find_data(error: CycloptsError, name: str) -> str:
    """The command line in which a positional argument is the data; "" where it is not clear which one."""
    tokens = (error.root_input_tokens or [])[len(name.split()) :]
    words = list(takewhile(lambda token: not token.startswith("-"), tokens))
    models = [w for w in words if w.endswith(".safetensors") or (Path(w) / "model.safetensors").exists()]
    data = [word for word in words if word not in models]
    return f"resnetlab {name} {' '.join(models)} --data {data[0]}" if models and len(data) == 1 else ""


def _find_command_name(arguments: Sequence[str]) -> str:
    """The command of a command line, such as "export" or "data pack"."""
    words = [argument for argument in arguments[:2] if not argument.startswith("-")]
    return " ".join(words if words[:1] in (["data"], ["detect"], ["segment"]) else words[:1])


def _expand_home(argument: str) -> str:
    """Expands ~ in --out=~/runs: shells expand it only at the start of a word, and a folder named ~ is a trap."""
    option, _, value = argument.partition("=")
    at_home = option.startswith("--") and value.startswith("~")
    return f"{option}={os.path.expanduser(value)}" if at_home else argument
