"""Quantization methods: weight, scheme and input statistics in, integers on a grid out. One method a file."""

from hf_shrink.quantization.base import METHODS, QuantizationMethod, QuantizedWeight

__all__ = ["METHODS", "QuantizationMethod", "QuantizedWeight"]
