"""Comparisons that were made once, and can be made again from a checkout: not part of the package."""
