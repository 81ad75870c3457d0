"""Generation: sampling, decoding, text in and text out."""
