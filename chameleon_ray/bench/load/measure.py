"""Measuring several targets side by side: short windows in turn, so that what else the machine does hits all alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import aiohttp

from chameleon_ray.bench.load.client import UNFINISHED, Client, Outcome, Prepared, Window, prepare
from chameleon_ray.bench.load.errors import LoadError
from chameleon_ray.bench.load.figures import Slo
from chameleon_ray.bench.load.prompts import Prompts
from chameleon_ray.bench.load.targets import Target
from chameleon_ray.bench.load.workload import PlannedRequest, Workload

WARM_PROMPT_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Load:
    """Requests per second in ``num_windows`` windows of window_s each; after each, answers may take drain_limit_s."""

    rate_per_s: float
    num_windows: int
    window_s: float
    drain_limit_s: float


class Progress:
    """What a measurement tells while it runs; this one says nothing."""

    def begin(self, target: str, what: str, num_requests: int) -> None:
        """Requests are about to be sent."""

    def done(self, outcome: Outcome) -> None:
        """One of them has ended."""


class Bench:
    """All targets under one workload."""

    def __init__(
        self,
        targets: Sequence[Target],
        workload: Workload,
        prompts: Prompts,
        session: aiohttp.ClientSession,
        progress: Progress,
    ):
        self._clients = {target.name: Client(session, target.url) for target in targets}
        self._workload = workload
        self._prompts = prompts
        self._progress = progress

    async def warm_up(self, models: Sequence[str]) -> None:
        """One short request for every model to every target. Raises LoadError when one fails."""
        plans = [PlannedRequest(0.0, model, None, "", WARM_PROMPT_TOKENS, 1) for model in models]
        for name, windows in (await self._in_turn(plans, "warm-up")).items():
            failed = next((outcome for outcome in windows if outcome.error), None)
            if failed:
                raise LoadError(f"{name} fails for {failed.plan.model}: {failed.error}: {failed.message}")

    async def unloaded(self, num_requests: int) -> dict[str, list[Outcome]]:
        """Answers of systems that have nothing else to do. Raises LoadError when one fails."""
        results = await self._in_turn(self._workload.one_by_one(num_requests), "unloaded")
        for name, outcomes in results.items():
            failed = next((outcome for outcome in outcomes if outcome.error), None)
            if failed:
                raise LoadError(f"{name} fails although unloaded: {failed.error}: {failed.message}")
        return results

    async def burst(self, names: Sequence[str], num_requests: int, limit_s: float) -> dict[str, float]:
        """Answers per second of each named target that gets so many requests at once, in at most ``limit_s``: about the
        most that it can serve. Raises LoadError when one answers nothing."""
        rates = {}
        for name in names:
            requests = prepare(self._workload.one_by_one(num_requests), self._prompts)
            self._progress.begin(name, "burst", num_requests)
            window = await self._window(name, requests, limit_s)
            answered = sum(outcome.error is None for outcome in window.outcomes)
            if not answered:
                first = window.outcomes[0]
                raise LoadError(f"{name} answers nothing in {limit_s:.0f} s: {first.error}: {first.message}")
            rates[name] = answered / window.elapsed_s
        return rates

    async def loaded(self, loads: Mapping[str, Load], stop_below: Slo | None = None) -> dict[str, list[Window]]:
        """Each named target under its own load; every second round of windows in the opposite order of targets.

        stop_below: skip the remaining windows of a target once it cannot hold this any more.
        """
        plans = {
            name: [self._workload.poisson(i, load.rate_per_s, load.window_s) for i in range(load.num_windows)]
            for name, load in loads.items()
        }
        results: dict[str, list[Window]] = {name: [] for name in loads}
        for number in range(max(map(len, plans.values()), default=0)):
            in_turn = [name for name in loads if number < len(plans[name])]
            for name in in_turn if number % 2 == 0 else reversed(in_turn):
                if stop_below and _is_lost(results[name], sum(map(len, plans[name])), stop_below):
                    continue
                requests = prepare(plans[name][number], self._prompts)
                self._progress.begin(name, f"{loads[name].rate_per_s:.3g}/s", len(requests))
                results[name].append(await self._window(name, requests, loads[name].drain_limit_s))
        return results

    async def _window(self, name: str, requests: list[Prepared], drain_limit_s: float) -> Window:
        window = await self._clients[name].open_loop(requests, drain_limit_s, self._progress.done)
        if any(outcome.error == UNFINISHED for outcome in window.outcomes):
            await self._settle(name, requests[0].plan)
        return window

    async def _settle(self, name: str, plan: PlannedRequest) -> None:
        """What was cancelled must not burden the next window."""
        short = PlannedRequest(0.0, plan.model, plan.rank, plan.size_class, WARM_PROMPT_TOKENS, 1)
        try:
            await self._clients[name].settle(prepare([short], self._prompts)[0])
        except TimeoutError as error:
            raise LoadError(f"{name} does not recover from requests that were cancelled; lower the load") from error

    async def _in_turn(self, plans: Sequence[PlannedRequest], what: str) -> dict[str, list[Outcome]]:
        results: dict[str, list[Outcome]] = {name: [] for name in self._clients}
        self._progress.begin("all", what, len(plans) * len(self._clients))
        done: Callable[[Outcome], None] = self._progress.done
        for plan in plans:
            for name, client in self._clients.items():
                results[name].append(await client.send_one(prepare([plan], self._prompts)[0], done))
        return results


def _is_lost(windows: Sequence[Window], num_planned: int, slo: Slo) -> bool:
    missed = sum(not slo.is_met_by(outcome) for window in windows for outcome in window.outcomes)
    return missed > (1 - slo.percent / 100) * num_planned
