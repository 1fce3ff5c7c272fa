"""Reproductions, made from a checkout: not part of the package."""
