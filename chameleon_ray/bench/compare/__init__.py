"""Parts of ``chameleon bench schedulers`` and ``bench capacity``: real engines on this machine, side by side."""
