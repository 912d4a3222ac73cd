"""The edge: OpenAI-compatible HTTP in front of admission and the model servers."""
