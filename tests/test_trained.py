"""The trained network that comes with the package, cifar10:resnet20."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import resnetlab
from resnetlab.cli.main import run_command
from resnetlab.data.cifar import load_cifar
from resnetlab.errors import UsageError
from resnetlab.inference.download import TRAINED, find_model
from resnetlab.inference.start import load_start, resolve_start
from resnetlab.models.model_file import load_trained_model

NAME = "cifar10:resnet20"
WRONG = 42  # of the first 500
ERROR = 0.0823  # on CIFAR-10's test images, of results/resnet20-cifar10-64000-steps-h100


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").convert("RGB").save("image.png")
    return "image.png"


def test_commands_take_its_name(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["predict", NAME, image, "--json"]) == 0
    by_command = json.loads(capsys.readouterr().out)["predictions"][0]["top"]
    model = resnetlab.load(NAME, device="cpu")
    assert model.predict(image).to_json()["top"] == by_command  # type: ignore[union-attr]
    for command in (
        ["inspect", NAME],
        ["explain", NAME, image, "--out", "explained"],
        ["embed", NAME, ".", "--out", "f.npz"],
    ):
        assert run_command(command) == 0, command
    assert run_command(["export", NAME, "--to", "torchvision"]) == 0
    assert Path("resnet20.pth").is_file()  # not beside the package's file


def test_training_starts_from_it() -> None:
    assert resolve_start(NAME, Path("elsewhere")) == NAME
    torch.testing.assert_close(
        load_start(NAME).model.resnet.state_dict(), load_trained_model(Path(find_model(NAME))).resnet.state_dict()
    )


def test_the_packages_files_are_not_changed(capsys: pytest.CaptureFixture[str]) -> None:
    save = ["evaluate", NAME, "--data", "digits", "--save-temperature", "--fit-temperature", "1"]
    assert run_command(save) == 2 and "import published weights first" in capsys.readouterr().err
    assert run_command(["strip", NAME]) == 2 and "comes with the package" in capsys.readouterr().err
    assert run_command(["import", NAME]) == 2 and "needs no import" in capsys.readouterr().err
    with pytest.raises(UsageError, match="unknown trained model 'cifar10:resnet56'; did you mean 'cifar10:resnet20'"):
        find_model("cifar10:resnet56")


def test_a_file_of_ones_own_may_begin_with_the_same_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cifar10:mine").write_bytes(Path(find_model(NAME)).read_bytes())
    assert find_model("cifar10:mine") == "cifar10:mine"


def test_it_holds_no_images_and_its_card_says_how_it_was_made() -> None:
    model = load_trained_model(Path(find_model(NAME)))
    assert model.reference_images is None and model.recipe["steps"] == 64_000 and model.recipe["seed"] == 0
    card = (TRAINED / "cifar10-resnet20" / "README.md").read_text()
    assert f"{ERROR:.2%}".replace("%", " %") in card and NAME in card and "- steps: 64000" in card


def test_its_errors_on_the_first_test_images(cifar10_dir: Path) -> None:
    model, test = load_trained_model(Path(find_model(NAME))), load_cifar(cifar10_dir).test
    x = (test.images[:500] / 255 - model.preprocessing.mean) / model.preprocessing.std
    with torch.no_grad():
        predicted = model.net.eval()(x.permute(0, 3, 1, 2)).argmax(1)
    assert int((predicted != test.labels[:500]).sum()) == pytest.approx(WRONG, abs=1)


@pytest.mark.slow
def test_its_error_on_all_test_images(cifar10_dir: Path) -> None:
    evaluation = resnetlab.load(NAME, device="cpu", precision="fp32").evaluate("cifar10", data_dir=cifar10_dir)
    assert evaluation.metrics.top1_error == pytest.approx(ERROR, abs=0.0002)  # type: ignore[union-attr]
