"""Conversion: checkpoints of Hugging Face and PyTorch into ours, and back."""
