"""Lifecycle: which models there are, what runs where, and why."""
