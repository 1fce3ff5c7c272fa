"""The simulator and the real scheduler decide the same: every admission, eviction, load and preemption, in order."""

from random import Random

import pytest
from parity_driver import RealScheduler, Recorder, simulate

from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.paged.options import PagedSettings
from chameleon_ray.policy.adapter import Adapter
from chameleon_ray.sim.costs import CostModel
from chameleon_ray.sim.workload import SimRequest

RANKS = (8, 16, 32, 64, 128)
COSTS = CostModel.model_validate(
    {
        "name": "parity",
        # Above the 50 ms for which the simulator may rest: it asks the policy before every step, as the engine does.
        "step": {"overhead_s": 0.06, "weights_read_s": 0.0, "kv_read_s": 0.0, "token_s": 0.0001},
        "memory": {
            "block_tokens": 32,
            "kv_bytes_per_token": 1000,
            "pool_blocks": 90,
            "adapter_host_bytes": 2_500_000,
            "adapter_bytes_per_rank": 4000,
        },
        "links": {"host_bytes_s": 4e6, "disk_bytes_s": 2e6, "source_bytes_s": 1e6, "overhead_s": 0.01},
        "limits": {"max_num_seqs": 12, "max_num_batched_tokens": 192, "max_model_len": 700, "watermark_share": 0.0},
    }
)
NUM_REQUESTS = 160
NUM_SLOTS = 5


def adapters() -> list[Adapter]:
    ranks = [RANKS[number % len(RANKS)] for number in range(25)]
    return [Adapter(f"{number:064x}", rank, rank * 4000) for number, rank in enumerate(ranks)]


def requests(rng: Random, known: list[Adapter]) -> list[SimRequest]:
    """Half of them come faster than they can be served; then the queues drain, and it begins again."""
    made, now_s = [], 0.0
    for number in range(NUM_REQUESTS):
        now_s += rng.expovariate(3.0 if number % 80 < 50 else 0.7)
        place = min(int(rng.paretovariate(0.6)) - 1, len(known) - 1)
        adapter = None if rng.random() < 0.15 else known[place]
        prompt, output = rng.randrange(5, 400), min(250, 1 + int(rng.expovariate(1 / 50)))
        made.append(SimRequest(f"r{number}", now_s, prompt, output, adapter, max_tokens=250))
    return made


@pytest.mark.parametrize(
    ("scheduler", "num_slots"),
    [*((name, None) for name in ("chameleon", "paper", "fifo", "sjf", "static")), ("chameleon", NUM_SLOTS)],
)
def test_one_record_of_events_leads_to_the_same_decisions(
    demo: DemoPaths, scheduler: str, num_slots: int | None
) -> None:
    rng = Random(f"parity {scheduler}")
    known = adapters()
    costs = COSTS
    if num_slots is not None:  # As full of KV cache as with the adapters in the pool.
        costs = COSTS.model_copy(update={"memory": COSTS.memory.model_copy(update={"pool_blocks": 45})})
    todo = requests(rng, known)
    aborts = {one.request_id: one.arrival_s + rng.expovariate(0.3) for one in rng.sample(todo, 20)}
    settings = PagedSettings(
        adapter_memory_share=0.7,
        adapter_host_bytes=COSTS.memory.adapter_host_bytes,
        scheduler=scheduler,
        scheduler_refresh_s=40.0,
        prefetch=True,
    )
    real = RealScheduler(str(demo.model), costs, settings, known, todo, num_slots)
    simulated, replica = simulate(costs, real.memory.policy.config, known, todo, aborts)
    replayed = real.replay(simulated.events)
    reasons = {"kv_pressure", "load"} if num_slots is None else {"load"}
    assert_covered(simulated, {one.request_id for one in todo if one.adapter is None}, reasons)
    for ours, theirs in zip(simulated.decisions, replayed.decisions, strict=False):
        assert ours == theirs
    assert len(simulated.decisions) == len(replayed.decisions)
    assert replica.policy.cache.stats() == real.memory.policy.cache.stats()


def assert_covered(record: Recorder, base: set[str], reasons: set[str]) -> None:
    """The record has in it what could go wrong."""
    kinds = {what for _, what, *_ in record.decisions}
    assert {"arrive", "admit", "pass over", "requeue", "finish", "remove", "plan"} <= kinds
    plans = [rest for _, what, *rest in record.decisions if what == "plan"]
    assert sum(len(evict) for evict, *_ in plans) > 20
    assert {reason for evict, *_ in plans for _, reason in evict} >= reasons
    assert any(drop for _, drop, *_ in plans)
    admitted = [rest[0] for _, what, *rest in record.decisions if what == "admit"]
    assert len(set(admitted)) > 120 and len(admitted) > len(set(admitted)) and base & set(admitted)
    removed = [rest[0] for _, what, *rest in record.decisions if what == "remove"]
    assert set(removed) & set(admitted) and set(removed) - set(admitted)
