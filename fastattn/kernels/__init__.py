"""Backends. Each module here computes the operators' schemas in its own way and imports no other."""
