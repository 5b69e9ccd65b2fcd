"""Other people's checkpoints, read and written by name maps a reader can check."""
