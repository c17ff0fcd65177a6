"""Tasks: how to build a network, read a batch, compute the loss and judge.

The training loop uses them, and knows no pictures or labels.
"""
