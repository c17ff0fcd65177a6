"""The plan of a run on a cluster: counts by hand, the model's limits, and what the command prints."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from resnetlab.cli.main import run_command
from resnetlab.errors import UsageError
from resnetlab.models.spec import get_specification
from resnetlab.training.cluster_plan import Cluster, Job, count_link_bytes, make_plan, parse_count, step_times

JOB = Job("resnet50", get_specification("resnet50"), 1_280_000)


def test_the_exchange_sends_what_a_ring_sends() -> None:
    assert count_link_bytes(25_600_000, 2) == 102_400_000
    assert count_link_bytes(25_600_000, 1) == 0
    assert count_link_bytes(1_000, 4) == 2 * 4 * 1_000 * 3 / 4


def test_a_step_is_computing_and_what_it_does_not_hide() -> None:
    cluster = Cluster(16, gpus_per_machine=8, link=10, latency=50, images_per_second=2560)
    compute, exchange, exposed = step_times(JOB, cluster)
    parameters, _ = JOB.counts
    gradient = 4 * parameters
    assert compute == pytest.approx(0.05)
    assert exchange == pytest.approx(2 * gradient * 7 / 8 / 300e9 + gradient / 1.25e9 + 2 * 4 * 50e-6)  # 4 buckets
    assert exposed == pytest.approx(exchange - 0.05 * 2 / 3)
    assert step_times(JOB, replace(cluster, link=1e6))[2] == pytest.approx(
        step_times(JOB, replace(cluster, link=1e6))[1] / 4
    )
    assert step_times(JOB, Cluster(1))[2] == 0


def test_what_breaks_first() -> None:
    slow = make_plan(JOB, Cluster(64, link=10)).limits
    assert slow[0].startswith("now: images from other machines") and slow[1].startswith("now: the exchange brings")
    fast = make_plan(JOB, Cluster(64, link=400)).limits
    assert fast[0] == (
        "from 65 GPUs on: the batch exceeds 8,192, where SGD's error rises: optimizer=lars or lamb, or smaller shares"
    )
    few_cores = make_plan(JOB, Cluster(8, link=400, images_per_second=3000, cores=2)).limits
    assert few_cores[0].startswith("now: decoding needs 3 cores a GPU, not 2")
    efficiencies = [make_plan(JOB, Cluster(64, link=link)).figures["efficiency"].value for link in (10, 25, 100, 400)]
    assert efficiencies == sorted(efficiencies) and efficiencies[0] < 0.5 < 0.9 < efficiencies[-1] < 1


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--gpus", "64", "--net", "resnet50", "--images", "1.28M", "--link", "100"]
    assert run_command([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    figures = document["figures"]
    assert document["images"] == 1_280_000 and figures["batch"] == {"value": 8192, "basis": "counted"}
    assert figures["90 epochs"]["value"] == pytest.approx(90 * 1_280_000 / figures["all GPUs"]["value"])
    assert figures["one GPU alone"]["basis"] == "assumed" and figures["efficiency"]["basis"] == "modelled"
    assert run_command([*words, "--images-per-second", "2500"]) == 0
    printed = capsys.readouterr().out
    assert "2,500 images/s" in printed and "given" in printed and "What breaks first:" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "resnetlab: --gpus must be above 0, not 0."),
        (["--gpus", "8", "--images", "many"], "--images takes a number such as 1.28M, 50k or 1281167, not 'many'."),
        (["--gpus", "8", "--epochs", "-1"], "resnetlab: --epochs must be above 0, not -1.0."),
        (["--gpus", "8", "--net", "resnet51"], "unknown"),
    ],
)
def test_wrong_requests(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", *words]) == 2
    assert message in capsys.readouterr().err


def test_python_names_arguments() -> None:
    with pytest.raises(UsageError, match=r"^gpus_per_machine must be above 0, not -8\.$"):
        Cluster(gpus=8, gpus_per_machine=-8)


def test_counts_of_images() -> None:
    assert [parse_count(text) for text in ("1.28M", "50k", "1,281,167", "2B")] == [
        1_280_000,
        50_000,
        1_281_167,
        2 * 10**9,
    ]
    for text in ("", "-5", "1.2.3M", "5x"):
        with pytest.raises(UsageError):
            parse_count(text)
