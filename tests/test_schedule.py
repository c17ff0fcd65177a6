"""The learning rate at the steps where implementations go wrong, and the recipes' arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnetlab.errors import RunError, UsageError
from resnetlab.training.recipe import Recipe
from resnetlab.training.recipes import (
    RECIPES,
    describe_budget,
    describe_learning_rate,
    find_classification_recipe,
    find_named,
    paper_cifar,
    quick,
)
from resnetlab.training.schedule import learning_rate


@pytest.mark.parametrize(
    ("step", "lr"),
    [(0, 0.1), (399, 0.1), (400, 0.1), (31_999, 0.1), (32_000, 0.01), (47_999, 0.01), (48_000, 0.001), (63_999, 0.001)],
)
def test_paper_cifar_learning_rate(step: int, lr: float) -> None:
    assert learning_rate(paper_cifar(), step, None) == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "lr"), [(0, 0.01), (399, 0.01), (400, 0.1), (31_999, 0.1), (32_000, 0.01), (48_000, 0.001)]
)
def test_warmup_by_steps_ends_after_400(step: int, lr: float) -> None:
    assert learning_rate(replace(paper_cifar(), warmup="steps"), step, None) == pytest.approx(lr, rel=1e-12)


def test_warmup_by_training_error_ends_where_it_was_measured() -> None:
    warm = replace(paper_cifar(), warmup="train-error")
    assert learning_rate(warm, 10_000, None) == 0.01  # the error has not fallen below 80 % yet
    assert learning_rate(warm, 349, 350) == 0.01
    assert learning_rate(warm, 350, 350) == 0.1
    assert learning_rate(warm, 32_000, 350) == pytest.approx(0.01, rel=1e-12)


@pytest.mark.parametrize(("batch", "bn_batch"), [("256", 64), ("100", 50), ("64", 64), ("62", 62), ("7", 7)])
def test_bn_has_a_batch_that_divides_the_batch(batch: str, bn_batch: int) -> None:
    """`--batch 100` beside a recipe's bn_batch of 64; a bn_batch that is given is kept or refused."""
    assert paper_cifar().with_values({"batch": batch}).bn_batch == bn_batch
    assert paper_cifar().with_values({"batch": batch, "bn_batch": batch}).bn_batch == int(batch)
    assert find_classification_recipe("quick").with_values({"batch": batch}).bn_batch == 0


def test_the_learning_rate_scales_linearly_with_the_batch_after_a_warm_up() -> None:
    """Goyal et al. 2017: 0.1 for 256 images is 3.2 for 8,192, reached over 5 of 90 epochs; halved batches halve it."""
    imagenet = replace(find_classification_recipe("preact-imagenet"), steps=14_076, milestones=(4_692, 9_384))
    large = imagenet.with_values({"batch": "8192", "bn_batch": "32", "lr_base_size": "256"})
    assert (large.warmup, large.warmup_lr, large.warmup_steps) == ("linear", 0.1, 782)
    rates = [learning_rate(large, step, None) for step in (0, 391, 782, 4_691, 4_692, 9_384)]
    assert rates == pytest.approx([0.1, 1.65, 3.2, 3.2, 0.32, 0.032], rel=1e-12)
    small = imagenet.with_values({"batch": "128", "lr_base_size": "256"})
    assert small.warmup == "none" and learning_rate(small, 0, None) == pytest.approx(0.05, rel=1e-12)
    own = imagenet.with_values({"batch": "8192", "lr_base_size": "256", "warmup": "none"})
    assert own.warmup == "none" and learning_rate(own, 0, None) == pytest.approx(3.2, rel=1e-12)
    modern = find_classification_recipe("modern").with_values({"batch": "2048", "lr_base_size": "1024"})
    assert (modern.warmup_lr, modern.warmup_steps) == (0.005, 6_256)  # it has a warm-up
    assert learning_rate(modern, 6_256, None) == pytest.approx(1.0, rel=1e-12)
    assert "lr_base_size" not in imagenet.to_json() and large.to_json()["lr_base_size"] == 256


@pytest.mark.parametrize(
    ("values", "warning"),
    [
        ({"batch": "512"}, None),
        (
            {"batch": "1024"},
            "the learning rate 0.1 of paper-imagenet is for batches of 256, not 1,024; --set lr_base_size=256",
        ),
        ({"batch": "1024", "lr": "0.4"}, None),
        ({"batch": "8192", "lr_base_size": "256"}, None),
        (
            {"batch": "16384", "lr_base_size": "256"},
            "with SGD the error rises in batches above 8,192 (Goyal et al. 2017)",
        ),
        ({"batch": "16384", "lr": "10", "optimizer": "lars"}, None),
        (
            {"optimizer": "adamw"},
            "the learning rate 0.1 of paper-imagenet is for sgd, not adamw, which takes far smaller ones",
        ),
        ({"optimizer": "lamb", "lr": "0.002"}, None),
    ],
)
def test_a_batch_beyond_the_recipes_range_is_reported(values: dict[str, str], warning: str | None) -> None:
    found = describe_learning_rate(find_classification_recipe("paper-imagenet").with_values(values))
    assert (found or "").startswith(f"warning: {warning}" if warning else "") and bool(found) == bool(warning)


@given(steps=st.integers(1, 200_000))
def test_rescaling_keeps_the_schedule_in_proportion(steps: int) -> None:
    full, short = paper_cifar(), paper_cifar().rescale(steps)
    assert short.steps == steps
    for ours, theirs in zip(short.milestones, full.milestones, strict=False):
        assert abs(ours / steps - theirs / full.steps) <= 1 / steps
    assert short.warmup_steps == max(1, round(400 * steps / full.steps))
    assert short.log_every >= 1 and short.eval_every >= 1
    assert (describe_budget(short) is None) == (steps == full.steps)


def test_a_short_run_is_labelled() -> None:
    assert describe_budget(paper_cifar().rescale(2000)) == "2,000 of the 64,000 steps of paper-cifar (3.1%)"
    assert describe_budget(paper_cifar()) is None
    assert describe_budget(quick()) is None


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_complete_and_documented(name: str) -> None:
    value = RECIPES[name]()
    assert value.name == name
    assert type(value).from_values(value.to_json()) == value
    for word in ("Paper:", "Command:", "Cost:", "Expected:"):
        assert word in (RECIPES[name].__doc__ or ""), f"{name} does not say its {word}"


def test_toml_round_trip() -> None:
    import tomllib

    value = quick().with_values({"shortcut": "C", "milestones": "10,20", "lr": "0.05", "flip": "true", "layers": "3"})
    again = Recipe.from_values(tomllib.loads(value.to_toml()))
    assert again == value
    assert again.key == value.key
    assert value.specification == {"shortcut": "C", "layers": 3}
    assert value.key != quick().key


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("bach", "3", "unknown key 'bach'; did you mean 'batch'?"),
        ("batch", "many", "batch takes a whole number, not 'many'."),
        ("lr", "x", "lr takes a number, not 'x'."),
        ("flip", "perhaps", "flip takes true or false, not 'perhaps'."),
        ("milestones", "a,b", "milestones takes whole numbers separated by commas, not 'a,b'."),
        ("batch", "1", "batch must be 2 or more: batch normalisation needs more than one image."),
        ("batch", "0", "batch must be from 1 to 1,048,576, not 0."),
        ("bn_batch", "1", "bn_batch must be 2 or more: batch normalisation needs more than one image."),
        ("bn_batch", "48", "bn_batch 48 does not divide the batch of 64; the nearest that does is 32."),
        ("schedule", "cosin", "unknown schedule 'cosin'; did you mean 'cosine'?"),
        ("ema_decay", "1", "ema_decay must be from 0 to below 1, not 1.0."),
        ("weight_decay", "inf", "weight_decay must be 0 or more, not inf."),
        ("momentum", "5", "momentum must be from 0 to below 1, not 5.0."),
        ("milestones", "-5,3", "milestones must be steps from 1 up, not [-5, 3]."),
        ("lr", "nan", "lr must be a number above 0, not nan."),
        ("warmup", "step", "unknown warmup 'step'; did you mean 'steps'?"),
        ("milestones", "20,10", "milestones must rise, not [20, 10]."),
    ],
)
def test_wrong_values_are_named(key: str, text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        quick().with_values({key: text})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("key", "value"), [("data", 3), ("batch", 64.5), ("specification", 3), ("flip", 1), ("seed", "0")]
)
def test_a_damaged_recipe_is_reported(key: str, value: object) -> None:
    with pytest.raises(RunError, match=f"recipe.toml cannot be used: {key} must be"):
        Recipe.from_values(quick().to_json() | {key: value})


def test_unknown_recipe() -> None:
    with pytest.raises(UsageError, match="unknown recipe 'paper-cifr'; did you mean 'paper-cifar'"):
        find_classification_recipe("paper-cifr")


def test_changes_are_relative_to_the_named_recipe_of_the_same_length() -> None:
    resolved = replace(paper_cifar(), precision="bf16")
    for recipe, changes in (
        (resolved, []),
        (resolved.rescale(2000), []),
        (resolved.rescale(2000).with_values({"lr": "0.2"}), ["lr = 0.2 (not 0.1)"]),
        (replace(resolved, precision="fp32"), ["precision = 'fp32' (not 'bf16')"]),
    ):
        assert recipe.differences(find_named(recipe, "bf16")) == changes
    other = replace(resolved, name="boxes", steps=100)  # the name of another task's recipe
    assert find_named(other, "bf16") == other and describe_budget(other) is describe_learning_rate(other) is None
