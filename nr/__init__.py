"""Ten papers on how language models think, choose, write and speak, in JAX."""

__version__ = "0.1.0"
