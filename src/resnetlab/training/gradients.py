"""How the gradients of a step are computed: replayed from a CUDA graph, side by side in threads, or one after the other."""

from __future__ import annotations

from collections.abc import Callable

from resnetlab.training.backbone_graph import replay_backbone
from resnetlab.training.checkpoint import TrainState
from resnetlab.training.compilation import MIN_GRAPH_STEPS
from resnetlab.training.cuda_graph import GraphGradients
from resnetlab.training.side_by_side import SideBySideGradients
from resnetlab.training.step import Gradients, compute_gradients


def select_gradients(train_state: TrainState, report_graph: Callable[[str], None]) -> Gradients:
    """The way to compute gradients that the task's device config names; all are bit-identical.

    Args:
        report_graph: called once with a sentence on whether steps are replayed from a CUDA graph, if that is tried.
    """
    task, config = train_state.task, train_state.task.device_config
    if config.cuda_graph:
        return GraphGradients(report_graph)
    if config.device.type == "cuda" and config.world.size == 1 and task.recipe.steps >= MIN_GRAPH_STEPS:
        replay_backbone(task.net, task.recipe.exact, report_graph)  # of a detector or segmenter
    replicated = config.side_by_side > 1 or config.fused_bn or config.winograd
    return SideBySideGradients(task, train_state.exchange) if replicated else compute_gradients
