"""Adaptive decoding."""
