"""How much memory a model's server will need of each of its cards, before one has ever run."""
