"""Residual blocks: every shortcut and every order of activation is a value, none is a copy."""
