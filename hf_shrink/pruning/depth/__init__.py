"""Ways to choose whole blocks to remove, one a file."""
