"""What a unit or a weight is worth, told from the gradients of training; one score a file."""
