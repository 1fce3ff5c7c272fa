"""From measurements to a cost model: the fit, and the same workload in the simulator beside what the engine did."""

from collections.abc import Sequence

import numpy as np

from chameleon_ray.calibrate.measured import Measured, Served
from chameleon_ray.policy.adapter import Adapter
from chameleon_ray.sim.costs import (
    Calibration,
    Compared,
    CostModel,
    EngineLimits,
    LinkCosts,
    MemoryCosts,
)
from chameleon_ray.sim.fit import StepPoint, fit_step, fit_transfer
from chameleon_ray.sim.replica import Job
from chameleon_ray.sim.scenario import EngineSettings, PolicySettings, Scenario, simulate
from chameleon_ray.sim.workload import AdapterMix, SimRequest, WorkloadConfig

_DISK_BYTES_S = 2e9
_SOURCE_BYTES_S = 2e8


def cost_model(name: str, measured: Measured) -> CostModel:
    """The fitted model, with its errors in ``calibration``. Raises FitFailed."""
    step, error = fit_step(measured.steps)
    host_bytes_s, overhead_s = fit_transfer(measured.loads)
    disk_bytes_s, disk_overhead_s = fit_transfer(measured.fetches) if measured.fetches else (_DISK_BYTES_S, 0.0)
    assumed = [f"The remote source gives {_SOURCE_BYTES_S / 1e9:g} GB/s: not measured."]
    if not measured.fetches:
        assumed.append(f"The disk gives {_DISK_BYTES_S / 1e9:g} GB/s: not measured.")
    costs = CostModel(
        name=name,
        description=f"{measured.engine}: measured by `chameleon calibrate`.",
        assumptions=[*measured.assumptions, *assumed],
        step=step,
        memory=MemoryCosts.model_validate(measured.memory),
        links=LinkCosts(
            host_bytes_s=host_bytes_s,
            disk_bytes_s=disk_bytes_s,
            source_bytes_s=_SOURCE_BYTES_S,
            overhead_s=overhead_s,
            disk_overhead_s=disk_overhead_s,
        ),
        limits=EngineLimits.model_validate(measured.limits),
    )
    calibration = Calibration(
        engine=measured.engine,
        noise=noise(measured.steps),
        step_fit=error,
        validation=compare(costs, measured) if measured.served else {},
    )
    return costs.model_copy(update={"calibration": calibration})


def noise(points: Sequence[StepPoint]) -> float:
    """Median, over kinds of step, of how much the median time is above the fastest."""
    return float(np.median([point.seconds / point.fastest_s - 1 for point in points if point.count > 1]))


def compare(costs: CostModel, measured: Measured) -> dict[str, Compared]:
    """Latencies of the engine's workload, measured and simulated; seconds."""
    jobs = simulate_again(costs, measured)
    simulated = _figures(
        [job.request.arrival_s for job in jobs],
        [job.first_token_s or 0.0 for job in jobs],
        [job.end_s or 0.0 for job in jobs],
        [job.request.num_output_tokens for job in jobs],
    )
    served = measured.served
    real = _figures(
        [one.arrival_s for one in served],
        [one.first_token_s for one in served],
        [one.end_s for one in served],
        [one.num_output_tokens for one in served],
    )
    return {
        name: Compared(measured=real[name], simulated=simulated[name], error=simulated[name] / real[name] - 1)
        for name in real
    }


def simulate_again(costs: CostModel, measured: Measured) -> list[Job]:
    """The engine's workload in the simulator: the same requests, adapters on disk at first, the same policy."""
    adapters = [Adapter(f"{n:064x}", rank, size_bytes) for n, (rank, size_bytes) in enumerate(measured.adapters)]
    requests = [_request(number, one, adapters) for number, one in enumerate(measured.served)]
    scenario = Scenario(
        workload=WorkloadConfig(
            requests_per_s=1.0,
            duration_s=requests[-1].arrival_s + 1.0,
            warmup_s=0.0,
            adapters=AdapterMix(count=0),
        ),
        policy=PolicySettings.model_validate(measured.policy),
        engine=EngineSettings(host_resident=False),
    )
    return simulate(scenario, costs, requests).jobs


def summary_lines(costs: CostModel) -> list[str]:
    """What a person wants to know of a calibration."""
    calibration = costs.calibration
    if calibration is None:
        return []
    fit = calibration.step_fit
    lines = [
        calibration.engine,
        f"step time fitted to {fit.points} kinds of step: {fit.mean:.1%} off on average, {fit.p90:.1%} at the 90th "
        f"percentile, {fit.worst:.1%} at most; a median step takes {calibration.noise:.1%} more than the fastest "
        "of its kind (noise of this machine)",
    ]
    if calibration.validation:
        lines.append(f"{'the same workload, in ms':26}{'measured':>10}{'simulated':>11}{'error':>9}")
        lines += [
            f"{name:26}{1e3 * one.measured:10.2f}{1e3 * one.simulated:11.2f}{one.error:+9.1%}"
            for name, one in calibration.validation.items()
        ]
    return lines


def _request(number: int, one: Served, adapters: Sequence[Adapter]) -> SimRequest:
    # The engine knew each request's limit on its output, which was its length.
    adapter = adapters[one.adapter] if one.adapter >= 0 else None
    prompt, output = one.num_prompt_tokens, one.num_output_tokens
    return SimRequest(f"r{number}", one.arrival_s, prompt, output, adapter, max_tokens=output)


def _figures(
    arrivals: Sequence[float], firsts: Sequence[float], ends: Sequence[float], outputs: Sequence[int]
) -> dict[str, float]:
    arrival, first, end = np.array(arrivals), np.array(firsts), np.array(ends)
    gaps = np.array(outputs) - 1
    values = {
        "ttft": first - arrival,
        "tbt": ((end - first)[gaps > 0] / gaps[gaps > 0]),
        "e2e": end - arrival,
    }
    return {
        f"{name}_{statistic}_s": float(np.mean(series) if share is None else np.quantile(series, share))
        for name, series in values.items()
        for statistic, share in (("mean", None), ("p50", 0.5), ("p99", 0.99))
    }
