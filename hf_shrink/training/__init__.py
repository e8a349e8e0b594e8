"""Compression inside transformers' Trainer, and recovery after it."""
