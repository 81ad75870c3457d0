"""Writing with a model: sampling, decoding, text in and text out."""
