"""Tasks: how to build a network, read a batch, compute the loss and evaluate.

The training loop calls a task and handles no images or labels itself.
"""
