"""Pure decisions: no clock, no randomness of its own, no I/O. Drivers pass time in and carry decisions out."""
