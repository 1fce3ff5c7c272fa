"""The documentation's tables are those of the code: options, metrics, endpoints, errors. And the README stays short."""

import re
from pathlib import Path

import pytest

from chameleon_ray.adapters import errors
from chameleon_ray.reference_tables import DOCS, PAGES, options_table, with_table

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


@pytest.mark.parametrize("page", PAGES)
def test_reference_pages_hold_the_tables_of_the_code(page: str) -> None:
    text = (DOCS / page).read_text()
    assert text == with_table(text, PAGES[page]()), "run: python -m chameleon_ray.reference_tables"


def test_every_option_says_what_it_means() -> None:
    for row in options_table().splitlines()[2:]:
        assert row.rstrip("|").rpartition("|")[2].strip(), row


def test_every_endpoint_is_documented() -> None:
    text = (DOCS / "adapters.md").read_text()
    routes = re.findall(r'@app\.(get|post)\("([^"{]+)', (ROOT / "deployments/ingress.py").read_text())
    assert len(routes) > 6
    for method, path in routes:
        assert f"`{method.upper()} {path}" in text or f"`{path.rstrip('/')}" in text, path


def test_every_error_is_documented_with_its_status() -> None:
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    documented = {(int(status), kind) for status, kind in rows}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.AdapterError)]
    ours = {(kind.http_status, kind.code) for kind in kinds}
    assert len(ours) > 9 and not ours - documented
    code = "".join(path.read_text() for path in (ROOT / "deployments").glob("*.py"))
    code += (ROOT / "chameleon_ray/openai_errors.py").read_text()
    found = re.findall(r'(?:Api|sse_)[Ee]rror\(\s*(\d{3}),.*?"(\w+)"[,)]', code)
    raised = {(int(status), kind) for status, kind in found}
    assert len(raised) > 9 and not raised - documented


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / target).exists(), target
