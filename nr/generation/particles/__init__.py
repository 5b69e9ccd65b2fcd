"""Sequence-level targets: potentials, particle filters, steering, rejection, Metropolis chains."""
