"""Too little memory, really: a process that may not take more says what would fit, and finds it by itself when asked."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from residuum.training.fitting import is_short

CODE = """
import resource, sys
from pathlib import Path
from residuum.cli.main import run
arguments = "train digits --net resnet14 --steps 2 --device cpu --set size=64 --set threads=1 --set precision=fp32".split()
assert run([*arguments, "--set", "batch=2", "--out", "warm"]) == 0  # all that is loaded late is there now
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 600 * 2**20,) * 2)
print("short", run([*arguments, "--set", "batch=1024", "--out", "short"]))
print("auto", run([*arguments, "--batch", "auto", "--set", "batch=1024", "--out", "auto"]))
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux how much memory is in use")
def test_short_memory_says_what_fits_and_auto_finds_it(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CODE], text=True, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "short 1" in done.stdout and "auto 0" in done.stdout, done.stderr
    found = re.search(
        r"memory is too short for 1,024 pictures at once; (\d+) would fit: start anew with --set bn_batch=", done.stderr
    )
    assert found and 2 <= int(found[1]) < 1024, done.stderr
    assert "batch auto: parts of" in done.stderr
    recipe = (tmp_path / "auto" / "recipe.toml").read_text()
    assert "\nbatch = 1024\n" in recipe and re.search(r"\nbn_batch = (4|8|16|32|64|128|256)\n", recipe)
    assert "Traceback" not in done.stderr


def test_what_libraries_on_a_gpu_say_of_short_memory_is_understood() -> None:
    assert is_short(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_short(RuntimeError("GET was unable to find an engine to execute this computation"))
    assert not is_short(RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm(handle)`"))
