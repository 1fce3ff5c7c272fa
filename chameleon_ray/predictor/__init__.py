"""Output lengths from the prompt's text: an encoder with a small head, trained on logged requests."""
