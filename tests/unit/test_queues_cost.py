import json

from chameleon_ray.bench import policy as bench
from chameleon_ray.bench.policy import run
from chameleon_ray.policy.replica import ReplicaPolicy


def test_a_step_with_a_thousand_queued_requests_stays_within_its_budget(tmp_path, capsys, monkeypatch):
    measured = []

    class Counted(ReplicaPolicy):
        def end_step(self, now_s, reserved_blocks=0):
            measured.append(self.num_running)
            return super().end_step(now_s, reserved_blocks)

    monkeypatch.setattr(bench, "ReplicaPolicy", Counted)
    path = tmp_path / "policy.json"
    assert run(path, num_steps=400) == 0
    results = json.loads(path.read_text())
    assert results["num_queued"] == 1000
    # 220 us on an idle machine, where adapters load slowly and none is in memory yet; later a step takes 50. To look
    # at all 1,000 requests would take milliseconds.
    assert 0 < results["scheduler_step_us_p50"] <= 600 and results["scheduler_step_us_p99"] > 0
    assert len(measured) == 400 * len(bench.SCENARIOS) * bench.REPEATS and min(measured[-200:]) > 0
    assert results["cache_plan_us_p50"] > 0 and results["router_rank_us_p50"] > 0
    assert all(scenario["admissions"] > 0 for scenario in results["scenarios"].values())
    assert "policy step, no room" in capsys.readouterr().out
