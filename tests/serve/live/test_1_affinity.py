"""Where requests go. First of all files: what it measures is where adapters come to lie, so none may be loaded yet."""

from collections import Counter
from functools import partial
from pathlib import Path
from random import Random

from chameleon_ray.adapters.store import content_digest
from live.calls import complete, concurrently, text_of
from live.service import Service, wait_for

NUM_REQUESTS = 300
METRICS_LIMIT_S = 60.0


def holders(service: Service) -> dict[str, set[str]]:
    """Adapter name -> the replicas that have it in GPU or host memory: those that have served it."""
    found: dict[str, set[str]] = {}
    for replica in service.placement():
        for name, tier in replica["adapters"].items():
            if tier != "disk":
                found.setdefault(name, set()).add(replica["replica"])
    return found


def test_right_after_the_start_every_replica_has_on_disk_what_its_store_holds(service: Service) -> None:
    names = service.adapter_names()
    stored = [entry.name for entry in service.store.iterdir() if not entry.name.startswith(".")]
    assert len(names) == 24, "the configured adapters were fetched and validated before the first report"
    refused = content_digest(Path(service.adapters_config["preload"][0]["uri"]))
    assert len(stored) == 25 and refused in stored, "what the engine refuses is in the store, and in no replica's tiers"
    on_disk = [dict.fromkeys(names, "disk")] * service.num_replicas
    wait_for(lambda: [one["adapters"] for one in service.placement()] == on_disk, "placement says so before any use")


def skewed(names: list[str], rng: Random) -> list[str]:
    """NUM_REQUESTS names, each at least once, the popularity of the n-th falling like 1/n."""
    names = rng.sample(names, len(names))
    weights = [1 / place for place in range(1, len(names) + 1)]
    drawn = names + rng.choices(names, weights, k=NUM_REQUESTS - len(names))
    return rng.sample(drawn, len(drawn))


def test_the_logs_say_what_happens_when_it_happens(service: Service) -> None:
    """Also after vLLM has configured logging, and no matter how few lines there are."""
    assert service.serve_logs().count("the engine is ready after") == service.num_replicas
    text_of(complete(service, service.base))
    wait_for(lambda: "POST /v1/completions 200" in service.serve_logs(), "the request in Serve's log")


def test_skewed_traffic_keeps_adapters_on_few_replicas_and_the_load_balanced(service: Service) -> None:
    assert not holders(service), "adapters have been loaded before this test: run it on a fresh application"
    wanted = skewed(service.adapter_names(), Random(7))
    assert len(set(wanted)) == 24
    rng = Random(8)
    calls = [
        partial(complete, service, name, prompt=[rng.randrange(10, 600) for _ in range(8)], max_tokens=4)
        for name in wanted
    ]
    answers = concurrently(calls, clients=16)
    assert Counter(answer.status_code for answer in answers) == {200: NUM_REQUESTS}
    assert [answer.json()["model"] for answer in answers] == wanted

    wait_for(lambda: holders(service).keys() == set(wanted), "placement shows every adapter")
    num_holders = {name: len(ids) for name, ids in holders(service).items()}
    # With two replicas and no affinity, an adapter with n requests stays on one of them with probability 2^(1-n): the
    # mean would be above 1.9.
    assert sum(num_holders.values()) / len(num_holders) <= 1.5, num_holders

    reasons = {"resident", "host", "cold", "overload", "no_hint"}

    def decisions() -> dict[str, float]:
        metrics = service.metrics()
        return {reason: metrics.total("ray_chameleon_routing_decisions_total", reason=reason) for reason in reasons}

    wait_for(lambda: sum(decisions().values()) >= NUM_REQUESTS, "the decisions in the metrics", METRICS_LIMIT_S)
    assert sum(decisions().values()) == NUM_REQUESTS, decisions()
    assert decisions()["cold"] > 0, decisions()
    assert decisions()["resident"] > decisions()["cold"] + decisions()["overload"], decisions()

    def served() -> dict[str, float]:
        return served_by_replica(service)

    wait_for(lambda: sum(served().values()) >= NUM_REQUESTS, "vLLM's metrics", METRICS_LIMIT_S)
    assert len(served()) == service.num_replicas
    # Without waiting nothing but the hash of the replicas' random ids shares the skewed adapters out: of all ways to do
    # so about one in a hundred thousand leaves a replica less than a fiftieth.
    assert min(served().values()) >= NUM_REQUESTS / 50, served()


def served_by_replica(service: Service) -> dict[str, float]:
    """Replica id -> requests that its engine has finished, by vLLM's own metric."""
    totals: Counter[str] = Counter()
    for labels, value in service.samples("ray_vllm_request_success_total"):
        totals[labels["ReplicaId"]] += int(value)
    return dict(totals)


def test_metrics_show_what_happens(service: Service) -> None:
    assert complete(service, "no-such-adapter").status_code == 404
    assert complete(service, service.base).status_code == 200
    wait_for(
        lambda: service.metric("ray_chameleon_requests_total", outcome="client_error") >= 1,
        "the 404 in the metrics",
        METRICS_LIMIT_S,
    )
    assert service.metric("ray_chameleon_requests_total", outcome="ok") >= 1
    wait_for(
        lambda: service.metric("ray_chameleon_routing_decisions_total", reason="base") >= 1,
        "the base model's request in the metrics",
        METRICS_LIMIT_S,
    )
    lookups = service.metric("ray_chameleon_routing_lookups_total")
    assert 0 <= service.metric("ray_chameleon_routing_hits_total") <= lookups
    vllm_own = {"ray_vllm_num_requests_running", "ray_vllm_time_to_first_token_seconds_count"}
    vllm_own |= {"ray_vllm_kv_cache_usage_perc", "ray_vllm_lora_requests_info"}

    def are_shown() -> bool:
        text_of(complete(service, "demo-r8-00"))  # Ray shows a gauge for a while after it was set
        metrics = service.metrics()
        ages_s = [value for _, value in metrics.samples("ray_chameleon_placement_age_s")]
        return bool(ages_s) and 0 <= max(ages_s) < 5 and all(metrics.samples(name) for name in vllm_own)

    wait_for(are_shown, "gauges of the router, and vLLM's own metrics", METRICS_LIMIT_S, 0.5)
