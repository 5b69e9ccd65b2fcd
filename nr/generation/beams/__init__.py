"""Search for probable texts: beams and their constraints, stochastic beams, best-first search."""
