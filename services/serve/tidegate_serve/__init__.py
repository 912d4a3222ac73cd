"""The `tidegate` command, and `serve`: the three services as child processes."""
