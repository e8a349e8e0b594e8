"""Quantization-aware training: weights, and under W8A8 inputs, are rounded in the forward pass as they will be stored.

The scales are learned with the weights (LSQ, Esser et al., arXiv 1902.08153).
"""
