"""Two footnotes of 2015: more iterations do not end degradation (3), and 110 layers converge without a warm-up too (5)."""

from __future__ import annotations

from collections.abc import Sequence

from resnetlab.formatting import format_count, format_share
from resnetlab.studies.runs import RunOutcomes
from resnetlab.studies.setting import Setting
from resnetlab.studies.variants import SideBySide, Variant, assess_claim, describe_errors, warmup_2015
from resnetlab.studies.verdicts import compare_by_seed

TIMES = 3  # as many iterations


class Iterations(SideBySide):
    """A shallow and a deep plain net, for the study's steps and for three times as many."""

    name = "iterations"
    question = "Do three times the iterations end degradation?"
    place = "2015 §4.1, footnote 3"
    caption = "The paper has no figure of this; laid out as 2015 Fig. 6. The axis of steps is that of the longer runs."
    remarks = ("The paper says so of plain-34 on ImageNet, and prints no number.",)

    def variants(self, setting: Setting) -> list[Variant]:
        """Shallow and deep, then both for longer."""
        depths = setting.pick_depths(smoke=(8, 14), quick=(8, 56), paper=(20, 56))
        long = setting.base.rescale(TIMES * setting.base.steps)
        changes = {"steps": long.steps, "milestones": long.milestones, "warmup_steps": long.warmup_steps}
        nets = [(f"plain{depth}", warmup_2015(setting, depth)) for depth in sorted({depths[0], depths[-1]})]
        return [Variant(net, net, {}, warmup) for net, warmup in nets] + [
            Variant(f"{net}, {TIMES} times", net, {}, warmup | changes) for net, warmup in nets
        ]

    def reference(self, label: str, variants: Sequence[Variant]) -> str:
        """The shallow net that trained as long."""
        return variants[len(variants) // 2 if label.endswith("times") else 0].label

    def answer(self, setting: Setting, outcomes: RunOutcomes, variants: Sequence[Variant]) -> tuple[str, str]:
        """Whether the deep net still trains worse than the shallow one after the longer runs."""
        if len(variants) == 2:
            return "One depth alone cannot show degradation; give several with --depths.", ""
        shallow, deep, shallow_long, deep_long = (v.label for v in variants)
        errors = {v.label: outcomes.by_seed(v.label, "training_error") for v in variants}
        still, before = (compare_by_seed(errors[a], errors[b]) for a, b in ((deep_long, shallow_long), (deep, shallow)))
        opening = {
            "shown": "Degradation is still shown",
            "points to": "The runs still point to degradation, no more,",
            "not shown": "Degradation is not shown",
        }[still.strength]
        text = describe_errors(before, deep, shallow)
        length = f"{variants[-1].changes['steps']:,} steps, {TIMES} times {format_share(setting.share)} of the paper's epochs"
        return (
            f"{opening} after {length}: {describe_errors(still, deep_long, shallow_long)}.",
            f"After {format_count(setting.base.steps, 'step')}, {text}.",
        )


class Warmup(SideBySide):
    """A deep residual net with the paper's warm-up and without one."""

    name = "warm-up"
    question = "Does the deep residual net need a warm-up?"
    place = "2015 §4.2, footnote 5"
    caption = "The paper has no figure of this; laid out as 2015 Fig. 6."
    remarks = (
        "Without: “it starts converging (below 90 % error) after several epochs, but still reaches similar accuracy”.",
    )

    def variants(self, setting: Setting) -> list[Variant]:
        """With and without."""
        net = f"resnet{setting.pick_depths(smoke=(14,), quick=(56,), paper=(110,))[-1]}"
        return [
            Variant(f"{net}, warm-up", net, {}, {"warmup": "train-error"}),
            Variant(f"{net}, none", net, {}, {"warmup": "none"}),
        ]

    def answer(self, setting: Setting, outcomes: RunOutcomes, variants: Sequence[Variant]) -> tuple[str, str]:
        """Whether a warm-up helps, and when each begins to converge."""
        with_one, without = (v.label for v in variants)
        verdict, details = assess_claim(setting, outcomes, without, with_one, f"{with_one} tests better")
        begins = []
        for label in (with_one, without):
            steps = [line for o in outcomes.of(label)[:1] for line in o.metrics if line["kind"] == "train"]
            first = next((line["step"] for line in steps if line["error"] < 0.9), None)
            begins.append(f"{label}: {'never' if first is None else f'step {first:,}'}")
        return verdict, f"{details} Training error first below 90 % in seed 0: {'; '.join(begins)}."
