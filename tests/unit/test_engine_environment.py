"""How many engine processes a node may have, and whether they are too many for its cores to poll for long."""

from pathlib import Path
from typing import Any

import pytest

from chameleon_ray.config import AppConfig, ConfigError
from chameleon_ray.engine.environment import SHORT_SPIN_S, num_engine_processes, usable_cores, worker_spin_s


def config(**args: Any) -> AppConfig:
    return AppConfig.from_args({"model.source": "x"} | args)


@pytest.mark.parametrize(
    ("args", "cores", "num_gpus", "expected"),
    [
        ({}, 2, None, 2),
        ({"replicas.num_replicas": "2", "replicas.num_cpus": "0.5"}, 2, None, 4),
        ({"replicas.num_replicas": "9", "replicas.num_cpus": "4"}, 8, None, 4),
        ({"replicas.num_replicas": "9", "replicas.num_cpus": "0"}, 8, None, 18),
        ({"replicas.num_cpus": "16"}, 8, None, 2),
        ({"replicas.autoscaling.max_replicas": "3"}, 64, None, 6),
        ({"replicas.num_replicas": "64", "engine.tensor_parallel_size": "2"}, 96, 8, 12),
        ({"replicas.num_replicas": "2", "engine.tensor_parallel_size": "4"}, 96, 8, 10),
    ],
)
def test_processes_that_fit_on_a_node(args: dict[str, Any], cores: float, num_gpus: int | None, expected: int) -> None:
    assert num_engine_processes(config(**args), cores, num_gpus) == expected


@pytest.mark.parametrize(("cores", "expected"), [(2, SHORT_SPIN_S), (7, SHORT_SPIN_S), (8, None), (64, None)])
def test_polling_is_short_where_cores_are_scarce(cores: float, expected: float | None) -> None:
    assert worker_spin_s(config(), cores, num_processes=4) == expected


@pytest.mark.parametrize("chosen", [0.0, 0.01, 1.0])
def test_the_operator_decides(chosen: float) -> None:
    given = config(**{"engine.worker_spin_s": str(chosen)})
    assert [worker_spin_s(given, cores, num_processes=4) for cores in (1, 64)] == [chosen, chosen]
    with pytest.raises(ConfigError, match="worker_spin_s"):
        config(**{"engine.worker_spin_s": "-1"})


@pytest.mark.parametrize(
    ("content", "share"), [("max 100000\n", 1.0), ("50000 100000\n", 0.5), ("99999999 100000\n", 1.0), ("odd", 1.0)]
)
def test_a_control_groups_quota_bounds_the_cores(tmp_path: Path, content: str, share: float) -> None:
    whole = usable_cores(tmp_path / "missing")
    assert whole >= 1
    (tmp_path / "cpu.max").write_text(content)
    expected = whole if share == 1.0 else min(whole, share)
    assert usable_cores(tmp_path / "cpu.max") == expected
