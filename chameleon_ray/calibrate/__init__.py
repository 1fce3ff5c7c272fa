"""``chameleon calibrate``: measures an engine or bare kernels, fits a cost model to it, and shows how well it does."""
