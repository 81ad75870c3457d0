"""Models as programs of ONNX: `save_onnx`."""
