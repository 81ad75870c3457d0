"""The server: continuous batching over rows of one state, a cache of prefixes, OpenAI's API and a page."""
