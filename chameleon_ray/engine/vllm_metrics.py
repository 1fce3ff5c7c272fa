"""vLLM's own metrics through Ray's, with the adapters' names as clients know them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger
from vllm.v1.metrics.stats import SchedulerStats

from chameleon_ray.adapters.identity import AdapterId


class NamedAdaptersLogger(RayPrometheusStatLogger):
    """``vllm:lora_requests_info`` names ``my-adapter``, not ``my-adapter@<digest>``, and each label only those that run
    or wait: vLLM lists all that have requests in both."""

    def record(self, scheduler_stats: SchedulerStats | None, *args: Any, **kwargs: Any) -> None:
        if scheduler_stats is not None:
            scheduler_stats = replace(
                scheduler_stats,
                waiting_lora_adapters=by_client_name(scheduler_stats.waiting_lora_adapters),
                running_lora_adapters=by_client_name(scheduler_stats.running_lora_adapters),
            )
        super().record(scheduler_stats, *args, **kwargs)


def by_client_name(requests: Mapping[str, int]) -> dict[str, int]:
    """Requests by adapter name, versions added up, names without requests left out; in the order of names, so that the
    same adapters give the same label."""
    counts: Counter[str] = Counter()
    for name, number in sorted(requests.items()):
        if number:
            counts[AdapterId.parse(name)[0]] += number
    return dict(counts)
