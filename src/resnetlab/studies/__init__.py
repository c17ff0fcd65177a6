"""The papers' experiments: each a plan of ordinary runs and a way to read them."""
