"""Networks: specification, construction, costs, and the model file."""
