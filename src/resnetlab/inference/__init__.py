"""From a model file to results: prediction, explanation, export."""
