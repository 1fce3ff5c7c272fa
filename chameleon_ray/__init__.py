"""Chameleon for Ray Serve and vLLM: many LoRA adapters over one base model."""

__version__ = "0.2.0"
