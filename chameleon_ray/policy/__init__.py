"""Pure decisions: no clock, no randomness of its own, no I/O. Drivers pass time in and carry decisions out.

``replica.ReplicaPolicy`` is what engine and simulator drive. A request's life is ``arrive``, then in every step
``begin_step`` -> ``peek`` -> ``admit`` or ``pass_over`` -> ``end_step``, then ``finish``. Queues own the one record of
a request, the cache that of an adapter on its replica (both in ``records.py``).

Adapters
    tier        where its weights lie: at their source, on disk, in host memory, in GPU memory
    state       where it is on its way to the GPU (``residency.py``); *resident*: the kernels can read it
    hit         a request whose adapter is resident when it arrives
    idle        resident, and no running request uses it: may be evicted; *pinned*: not idle, or being loaded
    fetch, load read into host memory; copied from there to the GPU
    needed      the requests that the step would run next lack it, or have it and wait for memory
    blocked     the first needed adapter that does not fit even if everything idle left
    plan        what is to be evicted, dropped from host memory, loaded and fetched; ``commit`` takes it as done
    reclaim     evict for the KV cache

Requests
    WRS         weighted request size: prompt, predicted output and adapter, each relative to the largest
    queue       waiting requests of one class of sizes, in order of arrival
    boost       ``chameleon``: a small request counts as if it had come a little earlier (``ordering.py``)
    quota, seat ``paper``: tokens that a queue may lend, requests of it that may run; a running request *borrows* them
    overtake    to be admitted before an older request that waits for capacity
    set aside   not looked at while its adapter loads; ``recall`` puts it back at its place
    bypass      to overtake a request whose adapter has no room, predicted to end before it has
    squash      to stop a bypass that did not; it runs again from its old place
    hold        to keep the replica free for one request that was overtaken too often
"""
