"""From text to batches: sources, tokenizers, token datasets, Grain pipelines, records."""
