"""Pure tensor maths: affine grids and linear algebra. Nothing here has seen an nn.Module."""
