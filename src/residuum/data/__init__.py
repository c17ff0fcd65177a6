"""Pictures and labels: where they come from, in which order, and how they are augmented."""
