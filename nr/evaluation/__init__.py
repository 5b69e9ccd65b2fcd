"""Perplexity, sparse-autoencoder metrics, steering, counted FLOPs, reports, plots."""
