"""The Python version of CIFAR: pickled dictionaries, read without letting the file call anything.

A pickle names functions that its reader is to call. Here the four names that these files need stand for inert values of our
own, and any other name is an error.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from residuum.errors import DataError


class _Array:
    """Stands for an array while the pickle is read; `state` is (version, shape, type, Fortran order, bytes)."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


class _Type:
    """Stands for a numpy type: only its name is kept."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        return None


def _new_array(*_: Any) -> _Array:
    return _Array()


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encoded,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no published file does")
        return KNOWN[module, name]


def read(path: Path) -> dict[str, Any]:
    """The dictionary in a file of CIFAR's Python version; arrays are uint8, names str.

    Raises DataError where the file is missing, cut short, or asks for anything that CIFAR does not need.
    """
    try:
        value = _Reader(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); unpack the archive again.") from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise DataError(f"{path} is no file of CIFAR's Python version ({error}); unpack the archive again.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is no file of CIFAR's Python version; unpack the archive again.")
    return {_text(key): _plain(item, path) for key, item in value.items()}


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _plain(value: Any, path: Path) -> Any:
    if isinstance(value, _Array):
        return _array(value, path)
    return [_text(item) for item in value] if isinstance(value, list) else _text(value)


def _array(value: _Array, path: Path) -> NDArray[np.uint8]:
    try:
        _, shape, kind, fortran, content = value.state
        if _text(kind.name) != "u1":
            raise ValueError(f"its values are {_text(kind.name)}, not bytes")
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} holds no pictures ({error}); unpack the archive again.") from error
