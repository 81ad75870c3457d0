"""Generation: sampling, decoding, continuation of texts."""
