"""Tasks: how to build a network, read a batch, compute the loss and evaluate.

The training loop uses them, and knows no images or labels.
"""
