"""The counters of a run, which a checkpoint keeps beside network and optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

INITIAL_SCALE, GROWTH_STEPS = 2.0**16, 2000  # of fp16's loss, as in torch.amp.GradScaler


@dataclass
class RunState:
    """The progress of a run: everything but the network and the optimizer."""

    step: int = 0  # steps completed
    warmup_end: int | None = None  # step at which the warm-up "train-error" ended
    lr_drops: int = 0  # schedule "plateau": how often the learning rate was divided by 10
    best: float | None = None  # lowest held-out error so far
    bad_evaluations: int = 0  # evaluations since then, or since the learning rate was divided
    best_step: int = 0  # "keep" and "early_stop": step of the lowest held-out error; 0 before the first evaluation
    best_error: float = 1.0
    since_best: int = 0  # evaluations since then
    losses: list[Tensor] = field(default_factory=list)  # a scalar for each step since the last line of metrics.jsonl
    errors: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0  # of training and evaluation
    step_seconds: float = 0.0  # of training steps only
    replayed_steps: int = 0  # from a CUDA graph
    loss_scale: float = 0.0  # of fp16; 0 before the first step, and in other precisions
    steps_at_scale: int = 0  # updates since the scale changed
    skipped_updates: int = 0  # because a gradient was not finite

    def update_plateau(self, error: float, patience: int) -> None:
        """Counts an evaluation for the schedule "plateau" (2015 §3.4)."""
        if self.best is None or error < self.best:
            self.best, self.bad_evaluations = error, 0
            return
        self.bad_evaluations += 1
        if self.bad_evaluations >= patience:
            self.lr_drops, self.bad_evaluations = self.lr_drops + 1, 0

    def update_loss_scale(self, finite: bool) -> None:
        """Halves the scale after gradients that are not finite, doubles it after GROWTH_STEPS that are (torch's GradScaler)."""
        if not finite:
            self.loss_scale, self.steps_at_scale = self.loss_scale / 2, 0
            self.skipped_updates += 1
            return
        self.steps_at_scale += 1
        if self.steps_at_scale == GROWTH_STEPS:
            self.loss_scale, self.steps_at_scale = self.loss_scale * 2, 0

    def is_best(self, error: float) -> bool:
        """Counts an evaluation, and returns whether its held-out error is the lowest so far."""
        if self.best_step and error >= self.best_error:
            self.since_best += 1
            return False
        self.best_step, self.best_error, self.since_best = self.step, error, 0
        return True
