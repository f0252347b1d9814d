"""Evaluation: the streaming metrics of VideoLLM-online."""
