"""The model hub: what a source means, what a repository holds, and how its files get into the cache.

The library `huggingface_hub` does what it does (addresses, tokens, listings, the cache's layout); it is
imported when a model first needs the hub, so that services without such models never load it.
"""
