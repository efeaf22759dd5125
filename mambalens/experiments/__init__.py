"""Several models side by side, the paper's experiments, the demo."""
