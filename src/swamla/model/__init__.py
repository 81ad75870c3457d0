"""Models as data: configs that build language models out of mixers, FFNs and norms."""
