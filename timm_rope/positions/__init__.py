"""Where patches are: coordinates, rules for larger grids, random coordinates in training."""
