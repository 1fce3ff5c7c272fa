"""Processes that start with torch and the kernels already imported, which takes a new interpreter seconds."""

import multiprocessing

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["chameleon_kernels.testing", "chameleon_kernels.triton_ops"])
