"""Everything that is wrong with data, found at once: what `mcit verify` does without a model or a scorer."""
