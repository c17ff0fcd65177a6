"""Images and labels: sources, sampling and augmentation."""
