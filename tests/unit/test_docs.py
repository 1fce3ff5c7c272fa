"""The documentation's tables are those of the code: options, metrics, endpoints, errors. And the README stays short."""

import re
from pathlib import Path

import pytest

from chameleon_ray.adapters import errors
from chameleon_ray.config import AppConfig
from chameleon_ray.reference_tables import DOCS, PAGES, options_table, with_table
from chameleon_ray.sim.scenario import EngineSettings

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
    vllms = {(400, "BadRequestError")}
    assert documented - ours - raised - vllms <= {(500, "server_error")}, "a row that nothing raises"


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / target).exists(), target


def _prose() -> dict[str, str]:
    """Pages by name, without what is not about today's code."""
    pages = [
        README,
        *(ROOT / name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md")),
        *DOCS.glob("*.md"),
    ]
    return {path.name: path.read_text() for path in pages}


def _named(pattern: str) -> dict[str, str]:
    """What the pattern finds in code spans and blocks of the pages, and where."""
    spans = r"```.*?```|`[^`\n]+`|^    .*?$"
    return {
        name: page
        for page, text in _prose().items()
        for span in re.findall(spans, text, re.DOTALL | re.MULTILINE)
        for name in re.findall(pattern, span)
    }


def test_options_that_the_pages_name_exist() -> None:
    options = set(re.findall(r"^\| `([\w.]+)`", options_table(), re.MULTILINE))
    options |= {f"engine.{name}" for name in EngineSettings.model_fields}  # of the simulator's scenarios
    sections = "|".join(AppConfig.model_fields)
    named = _named(rf"(?<![\w./-])((?:{sections})\.(?!py\b)[a-z]\w*)")
    assert len(named) > 50
    assert not {name: page for name, page in named.items() if name not in options}


def test_metrics_that_the_pages_name_exist() -> None:
    known = set(re.findall(r"^\| `(chameleon_\w+)", (DOCS / "metrics.md").read_text(), re.MULTILINE))
    named = _named(r"(?<![\w.])(chameleon_\w+)\b(?![/.*])")
    named = {name: page for name, page in named.items() if name not in ("chameleon_ray", "chameleon_kernels")}
    assert len(known) > 30 and len(named) > 30
    assert not {name: page for name, page in named.items() if name.removesuffix("_total") not in known}


def test_files_that_the_pages_name_exist() -> None:
    files = [str(path) for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    named = {
        name: page for page, text in _prose().items() for name in re.findall(r"(?<![\w*/])(?!slora/)[\w/]+\.py\b", text)
    }
    assert len(named) > 40
    assert not {name: page for name, page in named.items() if not any(path.endswith(f"/{name}") for path in files)}


def test_flags_that_the_pages_name_exist() -> None:
    tops = ("chameleon_ray", "benchmarks", "experiments", "kernels", "examples")
    code = "".join(path.read_text() for top in tops for path in (ROOT / top).rglob("*.py"))
    others = {
        "ray": ("--head", "--metrics-export-port"),
        "vllm": ("--enable-lora", "--lora-modules"),
        "slora": ("--max_total_token_num",),
    }
    known = {*re.findall(r'"(--[a-z-]+)"', code), "--help", *(flag for flags in others.values() for flag in flags)}
    named = _named(r"(?<![\w-])(--[a-z][a-z_-]+)")
    assert len(named) > 30
    assert not {name: page for name, page in named.items() if name not in known}
