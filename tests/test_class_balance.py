"""Options for data as people have it: class weights, balanced sampling, folds, the best weights, early stop, frozen stages."""

from __future__ import annotations

import json
import random
import tomllib
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

import resnetlab
from images import folder
from resnetlab.cli.main import run_command
from resnetlab.data import digits
from resnetlab.data.augment import Augmentation, rotate_images
from resnetlab.data.dataset import A_TENTH, GROUP, MemorySplit, assign_folds, count_held_out, take_fold
from resnetlab.data.sampler import BalancedEpochs, Batch, step_indices
from resnetlab.errors import DataError, RunError, UsageError
from resnetlab.evaluation.calibration import choose_none_below
from resnetlab.evaluation.evaluate import evaluate
from resnetlab.models.model_file import load_trained_model
from resnetlab.preprocessing import Preprocessing
from resnetlab.random import StepDraws
from resnetlab.run_folder import RunFolder, list_checkpoints
from resnetlab.training.class_balance import describe_imbalance, parse_class_weights
from resnetlab.training.recipe import Overrides, Recipe
from resnetlab.training.recipes import RECIPES, find_classification_recipe, find_recipe
from resnetlab.training.recorder import RunStopped
from resnetlab.training.result import ClassificationResult, Progress
from resnetlab.training.tasks.classification import ClassificationTask
from resnetlab.training.tasks.classification_data import describe_view
from resnetlab.training.train import RunOptions, build_task, resume, start_run
from runs import assert_same, figures
from tiny_runs import TINY, TINY_PHOTOS, tiny

CPU = RunOptions(device="cpu")
LABELS = torch.tensor([0] * 12 + [1] * 3 + [2] * 9)


def test_class_weights_equal_a_hand_computation() -> None:
    balanced = parse_class_weights("balanced", "abc", LABELS)
    assert balanced is not None and balanced.tolist() == pytest.approx([24 / 36, 24 / 9, 24 / 27])
    assert float(balanced[LABELS].mean()) == pytest.approx(1)
    task = build_task(tiny(class_weights="3=4,5=0.5"), CPU)
    images, labels = torch.randn(6, 1, 8, 8), torch.tensor([3, 5, 0, 3, 1, 9])
    loss, _ = task.loss(Batch(images, labels, labels))
    with torch.no_grad():
        log_scores = task.net(images).log_softmax(1)
    by_hand = -sum(
        w * log_scores[i, y] for i, (w, y) in enumerate(zip((4, 0.5, 1, 4, 1, 1), labels.tolist(), strict=True))
    )
    assert float(loss.detach()) == pytest.approx(float(by_hand) / 6, rel=1e-5)
    for text, sentence in (
        ("4=x", "takes name=number"),
        ("4:2", "takes name=number, such as 0=2, not .4:2."),
        ("cat=2", "unknown class in class_weights 'cat'"),
        ("4=0", "above 0"),
    ):
        with pytest.raises(UsageError, match=sentence):
            parse_class_weights(text, tuple("0123456789"), LABELS)


def test_balanced_epochs_equal_a_count_by_hand() -> None:
    epochs = BalancedEpochs.from_labels(LABELS)
    assert epochs.length == 24
    stream = torch.cat([step_indices(5, 24, 10, step, epochs) for step in range(36)])  # 360 images, 15 epochs
    for epoch in stream.view(15, 24):
        assert LABELS[epoch].bincount().tolist() == [8, 8, 8]
    seen = Counter(stream.tolist())
    assert {i: seen[i] for i in (0, 11)} == {0: 10, 11: 10} and {seen[i] for i in (12, 13, 14)} == {40}
    assert {seen[i] for i in range(15, 24)} == {13, 14}  # 120 of 9 images
    assert not torch.equal(stream[:24], stream[24:48])
    kept = (*epochs.members, epochs(5, 24, 0))  # in every process that reads: 4 bytes an image each
    assert {x.dtype for x in kept} == {torch.int32} and stream.dtype == torch.int64


def test_an_imbalance_is_reported() -> None:
    labels = torch.tensor([0] * 500 + [1] * 10)
    assert "500 training images, b 10" in str(describe_imbalance("ab", labels))
    assert "class_weights=balanced" in str(describe_imbalance("ab", labels)) and describe_imbalance("abc", LABELS) == []
    for counts, is_reported in (
        ((43, 5), True),
        ((100, 10), True),
        ((99, 10), False),
        ((24, 5), False),
        ((25, 5), True),
    ):
        assert bool(describe_imbalance("ab", torch.arange(2).repeat_interleave(torch.tensor(counts)))) == is_reported


@pytest.mark.parametrize(
    "values",
    [
        {"sampling": "balanced", "class_weights": "balanced", "flip_vertical": True, "rotate": 20.0, "eval_every": 7},
        {"keep": "best", "early_stop": 2, "val_images": 100, "eval_every": 2},
    ],
)
def test_a_stopped_run_resumes_bit_identically(values: dict[str, object], tmp_path: Path) -> None:
    recipe = tiny(checkpoint_minutes=0.0, **values)
    start_run(recipe, tmp_path / "a", CPU)
    with pytest.raises(RunStopped):
        start_run(recipe, tmp_path / "b", replace(CPU, on_evaluate=lambda _: True))
    resume(tmp_path / "b", CPU)
    assert_same(tmp_path / "a", tmp_path / "b")


def test_the_best_weights_have_a_checkpoint_of_their_step(tmp_path: Path) -> None:
    def fail(p: Progress) -> None:
        if p.step == 3:
            raise ZeroDivisionError

    recipe = tiny(keep="best", val_images=100, eval_every=2, log_every=1, checkpoint_minutes=60.0)
    with pytest.raises(ZeroDivisionError):
        start_run(recipe, tmp_path / "run", replace(CPU, on_progress=fail))
    assert [path.name for path in list_checkpoints(RunFolder(tmp_path / "run"))] == ["step-00000002.safetensors"]


def test_the_best_weights_are_kept_and_a_run_ends_early(tmp_path: Path) -> None:
    recipe = tiny(
        keep="best", early_stop=1, val_images=200, eval_every=2, lr=3.0
    )  # too large a rate: the error rises again
    said: list[str] = []
    result = start_run(replace(recipe, steps=200), tmp_path / "run", replace(CPU, report=said.append))
    errors = {line["step"]: line["top1_error"] for line in figures(tmp_path / "run") if line["kind"] == "held_out"}  # type: ignore[comparison-overlap]
    best = min(errors, key=lambda step: (errors[step], step))
    assert result.steps == max(errors) < 200 and best == result.steps - 2
    assert f"keeping the weights of step {best:,}, the best on the held-out images" in " ".join(said)
    early = f"ended early, after step {result.steps} of 200: the held-out error was no lower in the last 1 evaluation"
    assert early in said
    model = load_trained_model(Path(result.model))
    assert model.metrics["held_out"]["top1_error"] == errors[best]
    assert resume(tmp_path / "run", CPU).to_json() == result.to_json()  # it is finished
    with pytest.raises(RunError, match=rf"ended early, after step {result.steps} of 200, .*--start-from .*model"):
        resume(tmp_path / "run", CPU, overrides=Overrides(steps=400))
    with pytest.raises(
        UsageError,
        match=r"early_stop watches the held-out error, but nothing is held out; .*1,437 images .*val_images=143",
    ):
        build_task(tiny(early_stop=3, val_images=0), CPU)


def test_folds_cover_everything_once_and_keep_groups(tmp_path: Path) -> None:
    data = digits.load_digits()
    folds = [take_fold(data, f"{k}/5") for k in range(1, 6)]
    names = [name for fold in folds for name in fold.test.names]
    assert sorted(names) == sorted(data.train.names) and {len(fold.test) for fold in folds} <= {287, 288}
    counts = np.array([fold.test.labels.bincount().tolist() for fold in folds])
    assert (counts.max(0) - counts.min(0)).max() <= 1
    groups = np.array([f"g{i % 11}" for i in range(len(LABELS))], object)
    split = MemorySplit(torch.zeros(24, 1, 1, 1, dtype=torch.uint8), LABELS, columns={GROUP: groups})
    of_fold = assign_folds(split, 3)
    assert all(len(set(of_fold[torch.from_numpy(groups == g)].tolist())) == 1 for g in set(groups))
    assert of_fold.bincount().min() >= 6
    with pytest.raises(UsageError, match="fold must be K/N"):
        take_fold(data, "6/5")
    with pytest.raises(DataError, match="11 images or groups cannot be divided into 12 folds"):
        assign_folds(split, 12)


def test_folds_of_many_images_and_classes_take_little_memory() -> None:
    split = MemorySplit(torch.empty(2000, 1, 1, 1, dtype=torch.uint8), torch.arange(2000) % 500)
    tracemalloc.start()
    of_fold = assign_folds(split, 2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert of_fold.bincount().tolist() == [1000, 1000] and peak < 3e6  # a table of images and classes has 8 MB


def test_cross_validation_gives_mean_and_deviation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = ["--set=image_size=8", "--set=threads=1"]
    command = ["train", "digits", "--net", "resnet8", "--folds", "2", "--out", str(tmp_path / "cv"), "--device", "cpu"]
    assert run_command([*command, "--steps", "4", "--json", *values]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert "folds divide the 1,437 images of train; the 360 of test are not used" in err
    errors = [each["top1_error"] for each in summary["runs"]]
    assert summary["top1_error"] == pytest.approx(np.mean(errors)) and summary["n"] == 1437
    assert summary["standard_deviation"] == pytest.approx(np.std(errors, ddof=1))
    again = resnetlab.load(tmp_path / "cv" / "fold-1" / "model.safetensors")
    assert again is not None and json.loads((tmp_path / "cv" / "folds.json").read_text()) == summary
    assert run_command([*command, "--steps", "4", "--json", *values]) == 0  # nothing is trained again
    assert json.loads(capsys.readouterr().out) == summary
    # before, only some of the values were compared, and the figures were those of a mixture of recipes
    assert run_command([*command, "--steps", "4", "--set=weight_decay=0.01", *values]) == 1
    assert "you ask for weight_decay = 0.01 (not 0.0005)" in capsys.readouterr().err


def test_frozen_stages_keep_their_weights(tmp_path: Path) -> None:
    first = start_run(tiny(), tmp_path / "a", CPU)
    recipe = tiny(start_from=str(first.model), frozen_stages="C2", seed=5)
    second = start_run(recipe, tmp_path / "b", CPU)
    before, after = (load_trained_model(Path(r.model)).net.state_dict() for r in (first, second))
    same = {key.split(".")[0] for key in before if torch.equal(before[key], after[key]) and "num_batches" not in key}
    assert same >= {"conv1", "bn1", "layer1"} and not same & {"layer2", "layer3", "fc"}
    with pytest.raises(UsageError, match="unknown map in frozen_stages 'C9'"):
        build_task(replace(recipe, frozen_stages="C9"), CPU)
    with pytest.raises(UsageError, match="frozen_stages keeps the weights of start_from"):
        tiny(frozen_stages="C1")


def test_flips_and_rotations() -> None:
    x = torch.rand(2, 3, 6, 6)
    turned = rotate_images(x, torch.tensor([90.0, 0.0]))
    torch.testing.assert_close(turned[0], x[0].rot90(1, (1, 2)), rtol=0, atol=1e-5)
    torch.testing.assert_close(turned[1], x[1], rtol=0, atol=1e-6)
    plain = Preprocessing(3, (6, 6), 6, torch.zeros(3), torch.ones(3))
    pixels = torch.randint(0, 256, (16, 6, 6, 3), dtype=torch.uint8)
    draws = StepDraws(1, 0, 16)
    before, after = (Augmentation(flip_vertical=flip)(pixels, plain, draws) for flip in (False, True))
    upside_down = [torch.equal(a, b.flip(1)) for a, b in zip(after, before, strict=True)]
    assert 2 < sum(upside_down) < 14 and all(torch.equal(after[i], before[i]) for i in range(16) if not upside_down[i])
    part = Augmentation(flip_vertical=True, rotate=30)(pixels[4:8], plain, draws._replace(positions=torch.arange(4, 8)))
    torch.testing.assert_close(
        part, Augmentation(flip_vertical=True, rotate=30)(pixels, plain, draws)[4:8], rtol=0, atol=0
    )


def test_added_values_leave_older_recipes_and_their_hashes_alone() -> None:
    recipe = tiny(sampling="shuffle")
    assert (
        not {"keep", "groups", "sampling"} & recipe.to_json().keys() and Recipe.from_values(recipe.to_json()) == recipe
    )
    assert tiny().key == recipe.key and Recipe.from_values(tiny().to_json()) == tiny()  # which is "auto"
    best = replace(recipe, keep="best")
    assert best.to_json()["keep"] == "best" and best.key != recipe.key
    assert recipe.differences(best) == ["keep = 'last' (not 'best')"]


def test_groups_and_folds_of_a_folder(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"": 12}, ("a", "b"))
    values = TINY_PHOTOS | {"steps": 1, "fold": "1/3", "groups": r"bild (\d)"}
    result = resnetlab.train("photos", data=str(root), out=tmp_path / "run", **values)  # type: ignore[arg-type]
    names = json.loads((tmp_path / "run" / "holdout.json").read_text())["held-out"]
    held_out = {name.split()[1][0] for name in names}
    rest = {str(f).rsplit("bild ")[1][0] for f in root.rglob("*.jpg") if str(f.relative_to(root)) not in names}
    assert not held_out & rest and result.n == len(names) == 8


def test_sizes_follow_each_other(tmp_path: Path) -> None:
    photos = find_recipe("photos", "classify")
    small = photos.with_values({"image_size": "96"})
    assert small.to_json()["eval_resize"] == 110
    assert photos.with_values({"image_size": "320"}).to_json()["eval_resize"] == 366
    assert photos.with_values({"image_size": "96", "eval_resize": "256"}).to_json()["eval_resize"] == 256
    assert isinstance(small, Recipe) and describe_view(small) == []
    assert "14% of a square image" in describe_view(replace(small, eval_resize=256))[0]
    both = describe_view(replace(small, net="resnet8", eval_resize=256))
    assert len(both) == 2 and "for images of about 32 pixels" in both[0] and "14% of a square image" in both[1]
    first = start_run(tiny(), tmp_path / "a", CPU)
    task = build_task(replace(find_recipe("finetune", "classify"), data="digits", start_from=str(first.model)), CPU)
    assert isinstance(task, ClassificationTask) and (task.recipe.image_size, task.recipe.eval_resize) == (8, 8)
    with pytest.raises(UsageError, match="image_size=0 takes the size of a model to start from"):
        build_task(tiny(image_size=0, pad=0), CPU)
    with pytest.raises(UsageError, match="the warm-up of 30 steps is longer than the run, 20"):
        build_task(tiny(warmup="steps", warmup_steps=30), CPU)


def test_images_that_will_be_evaluated_are_opened_first(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"train": 4, "val": 2})
    files = sorted((root / "val").rglob("*.jpg"))
    for problem, reason in (
        (lambda f: f.write_bytes(f.read_bytes()[:-200]), "is damaged"),
        (lambda f: f.unlink(), "not there"),
    ):
        problem(files[0])
        (root / "val" / "alpha" / "link.jpg").unlink(missing_ok=True)
        (root / "val" / "alpha" / "link.jpg").symlink_to(files[0])
        with pytest.raises(DataError, match=reason):
            resnetlab.train("photos", data=str(root), out=tmp_path / "run", progress=False, **TINY_PHOTOS)  # type: ignore[arg-type]
        assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_data_that_moved(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"train": 4, "val": 2})
    values = TINY_PHOTOS | {"eval_every": 3, "checkpoint_minutes": 0.0, "val_images": 3, "progress": False}
    whole = resnetlab.train("photos", data=str(root), out=tmp_path / "a", **values)  # type: ignore[arg-type]
    with pytest.raises(RunStopped):
        resnetlab.train("photos", data=str(root), out=tmp_path / "b", on_evaluate=lambda _: True, **values)  # type: ignore[arg-type]
    root.rename(tmp_path / "moved")
    resnetlab.train(resume=tmp_path / "b", data=str(tmp_path / "moved"), progress=False)
    assert Path(whole.model).read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    (tmp_path / "b" / "result.json").unlink()
    next((tmp_path / "moved" / "train").rglob("*.jpg")).unlink()
    with pytest.raises(RunError, match="does not hold the data that"):
        resnetlab.train(resume=tmp_path / "b", data=str(tmp_path / "moved"), progress=False)


def test_a_tenth_is_held_out_by_default_and_recorded(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"": 20}, ("a", "b"))  # 8 of 40 images are for the end, 3 of 32 are watched
    values = TINY_PHOTOS | {"steps": 4, "eval_every": 2, "checkpoint_minutes": 0.0, "progress": False}
    said: list[str] = []
    whole = resnetlab.train("photos", data=str(root), out=tmp_path / "a", report=said.append, **values)  # type: ignore[arg-type]
    assert "29 images to train on, 3 held out to watch the error of, 8 to test on" in " ".join(said)
    assert not any("val_images" in sentence for sentence in said)  # it is the recipe's own value, resolved
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "held_out"] == [2, 4]
    assert tomllib.loads((tmp_path / "a" / "recipe.toml").read_text())["val_images"] == 3
    drawn = json.loads((tmp_path / "a" / "holdout.json").read_text())
    assert (len(drawn["evaluated while training"]), len(drawn["held-out"])) == (3, 8)
    assert not set(drawn["evaluated while training"]) & set(drawn["held-out"])
    model = load_trained_model(Path(whole.model))
    assert model.temperature == 1 and not model.calibration  # three images are too few to fit one on
    page = (tmp_path / "a" / "report.html").read_text()  # where "held-out" are the three images
    assert " test error" in page and "8 test images" in " ".join(page.replace("</strong>", "").split())
    with pytest.raises(RunStopped):
        resnetlab.train("photos", data=str(root), out=tmp_path / "b", on_evaluate=lambda _: True, **values)  # type: ignore[arg-type]
    recipe = replace(find_recipe("photos", "classify").with_values({"image_size": "16", "eval_resize": "20"}), steps=4)
    assert recipe.resolve_like(resume_recipe(tmp_path / "b")).to_json()["val_images"] == 3  # as a restarted job asks
    own = replace(recipe, transform="own")  # recorded where a function is given in Python
    assert recipe.resolve_like(own).transform == own.resolve_like(recipe).transform == "own"
    resume(tmp_path / "b", CPU)
    assert_same(tmp_path / "a", tmp_path / "b")


def resume_recipe(run: Path) -> Recipe:
    return Recipe.from_values(tomllib.loads((run / "recipe.toml").read_text()))


def test_how_many_are_held_out_by_default(tmp_path: Path) -> None:
    assert [count_held_out(A_TENTH, n, 10) for n in (49, 50, 100, 250, 10_000, 1_000_000)] == [
        0,
        10,
        10,
        25,
        1000,
        1000,
    ]
    assert count_held_out(7, 20, 10) == 7 and count_held_out(0, 20, 10) == 0
    with pytest.raises(UsageError, match="val_images must be 0 or more, or -1 for a tenth of the training images"):
        tiny(val_images=-2)
    assert {name for name, make in RECIPES.items() if getattr(make(), "val_images", 0) == A_TENTH} == {
        "photos", "finetune", "boxes", "masks"
    }  # fmt: skip
    given = folder(tmp_path / "given", {"train": 10, "val": 3, "test": 3})
    grouped = folder(tmp_path / "grouped", {"train": 10, "test": 3})
    for root, groups, count in (
        (given, "", 0),
        (grouped, "", 3),
        (grouped, "train|test", 0),
    ):  # one group cannot be divided
        recipe = replace(
            find_classification_recipe("photos"), data=str(root), groups=groups, image_size=16, net="resnet8"
        )
        task = build_task(replace(recipe, eval_resize=20), CPU)
        assert (task.recipe.to_json()["val_images"], len(task.held_out)) == (count, 9 if root == given else count)


def test_none_of_these_is_chosen_on_held_out_images(tmp_path: Path) -> None:
    scores = torch.eye(20)[:, :2] * 0 + torch.arange(20)[:, None] / 20 * torch.tensor([1.0, 0.5])
    assert choose_none_below(scores, 0.1) == pytest.approx(2 / 20)  # two of twenty are below
    result = start_run(tiny(none_share=0.25, val_images=40), tmp_path / "run", CPU)
    model = load_trained_model(Path(result.model))
    assert model.calibration["none_share"] == 0.25 and isinstance(result, ClassificationResult)
    test = evaluate(model, "digits", device="cpu", precision="fp32")  # as it was trained, also where bf16 is fast
    low = test.metrics.scores.max(1).values < model.none_below
    wrong = (test.metrics.predicted != test.metrics.labels)[~low]
    assert test.none_of_these == result.none_of_these is not None
    assert result.none_of_these["share"] == pytest.approx(float(low.double().mean()))
    assert result.none_of_these["top1_error"] == pytest.approx(float(wrong.double().mean()))
    assert 'as 25% of these images have, is "none of these"' in test.calibration[0]
    assert "predicted as none of the classes" in (tmp_path / "run" / "report.html").read_text()
    fitted = evaluate(model, "digits", device="cpu", fit_on="100").trained_models[0]
    assert fitted.calibration["none_share"] == 0.25 and 0 < fitted.none_below != model.none_below
    for values, sentence in (
        ({"val_images": 0}, "nothing is held out"),
        ({"val_images": 10}, "such as --set val_images=40"),
    ):
        with pytest.raises(UsageError, match=sentence):
            build_task(tiny(none_share=0.05, **values), CPU)


def jitter(image: Image.Image) -> Image.Image:
    """A transform that draws from all three generators."""
    shift = random.randint(-1, 1), int(np.random.randint(-1, 2)), int(torch.randint(-1, 2, ()))  # noqa: NPY002
    return ImageChops.offset(image, shift[0] + shift[2], shift[1])


def test_a_transform_of_ones_own_resumes_bit_identically(tmp_path: Path) -> None:
    values = TINY | {"steps": 8, "eval_every": 3, "device": "cpu", "progress": False, "checkpoint_minutes": 0.0}
    state = random.getstate(), torch.get_rng_state()
    whole = resnetlab.train("digits", transform=jitter, out=tmp_path / "a", **values)  # type: ignore[arg-type]
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    with pytest.raises(RunStopped):
        resnetlab.train("digits", transform=jitter, out=tmp_path / "b", on_evaluate=lambda _: True, **values)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"changed by the function .*\.jitter; give it again"):
        resnetlab.train(resume=tmp_path / "b", progress=False)
    with pytest.raises(UsageError, match=r"\.jitter, not PIL\.ImageChops\.invert; give it again"):
        resnetlab.train(resume=tmp_path / "b", transform=ImageChops.invert, progress=False)
    resnetlab.train(resume=tmp_path / "b", transform=jitter, workers=2, progress=False)
    assert_same(tmp_path / "a", tmp_path / "b")
    bare = resnetlab.train("digits", out=tmp_path / "c", **values)  # type: ignore[arg-type]
    same = resnetlab.train("digits", transform=lambda image: np.array(image)[..., None], out=tmp_path / "d", **values)  # type: ignore[arg-type]
    weights = [load_trained_model(Path(r.model)).net.state_dict()["fc.weight"] for r in (whole, bare, same)]
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[1])
    assert 'transform = "test_class_balance.jitter"' in (tmp_path / "a" / "recipe.toml").read_text()
    for wrong, sentence in (
        (lambda image: image.resize((9, 9)), r"gives one of the same size, .* it gave torch\.uint8 \(9, 9, 1\)"),
        (lambda image: image.nothing, "failed on an image: AttributeError"),
    ):
        with pytest.raises(UsageError, match=sentence):
            resnetlab.train("digits", transform=wrong, out=tmp_path / f"e{len(sentence)}", **values)  # type: ignore[arg-type]
