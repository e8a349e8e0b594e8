"""Ways to choose single weights that become zero, one a file."""
