"""Models as GGUF files, which llama.cpp and the programs on top of it run: `swamla.interop.save_gguf`."""
