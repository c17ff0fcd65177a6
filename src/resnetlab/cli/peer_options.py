"""Understands command lines written with the options of other programs (`peer_words`)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from inspect import Parameter
from itertools import chain
from pathlib import Path

from cyclopts import App

from resnetlab.errors import UsageError
from resnetlab.peer_words import ANSWERS, COMMANDS, FIXED_ANSWERS, REPLACING, is_peer_word, translate, translate_flag

_OPTION = re.compile(r"--?[A-Za-z][\w.-]*")
_SETTING = re.compile(r"[a-z][a-z0-9_]*=.+")  # Ultralytics' epochs=10
_LISTS = ("models", "recipes", "runs", "study")  # commands that list, or show what is named
_POSITIONAL = ("MODEL", "NET", "DATA", "PATTERN", "TO", "IMAGES")  # in their order on a command line


class _Command:
    """A command's words, option names, and positional arguments."""

    def __init__(self, words: list[str], app: App) -> None:
        self.words = words
        arguments = list(app.assemble_argument_collection())
        self.options = {name for argument in arguments for name in argument.names if name.startswith("--")} | {"--help"}
        self.flags = {name for argument in arguments if argument.hint is bool for name in argument.names} | {"--help"}
        self.negatives = {name for argument in arguments for name in argument.negatives}
        names = {name for argument in arguments for name in argument.names} - self.options - {"*"}
        self.positional = {"MODEL" if name == "MODELS" else name for name in names}
        self.takes_many = any(argument.field_info.kind is Parameter.VAR_POSITIONAL for argument in arguments)
        self.takes_hyphens = any(argument.parameter.allow_leading_hyphen for argument in arguments)

    @cached_property
    def recipe_keys(self) -> Collection[str]:
        """The keys that `--set` takes."""
        if "--set" not in self.options:
            return ()
        from resnetlab.models.spec import Specification

        keys = {f.name for f in fields(Specification)} - {"channels", "classes"}
        if "train" not in self.words:
            return keys
        from resnetlab.training.annotated_recipes import DetectionRecipe, SegmentationRecipe
        from resnetlab.training.recipe import BaseRecipe, Recipe

        recipes: dict[str, type[BaseRecipe]] = {"detect": DetectionRecipe, "segment": SegmentationRecipe}
        own = {f.name for f in fields(recipes.get(self.words[0], Recipe))}
        return keys | own - {"name", "specification", "data", "net"}

    def resolve(self, option: str) -> tuple[str, str | None] | None:
        """Our option ("--batch"), positional argument ("MODEL") or key of the recipe, and the value of a word without one.

        None if there is none.
        """
        key = _to_key(option)
        ours = {_to_key(name): name for name in self.options} | {name: name for name in self.positional}
        if own := key if key in ours else translate(key, ours):
            return ours[own], None
        if flag := translate_flag(key, ours):
            return ours[flag[0]], flag[1]
        if key in ANSWERS or key in self.recipe_keys:
            return (key, None) if key in self.recipe_keys and key not in ANSWERS else None
        if key.removeprefix("no_") in self.recipe_keys:
            return key.removeprefix("no_"), "false"
        return (own, None) if (own := translate(key, self.recipe_keys)) else None

    def check_positional(self, plain: Sequence[str], given: Mapping[str, Sequence[str]]) -> None:
        """Raises UsageError if a positional argument that an option of another program gives is there without it too."""
        options = [f"--{name.lower()} {value}" for name, values in given.items() for value in values]
        if options and not self.takes_many and len(plain) + len(options) > len(self.positional):
            takes = " and ".join(f"one {name}" for name in _POSITIONAL if name in self.positional)
            found = ", ".join([*plain, *options])
            raise UsageError(f"{' '.join(self.words)} takes {takes}, and here are {found}; give each once.")

    def refuse(self, option: str) -> None:
        """Raises UsageError for a word of other programs that has an answer, and for an unknown option among images."""
        answer = ANSWERS.get(key := _to_key(option)) or FIXED_ANSWERS.get(key)
        if key in REPLACING and "--resume" not in self.options:  # this command makes no run
            answer = "a file that --out names is replaced without asking." if "--out" in self.options else None
        if answer is not None:
            raise UsageError(f"there is no option {option}: {answer}")
        if (flag := option.replace("--no-", "--", 1)) != option and flag in self.flags and option not in self.negatives:
            raise UsageError(f"{flag} is off unless it is given; leave {option} out.")
        if self.takes_hyphens:
            raise UsageError(f"unknown option {option}; `resnetlab {' '.join(self.words)} --help` lists the options.")


def understand(app: App, arguments: Sequence[str]) -> list[str]:
    """The command line in our own words.

    Options and `key=value` of other programs become ours, keys of the recipe become `--set key=value`, and what others give by
    an option, such as `--model`, becomes a positional argument.

    Raises UsageError, with the option that does the job, for a word of another program that has no counterpart.
    """
    if len(arguments) > 1 and arguments[0] == "classify" and (arguments[1] in list(app) or arguments[1] in COMMANDS):
        arguments = arguments[1:]  # Ultralytics' `yolo classify train`
    command = _find_command(app, arguments)
    if command is None:
        return list(arguments)
    positional: dict[str, list[str]] = {name: [] for name in _POSITIONAL}
    rest: list[str] = []
    plain: dict[int, str] = {}  # positional arguments by their place in `rest`
    tokens = list(arguments[len(command.words) :])
    if (
        command.words[0] in _LISTS
        and tokens[:1]
        and tokens[0] in ("list", "ls", "show")
        and not Path(tokens[0]).exists()
    ):
        del tokens[0]
    while tokens and tokens[0] != "--":
        token = tokens.pop(0)
        name, equals, value = token.partition("=")
        if name in command.options or name == "-h":
            if name in command.flags and tokens and tokens[0].lower() in ("true", "false"):
                token = f"{name}={tokens.pop(0).lower()}"
            if token == "--compile" and (not tokens or tokens[0].startswith("-")):  # a flag in other programs
                token = "--compile=on"
                equals = "="
            rest.append(token)
            if not equals and name not in command.flags and tokens:
                rest.append(tokens.pop(0))  # its value, whatever that looks like
            continue
        setting = _SETTING.fullmatch(token) is not None and not Path(token).exists()
        is_option = _OPTION.fullmatch(name) is not None
        found = command.resolve(name) if setting or is_option else None
        if found is None:
            if is_option or (setting and is_peer_word(name)):
                command.refuse(name)
            if not is_option:
                plain[len(rest)] = token
            rest.append(token)
            continue
        own, fixed = found
        if fixed is None and not equals and own not in command.flags:
            value = "true" if not tokens or _OPTION.fullmatch(tokens[0]) else tokens.pop(0)
        if own in positional:
            positional[own].append(value)
        elif own.startswith("--"):
            rest.append(own if own in command.flags else f"{own}={fixed or value}")
        else:
            rest += ["--set", f"{own}={fixed or value}"]
    if len(plain) + sum(map(len, positional.values())) > len(command.positional) and "--net" in command.options:
        from resnetlab.models.spec import is_network_name

        for place, word in list(plain.items()):
            if is_network_name(word) and not Path(word).exists():
                rest[place] = f"--net={plain.pop(place)}"
    command.check_positional(list(plain.values()), positional)
    last = [*positional.pop("TO"), *positional.pop("IMAGES")]
    return [*command.words, *chain(*positional.values()), *rest, *last, *tokens]


def _find_command(app: App, arguments: Sequence[str]) -> _Command | None:
    """The command that a command line names; None if there is none. Raises UsageError for another program's command."""
    words: list[str] = []
    for word in arguments:
        if word.startswith("-") or word not in list(app):
            break
        app = app[word]
        words.append(word)
    first = "" if words or not arguments else arguments[0]
    if first in COMMANDS:
        kind = "option" if first.startswith("-") else "command"
        raise UsageError(f"there is no {kind} {first!r}; it is `resnetlab {COMMANDS[first]}` here.")
    if (first.startswith("-") and first not in list(app)) or _SETTING.fullmatch(first):
        raise UsageError(f"{first} is no option of `resnetlab` itself; a command comes first: resnetlab train --help")
    second = arguments[len(words)] if words and len(arguments) > len(words) else ""
    if app.default_command is None and second not in list(app) and COMMANDS.get(second) in list(app):
        raise UsageError(
            f"there is no command {second!r}; it is `resnetlab {' '.join(words)} {COMMANDS[second]}` here."
        )
    return _Command(words, app) if words and app.default_command is not None else None


def _to_key(option: str) -> str:
    return option.lstrip("-").replace("-", "_")
