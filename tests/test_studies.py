"""Studies: verdict rules by hand, plans, runs that are reused, and the files of a study."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import images
import zygote
from resnetlab.cli.main import run_command
from resnetlab.device import DeviceConfig
from resnetlab.errors import DataError, RunError, UsageError
from resnetlab.formatting import format_share
from resnetlab.models import probes
from resnetlab.models.model_file import load_trained_model
from resnetlab.models.probes import LayerSignal
from resnetlab.models.resnet import ResNet, build
from resnetlab.run_folder import RunFolder
from resnetlab.studies import (
    catalogue,
    code_version,
    cost_estimate,
    gradients,
    lesion,
    report,
    responses,
    runs,
    workers,
)
from resnetlab.studies.block_depth import BlockDepth
from resnetlab.studies.code_version import CodeVersions
from resnetlab.studies.convergence import Convergence
from resnetlab.studies.cost import agrees
from resnetlab.studies.cost_estimate import START_UP, CostEstimate
from resnetlab.studies.degradation import Degradation
from resnetlab.studies.footnotes import Iterations
from resnetlab.studies.imagenet import SIDES, ImageNet
from resnetlab.studies.orderings import Orderings
from resnetlab.studies.probe_images import load_probe_batch, select_probe_images
from resnetlab.studies.protocols import Protocols
from resnetlab.studies.runs import StudyRun
from resnetlab.studies.setting import PAPER_EPOCHS, Setting, Trial, check_depth
from resnetlab.studies.shortcut_types import ShortcutTypes
from resnetlab.studies.study import (
    PlanProgress,
    describe_other_versions,
    estimate_reading,
    find_missing,
    locate_runs,
    run_studies,
)
from resnetlab.studies.variants import error_rows, network_trials
from resnetlab.studies.verdicts import compare_by_seed, compare_with_paper, mean_sd, tally
from resnetlab.training.recipe import Recipe
from study_settings import make_setting


def setting(**changes: object) -> Setting:
    return Setting(**({"data": "digits", "data_dir": Path("data"), "budget": "smoke", "seeds": 1} | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def quick_workers() -> Iterator[None]:
    with zygote.spawning():
        yield


# -- rules -------------------------------------------------------------------------------------------------------------


def test_a_comparison_equals_a_hand_computation() -> None:
    c = compare_by_seed({0: 0.3, 1: 0.5, 2: 0.4, 7: 0.9}, {0: 0.1, 1: 0.2, 2: 0.3})  # seed 7 has no partner
    assert (c.wins, c.losses, c.n) == (3, 0, 3)
    assert c.mean == pytest.approx(0.2)
    half = 4.302653 * 0.1 / math.sqrt(3)  # differences 0.2, 0.3, 0.1: sd 0.1; t of 2 degrees of freedom
    assert c.interval == pytest.approx((0.2 - half, 0.2 + half), abs=1e-6)
    assert c.strength == "points to"  # all agree, but the interval holds 0


@pytest.mark.parametrize(
    ("differences", "strength"),
    [
        ([0.2, 0.21, 0.19], "shown"),
        ([0.2, 0.3, 0.1], "points to"),
        ([0.2, 0.3, -0.1], "not shown"),
        ([0.2, 0.3, 0.0], "not shown"),
        ([0.2, 0.2], "not shown"),
        ([], "not shown"),
    ],
)
def test_no_verdict_is_stronger_than_its_evidence(differences: list[float], strength: str) -> None:
    c = compare_by_seed(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0))
    assert c.strength == strength
    assert c.reversed.strength == "not shown"  # the contrary is not shown by what does not show it


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([1, 1, 1, 1, 1], "plain56 trains worse than plain20 in 5 of 5 seeds"),
        ([-1, -1, -1], "plain56 trains better than plain20 in 3 of 3 seeds"),
        ([1, 1, -1], "plain56 trains worse than plain20 in 2 of 3 seeds: no verdict"),
        ([1, 1], "plain56 trains worse than plain20 in 2 of 2 seeds, too few for a verdict"),
        ([1], "plain56 trains worse than plain20 in 1 of 1 seed, too few for a verdict"),
        ([1, -1, 0], "plain56 and plain20 are level: each larger in 1 of 3 seeds"),
        ([], "there is no seed in which both plain56 and plain20 have a figure"),
    ],
)
def test_a_tally_counts_seeds(differences: list[float], words: str) -> None:
    c = compare_by_seed(dict(enumerate(differences)), dict.fromkeys(range(9), 0.0))
    assert tally(c, "plain56", "plain20", larger="trains worse than", smaller="trains better than") == words


def test_runs_that_diverged_take_from_what_is_said() -> None:
    """What is left of a network's runs is neither all of its seeds nor the paper's statistic."""
    worse, better = {0: 0.3, 1: 0.31, 2: 0.29}, {0: 0.1, 1: 0.1, 2: 0.1, 3: 0.1}
    assert compare_by_seed(worse, dict.fromkeys(range(3), 0.1)).strength == "shown"
    for c in (compare_by_seed(worse, better), compare_by_seed(better, worse).reversed):
        assert c.n == 3 and c.strength == "points to" and c.interval is not None and c.interval[0] > 0
        assert c.describe().endswith("n = 3; 1 seed left out, where a run diverged")
    assert compare_with_paper([0.08, 0.09, 0.1], 0.0875, 1.0, diverged=2) == "not comparable: 2 of 5 runs diverged"
    fails, does_not = (compare_with_paper([0.08] * n, None, 1.0, diverged=5 - n) for n in (2, 3))
    assert fails == "fails by the paper's measure (above 20 %); 3 of 5 runs diverged"
    assert does_not == "does not fail by the paper's measure (above 20 %); 2 of 5 runs diverged"
    assert compare_with_paper([], None, 1.0, diverged=5).startswith("fails by the paper's measure")


def test_the_papers_figure_is_compared_only_at_its_length() -> None:
    assert compare_with_paper([0.08, 0.09], 0.0875, 0.02) == "not comparable: 2 % of the paper's epochs"
    assert compare_with_paper([0.08, 0.085, 0.09], 0.0875, 1.0) == "within two standard deviations of the paper"
    assert compare_with_paper([0.10, 0.101, 0.1005], 0.0875, 1.0).startswith(
        "1.30 points above the paper, more than two"
    )
    assert compare_with_paper([0.10, 0.101], 0.0875, 1.0) == "1.30 points above the paper, 2 seeds: no verdict"
    assert compare_with_paper([0.08], 0.0875, 1.0) == "0.75 points below the paper, one seed: no verdict"
    assert compare_with_paper([], 0.0875, 1.0) == "no run ended with a figure"
    assert mean_sd([1.0, 2.0, 3.0]) == (2.0, 1.0) and mean_sd([1.0]) == (1.0, None)


# -- plans -------------------------------------------------------------------------------------------------------------


def test_the_paper_budget_on_cifar_is_the_papers_own_recipe(cifar10_dir: Path) -> None:
    base = setting(data="cifar10", data_dir=cifar10_dir, budget="paper").base
    assert (base.steps, base.milestones, base.val_images, base.batch) == (64_000, (32_000, 48_000), 0, 128)
    quick = setting(data="cifar10", data_dir=cifar10_dir, budget="quick")
    assert quick.base.steps == 1280 and quick.share == pytest.approx(0.02)
    assert pytest.approx(163.84) == PAPER_EPOCHS


def test_a_plan_has_every_depth_kind_and_seed_once() -> None:
    trials = Degradation().plan(setting(seeds=3, depths=(14, 8, 8)))
    assert [t.label for t in trials[::3]] == ["plain8", "resnet8", "plain14", "resnet14"]
    assert len({t.recipe.key for t in trials}) == 12
    assert {t.recipe.threads for t in trials} == {1}
    (deep,) = network_trials(setting(), "resnet110")
    assert deep.recipe.warmup == "train-error"


@pytest.mark.parametrize(
    ("depth", "sentence"),
    [
        (21, "depth 21 is not 6n+2; the nearest are 20 and 26."),
        (50, "depth 50 is the depth of another kind of network; the nearest are 44 and 56."),
        (2, "depth 2 is not 6n+2; the nearest are 8 and 14."),
    ],
)
def test_an_unknown_depth_gets_the_nearest_two(depth: int, sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        check_depth(depth)
    assert str(error.value) == sentence


def test_every_run_of_a_study_has_the_precision_that_was_asked_for() -> None:
    assert {trial.recipe.precision for trial in setting(precision="bf16").trials("a", "resnet8")} == {"bf16"}
    with pytest.raises(UsageError, match="unknown precision 'fp8'"):
        _ = setting(precision="fp8").base


def test_zero_seeds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["study", "cost", "--seeds", "0"]) == 2
    assert "--seeds must be from 1 to 1,000, not 0" in capsys.readouterr().err


def test_a_data_set_too_small_to_split_is_refused(tmp_path: Path) -> None:
    from PIL import Image

    for kind in ("a", "b"):
        for i in range(6):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / kind / f"{i}.png")
    with pytest.raises(DataError, match="too few to split"):
        _ = setting(data=str(tmp_path)).source


def test_convergence_compares_the_18_layer_nets_on_a_folder(tmp_path: Path) -> None:
    here = setting(data=str(images.folder(tmp_path, {"train": 10, "val": 3})))
    tried = Convergence().adapt(
        here
    )  # "does it run at all": 20 steps of 32 images of 224 pixels took a quarter of an hour
    assert {(t.recipe.image_size, t.recipe.batch, t.recipe.steps) for t in Convergence().plan(tried)} == {(66, 8, 20)}
    assert tried.share == pytest.approx(20 * 8 / 30 / (600_000 * 256 / 1_281_167))
    own = Convergence().adapt(replace(here, steps=20, budget="quick"))
    plain, residual = Convergence().plan(own)
    assert (plain.recipe.net, residual.recipe.net) == ("plain18", "resnet18")
    assert (residual.recipe.name, residual.recipe.image_size, residual.recipe.batch) == ("photos", 224, 32)
    counts = [sum(p.numel() for p in ResNet(own.spec(t.recipe)).parameters()) for t in (plain, residual)]
    assert counts[0] == counts[1]  # option A, as in 2015 Table 2
    assert own.share == pytest.approx(20 * 32 / 30 / (600_000 * 256 / 1_281_167))  # of 2015 §3.4's passes
    for twins in (here, setting(depths=(14,))):  # chosen depths, and small images, have the nets of 6n+2 layers
        own = Convergence().adapt(replace(twins, depths=(14,)))
        assert [t.recipe.net for t in Convergence().plan(own)] == ["plain14", "resnet14"]


def test_networks_that_are_the_same_function_are_left_out() -> None:
    """In ResNet-8 every unit begins a stage, so two pairs of orders are one function each (compared by hand: difference 0)."""
    small, deeper = setting(depths=(8,)), setting(depths=(14,))
    kept, sentences = Orderings().drop_twins(small)
    assert [v.label for v in kept] == ["original", "relu-before-add", "preact"]
    assert sentences == [
        "bn-after-add is left out: in resnet8 it is the same function as preact; deeper nets tell them apart.",
        "relu-only-preact is left out: in resnet8 it is the same function as original; deeper nets tell them apart.",
    ]
    assert {t.label for t in Orderings().plan(small)} == {"original", "relu-before-add", "preact"}
    assert len(Orderings().plan(deeper)) == 5 and not Orderings().drop_twins(deeper)[1]
    assert not ShortcutTypes().drop_twins(small)[1]  # dropout is the identity only in eval mode


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """A folder in which the smallest study was made from the command line, and the rows it wrote."""
    folder = tmp_path_factory.mktemp("study_folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["resnetlab", "study", "degradation"])
        patch.setattr(code_version, "measure_fingerprint", lambda device: "tiny weights")
        patch.setattr(
            workers, "worker_devices", lambda device, num_runs, image_size: ["cpu"]
        )  # a second process would import all again
        arguments = ["study", "degradation", "--steps", "4", "--seeds", "1", "--depths", "8,14", "--out", "out"]
        assert run_command([*arguments, "--device", "cpu"]) == 0
    return folder, json.loads((folder / "out" / "rows.json").read_text())


def test_a_study_writes_its_rows_and_one_page(study_folder: tuple[Path, dict[str, object]]) -> None:
    folder, document = study_folder
    rows = document["rows"]
    assert isinstance(rows, list) and len(rows) == 8
    assert {"study", "what", "figure", "mean", "sd", "n", "paper", "paper_source", "budget", "verdict"} <= rows[
        0
    ].keys()
    for row in rows:
        assert 0 <= row["mean"] <= 1 and row["n"] == 1 and row["sd"] is None and 0 < row["budget"] < 0.01
    with open(folder / "out" / "rows.csv") as file:
        assert [row["verdict"] for row in csv.DictReader(file)] == [row["verdict"] for row in rows]
    page = (folder / "out" / "report.html").read_text()
    assert "<svg" in page and "too few for a verdict" in page and "not comparable" not in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_the_rows_equal_the_runs_results(study_folder: tuple[Path, dict[str, object]]) -> None:
    folder, document = study_folder
    for row in document["rows"]:  # type: ignore[attr-defined]
        (made,) = (folder / "runs" / "studies").glob(f"{row['what']}-seed0-*")
        result = json.loads((made / "result.json").read_text())
        lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
        last = next(line for line in reversed(lines) if line["kind"] == "train")
        assert row["mean"] == (result["top1_error"] if row["figure"] == "test error" else last["error"])


def test_finished_runs_are_reused(
    study_folder: tuple[Path, dict[str, object]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, document = study_folder
    monkeypatch.chdir(folder)
    monkeypatch.setattr(workers, "make_runs", None)  # no run is made
    assert run_command(["study", "degradation", "--steps", "4", "--seeds", "1", "--depths", "8,14", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"] == document["rows"]
    assert "all 4 runs are there already" in err


def rename_source(study_run: StudyRun, source: str) -> Path:
    """Renames the folder of a run to that of another source."""
    return study_run.folder.rename(study_run.folder.with_name(f"{study_run.folder.name.rpartition('-')[0]}-{source}"))


def test_runs_count_where_the_code_comes_to_the_same_weights(
    study_folder: tuple[Path, dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(study_folder[0] / "runs" / "studies", tmp_path / "studies")
    here, machine = setting(steps=4, depths=(8, 14)), code_version.machine_kind("cpu")
    trials = Degradation().plan(here)
    planned = locate_runs(trials, here, root)
    assert all(run.finished and run.folder.name.endswith(code_version.source_hash()) for run in planned)
    record = json.loads((root / code_version.RECORD).read_text())
    assert record[code_version.source_hash()] == {machine: "tiny weights"}
    for run, source in zip(planned, ("equal", "other", "unknown"), strict=False):
        rename_source(run, source)
    record |= {"equal": {machine: "tiny weights"}, "other": {machine: "other weights"}}
    (root / code_version.RECORD).write_text(json.dumps(record))
    equal, other, unknown, own = locate_runs(trials, here, root)
    assert equal.finished and equal.folder.name.endswith("-equal") and own == planned[3]
    assert not other.finished and [path.name[-6:] for path in other.others] == ["-other"] and unknown.others
    reports: list[str] = []
    assert find_missing([equal, other, unknown, own], reports.append) == [other, unknown]
    (report,) = reports
    assert report.startswith(
        "runs made by code that produces other weights are neither changed nor used: 2 (--any-version"
    )
    rename_source(unknown_run := StudyRun(unknown.recipe, unknown.others[0]), "elsewhere")
    (unknown_run.folder.with_name(f"{unknown_run.folder.name.rpartition('-')[0]}-elsewhere") / "result.json").unlink()
    any_version = locate_runs(trials, replace(here, any_version=True), root)
    assert [run.finished for run in any_version] == [
        True,
        True,
        False,
        True,
    ]  # an unfinished run is never another code's to resume
    assert any_version[2].folder.name.endswith(code_version.source_hash())
    monkeypatch.setattr(code_version, "source_hash", lambda: "new")  # an edited message: measured again, and equal
    monkeypatch.setattr(runs, "source_hash", lambda: "new")
    monkeypatch.setattr(code_version, "measure_fingerprint", lambda device: "tiny weights")
    assert [run.finished for run in locate_runs(trials, here, root)] == [True, False, False, True]
    CodeVersions(root, "cpu").record()
    assert json.loads((root / code_version.RECORD).read_text())["new"] == {machine: "tiny weights"}


def test_networks_are_measured_in_a_precision_that_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, own, measured in (("fp32", "bf16", "fp32"), ("bf16", "bf16", "bf16"), ("bf16", "fp32", "fp32")):
        monkeypatch.setattr("resnetlab.studies.setting.default_precision", lambda device, native=native: native)
        here = replace(setting(), precision=own, device="cpu")
        assert here.measuring_precision == measured
        sentences = [f"Trained in {own}, which this machine does not compute; evaluated here in {measured}."]
        assert here.measuring_remarks == (sentences if measured != own else [])


def test_a_study_on_a_mac_trains_and_compares_code_on_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert Setting("digits", Path("data"), "smoke", 1).device == "cpu"
    monkeypatch.setattr(code_version, "select_device", lambda *_: DeviceConfig(torch.device("mps"), "fp32", 1, ""))
    assert code_version.machine_kind("mps").startswith("mps ")


def test_runs_of_another_length_have_a_budget_of_their_own() -> None:
    here = make_setting("cifar10", (20, 56), seeds=1)
    trials = Iterations().plan(here)
    outcomes = runs.RunOutcomes(tuple(runs.RunOutcome(trial, Path("nowhere")) for trial in trials))
    rows = [row for trial in trials for row in error_rows(here, outcomes, trial.label, trials[0].label)]
    assert [row.budget for row in rows] == pytest.approx([1, 1, 1, 1, 3, 3, 3, 3])


def test_a_report_says_that_other_code_made_runs(tmp_path: Path) -> None:
    trial = Trial("resnet8", setting().base)
    own, other = (
        runs.RunOutcome(trial, tmp_path / f"resnet8-{source}") for source in (code_version.source_hash(), "other")
    )
    assert describe_other_versions([own]) == []
    assert describe_other_versions([own, other]) == ["1 run of 2 made by another version of the code."]


def test_a_finished_run_of_version_01_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by its recipe.toml, whose keys and hash are those of 0.1."""
    pytest.importorskip("resnetlab.migrate_v01", reason="reading version 0.1 is merged from another branch")
    old = shutil.copytree(Path(__file__).parent / "data" / "v0.1" / "classifier", tmp_path / "run")
    recipe = Recipe.from_values(RunFolder(old).read_recipe())
    data = setting().source.fingerprint
    (source,) = code_version.V01
    old.rename(tmp_path / f"resnet8-seed3-0123456789abcdef-{data[:8]}-{source}")
    machine = code_version.machine_kind("cpu")
    monkeypatch.setattr(code_version, "V01", {source: {machine: "tiny weights"}})
    monkeypatch.setattr(code_version, "measure_fingerprint", lambda device: "tiny weights")
    versions = CodeVersions(tmp_path, "cpu")
    study_run = StudyRun.locate(tmp_path, replace(recipe, compile="auto"), data, versions)
    assert study_run.finished and study_run.folder.name.endswith(source)
    outcome = runs.RunOutcome(Trial("resnet8", recipe), study_run.folder)
    assert outcome.test_error == 0.15 and outcome.training_error is not None
    assert not StudyRun.locate(tmp_path, replace(recipe, lr=0.2), data, versions).others  # another run


def test_the_tiny_runs_come_to_the_weights_of_version_01(capsys: pytest.CaptureFixture[str]) -> None:
    ((source, fingerprints),) = code_version.V01.items()
    assert source == "8bd7db84"
    fingerprint = code_version.measure_fingerprint.__wrapped__("cpu")
    assert fingerprint == fingerprints.get(code_version.machine_kind("cpu"), fingerprint)
    assert capsys.readouterr() == ("", "")  # nobody asked for these runs


def test_a_diverged_run_is_a_result(tmp_path: Path) -> None:
    here = setting(steps=4)
    (trial,) = here.trials("plain8", "plain8", lr=1e30)
    study_run = StudyRun(trial.recipe, tmp_path / "run")
    study_run.make(Path("data"), "cpu", lambda _: None)
    outcome = runs.RunOutcome(trial, study_run.folder)
    assert study_run.finished and "not finite" in (outcome.diverged or "") and outcome.training_error is None
    study_run.make(Path("data"), "cpu", lambda _: None)  # and is not made again


def test_a_failed_run_stops_the_plan_with_its_error(tmp_path: Path) -> None:
    here = setting(steps=4)
    (trial,) = here.trials("plain8", "plain8", data=str(tmp_path / "nowhere"))
    with pytest.raises(RunError, match="nowhere is not there"):
        workers.make_runs([StudyRun(trial.recipe, tmp_path / "run")], Path("data"), ["cpu"], lambda index, step: None)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["degradaton"], "unknown study 'degradaton'; did you mean 'degradation'?"),
        (["degradation", "--budget", "qick"], "unknown budget 'qick'; did you mean 'quick'?"),
        (["degradation", "--depths", "20,21"], "depth 21 is not 6n+2; the nearest are 20 and 26."),
        (["degradation", "--depths", "twenty"], "--depths takes whole numbers"),
        (["degradation", "--seeds", "-1"], "--seeds must be from 1 to 1,000"),
        (["degradation", "--data", "digts"], "unknown data set 'digts'; did you mean 'digits'?"),
        (["degradation", "--steps", "100000000", "--depths", "8"], "add --yes to start it all the same"),
    ],
)
def test_bad_requests_get_one_sentence(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["study", *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_catalogue_lists_every_study() -> None:
    assert [*(s.name for s in catalogue.select_studies("all")), "imagenet", "imagenet-preact"] == list(
        catalogue.STUDIES
    )
    assert format_share(0.02) == "2 %" and format_share(1.0) == "100 %"


# -- the other experiments ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_studies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, object]]]:
    """All studies with the smallest runs, in one process; the folder, and the rows."""
    folder = tmp_path_factory.mktemp("all_studies")
    here = setting(steps=3, depths=(8,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_version, "measure_fingerprint", lambda device: "tiny weights")
        patch.setattr(workers, "make_runs", make_runs_here)
        outputs = run_studies(catalogue.select_studies("all"), here, root=folder / "runs")
    report.write_study(outputs, folder / "out", "resnetlab study all")
    return folder, json.loads((folder / "out" / "rows.json").read_text())["rows"]


def make_runs_here(
    runs: Sequence[StudyRun], data_dir: Path, devices: Sequence[str], on_step: Callable[[int, int], None]
) -> None:
    for index, planned in enumerate(runs):
        planned.make(data_dir, "cpu", lambda p, index=index: on_step(index, p.step))  # type: ignore[misc]


@pytest.mark.slow
def test_all_studies_make_one_report_and_share_runs(all_studies: tuple[Path, list[dict[str, object]]]) -> None:
    folder, rows = all_studies
    cifar = [study.name for study in catalogue.select_studies("all")]
    assert {row["study"] for row in rows} == set(cifar)
    assert all(row["verdict"] for row in rows)
    made = [path for path in (folder / "runs").glob("plain8-seed0-*") if RunFolder(path).read_recipe()["steps"] == 3]
    assert len(made) == 1  # degradation, convergence, responses, … share it; `iterations` has one of 9 steps too
    page = (folder / "out" / "report.html").read_text()
    for name in cifar:
        assert f'href="#{name}"' in page and f'id="{name}"' in page
    assert page.count("<svg") == 2 * sum(1 for _ in re.finditer('<figure class="card">', page))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


@pytest.mark.slow
def test_rows_of_different_studies_agree_on_what_they_share(all_studies: tuple[Path, list[dict[str, object]]]) -> None:
    _, rows = all_studies
    found = {row["study"]: row["mean"] for row in rows if row["what"] == "resnet8" and row["figure"] == "test error"}
    del found["preactivation"]  # with 2016's warm-up
    assert set(found) >= {"degradation", "depth", "convergence"} and len(set(found.values())) == 1
    identity = [row for row in rows if row["study"] == "gradients" and "x_L - x_l" in str(row["figure"])]
    # resnet8, preresnet8, and preresnet8 with shortcuts scaled by half, whose identity has that factor
    assert [row["verdict"] == "exact in float64" for row in identity] == [False, True, True]
    products = [row["mean"] for row in rows if "product of the shortcuts" in str(row["figure"])]
    assert products == [1.0, 1.0, 0.5]  # one unit of resnet8 keeps its shape


@pytest.mark.slow
def test_counts_are_compared_with_the_papers(all_studies: tuple[Path, list[dict[str, object]]]) -> None:
    _, rows = all_studies
    counted = {(row["what"], row["figure"]): row for row in rows if row["study"] == "cost"}
    assert counted["resnet50", "multiply-adds"]["mean"] == 3_857_973_248
    assert counted["vgg19", "multiply-adds"]["mean"] == 19_632_062_464  # 19.6e9 in the paper
    assert counted["alexnet", "parameters"]["mean"] == 61_100_840  # torchvision's documentation
    differing = {key for key, row in counted.items() if "NOT" in str(row["verdict"])}
    assert differing == {("vgg16", "multiply-adds"), ("preresnet1001", "parameters")}  # 10.2M leaves BN's out
    assert "without BN's weights and biases" in str(counted["preresnet1001", "parameters"]["verdict"])
    sources = {name: counted[name, "multiply-adds"]["paper_source"] for name in ("vgg16", "vgg19", "resnet34")}
    assert sources == {"vgg16": "2015 §4.1", "vgg19": "2015 §3.3 and Fig. 3", "resnet34": "2015 Table 1"}
    parameters = {name: counted[name, "parameters"]["paper_source"] for name in ("resnet56", "preresnet164")}
    assert parameters == {"resnet56": "2015 Table 6", "preresnet164": "2016 Table 4"}


def test_a_count_agrees_where_it_rounds_or_truncates() -> None:
    assert agrees(3_857_973_248, 3.8e9) and agrees(3_750_000_000, 3.8e9) and agrees(269_722, 0.27e6)
    assert not agrees(4_089_184_256, 3.8e9) and not agrees(272_474, 0.26e6) and not agrees(3_900_000_000, 3.8e9)


def test_health_follows_a_rule() -> None:
    flat = [LayerSignal("a", 1.0, 1.0), LayerSignal("b", 1.0, 2.0), LayerSignal("c", 1.0, 3.0)]
    assert gradients.healthy_layers(flat) == [True] * 3
    assert gradients.healthy_layers([*flat, LayerSignal("d", 0.001, 2.0), LayerSignal("e", 1.0, 0.0)])[3:] == [
        False,
        False,
    ]
    assert gradients.healthy_layers([*flat, LayerSignal("d", 1.0, 2.0), LayerSignal("e", 1.0, 500.0)])[3:] == [
        True,
        False,
    ]
    assert gradients.count_unhealthy([gradients.SignalFlow(flat, [*flat, LayerSignal("d", 0.0, 2.0)])]) == 1


@pytest.mark.parametrize(
    ("intact", "single", "verdict"),
    [
        (0.1, {"a": 0.2, "b": 0.3}, "net's error rises smoothly in 3 of 3 seeds."),  # half way to 0.9 is 0.5
        (0.1, {"a": 0.9, "b": 0.3}, "net collapses without one block in 3 of 3 seeds."),
        (0.1, {"a": 0.6, "b": 0.1}, "net collapses in 0 and rises smoothly in 0 of 3 seeds."),
        (0.8, {"a": 0.9}, "net has learnt too little to lose much: its error is above 45% in 3 of 3 seeds."),
    ],
)
def test_the_effect_of_lesions_follows_a_rule(intact: float, single: dict[str, float], verdict: str) -> None:
    errors = lesion.LesionErrors(intact, single, {}, {})
    assert lesion.lesion_verdict(dict.fromkeys(range(3), errors), "net", 0.9) == verdict


def test_lesions_are_reproducible() -> None:
    net = build("resnet14", seed=0)
    first, again = ([(kind, which) for kind, which, _ in lesion.generate_lesions(net, 0)] for _ in range(2))
    assert first == again and first[:6] == [("single", name) for name, _ in net.blocks()]
    assert {kind for kind, _ in first} == {"single", "several", "swaps"}


@pytest.mark.slow
def test_responses_are_measured_in_the_trained_nets(all_studies: tuple[Path, list[dict[str, object]]]) -> None:
    folder, rows = all_studies
    (row,) = (r for r in rows if r["study"] == "responses" and r["what"] == "resnet8")
    here = setting(steps=3, depths=(8,))
    study_run = locate_runs(Degradation().plan(here), here, folder / "runs")[1]
    bundle = load_trained_model(study_run.folder / "model.safetensors")
    x, _ = load_probe_batch(bundle, select_probe_images(here, responses.IMAGES))
    layers = probes.measure_responses(bundle.net, x)
    assert row["mean"] == pytest.approx(sum(layers.values()) / len(layers))


def test_block_depths_keep_the_number_of_layers() -> None:
    here = setting(depths=(56,))
    depths = {
        v.label: here.spec(here.trials(v.label, v.net, v.values)[0].recipe).depth for v in BlockDepth().variants(here)
    }
    assert depths == {"plain": 56, "F of 1": 56, "F of 2": 56, "F of 3": 56}
    assert [v.label for v in BlockDepth().variants(setting(depths=(14,)))] == ["plain", "F of 1", "F of 2"]


@pytest.mark.parametrize("times", [(1.0, 2.5), (2.0, 1.0)])  # of the smaller net and the larger; the first disturbed
def test_a_plan_costs_more_than_a_part_of_it(times: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_estimate, "_time_step", lambda spec, *_: times[spec.depths[0] > 1])
    here = setting(steps=10, depths=(8, 14))
    estimate = CostEstimate(here)
    short, long = (estimate.run(here.trials("x", f"resnet{depth}")[0].recipe) for depth in (8, 56))
    assert 0 < short < long
    plan = locate_runs(Degradation().plan(here), here, Path("nowhere"))
    assert estimate.remaining(plan, 1) > estimate.remaining(plan, 2) > estimate.remaining(plan[:1], 2) > 0


def test_the_cost_counts_evaluations_after_the_steps() -> None:
    """A run whose steps are done is still tested; a study of protocols evaluates its models by each."""
    here = setting(steps=10, depths=(8, 14))
    estimate = CostEstimate(here)
    recipe = here.trials("x", "resnet8")[0].recipe
    tested = estimate.evaluation(recipe, len(here.source.test))
    assert estimate.run(recipe, 10) == pytest.approx(START_UP + tested) and tested > 0
    size = here.base.image_size
    views = Protocols().count_views(here, "resnet8")
    assert views == 1 + sum((side / size) ** 2 for side in (size, size + size // 8, size + size // 4))
    assert Protocols().count_views(here, "resnet110") == 0
    reading = estimate_reading(Protocols(), Protocols().plan(here), here, estimate)
    plan = locate_runs(Protocols().plan(here), here, Path("nowhere"))
    before, estimate.reading = estimate.remaining(plan, 2), reading
    assert estimate.remaining(plan, 2) == pytest.approx(before + reading / 2) and reading > views * tested
    of_224 = SimpleNamespace(base=SimpleNamespace(image_size=224))
    deepest = ImageNet().count_views(of_224, "resnet152")  # type: ignore[arg-type]
    assert deepest == pytest.approx(10 + 1 + 2 * sum((side / 224) ** 2 for side in SIDES) + (320 / 224) ** 2)


def test_the_first_time_of_a_study_is_not_that_of_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    here = setting(steps=20, depths=(8, 14))
    plan = locate_runs(Degradation().plan(here), here, Path("nowhere"))
    monkeypatch.setattr(CostEstimate, "step", lambda self, recipe: 0.5)
    told: list[str] = []
    progress = PlanProgress(plan, CostEstimate(here), 2, lambda done, total, text: told.append(text))
    start = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: start + 10)  # two processes have started in the meantime
    progress.update(0, 1)
    left = CostEstimate(here).remaining(plan, 2)
    seconds = re.fullmatch(r"0 of 4 runs  (\d+) s left", told[0])
    assert seconds and left < float(seconds[1]) < 2 * left
