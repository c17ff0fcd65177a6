"""Training: recipes, the learning rate, the step, checkpoints, and the one loop."""
