"""Residual blocks: every shortcut and activation order is a value of one block class."""
