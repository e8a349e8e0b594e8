"""One file a group of families, each with a list FAMILIES; a new family is one entry and nothing else."""
