"""Ways to score units, one a file: query heads and KV groups of attention, channels of an MLP."""
