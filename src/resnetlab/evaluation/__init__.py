"""Evaluating networks: metrics, and the protocols of evaluation."""
