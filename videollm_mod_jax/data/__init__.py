"""Dialogue, tokenizer, video, features and batches; nothing here imports jax or the models."""
