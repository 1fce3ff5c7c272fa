"""The tables of options and metrics in the documentation and the Grafana dashboard, made from the code.

``python -m chameleon_ray.reference_tables`` writes all of them: the tables into ``docs/``, between their markers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from chameleon_ray import dashboard, metrics
from chameleon_ray.config import AppConfig

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- python -m chameleon_ray.reference_tables -->\n", "<!-- end of the table -->"


def with_table(page: str, table: str) -> str:
    """The page with ``table`` between the markers. ValueError when they are missing."""
    before, after = page.index(BEGIN) + len(BEGIN), page.index(END)
    return page[:before] + table + page[after:]


def metrics_table() -> str:
    """A Markdown table with every metric of ours and its tags, in the order of ``metrics.all_metrics``."""
    found = metrics.all_metrics()
    names = [f"{metric.name}{{{','.join(metric.tag_keys)}}}" if metric.tag_keys else metric.name for metric in found]
    rows = (f"| `{name}` | {metric.description} |\n" for name, metric in zip(names, found, strict=True))
    return "| metric | meaning |\n| --- | --- |\n" + "".join(rows)


def options_table() -> str:
    """A Markdown table with every option an operator may set, in the order of the model."""
    return "| option | default | meaning |\n| --- | --- | --- |\n" + "".join(
        f"| `{name}` | {default} | {meaning.replace('|', chr(92) + '|')} |\n"
        for name, default, meaning in _rows(AppConfig, "")
    )


def _rows(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            if field.description:
                yield f"{prefix}{name}", _shown(field.get_default(call_default_factory=True)), field.description
            yield from _rows(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _shown(field.get_default(call_default_factory=True)), field.description or ""


def _section(annotation: Any) -> type[BaseModel] | None:
    """The nested section that an option is, optional or not; lists of sections are plain options."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel) and "list" not in str(annotation):
            return candidate
    return None


def _shown(default: Any) -> str:
    if default is PydanticUndefined:
        return "required"
    if default is None or default in ([], {}):
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


PAGES = {"options.md": options_table, "metrics.md": metrics_table}


if __name__ == "__main__":
    for name, table in PAGES.items():
        page = DOCS / name
        page.write_text(with_table(page.read_text(), table()))
    dashboard.FILE.write_text(dashboard.dashboard())
