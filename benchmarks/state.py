"""What the policy inside a server says of itself at ``/metrics`` (engine/paged/prometheus.py)."""

from collections import Counter
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

from chameleon_ray.bench.load.errors import LoadError
from chameleon_ray.bench.load.targets import Target

LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class PolicyState:
    """cutoffs: sizes between the queues. quotas, seats: of each queue, 0: no limit. totals: since the start, by name
    without ``chameleon_``."""

    cutoffs: tuple[float, ...]
    quotas: tuple[int, ...]
    seats: tuple[int, ...]
    totals: Counter[str]

    def since(self, before: "PolicyState") -> "Counter[str]":
        """Totals of the time between."""
        return Counter({name: total - before.totals[name] for name, total in self.totals.items()})

    def describe(self) -> str:
        """Queues in words."""
        if len(self.quotas) < 2:
            return "one queue"
        parts = [
            f"up to {cutoff:.3g}: {quota} tokens, {seats} seats" if cutoff else f"above: {quota} tokens, {seats} seats"
            for cutoff, quota, seats in zip((*self.cutoffs, 0.0), self.quotas, self.seats, strict=True)
        ]
        return f"{len(self.quotas)} queues by size; " + "; ".join(parts)


def parse_state(text: str) -> PolicyState:
    """The state in a Prometheus exposition. Raises LoadError where there is none (a server without our policy)."""
    queues: dict[str, dict[int, float]] = {"cutoff": {}, "quota_tokens": {}, "max_running": {}}
    totals: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("chameleon_")
            if name == sample.name:
                continue
            if name.endswith("_total"):
                totals[name.removesuffix("_total")] += int(sample.value)
            elif (gauge := name.removeprefix("queue_")) in queues:
                queues[gauge][int(sample.labels["queue"])] = sample.value
    if not queues["quota_tokens"]:
        raise LoadError("/metrics holds nothing of our queues")
    ordered = {gauge: [values[number] for number in sorted(values)] for gauge, values in queues.items()}
    return PolicyState(
        cutoffs=tuple(ordered["cutoff"][:-1]),
        quotas=tuple(map(int, ordered["quota_tokens"])),
        seats=tuple(map(int, ordered["max_running"])),
        totals=totals,
    )


def read_state(target: Target) -> PolicyState:
    """The state of a server's policy. Raises LoadError when it does not answer."""
    try:
        return parse_state(httpx.get(f"{target.url}/metrics", timeout=LIMIT_S).raise_for_status().text)
    except httpx.HTTPError as error:
        raise LoadError(f"{target.name}: {target.url}/metrics does not answer: {error!r}") from error
