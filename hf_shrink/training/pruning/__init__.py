"""Pruning while training: gates on units, masks on single weights, and the parts that move them."""
