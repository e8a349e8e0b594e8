"""Ways to choose what is kept of the residual stream, one a file."""
