"""Adapters in idle KV memory: vLLM 0.30 with LoRA weights read in place from blocks borrowed from its KV-cache pool.

It plugs into vLLM through official options alone (``options.paged_arguments``): a scheduler class, a worker class, a KV
connector and ``additional_config``. In order of a request's life:

    options      the settings, the vLLM arguments that switch all this on, and what it cannot serve
    connector    vLLM's hooks on both sides, translation only
    memory       scheduler process: drives ``policy.cache``, owns the adapters' blocks, says who may run
    storage      which of the pool's blocks are lent to adapters
    queue        the policy's queues in the place of vLLM's waiting queues
    scheduler    vLLM's scheduler with the two above
    messages     what scheduler and workers tell each other with every step
    host         worker process: reads adapters into host memory, copies them into blocks
    checkpoint   an adapter's files: what is in them, and their weights in page order
    pages        where a KV-cache tensor's blocks lie, as pages for weights
    lora         vLLM's LoRA layers without slots, computing with ``chameleon_kernels``
    worker       vLLM's worker with the three above
"""
