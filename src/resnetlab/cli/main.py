"""The command `resnetlab`: its subcommands and its error handling."""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from collections.abc import Sequence
from inspect import getdoc

from cyclopts import App, CycloptsError, MissingArgumentError, UnusedCliTokensError

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
    unused = isinstance(error, UnusedCliTokensError) and error.unused_tokens
    found = error.argument if isinstance(error, MissingArgumentError) else None
    if not error.command_chain or not (unused or found):
        return " ".join(str(error).split()) + " (resnetlab --help lists what there is)"
    command, name = app, " ".join(error.command_chain)
    for word in error.command_chain:
        command = command[word]
    example = re.search(r"^Example: `([^`]+)`", getdoc(command.default_command) or "", re.MULTILINE)
    needs = f"{name} does not take {' '.join(map(repr, unused))}" if unused else f"{name} needs a value"
    if found is not None:
        needs = f"{name} needs {found.name}" if found.required else f"{found.name} needs a value"
    return f"{needs}; for example: {example[1]}" if example else f"{needs}."


def _find_command_name(arguments: Sequence[str]) -> str:
    """The command of a command line, such as "export" or "data pack"."""
    words = [argument for argument in arguments[:2] if not argument.startswith("-")]
    return " ".join(words if words[:1] in (["data"], ["detect"], ["segment"]) else words[:1])


def _expand_home(argument: str) -> str:
    """Expands ~ in --out=~/runs: shells expand it only at the start of a word, and a folder named ~ is a trap."""
    option, _, value = argument.partition("=")
    at_home = option.startswith("--") and value.startswith("~")
    return f"{option}={os.path.expanduser(value)}" if at_home else argument
