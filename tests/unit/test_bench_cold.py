"""``chameleon bench cold`` without its engine: adapters of the sizes asked for, fetched from a real S3 server."""

import json
from pathlib import Path

import pytest
from object_store import BUCKET, running_s3

from chameleon_ray.adapters.modules import table_of_weights
from chameleon_ray.adapters.s3 import open_s3
from chameleon_ray.adapters.sources import CONFIG_FILE, WEIGHTS_FILE
from chameleon_ray.adapters.store import content_digest
from chameleon_ray.adapters.validate import Rules, validate_adapter
from chameleon_ray.bench import cold
from chameleon_ray.cli import main
from chameleon_ray.demo import DemoPaths


def test_adapters_of_about_the_size_that_fit_the_model(demo: DemoPaths, tmp_path: Path) -> None:
    table = table_of_weights(demo.model)
    for size_mib in (1, 3):
        folder = cold.write_adapter(demo, tmp_path / str(size_mib), size_mib)
        assert (folder / WEIGHTS_FILE).stat().st_size == pytest.approx(size_mib * cold.MIB, rel=0.1)
        info = validate_adapter(folder, table, Rules(max_rank=512, max_bytes=1 << 30))
        assert info.rank == json.loads((folder / CONFIG_FILE).read_text())["r"] == 16 * size_mib


def test_fetches_are_measured_beside_plain_downloads(
    demo: DemoPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    with running_s3() as s3:
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
        client = open_s3({}, 60.0)
        made = cold.write_adapter(demo, tmp_path / "made", 1)
        cold._put(client, BUCKET, "cold/x", made)
        row, folders = cold._fetch(client, f"s3://{BUCKET}/cold/x", demo, tmp_path, 1, 2)
    assert len(folders) == 2 and {content_digest(Path(folder)) for folder in folders} == {content_digest(made)}
    assert row.pop("mib") == 1 and len(row) == 4 and min(row.values()) > 0, row


@pytest.mark.parametrize("options", [["gs://b/x"], ["s3://b/x", "--mib", "0"], ["s3://b/x", "--repeats", "0"]])
def test_what_cannot_be_measured_is_said(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "cold", "--source", *options]) == 2
    assert "give --source s3://bucket/path" in capsys.readouterr().err
