"""The experiments of Chameleon (MICRO 2025) again: ``python -m experiments.paper``."""
