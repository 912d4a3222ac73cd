"""A look-alike of a vLLM server: its routes, errors, streams, sleep and memory, without a GPU.

It stands alone: nothing of tidegate is imported here, so that what a test sees is what the wire carried.
"""
