"""Where text comes from: models on disk, ready to be decoded."""
