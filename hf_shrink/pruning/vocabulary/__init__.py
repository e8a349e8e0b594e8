"""Ways to choose the tokens that stay, one a file."""
