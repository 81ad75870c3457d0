"""Generation: sampling and decoding."""
