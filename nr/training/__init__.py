"""One way to train: state, step, loop, optimizers, sharding, checkpoints, metrics."""
