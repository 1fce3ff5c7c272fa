"""The Grafana dashboard, made from the declared metrics: ``python -m chameleon_ray.reference_tables`` writes it.

A metric of ours that no panel below shows gets a panel of its own in the last row.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chameleon_ray import metrics
from chameleon_ray.metrics import Metric
from chameleon_ray.policy import figures
from chameleon_ray.policy.admission import QueuesState

FILE = Path(__file__).parents[1] / "cluster_configs/grafana/chameleon.json"
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_APPLICATION, _REPLICA = 'application=~"$application"', 'replica=~"$replica"'
_WIDTH, _HEIGHT, _ACROSS = 8, 8, 3
_ON_REPLICAS = {
    *metrics.REPORTED,
    *(one.name for one in (metrics.ADAPTERS, metrics.ADAPTER_LOAD_S, metrics.QUEUE_WAIT_S, metrics.LENGTH_PREDICTIONS)),
}
_ALL = {metric.name: metric for metric in metrics.all_metrics()}


@dataclass(frozen=True, slots=True)
class Panel:
    """targets: (PromQL, legend) of each line. unit: one of Grafana's. stacked: lines add up to a whole."""

    title: str
    description: str
    unit: str
    targets: Sequence[tuple[str, str]]
    stacked: bool = False


def _series(metric: Metric) -> str:
    """The metric as Prometheus has it: over time where it is a counter or a histogram."""
    ending = {"counter": "_total", "gauge": "", "histogram": "_bucket"}[metric.kind]
    where = f"{_APPLICATION}, {_REPLICA}" if metric.name in _ON_REPLICAS else _APPLICATION
    series = f"ray_{metric.name}{ending}{{{where}}}"
    return series if metric.kind == "gauge" else f"rate({series}[$__rate_interval])"


def _line(metric: Metric, *by: str, how: str = "sum", above_zero: bool = False) -> str:
    grouped = f" by ({', '.join(by)}) " if by else ""
    return f"{how}{grouped}({_series(metric)}{' > 0' if above_zero else ''})"


def _quantile(share: float, series: str, *by: str) -> str:
    return f"histogram_quantile({share:g}, sum by ({', '.join(('le', *by))}) ({series}))"


def _vllm_quantiles(name: str) -> list[tuple[str, str]]:
    series = f"rate(ray_vllm_{name}_bucket[$__rate_interval])"
    return [(_quantile(share, series), legend) for share, legend in ((0.5, "P50"), (0.99, "P99"))]


def _grouped(metric: Metric, tag: str, prefix: str = "", suffix: str = "") -> tuple[str, str]:
    return _line(metric, tag), f"{prefix}{{{{{tag}}}}}{suffix}"


def _rows() -> dict[str, list[Panel]]:
    ours = _ALL
    used, quota = ours["chameleon_queue_used_tokens"], ours["chameleon_queue_quota_tokens"]
    hits, misses = ours["chameleon_adapter_hits"], ours["chameleon_adapter_misses"]
    counts = [ours[name] for name, series in figures.declared(QueuesState).items() if series.is_total]
    engines = "In the engines, as vLLM measures it."
    return {
        "Latency": [
            Panel("Time to first token", engines, "s", _vllm_quantiles("time_to_first_token_seconds")),
            Panel("Time between tokens", engines, "s", _vllm_quantiles("inter_token_latency_seconds")),
            Panel("Requests by outcome", "At the ingress.", "reqps", [_grouped(metrics.REQUESTS, "outcome")], True),
        ],
        "Scheduler": [
            Panel(
                "Queue lengths",
                "Requests that wait, by queue: 0 has the smallest.",
                "short",
                [_grouped(ours["chameleon_queue_waiting"], "queue", "queue ")],
                True,
            ),
            Panel(
                "Waiting requests by reason",
                "What they wait for: their turn, or something of their adapter.",
                "short",
                [_grouped(ours["chameleon_waiting_requests"], "reason")],
                True,
            ),
            Panel(
                "Waiting time by queue, P99",
                "From arrival, or preemption, to admission.",
                "s",
                [(_quantile(0.99, _series(metrics.QUEUE_WAIT_S), "queue"), "queue {{queue}}")],
            ),
            Panel(
                "Quota in use",
                "Tokens lent, by queue. Above 100%: one request that is larger than its queue's quota.",
                "percentunit",
                [(f"{_line(used, 'queue')} / ({_line(quota, 'queue')} > 0)", "queue {{queue}}")],
            ),
            Panel(
                "Quotas",
                "Tokens that running requests of a queue may borrow.",
                "short",
                [_grouped(quota, "queue", "queue ")],
                True,
            ),
            Panel(
                "Cut-offs",
                "Largest request size (WRS) of a queue, averaged over replicas.",
                "short",
                [
                    (
                        _line(ours["chameleon_queue_cutoff"], "queue", how="avg", above_zero=True),
                        "queue {{queue}}",
                    )
                ],
            ),
            Panel(
                "Decisions",
                "Squashes should stay below 5% of admissions.",
                "reqps",
                [(_line(count), count.name.removeprefix("chameleon_")) for count in counts],
            ),
            Panel(
                "Oldest waiting request",
                "Nobody should starve.",
                "s",
                [(_line(ours["chameleon_oldest_waiting_s"], "replica", how="max"), "{{replica}}")],
            ),
            Panel(
                "Output lengths predicted right",
                "Share of the latest predictions in the right length class.",
                "percentunit",
                [(_line(ours["chameleon_length_accuracy"], how="avg"), "right class")],
            ),
        ],
        "Adapter cache": [
            Panel(
                "Adapter resident on arrival",
                "Hit rate in the engines, and at routing.",
                "percentunit",
                [
                    (f"{_line(hits)} / ({_line(hits)} + {_line(misses)})", "engine"),
                    (f"{_line(metrics.ROUTING_HITS)} / {_line(metrics.ROUTING_LOOKUPS)}", "router"),
                ],
            ),
            Panel(
                "Evictions by reason",
                "Adapters that left KV memory.",
                "ops",
                [_grouped(ours["chameleon_adapter_evictions"], "reason")],
                True,
            ),
            Panel(
                "Blocks held",
                "KV-cache blocks that adapters hold, and may hold.",
                "short",
                [
                    _grouped(ours["chameleon_adapter_blocks"], "replica"),
                    (_line(ours["chameleon_adapter_blocks_limit"]), "limit, all replicas"),
                ],
            ),
            Panel(
                "Memory of adapters",
                "GPU memory of their blocks; host memory per rank.",
                "bytes",
                [
                    (_line(ours["chameleon_adapter_bytes"]), "GPU"),
                    (_line(ours["chameleon_adapter_host_bytes"]), "host"),
                ],
            ),
            Panel("Adapters by tier", "Where replicas hold them.", "short", [_grouped(metrics.ADAPTERS, "tier")], True),
            Panel(
                "KV cache in use",
                "As vLLM counts: what adapters hold is in it.",
                "percentunit",
                [("avg(ray_vllm_kv_cache_usage_perc)", "KV cache")],
            ),
            Panel(
                "Loads",
                "fetch: disk to host memory; load: host memory to KV blocks.",
                "ops",
                [
                    _grouped(ours["chameleon_adapter_loads"], "stage"),
                    _grouped(ours["chameleon_adapter_loads_in_flight"], "stage", suffix=", under way"),
                ],
            ),
            Panel(
                "Load time, P99",
                "Per rank.",
                "s",
                [(_quantile(0.99, _series(metrics.ADAPTER_LOAD_S), "stage"), "{{stage}}")],
            ),
            Panel(
                "Failed loads", "By what failed.", "ops", [_grouped(ours["chameleon_adapter_load_failures"], "stage")]
            ),
        ],
    }


def _others(rows: dict[str, list[Panel]]) -> Iterator[Panel]:
    """A panel for each metric of ours that no other panel shows."""
    shown = "".join(expression for panels in rows.values() for panel in panels for expression, _ in panel.targets)
    for metric in metrics.all_metrics():
        if not re.search(rf"ray_{metric.name}(_total|_bucket)?{{", shown):
            in_seconds = metric.name.endswith("_s")
            title = metric.name.removeprefix("chameleon_").removesuffix("_s").replace("_", " ").capitalize()
            legend = " ".join(f"{{{{{tag}}}}}" for tag in metric.tag_keys) or title.lower()
            unit = "s" if in_seconds else "ops" if metric.kind == "counter" else "short"
            line = _line(metric, *metric.tag_keys, how="max" if in_seconds else "sum")
            yield Panel(title, metric.description, unit, [(line, legend)])


def dashboard() -> str:
    """The dashboard as Grafana imports it."""
    rows = _rows()
    rows["Everything else"] = list(_others(rows))
    panels: list[dict[str, Any]] = []
    y = 0
    for row, contents in rows.items():
        place = {"x": 0, "y": y, "w": _WIDTH * _ACROSS, "h": 1}
        panels.append(
            {"type": "row", "title": row, "id": len(panels) + 1, "gridPos": place, "collapsed": False, "panels": []}
        )
        for number, panel in enumerate(contents):
            line, column = divmod(number, _ACROSS)
            place = {"x": _WIDTH * column, "y": y + 1 + _HEIGHT * line, "w": _WIDTH, "h": _HEIGHT}
            panels.append(_panel(panel, len(panels) + 1, place))
        y += 1 + _HEIGHT * -(-len(contents) // _ACROSS)
    content = {
        "title": "chameleon-ray",
        "uid": "chameleon-ray",
        "tags": ["chameleon-ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_SOURCE, *_variables()]},
    }
    lines = ",\n  ".join(json.dumps(panel) for panel in panels)
    return f'{json.dumps(content, indent=1)[:-2]},\n "panels": [\n  {lines}\n ]\n}}\n'


_SOURCE = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {}}


def _variables() -> Iterator[dict[str, Any]]:
    for name, series in (
        ("application", "ray_chameleon_requests_total"),
        ("replica", f"ray_chameleon_adapters{{{_APPLICATION}}}"),
    ):
        yield {
            "name": name,
            "label": name.capitalize(),
            "type": "query",
            "datasource": _DATASOURCE,
            "query": f"label_values({series}, {name})",
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        }


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    drawing = {"fillOpacity": 20 if panel.stacked else 0, "stacking": {"mode": "normal" if panel.stacked else "none"}}
    return {
        "type": "timeseries",
        "id": number,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": drawing}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"expr": expression, "legendFormat": legend, "refId": chr(ord("A") + place)}
            for place, (expression, legend) in enumerate(panel.targets)
        ],
    }
