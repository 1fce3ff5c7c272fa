"""Output lengths: from recent traffic (``lengths.py``), or from the prompt's text, by an encoder with a small head that
is trained on logged requests."""
