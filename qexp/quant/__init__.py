"""Quantizers for torch alone: no Lightning, Hydra, W&B or ONNX is imported here."""
