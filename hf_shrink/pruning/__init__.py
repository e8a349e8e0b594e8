"""Pruning: score the units or blocks, decide what goes, and refit what reads from them. The cutting is surgery's."""
