"""Flax modules: arrays in, arrays out. No I/O, no config objects, no training."""
