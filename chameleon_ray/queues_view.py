"""``chameleon queues``: the live queues and adapter caches of all replicas, as tables."""

import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

ANSWER_LIMIT_S = 10.0
CLEAR_SCREEN = "\x1b[2J\x1b[H"
_COLUMNS = ("queue", "sizes up to", "waiting", "loading", "running", "seats", "quota tokens", "used")

Fields = Mapping[str, Any]


def run(url: str, api_key: str | None, watch_s: float | None) -> int:
    """Print the tables, with ``watch_s`` again and again until Ctrl-C; the exit status."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    with httpx.Client(base_url=url, headers=headers, timeout=ANSWER_LIMIT_S) as http:
        try:
            while True:
                text, status = _show(http)
                if watch_s is not None and sys.stdout.isatty():
                    text = CLEAR_SCREEN + text
                print(text, file=sys.stderr if status and watch_s is None else sys.stdout, flush=True)
                if watch_s is None:
                    return status
                time.sleep(max(0.1, watch_s))
        except KeyboardInterrupt:
            return 0


def _show(http: httpx.Client) -> tuple[str, int]:
    try:
        response = http.get("/v1/chameleon/queues")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"error: {http.base_url} does not answer: {error}", 1
    try:
        answer = response.json()
        if response.status_code != 200:
            return f"error: {response.status_code}: {answer['error']['message']}", 1
        return tables(answer["replicas"]), 0
    except (ValueError, KeyError, TypeError):
        return f"error: {http.base_url} is not this application: {response.status_code} {response.text[:200]}", 1


def tables(replicas: list[Fields]) -> str:
    """What the endpoint lists, for people."""
    if not replicas:
        return "no replica is there"
    return "\n\n".join("\n".join(_replica(one)) for one in replicas)


def _replica(one: Fields) -> Iterator[str]:
    name = f"replica {one['replica'] or 'unknown'}"
    if "error" in one:
        yield f"{name}: {one['error']}"
        return
    yield f"{name}: {one['running']} running, {one['waiting']} waiting{_waiting(one)}"
    if "queues" not in one:
        stock = one["adapter_memory"] == "stock"
        yield f"  {'vLLM queues requests itself: adapters are in its slots' if stock else 'no request has come yet'}"
        return
    yield from _queues(one["queues"])
    yield from _counts(one)


def _waiting(one: Fields) -> str:
    reasons = [f"{number} for {_WAITS[reason]}" for reason, number in one.get("waiting_for", {}).items() if number]
    if not reasons:
        return ""
    return f" ({', '.join(reasons)}; the oldest for {one['oldest_waiting_s']:.1f} s)"


_WAITS = {
    "turn": "their turn",
    "inspection": "their adapter's files to be inspected",
    "fetch": "their adapter from disk",
    "room": "room for their adapter",
    "load": "their adapter to load",
}


def _queues(queues: list[Fields]) -> Iterator[str]:
    rows = [
        (
            str(queue["queue"]),
            "any" if queue["max_size"] is None else f"{queue['max_size']:.4g}",
            *(f"{queue[name]:,}" for name in ("waiting", "loading", "running")),
            *("-" if queue[name] is None else f"{queue[name]:,}" for name in ("max_running", "quota_tokens")),
            f"{queue['used_tokens']:,}",
        )
        for queue in queues
    ]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    for row in (_COLUMNS, *rows):
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _counts(one: Fields) -> Iterator[str]:
    cache, counts, predictions = one["cache"], one["scheduler"], one["predictions"]
    asked = cache["hits"] + cache["misses"]
    evictions = ", ".join(f"{number:,} {reason}" for reason, number in cache["evictions"].items() if number) or "none"
    yield (
        f"  adapters: {cache['adapters_resident']} resident, {cache['adapters_in_host']} in host memory, "
        f"{cache['adapters_known']} known; {cache['blocks_held']:,} of at most {cache['max_blocks']:,} blocks; "
        f"under way: {cache['fetches_in_flight']} fetches, {cache['loads_in_flight']} loads"
    )
    hits = f"{cache['hits'] / asked:.0%} of {asked:,} requests" if asked else "none asked for"
    yield f"  resident on arrival: {hits}; evictions: {evictions}"
    scale = counts["minima_scale"]
    yield "  " + ", ".join(f"{name} {number:,}" for name, number in counts.items() if isinstance(number, int))
    if scale < 1:
        yield f"  the quotas cannot hold the SLO: scaled by {scale:.2f}"
    if predictions["num_requests"]:
        yield (
            f"  output lengths: {predictions['right_bucket_share']:.0%} of the latest {predictions['num_requests']:,} "
            f"in the right class, off by {predictions['mean_absolute_error_tokens']:.0f} tokens on average"
        )
