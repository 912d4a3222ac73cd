"""Footprints: what servers really took of their cards, measured, kept, and used for later starts."""
