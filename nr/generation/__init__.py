"""Token-level generation: cached decoding, sampling, interventions."""
