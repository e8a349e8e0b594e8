"""Checkpoints: what is read, what is written, and what stock transformers makes of it."""
