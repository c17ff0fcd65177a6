"""From a model file to answers: prediction, explanation, export, service."""
