"""What studies compare with the papers: a run only with the printed figure of the same network, data, training and test.

The rows of every study are built at the paper's length from made-up errors, for several data sets and depths, and held against
a ledger of the papers' numbers that was written by hand from their tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from typing import Any

import pytest

from resnetlab.errors import UsageError
from resnetlab.models.probes import IdentityFlow, LayerSignal
from resnetlab.studies import catalogue, figures, gradients, lesion, protocols, responses
from resnetlab.studies.runs import RunOutcome, RunOutcomes
from resnetlab.studies.setting import Setting, Trial
from resnetlab.studies.study import Row, count_diverged, describe_endless_warmups
from resnetlab.studies.verdicts import compare_with_paper, difference_from_printed
from study_settings import make_setting

Facts = dict[str, Any]


def basic(depth: int, **facts: object) -> Facts:
    """What a specification must be, and "warmup", what its recipe must have."""
    return {"block": "basic", "depth": depth, "layers": 2, "shortcut": "A", "activation_order": "original"} | facts


def bottleneck(depth: int, **facts: object) -> Facts:
    return {"block": "bottleneck", "depth": depth, "shortcut": "B", "activation_order": "original"} | facts


SMALL = {"data": "cifar10", "steps": 64_000, "batch": 128}
Y15, WARM, Y16 = (SMALL | {"warmup": warmup} for warmup in ("none", "train-error", "steps"))
C100 = Y16 | {"data": "cifar100"}
LEDGER: dict[float, list[Facts]] = {  # per cent -> what a run must be to stand beside it
    8.75: [basic(20) | Y15], 7.51: [basic(32) | Y15], 7.17: [basic(44) | Y15], 6.97: [basic(56) | Y15],
    6.61: [basic(110) | WARM, basic(110) | Y16], 6.43: [basic(110) | WARM], 7.93: [basic(1202) | WARM],
    12.35: [basic(110, shortcut="constant", shortcut_scale=0.5, residual_scale=0.5) | Y16],
    8.70: [basic(110, shortcut="exclusive-gate", gate_bias=-6) | Y16],
    9.81: [basic(110, shortcut="exclusive-gate", gate_bias=-7) | Y16],
    12.86: [basic(110, shortcut="shortcut-gate", gate_bias=0) | Y16],
    6.91: [basic(110, shortcut="shortcut-gate", gate_bias=-6) | Y16],
    12.22: [basic(110, shortcut="conv") | Y16],
    8.17: [basic(110, activation_order="bn-after-add") | Y16],
    7.84: [basic(110, activation_order="relu-before-add") | Y16],
    6.71: [basic(110, activation_order="relu-only-preact") | Y16],
    6.37: [basic(110, activation_order="preact") | Y16],
    5.93: [bottleneck(164) | Y16], 6.50: [bottleneck(164, activation_order="bn-after-add") | Y16],
    6.14: [bottleneck(164, activation_order="relu-before-add") | Y16],
    5.91: [bottleneck(164, activation_order="relu-only-preact") | Y16],
    5.46: [bottleneck(164, activation_order="preact") | Y16],
    9.90: [basic(110, layers=1) | Y16], 8.91: [basic(110, layers=1, activation_order="preact") | Y16],
    7.61: [bottleneck(1001) | Y16], 4.92: [bottleneck(1001, activation_order="preact") | Y16],
    4.89: [bottleneck(1001, activation_order="preact") | Y16],
    25.16: [bottleneck(164) | C100], 24.33: [bottleneck(164, activation_order="preact") | C100],
    27.82: [bottleneck(1001) | C100], 22.71: [bottleneck(1001, activation_order="preact") | C100],
    22.68: [bottleneck(1001, activation_order="preact") | C100],
}  # fmt: skip
FAILS = [  # "fail" of 2016 Table 1, above 20 %
    basic(110, shortcut="none") | Y16,
    basic(110, shortcut="constant", shortcut_scale=0.5, residual_scale=1) | Y16,
    *(basic(110, shortcut="exclusive-gate", gate_bias=b) | Y16 for b in range(-5, 1)),
    basic(110, shortcut="dropout", shortcut_dropout=0.5) | Y16,
]
ABOVE_60 = [basic(110, shortcut="none") | WARM]  # plain-110, 2015 Fig. 6


def made_up(trial: Trial, position: int) -> RunOutcome:
    """A finished run with errors that no two networks share, near 8 %."""
    outcome, steps = RunOutcome(trial, Path("nowhere")), trial.recipe.steps
    error = 0.08 + 0.0011 * (position % 17) + 0.0007 * math.sin(7 * trial.recipe.seed + position)
    lines = [
        {"kind": "train", "step": steps * i // 10, "error": error / i, "loss": error / i, "lr": 0.1}
        for i in range(1, 11)
    ]
    outcome.__dict__.update(diverged=None, result={"top1_error": error}, metrics=lines, environment={})
    return outcome


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "draw_study_figure", lambda *_, **__: None)  # takes a second each


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of trained networks, made up: nothing is trained here."""
    layers = [LayerSignal(str(i), 1.0, 1.0) for i in range(3)]
    unit = IdentityFlow("layer1.1", 0.0, 1.0, 0.1, 1.0, 1.0, 1.0)
    monkeypatch.setattr(RunOutcome, "load_model", lambda self: SimpleNamespace(spec=None, net=None, resnet=None))
    for name, value in {
        "select_probe_images": lambda *_: None,
        "load_probe_batch": lambda *_: ([0], [0]),
        "build_from_spec": lambda *_, **__: None,
        "measure_signals": lambda *_: layers,
        "measure_identity_flow": lambda *_: [unit],
    }.items():
        monkeypatch.setattr(gradients, name, value)
    monkeypatch.setattr(
        responses,
        "measure_all_responses",
        lambda setting, outcomes, _: {
            label: {o.seed: [0.1, 0.2 + 0.001 * o.seed] for o in outcomes.of(label)}
            for label in {o.trial.label for o in outcomes.all}
        },
    )
    errors = lesion.LesionErrors(0.1, {"layer1.0": 0.2}, {2: 0.2}, {2: 0.2})
    monkeypatch.setattr(lesion, "measure_lesions", lambda model, setting, seed: errors)

    def measure(self: protocols.Protocols, setting: Setting, outcomes: RunOutcomes, _: object) -> protocols.Errors:
        errors: protocols.Errors = {}
        for p in self.protocols(setting):
            for label in [*self.models(setting, p), protocols.ENSEMBLE]:
                for rank in ("", protocols.TOP5) if self.on_imagenet else ("",):
                    errors.setdefault(label, {})[p + rank] = {s: 0.08 + 0.001 * s for s in range(setting.seeds)}
        return errors

    monkeypatch.setattr(protocols.Protocols, "_measure", measure)


@pytest.fixture
def no_models(no_figures: None, measurements: None) -> None:
    """Neither measured nor drawn."""


def all_rows(setting: Setting, names: tuple[str, ...]) -> Iterator[tuple[str, Row, Trial | None, Setting]]:
    """Every row of studies, with the first trial of its network."""
    for name in names:
        study = catalogue.STUDIES[name]
        own = study.adapt(setting)
        own.__dict__["source"] = setting.source
        trials = study.plan(own)
        outcomes = RunOutcomes(tuple(made_up(trial, i) for i, trial in enumerate(trials)))
        for row in study.read(own, outcomes, lambda done, total: None).rows:
            yield name, row, next((t for t in trials if t.label == row.what), None), own


def fits(facts: Facts, trial: Trial, setting: Setting) -> bool:
    spec, recipe = setting.spec(trial.recipe), trial.recipe
    found = {"data": setting.data, "steps": recipe.steps, "batch": recipe.batch, "warmup": recipe.warmup}
    return (
        all(found.get(key, getattr(spec, key, None)) == value for key, value in facts.items())
        and spec.widths == (16, 32, 64)
        and recipe.val_images == 0
        and recipe.warmup_steps == 400
        and recipe.milestones == (32_000, 48_000)
    )


def check(name: str, row: Row, trial: Trial | None, setting: Setting) -> str | None:
    """Why a row compares unequal things; None where it compares equal ones, or none."""
    where = f"{name}, {row.what}, {row.figure} on {setting.data}: {row.paper}"
    value = None if row.paper is None else row.paper.value
    words = "" if row.paper is None else row.paper.source
    if value is None and "above" not in words:
        return where if "the paper:" in row.verdict or getattr(row, "from_paper", None) else None
    if "not comparable: 300 % of the paper's epochs" in row.verdict:  # the runs of footnote 3, and labelled so
        return None
    allowed = LEDGER.get(round(100 * value, 2), []) if value is not None else ABOVE_60 if "60" in words else FAILS
    crops = row.figure.startswith("test error") and (
        "," not in row.figure or "1crop" in row.figure or "beside" in row.figure
    )
    return None if trial and crops and any(fits(facts, trial, setting) for facts in allowed) else where


EVERY = tuple(study.name for study in catalogue.select_studies("all") if study.name != "cost")
SETTINGS = [  # data, depths, studies: the deepest nets, which take long to count, only where they belong
    ("cifar10", (), EVERY), ("cifar10", (20, 56), EVERY), ("cifar10", (110,), EVERY), ("cifar10", (164,), ("orderings",)),
    ("cifar10", (164, 1001), ("preactivation", "degradation")), ("cifar10", (8, 1202), ("depth",)),
    ("cifar100", (), EVERY), ("cifar100", (164, 1001), ("preactivation",)), ("digits", (20, 110), ("degradation", "depth")),
    ("photos", (), ("convergence", "protocols")),
]  # fmt: skip


@pytest.mark.usefixtures("no_models")
def test_no_study_compares_unequal_things() -> None:
    seen: set[float] = set()
    wrong = []
    for data, depths, names in SETTINGS:
        for name, row, trial, setting in all_rows(make_setting(data, depths), names):
            wrong += [problem] if (problem := check(name, row, trial, setting)) else []
            if row.paper and row.paper.value is not None:
                seen.add(round(100 * row.paper.value, 2))
    assert not wrong, "\n".join(wrong)
    assert seen == set(LEDGER)  # and every figure of the ledger finds its run


IMAGENET = {  # figure -> network -> top-1 and top-5, per cent: 2015 Tables 2 to 4, its models' README, 2016 Table 5 and §4.1
    "10crop": {"plain18": (27.94,), "resnet18, A": (27.88,), "plain34": (28.54, 10.02), "resnet34, A": (25.03, 7.76),
               "resnet34, B": (24.52, 7.46), "resnet34, C": (24.19, 7.40), "resnet50": (22.85, 6.71),
               "resnet101": (21.75, 6.05), "resnet152": (21.43, 5.71)},
    "multiscale:224,256,384,480,640": {"resnet34, B": (21.84, 5.71), "resnet34, C": (21.53, 5.60), "resnet50": (20.74, 5.25),
                                       "resnet101": (19.87, 4.60), "resnet152": (19.38, 4.49)},
    "1crop": {"resnet50": (24.7, 7.8), "resnet101": (23.6, 7.1), "resnet152": (23.0, 6.7),
              "resnet101, BN after addition": (24.6, 7.5)},
    "dense:320": {"resnet152": (21.3, 5.5), "preresnet152": (21.1, 5.5), "resnet200": (21.8, 6.0),
                  "preresnet200": (20.7, 5.3), "preresnet200, aspect ratio": (20.1, 4.8)},
}  # fmt: skip


def test_both_gates_are_trained_with_every_bias_from_0_to_minus_7() -> None:
    trials = catalogue.select_studies("shortcut-types")[0].plan(make_setting("cifar10", (), seeds=1))
    specs = [make_setting("cifar10", ()).spec(trial.recipe) for trial in trials]
    for gate in ("exclusive-gate", "shortcut-gate"):
        assert sorted(spec.gate_bias for spec in specs if spec.shortcut == gate) == list(range(-7, 1))


@pytest.mark.usefixtures("no_models")
def test_imagenets_figures_stand_beside_their_own_networks_and_tests() -> None:
    """At the paper's length on the whole of ImageNet every printed figure is found once; on another folder none is."""
    setting = make_setting("imagenet", (), seeds=3)
    found: dict[str, dict[str, list[float]]] = {figure: {} for figure in IMAGENET}
    for _, row, trial, own in all_rows(setting, ("imagenet", "imagenet-preact")):
        assert own.share == pytest.approx(1) and (trial is None or trial.recipe.image_size == 224)
        if row.paper and row.paper.value is not None:
            assert (
                trial is not None and row.from_paper is not None and row.from_paper.n == 3 and "of 5" not in row.verdict
            )
            assert trial.recipe.steps == (600_000 if trial.recipe.name == "paper-imagenet" else 450_411)
            figure = row.figure.removeprefix("top-5 ").removeprefix("test error, ")
            found[figure].setdefault(row.what, []).append(round(100 * row.paper.value, 2))
    assert found == {figure: {net: list(e) for net, e in errors.items()} for figure, errors in IMAGENET.items()}
    other = all_rows(make_setting("photos", (), seeds=3), ("imagenet", "imagenet-preact"))
    assert not any(row.paper and row.paper.value for _, row, _, _ in other)
    for data, depths in (("digits", ()), ("photos", (20,))):
        with pytest.raises(UsageError, match="laid out as ImageNet" if data == "digits" else "leave --depths out"):
            catalogue.STUDIES["imagenet"].adapt(make_setting(data, depths))


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_differences_from_the_paper_are_of_its_own_statistic(seeds: int) -> None:
    rows = [
        row
        for _, row, _, _ in all_rows(make_setting("cifar10", (20, 110), seeds), ("depth", "orderings"))
        if row.paper and row.paper.value
    ]
    statistics: dict[str, Callable[[Any], float]] = {"median": median, "best": min, "mean": fmean, "one": fmean}
    for row in rows:
        assert row.paper is not None and row.paper.value is not None
        kind = row.paper.source.rpartition(", ")[2].split()[0]
        if kind == "best" and seeds != 5:
            assert row.from_paper is None and "not comparable: the best of 5 there" in row.verdict
            continue
        assert row.from_paper is not None and row.from_paper.n == seeds
        assert row.from_paper.mean == pytest.approx(statistics[kind](row.values) - row.paper.value)
        assert (row.from_paper.interval is None) == (seeds == 1 or kind == "best")
        assert ("one seed: no interval" in row.verdict) == (seeds == 1)
    kinds = {row.paper.source.rpartition(", ")[2] for row in rows if row.paper}
    assert kinds == {"one run", "mean of 5", "best of 5", "median of 5"}


@pytest.mark.usefixtures("no_models")
def test_runs_of_another_length_are_labelled_not_compared() -> None:
    rows = [
        (row, s)
        for _, row, _, s in all_rows(make_setting("cifar10", (20, 56), steps=7_820), ("degradation", "depth"))
        if row.paper
    ]
    assert all(row.from_paper is None for row, _ in rows)
    beside = [row for row, _ in rows if row.paper and row.paper.value]
    assert beside and all(
        "beside the paper: not comparable: 12 % of the paper's epochs" in row.verdict for row in beside
    )


def test_the_interval_of_a_difference_from_the_paper_by_hand() -> None:
    found = difference_from_printed([0.08, 0.09, 0.10], 0.0875, 1, "one run")
    assert found is not None and found.mean == pytest.approx(0.0025) and found.n == 3
    half = 4.302653 * 0.01 * math.sqrt(1 / 3 + 1)
    assert found.interval == pytest.approx((0.0025 - half, 0.0025 + half), abs=1e-8)
    assert difference_from_printed([0.08, 0.09], 0.0643, 5, "best of 5") is None
    assert compare_with_paper([0.08, 0.1, 0.081], 0.081, 1.0, statistic="median of 5").startswith("within two")


@pytest.mark.usefixtures("no_models")
def test_runs_that_diverged_are_not_compared_with_the_paper() -> None:
    """The best of four, the mean of four: no statistic of the paper's five."""
    own = make_setting("cifar10", (20, 110))
    for name in ("depth", "protocols", "responses"):
        study = catalogue.STUDIES[name]
        outcomes = tuple(made_up(trial, i) for i, trial in enumerate(study.plan(own)))
        outcomes[-1].__dict__.update(diverged="not finite", result={})
        result = study.read(own, RunOutcomes(outcomes), lambda done, total: None)
        rows = count_diverged(result.rows, outcomes)
        assert [row.diverged for row in rows] == [int(row.what == "resnet110") for row in rows]
        rows = [row for row in rows if row.what == "resnet110" and row.paper and row.paper.value]
        assert all(row.from_paper is None and row.figure.startswith("test error") for row in rows)
        assert all("beside the paper: not comparable: 1 of " in row.verdict for row in rows)
        assert len(rows) == (0 if name == "responses" else 2)
        assert name != "depth" or "1 seed left out, where a run diverged" in result.answer + result.details


@pytest.mark.usefixtures("no_models")
def test_a_net_that_never_left_its_warm_up_is_named() -> None:
    """plain-110, whose training error stayed near chance, was trained at a tenth of the others' rate for all its steps."""
    own = make_setting("cifar10", (20, 110), seeds=1)
    study = catalogue.STUDIES["degradation"]
    outcomes = tuple(made_up(trial, i) for i, trial in enumerate(study.plan(own)))
    (stuck,) = (o for o in outcomes if o.trial.label == "plain110")
    stuck.__dict__["metrics"] = [line | {"lr": 0.01} for line in stuck.metrics]
    assert [o.trial.label for o in outcomes if o.never_warm] == ["plain110"]
    answer = study.read(own, RunOutcomes(outcomes), lambda done, total: None).answer
    assert answer.startswith(
        "Degradation is not shown (plain110 stayed at its warm-up's rate to the end in 1 of 1 seed): "
    )
    (sentence,) = describe_endless_warmups(outcomes)
    assert sentence.startswith("plain110 stayed at its warm-up's rate of 0.01 to the end in 1 of 1 seed: ")
    assert sentence.endswith("its training error never fell below 80 %.")


@pytest.mark.usefixtures("measurements")
def test_no_panel_has_more_than_four_curves_and_each_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every study: small multiples where there are more (2015 Fig. 6, 2016 Fig. 3), and names at the curves."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []

    def keep(draw: Callable[[Figure], None], *, width: int, height: int, name: str, **_: object) -> str:
        if name.endswith("wide"):
            drawn.append(Figure(figsize=(width / 100, height / 100)))
            drawn[-1].suptitle(name)
            draw(drawn[-1])
        return ""

    monkeypatch.setattr("resnetlab.evaluation.figures.inline_svg", keep)
    names = tuple(name for name in EVERY if name != "shortcut-types")  # drawn as the orderings are, in 21 panels
    list(all_rows(make_setting("cifar10", (8, 14, 20, 26, 32), 1, steps=7_820), names))
    panels = {(figure.get_suptitle(), i): axes for figure in drawn for i, axes in enumerate(figure.axes)}
    assert sum(name == "degradation-wide" for name, _ in panels) == 4 * 2  # four depths beside the shallowest
    assert sum(name == "orderings-wide" for name, _ in panels) == 4 + 1
    for where, axes in panels.items():
        curves = [line for line in axes.get_lines() if line.get_linestyle() != "None" and len(line.get_xdata()) > 1]
        assert len(curves) <= figures.CURVES, where
        named = {text.get_color() for text in axes.texts if text.get_text()}
        assert {line.get_color() for line in curves} <= named, where


@pytest.mark.usefixtures("no_models")
def test_an_answer_says_how_little_was_trained_and_of_which_nets() -> None:
    """In the same sentence: nothing follows for the paper's plain-56 from 20 steps, or from a net of 8 layers."""
    setting = make_setting("cifar10", (8, 14), 1, steps=20)
    for name in EVERY:
        study = catalogue.STUDIES[name]
        outcomes = RunOutcomes(tuple(made_up(trial, i) for i, trial in enumerate(study.plan(setting))))
        answer = study.read(setting, outcomes, lambda done, total: None).answer
        assert "20 steps (" in answer or "60 steps, 3 times " in answer, answer
        assert "of the paper's epochs" in answer
        assert ("nets of 8 layers and 14 layers are not the paper's" in answer) == (name == "degradation"), answer
