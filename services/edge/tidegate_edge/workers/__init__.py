"""Several processes as one edge: a master that serves nothing, and its workers (`edge.workers`)."""
