"""The simulated replica: exact small scenarios, queueing theory, conservation, determinism."""

import json
import os
import subprocess
import sys
from functools import partial
from random import Random

import numpy as np
import pytest

from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.sim.costs import CostModel, load_cost_model
from chameleon_ray.sim.link import Link
from chameleon_ray.sim.loop import run
from chameleon_ray.sim.oracle import OraclePredictor
from chameleon_ray.sim.replica import EngineMode, SimReplica
from chameleon_ray.sim.scenario import EngineSettings, PolicySettings, Scenario, replica_config, simulate
from chameleon_ray.sim.workload import AdapterMix, SimRequest, WorkloadConfig

FOREVER = 10**9


def costs(step=None, memory=None, limits=None, **links):
    """10 ms a step or 1 ms a token; blocks of 10 tokens, 1,000 bytes; links of 1 MB/s."""
    return CostModel(
        name="tiny",
        step={"weights_read_s": 0.01, "kv_read_s": 0.0, "token_s": 0.001, "token_rank_s": 0.0001, **(step or {})},
        memory={
            "block_tokens": 10,
            "kv_bytes_per_token": 100,
            "pool_blocks": 1000,
            "adapter_host_bytes": FOREVER,
            "adapter_bytes_per_rank": 5000,
            **(memory or {}),
        },
        links={"host_bytes_s": 1e6, "disk_bytes_s": 1e6, "source_bytes_s": 1e6, **links},
        limits={"max_num_batched_tokens": 20, "max_model_len": FOREVER, **(limits or {})},
    )


def serve(model, requests, policy=None, mode=None, tier=Tier.HOST, setup=None):
    """Jobs by request id of a replica that served ``requests`` to the end, with every check after every step."""
    jobs = {}
    policy = policy or PolicySettings(scheduler="fifo", predictor_accuracy=1.0)
    replica = SimReplica(
        model,
        replica_config(model, policy),
        mode or EngineMode(check_every=1),
        OraclePredictor(1.0, Random(0), FOREVER),
        lambda job, _: jobs.__setitem__(job.request.request_id, job),
    )
    for adapter in {request.adapter for request in requests if request.adapter}:
        replica.add_adapter(adapter, tier)
    run([(request.arrival_s, partial(replica.arrive, request)) for request in requests])
    replica.check_end()
    assert len(jobs) == len(requests)
    return jobs


A = Adapter("a", rank=1, size_bytes=5000)


def test_chunked_prefill_beside_decoding_and_a_load_to_the_microsecond():
    jobs = serve(costs(), [SimRequest("base", 0.0, 30, 3, None), SimRequest("lora", 0.012, 5, 2, A)])
    # Step 1, 0-20 ms: 20 of base's 30 prompt tokens. Step 2, -30 ms: the other 10; the load of a runs 20-25 ms.
    # Step 3, -40.5 ms: base's second token, lora's 5 prompt tokens: 10 ms and 5 tokens x rank 1 x 0.1 ms.
    # Step 4, -50.6 ms: the third and the second token, one of them of rank 1.
    assert jobs["base"].first_token_s == pytest.approx(0.030, abs=1e-9)
    assert jobs["lora"].admitted_s == pytest.approx(0.030, abs=1e-9)
    assert jobs["lora"].first_token_s == pytest.approx(0.0405, abs=1e-9)
    assert jobs["base"].end_s == pytest.approx(0.0506, abs=1e-9)
    assert jobs["lora"].end_s == pytest.approx(0.0506, abs=1e-9)
    assert not jobs["lora"].hit


def test_a_blocking_load_stops_the_engine():
    mode = EngineMode(blocking_loads=True, check_every=1)
    jobs = serve(costs(), [SimRequest("base", 0.0, 30, 3, None), SimRequest("lora", 0.012, 5, 2, A)], mode=mode)
    # The load takes 20-25 ms and nothing runs. Step 2, -40.5 ms: 10 prompt tokens of base, 5 of lora.
    assert jobs["lora"].first_token_s == pytest.approx(0.0405, abs=1e-9)
    assert jobs["base"].first_token_s == pytest.approx(0.0405, abs=1e-9)
    assert jobs["lora"].end_s == pytest.approx(0.0506, abs=1e-9)
    assert jobs["base"].end_s == pytest.approx(0.0606, abs=1e-9)


def test_prompts_computed_apart_stop_decoding():
    mode = EngineMode(separate_prefill=True, check_every=1)
    jobs = serve(costs(), [SimRequest("a", 0.0, 30, 3, None), SimRequest("b", 0.025, 10, 2, None)], mode=mode)
    # a's prompt 0-20 and 20-30 ms, b's 30-40 ms, in which a decodes nothing. Both decode 40-50 ms, a alone 50-60 ms.
    assert jobs["b"].first_token_s == pytest.approx(0.040, abs=1e-9)
    assert jobs["b"].end_s == pytest.approx(0.050, abs=1e-9)
    assert jobs["a"].end_s == pytest.approx(0.060, abs=1e-9)


def test_admissions_wait_for_so_many_decode_steps():
    mode = EngineMode(separate_prefill=True, decodes_per_pass=3, check_every=1)
    jobs = serve(costs(), [SimRequest("a", 0.0, 30, 6, None), SimRequest("b", 0.035, 10, 2, None)], mode=mode)
    # a decodes three times, 30-60 ms; then b's prompt, 60-70 ms; both decode 70-80 ms, a alone 80-90 ms.
    assert jobs["b"].first_token_s == pytest.approx(0.070, abs=1e-9)
    assert jobs["a"].end_s == pytest.approx(0.090, abs=1e-9)


def test_an_adapter_comes_from_source_over_disk_and_host():
    jobs = serve(costs(), [SimRequest("lora", 0.0, 5, 1, A)], tier=Tier.ABSENT)
    assert jobs["lora"].first_token_s == pytest.approx(0.015 + 0.0105, abs=1e-9)


def test_memory_that_runs_out_preempts_the_last_admitted_which_is_computed_again():
    model = costs(memory={"pool_blocks": 5}, limits={"max_num_batched_tokens": 100})
    jobs = serve(model, [SimRequest("first", 0.0, 19, 12, None), SimRequest("second", 0.0, 19, 4, None)])
    # Step 1, 0-19 ms: first's prompt, 2 of 5 blocks. Step 2, -39 ms: its second token and second's prompt, 2 blocks.
    # Step 3, -49 ms: first takes the fifth block for its 21st token. Step 4 would need a sixth for second, which is
    # preempted with 2 tokens given; its 21 tokens need 3 blocks, which are free once first has given 12.
    assert jobs["second"].num_preemptions == 1
    assert jobs["first"].num_preemptions == 0
    assert jobs["first"].first_token_s == pytest.approx(0.019, abs=1e-9)
    assert jobs["second"].first_token_s == pytest.approx(0.039, abs=1e-9)
    assert jobs["first"].end_s == pytest.approx(0.139, abs=1e-9)
    assert jobs["second"].end_s == pytest.approx(0.139 + 0.021 + 0.010, abs=1e-9)


def test_requests_that_can_never_fit_are_refused():
    jobs = serve(costs(memory={"pool_blocks": 5}), [SimRequest("huge", 0.0, 60, 1, None)])
    assert jobs["huge"].outcome == "refused"


def test_load_reports_memory_in_use_without_idle_adapters_and_recent_times():
    model = costs(memory={"pool_blocks": 100})
    config = replica_config(model, PolicySettings(scheduler="fifo", predictor_accuracy=1.0))
    replica = SimReplica(model, config, EngineMode(), OraclePredictor(1.0, Random(0), FOREVER), lambda job, now_s: None)
    replica.add_adapter(A, Tier.HOST)
    loads = []

    def look(now_s):
        loads.append(replica.load(now_s))
        return ()

    request = SimRequest("lora", 0.0, 20, 11, A)
    run([(0.0, partial(replica.arrive, request)), (0.06, look), (1.0, look)])
    # The load takes 5 ms, the prompt 22 ms, each of ten further steps 10.1 ms. At 60 ms the prompt holds 2 blocks, the
    # output 1, and a, which is idle afterwards, 5.
    running, idle = loads
    assert (running.num_running, running.kv_used_share) == (1, 0.08)
    assert replica.policy.cache.tiers()[A.digest] is Tier.GPU
    assert (idle.num_running, idle.kv_used_share) == (0, 0.0)
    assert (idle.ttft_s, idle.service_s) == (pytest.approx(0.022), pytest.approx(0.022 + 10 * 0.0101))


def test_transfers_share_a_link():
    link, done = Link(100.0), {}

    def arrived(name, now_s):
        done[name] = now_s
        return ()

    run(
        [
            (0.0, lambda now_s: link.transfer(100, partial(arrived, "long"), now_s)),
            (0.5, lambda now_s: link.transfer(25, partial(arrived, "short"), now_s)),
        ]
    )
    assert done == {"short": pytest.approx(1.0), "long": pytest.approx(1.25)}
    link.check_idle()


def _lindley(arrivals_s, services_s):
    """Waits of a first-come-first-served queue with one server."""
    waits = np.zeros(len(arrivals_s))
    gaps_s = np.diff(arrivals_s).tolist()
    wait_s = 0.0
    for number, (gap_s, service_s) in enumerate(zip(gaps_s, services_s[:-1].tolist(), strict=True), start=1):
        wait_s = max(0.0, wait_s + service_s - gap_s)
        waits[number] = wait_s
    return waits


@pytest.mark.parametrize(
    ("name", "draw", "second_moment"),
    [
        ("M/M/1", lambda rng, n: rng.exponential(size=n), 2.0),
        ("M/G/1", lambda rng, n: np.where(rng.random(n) < 0.5, 0.2, 1.8), 0.5 * (0.04 + 3.24)),
    ],
)
def test_one_seat_is_the_single_server_queue_of_theory(name, draw, second_moment):
    """Waits equal Lindley's recursion, whose mean over a long run is Pollaczek and Khinchine's within 2%."""
    rng, load = np.random.default_rng(7), 0.5
    count = 1_000_000
    arrivals_s = np.cumsum(rng.exponential(1 / load, size=count))
    num_tokens = np.maximum(1, np.rint(draw(rng, count) * 10_000))
    waits_s = _lindley(arrivals_s, num_tokens / 10_000)
    assert waits_s.mean() == pytest.approx(load * second_moment / (2 * (1 - load)), rel=0.02)

    simulated = 2000
    model = costs(
        step={"weights_read_s": 0.0, "token_s": 0.0001},
        memory={"pool_blocks": FOREVER},
        limits={"max_num_seqs": 1, "max_num_batched_tokens": FOREVER},
    )
    requests = [SimRequest(f"r{n}", float(arrivals_s[n]), int(num_tokens[n]), 1, None) for n in range(simulated)]
    jobs = serve(model, requests, mode=EngineMode())
    measured_s = [jobs[r.request_id].admitted_s - r.arrival_s for r in requests]
    assert measured_s == pytest.approx(waits_s[:simulated], abs=1e-6)


@pytest.mark.parametrize("scheduler", ["chameleon", "paper", "fifo", "sjf", "static"])
@pytest.mark.parametrize("reserve", [True, False])
def test_everything_adds_up_after_every_step_when_memory_is_short(scheduler, reserve):
    model = CostModel.model_validate(
        {
            **costs().model_dump(),
            "step": {"weights_read_s": 0.02, "kv_read_s": 1e-6, "token_s": 0.0001},
            "memory": {
                "block_tokens": 16,
                "kv_bytes_per_token": 1000,
                "pool_blocks": 120,
                "adapter_host_bytes": 1_500_000,
                "adapter_bytes_per_rank": 2000,
            },
            "links": {"host_bytes_s": 5e6, "disk_bytes_s": 2e6, "source_bytes_s": 1e6, "overhead_s": 0.001},
            "limits": {"max_num_seqs": 24, "max_num_batched_tokens": 256, "max_model_len": 1000},
        }
    )
    scenario = Scenario(
        workload=WorkloadConfig(
            requests_per_s=9.0,
            duration_s=12.0,
            warmup_s=0.0,
            length_scale=0.2,
            adapters=AdapterMix(count=30, base_share=0.1, drift_s=5.0),
        ),
        policy=PolicySettings(
            scheduler=scheduler,
            adapter_policy="discard" if reserve else "chameleon",
            predictor_accuracy=0.5,
            scheduler_refresh_s=7.0,
        ),
        engine=EngineSettings(
            blocking_loads=reserve, reserve_outputs=reserve, separate_prefill=reserve, host_resident=False
        ),
        seed=3,
        check_every_steps=1,
    )
    result = simulate(scenario, costs=model)
    summary = result.summary()
    assert summary["finished"] == summary["requests"] == result.num_requests > 50
    assert summary["loads"] > 10
    # Quotas leave too much of the memory unused for it to run out.
    assert reserve or scheduler in ("paper", "static") or summary["preemptions"] > 0


@pytest.mark.parametrize("scheduler", ["chameleon", "fifo"])
@pytest.mark.parametrize("pool_blocks", [300, 2000])
def test_many_steps_in_one_event_are_the_same_steps(scheduler, pool_blocks):
    """``check_every_steps`` makes every step an event of its own."""
    model = load_cost_model("a40-llama-7b")
    model = model.model_copy(update={"memory": model.memory.model_copy(update={"pool_blocks": pool_blocks})})
    workload = WorkloadConfig(
        requests_per_s=3.0,
        duration_s=30.0,
        warmup_s=0.0,
        length_scale=0.3,
        adapters=AdapterMix(count=40, ranks=[8, 16], base_share=0.2),
    )

    def served(check_every_steps):
        scenario = Scenario(
            workload=workload,
            policy=PolicySettings(scheduler=scheduler, scheduler_refresh_s=4.0),
            engine=EngineSettings(host_resident=False),
            check_every_steps=check_every_steps,
        )
        result = simulate(scenario, costs=model)
        times = [(j.request.request_id, j.admitted_s, j.first_token_s, j.end_s, j.num_preemptions) for j in result.jobs]
        return times, result.cache, result.num_steps, result.busy_s, result.num_events

    *spans, num_events = served(0)
    *steps, num_single_events = served(1)
    assert spans == steps
    assert num_events < 0.7 * num_single_events


_PRINT = """
import json, sys
from chameleon_ray.sim.scenario import Scenario, simulate
result = simulate(Scenario.model_validate_json(sys.argv[1]))
print(json.dumps([result.summary(), [[j.request.request_id, j.first_token_s, j.end_s] for j in result.jobs]]))
"""


def test_the_same_seed_gives_the_same_bytes_in_another_process_and_another_seed_does_not():
    def output(seed, hash_seed):
        scenario = Scenario(
            workload=WorkloadConfig(requests_per_s=9.0, duration_s=12.0, warmup_s=1.0, length_scale=0.3), seed=seed
        )
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", _PRINT, scenario.model_dump_json()]
        return subprocess.run(command, env=environment, check=True, capture_output=True, timeout=600).stdout

    first = output(5, "1")
    assert json.loads(first)[0]["finished"] > 50
    assert output(5, "2") == first
    assert output(6, "1") != first
