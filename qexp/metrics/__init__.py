"""What a run measures: each a pure function and a thin torchmetrics class."""
