"""Adapters in vLLM's own LoRA slots, with Chameleon's policy over them: vLLM's layers and kernels, our queue and cache.

The policy decides which request runs next, which adapters are in the ``max_loras`` slots, who leaves and who is loaded
ahead. A load (read, pack, pin; then copy into the slot) runs beside the batch, and vLLM's scheduler never sees a
request whose adapter is not in a slot. What ``engine.paged`` refuses runs here: adapters of experts, a KV cache in fp8,
MLA, hybrid models, speculative decoding.

The scheduler's side is ``engine.paged``'s, with another storage:

    options      the vLLM arguments that switch this on, and what it cannot serve
    storage      scheduler process: which slots are taken
    scheduler, connector   those of ``engine.paged`` for slots
    host         worker process: reads adapters into host memory, copies them into slots
    lora         vLLM's LoRA manager, which loads nothing by itself any more
    worker       vLLM's worker with the two above
"""
