"""One budget over bits, width and depth: what each option costs and damages, and which ones to take."""
