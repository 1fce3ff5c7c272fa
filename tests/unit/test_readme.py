"""The README's tables are those of the code: options, metrics, endpoints."""

import re
from pathlib import Path

from chameleon_ray import metrics
from chameleon_ray.metrics import Metric
from chameleon_ray.options_table import options_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_readme_documents_every_option() -> None:
    begin, end = "<!-- options: python -m chameleon_ray.options_table -->\n", "<!-- end of options -->"
    table = README[README.index(begin) + len(begin) : README.index(end)]
    assert table == options_table()


def test_every_option_says_what_it_means() -> None:
    for row in options_table().splitlines()[2:]:
        assert row.rstrip("|").rpartition("|")[2].strip(), row


def test_the_readme_documents_every_metric_of_ours_with_its_tags() -> None:
    cells = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `chameleon_")]
    written = dict(re.findall(r"`(chameleon_\w+)(?:\{(\w+)\})?`", "".join(cells)))
    existing = {
        metric.name: ",".join(metric.tag_keys) for metric in vars(metrics).values() if isinstance(metric, Metric)
    }
    assert written == existing


def test_the_readme_documents_every_endpoint() -> None:
    routes = re.findall(r'@app\.(get|post)\("([^"{]+)', (ROOT / "deployments/ingress.py").read_text())
    assert len(routes) > 6
    for method, path in routes:
        assert f"`{method.upper()} {path}" in README or f"`{path.rstrip('/')}" in README, path
