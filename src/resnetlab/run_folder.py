"""The run folder: its files, written so that they survive a crash in the middle of writing.

runs/<name>/
  recipe.toml          complete and resolved: every value that determines the result
  environment.json     versions and hardware
  metrics.jsonl        one JSON object a line: training and held-out figures by step
  checkpoints/         the last two, by step
  model.safetensors    the trained model (models.model_file)
  result.json          the figures `resnetlab train` ends with
  report.html          the same as a page
  tensorboard/         events, if TensorBoard is installed
  trackers.json        the run's trackers, and their identifiers of it
  trace.json           the steps that --profile traced
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import mimetypes
import os
import shutil
import stat
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout

from resnetlab import migrate_v01
from resnetlab.errors import NoSpaceError, RunError, UsageError, suggest_path
from resnetlab.formatting import is_number, parse_json
from resnetlab.stopping import check_stop

DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quotas
FOLDS_FILE = "folds.json"  # the figures of a cross-validation, in the folder of its runs
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems, some network ones among them


@contextlib.contextmanager
def explain_full_disk(hint: str) -> Iterator[None]:
    """Adds to the error for a full disk how to go on."""
    try:
        yield
    except NoSpaceError as error:
        raise NoSpaceError(error.path, hint) from error


def write_error(path: Path, error: OSError) -> RunError:
    """The error for a file that could not be written."""
    if error.errno in DISK_FULL:
        return NoSpaceError(path)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return RunError(f"no permission to write {path}; allow it, or choose another folder with --out.")
    return RunError(f"cannot write {path}: {error.strerror or error}; fix that, or choose another folder with --out.")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises the `write_error` of a file or folder where the body cannot write it."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file so that a crash leaves either the old content or the new, never a part (write, fsync, rename).

    Raises RunError if there is no space or no permission; the old file remains, and no partial file.
    """
    if path.exists() and not path.is_file():  # replacing /dev/null, or a pipe that another program reads, helps nobody
        raise RunError(f"{path} is {'a folder' if path.is_dir() else 'a pipe or a device'}; name a file to write.")
    check_stop()
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        remove_old_temporary_files(path)
        temporary.write_bytes(data)
        move_into_place(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error


def remove_old_temporary_files(path: Path) -> None:
    """Removes what killed processes left while they wrote this file: a process that still writes is not an hour old."""
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if old.stat().st_mtime < time.time() - 3600:
                old.unlink()


def write_together(folder: Path, files: Mapping[str, str]) -> None:
    """Writes files of one result into a folder, which is made where it is missing.

    The last one, which people open, is removed first: a crash leaves no page beside the figures of another result.

    Raises RunError if there is no space or no permission.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / list(files)[-1]).unlink(missing_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)


def check_output_file(
    out: Path, inputs: Iterable[str | Path], option: str = "--out", *, makes_folder: bool = False
) -> None:
    """Raises UsageError, before any work is done, if writing `out` would replace one of the `inputs`, or no file.

    Args:
        inputs: paths of files that are read; other values, such as published names, do no harm.
        makes_folder: whether the folder of `out` is made where it is missing.
    """
    if not out.exists():
        if makes_folder:
            check_output_folder(out.parent)
        elif not out.parent.is_dir():
            raise UsageError(f"{option} {out}: there is no folder {out.parent}; make it first, or choose another.")
        return
    if not out.is_file():
        raise UsageError(
            f"{option} {out} is {'a folder' if out.is_dir() else 'a pipe or a device'}; name a file to write."
        )
    for path in map(Path, inputs):
        with contextlib.suppress(OSError):  # not a path at all
            if out.samefile(path):
                raise UsageError(f"{option} {out} is {path} itself, which is read; choose another name.")
            is_image = (mimetypes.guess_type(out.name)[0] or "").startswith("image/")
            if is_image and out.resolve().is_relative_to(path.resolve()):
                raise UsageError(f"{option} {out} is an image in {path}, which is read; choose another name.")


def check_output_folder(out: Path | None, *, new: bool = False) -> None:
    """Raises RunError, before any work is done, if `out` is no folder that can be written into or made.

    Args:
        out: None, for a folder with a name of its own, is fine.
        new: whether it must also be empty, or missing.
    """
    if out is None:
        return
    if new and out.is_dir():
        RunFolder(out).check_empty()
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RunError(f"cannot write {out}: {there} is a file; --out names a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise write_error(out, PermissionError(errno.EACCES, "no permission"))


def move_into_place(temporary: Path, path: Path) -> None:
    """Gives a complete file its name, so that a power failure leaves it, or what was there before (fsync, rename)."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "nt":  # opens no folders, and needs no flush
        return
    descriptor = os.open(path.parent, os.O_RDONLY)  # only once the folder is on disk is the rename durable
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(run: RunFolder) -> list[Path]:
    """The run's checkpoints, oldest first."""
    paths = [p for p in run.checkpoints.glob("step-*.safetensors") if p.stem.removeprefix("step-").isdigit()]
    return sorted(paths, key=get_step)


def get_step(path: Path) -> int:
    """The step of a checkpoint."""
    return int(path.stem.removeprefix("step-"))


@contextlib.contextmanager
def hold_lock(file: Path, timeout: float = -1) -> Iterator[None]:
    """Locks a file, which is created, against other processes; a process that is killed releases it too.

    On a file system without locks it goes on without.

    Args:
        timeout: seconds to wait; -1 waits without end.

    Raises:
        Timeout: another process holds it.
        RunError: the file cannot be created.
    """
    lock = FileLock(file, timeout, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise write_error(file.parent, error) from error
    try:
        yield
    finally:
        lock.release()


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


class RunFolder:
    """One run folder, locked by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def create(path: Path | None, name: str) -> RunFolder:
        """Creates a new folder: `path`, or the first free one of runs/<name>, runs/<name>-2, …

        Raises RunError if the folder is not empty or cannot be created.
        """
        try:
            if path is not None:
                path.mkdir(parents=True, exist_ok=True)
                run = RunFolder(path)
                run.check_empty()
                return run
            Path("runs").mkdir(exist_ok=True)
            number = 1
            while True:
                candidate = Path("runs") / (name if number == 1 else f"{name}-{number}")
                with contextlib.suppress(FileExistsError):
                    candidate.mkdir()  # exclusive: two runs started at once get two folders
                    return RunFolder(candidate)
                number += 1
        except FileExistsError as error:
            raise RunError(f"{path or 'runs'} is a file; --out names a folder for the run.") from error
        except OSError as error:
            raise write_error(path or Path("runs"), error) from error

    @staticmethod
    def open(path: Path) -> RunFolder:
        """An existing run folder. Raises RunError if `path` is not one."""
        if path.is_file():
            raise RunError(f"{path} is a file; --resume takes the run's folder.")
        if not path.exists():
            raise RunError(f"{path} is not there{suggest_path(path) or '; give the folder of a run.'}")
        if not (path / "recipe.toml").is_file():
            raise RunError(
                f"{path} is not a run folder (it has no recipe.toml); give a folder that `resnetlab train` made."
            )
        return RunFolder(path)

    def check_empty(self) -> None:
        """Raises RunError if the folder holds anything but what a process killed at its very start leaves."""
        if any(p.name != ".lock" and not _is_temporary(p) for p in self.path.iterdir()):
            continued = f", or continue that run with: {self.resume_command}" * (self.path / "recipe.toml").exists()
            if continued and (self.path / "result.json").exists():
                continued = f", or train that finished run longer with: {self.resume_command} --epochs N"
            raise RunError(f"{self.path} is not empty; choose another --out{continued}{'' if continued else '.'}")

    def remove_temporary_files(self) -> None:
        """Removes temporary files of a process that was killed while writing; call it with the lock held."""
        for folder in (self.path, self.checkpoints):
            for file in folder.iterdir() if folder.is_dir() else ():
                if _is_temporary(file):
                    with contextlib.suppress(OSError):
                        file.unlink()

    @property
    def resume_command(self) -> str:
        """The command that continues the run, that of its task."""
        task = "classify"
        with contextlib.suppress(RunError):  # a damaged recipe is for --resume to describe
            task = self.read_recipe().get("task", task)
        return f"resnetlab {'' if task == 'classify' else f'{task} '}train --resume {self.path}"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @contextlib.contextmanager
    def lock(self, taken: str = "") -> Iterator[None]:
        """Locks the folder for this process. Raises RunError, with the sentence `taken`, if another process has it."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(hold_lock(self.path / ".lock", timeout=0))
            except Timeout as error:
                taken = taken or f"another process is training in {self.path}; wait for it, or choose another --out."
                raise RunError(taken) from error
            yield

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a JSON file into the folder, atomically."""
        write_atomically(self.path / name, json.dumps(value, indent=2) + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Reads a JSON file of the folder; None if it does not exist."""
        try:
            value = parse_json((self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / name} cannot be read ({error}); remove it or start a new run.") from error
        return value if isinstance(value, dict) else None

    def read_recipe(self) -> dict[str, Any]:
        """Reads the values in recipe.toml, those of version 0.1 under today's keys."""
        values = self.read_raw_recipe()
        return migrate_v01.migrate_recipe(values) if migrate_v01.is_recipe(values) else values

    def read_raw_recipe(self) -> dict[str, Any]:
        """Reads recipe.toml as it is."""
        file = self.path / "recipe.toml"
        try:
            return tomllib.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{file} cannot be read ({error}); start a new run.") from error


@contextlib.contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A temporary folder; folders of this prefix that killed processes left are removed, those still in use are not."""
    for old in parent.glob(f"{prefix}*"):
        with contextlib.suppress(RunError, OSError):
            if (old / ".lock").is_file():  # otherwise it is being made
                with RunFolder(old).lock():
                    shutil.rmtree(old)
    # Windows does not delete files that a process has mapped
    temporary = TemporaryDirectory(dir=parent, prefix=prefix, ignore_cleanup_errors=True)
    with temporary as folder, RunFolder(Path(folder)).lock():
        yield Path(folder)


LINE_KEYS = {  # kind of a line in metrics.jsonl -> the keys that it must have
    "train": {"step", "loss", "error", "lr", "images_per_second", "seconds"},  # and gradient_norm, share_waiting
    "held_out": {"step"},
}


class MetricsLog:
    """metrics.jsonl: one JSON object per line, appended and flushed."""

    def __init__(self, run: RunFolder, step: int) -> None:
        """Opens the file to continue after `step`; removes lines of later steps, which a killed process left."""
        self._path = run.path / "metrics.jsonl"
        if self._path.is_dir():
            raise RunError(f"{self._path} is a folder where the run's figures should go; move it away.")
        kept = [line for line in read_metrics(run) if line["step"] <= step]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        with writing(self._path):
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def write(self, kind: str, step: int, **figures: float) -> None:
        """Appends the figures of one step."""
        with writing(self._path):
            self._file.write(json.dumps({"kind": kind, "step": step, **figures}) + "\n")
            self._file.flush()
            removed = os.fstat(self._file.fileno()).st_nlink == 0
        if removed:
            raise RunError(f"{self._path} was removed while the run was training; start it again.")

    def sync(self) -> None:
        """Flushes all lines to disk, before a checkpoint that relies on them."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):
            self._file.close()


def read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    """Reads the lines of metrics.jsonl; invalid ones, such as one cut off by a crash, are skipped."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in (run.path / "metrics.jsonl").read_text("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError):
                line = parse_json(text)
                if not isinstance(line, dict):
                    continue
                keys = LINE_KEYS.get(str(line.get("kind")), {""})
                if keys <= line.keys() and all(is_number(value) for key, value in line.items() if key != "kind"):
                    lines.append(line)
    return lines


def is_private(path: Path) -> bool:
    """Whether a file or folder belongs to this user, is no link, and no one else may write it."""
    status = path.lstat()
    if not hasattr(os, "geteuid"):  # Windows, where a user's folders are private
        return not path.is_symlink()
    is_own = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return is_own and not stat.S_ISLNK(status.st_mode)


def cache_folder(name: str) -> Path:
    """A folder in the user's cache, `$XDG_CACHE_HOME/resnetlab/NAME` (`~/.cache/resnetlab/NAME`), which need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "resnetlab", name)
