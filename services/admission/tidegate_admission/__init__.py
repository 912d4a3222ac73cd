"""Admission: who waits, who is in flight, who is served next."""
