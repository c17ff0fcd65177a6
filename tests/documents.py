"""The commands and Python of the README and of the pages in docs/, as tests run them."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

import images
from resnetlab.cli.main import run_command
from service import write_classifier

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
GENERATED = {f"docs/reference/{name}.md" for name in ("commands", "models", "recipes")}  # by scripts/docs, not in git
UV = r"(?:(?:\.tools/bin/)?uv run (?:--\S+ )*)?"  # how a command may begin
FIRST = "python3 -m pip install -q --target .tools 'uv>=0.13,<1' && .tools/bin/uv run --no-dev resnetlab train"
SECOND = ".tools/bin/uv run pytest"


def blocks(language: str, page: Path = README) -> list[str]:
    """A page's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path = README, language: str = "sh") -> list[str]:
    """All commands of a page's blocks, continued lines and `&&` taken apart."""
    return split_commands("".join(blocks(language, page)))


def split_commands(text: str) -> list[str]:
    lines = text.replace("\\\n", "").splitlines()
    parts = (part.strip() for line in lines if not line.startswith("#") for part in line.split(" && "))
    return [part for part in parts if part]


def runnable(command: str) -> str | None:
    """The arguments of a `resnetlab` command; None for any other.

    Training is cut to 20 steps, studies to 3, and `data check` does not measure speed: half a minute of training steps.
    """
    ours, n = re.subn(rf"^{UV}resnetlab(?!\S)", "", command)
    if not n:
        return None
    if " data check" in ours:
        return f"{ours} --no-timing"
    if " study " in ours:  # the smallest runs, of the smallest networks
        return re.sub(r" --(steps|seeds|depths)[ =]\S+", "", ours) + " --steps 3 --seeds 1 --depths 8"
    if " train" not in ours or re.search("--(resume|show-recipe|help)", ours):
        return ours
    steps = "2 --set batch=4 --set image_size=64" if re.search(" (photos|shards)", ours) else "20"
    return re.sub(
        r"(?<= )train(?!\S)", f"train --steps {steps}", re.sub(r" --(steps|epochs)[ =]\S+", "", ours), count=1
    )


def add_images(text: str, folder: Path) -> None:
    """Adds the images that commands read: the repository's, or generated ones. Images after an option are outputs."""
    for option, name in re.findall(r"(--\S+ )?([\w./-]+\.(?:png|jpe?g))\b", text):
        if option or (folder / name).exists():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / name).is_file():
            shutil.copy(REPOSITORY / name, folder / name)
        else:
            Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(folder / name)


def add_model(folder: Path) -> None:
    """What pages for other systems call their own: a model file, and a list of images."""
    if not (folder / "model.safetensors").exists():
        write_classifier(folder / "model.safetensors")
        add_photos(folder)
        (folder / "images.txt").write_text("".join(f"{file}\n" for file in (folder / "photos").rglob("*.jpg")))


def add_photos(folder: Path) -> None:
    """A folder of class folders, like a reader's own."""
    if not (folder / "photos").exists():
        images.folder(folder / "photos", {"": 10}, ("daisy", "tulips"))


def add_cifar10(command: str, folder: Path, cifar10: Path) -> None:
    """Puts CIFAR-10 where the command will look for it."""
    place = re.search(r"--data-dir[ =](\S+)", command)
    link = folder / (place[1] if place else "data")
    if not link.exists():
        link.symlink_to(cifar10, target_is_directory=True)


def run_document(
    page: Path,
    folder: Path,
    subtests: pytest.Subtests,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Runs a page's blocks in their order, `resnetlab` commands and Python, as a reader does: in one folder and one session.

    They run in this process, since starting one for each would take longer than most commands do. Python that needs a package
    which is not installed is skipped.
    """
    monkeypatch.chdir(folder)
    session: dict[str, object] = {}
    for language, text in re.findall(r"^```(sh|python)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for part in [text] if language == "python" else split_commands(text):
            if (ours := part if language == "python" else runnable(part)) is None:
                continue
            with subtests.test(part):
                if "cifar10" in part:
                    add_cifar10(part, folder, request.getfixturevalue("cifar10_dir"))
                if "photos" in part:
                    add_photos(folder)
                add_images(part, folder)
                if '"model.safetensors"' in part:
                    add_model(folder)
                if language == "sh":
                    assert run_command(shlex.split(ours)) == 0
                    continue
                for package in re.findall(r"^(?:import|from) (\w+)", part, re.MULTILINE):
                    pytest.importorskip(package)
                exec(compile(part, page.name, "exec"), session)
