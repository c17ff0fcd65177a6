"""Networks: their specification, their assembly, their costs, and the model file."""
