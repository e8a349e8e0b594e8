"""Ways to score the experts of a mixture, one a file."""
