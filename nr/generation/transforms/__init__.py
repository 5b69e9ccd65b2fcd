"""Transforms of next-token logits that compose like optax: temperature, truncation, penalties, mixtures."""
