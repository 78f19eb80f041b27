"""Documents to tokens to shards to batches."""
