"""Model servers as containers of the local Docker engine."""
