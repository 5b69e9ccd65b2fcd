"""Speculative decoding: drafters, trees of drafts, rules of acceptance, the driver."""
