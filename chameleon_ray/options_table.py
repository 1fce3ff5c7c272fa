"""The README's table of options, made from the configuration model."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from chameleon_ray.config import AppConfig

HEADER = "| option | default | meaning |\n| --- | --- | --- |\n"


def options_table() -> str:
    """A Markdown table with every option an operator may set, in the order of the model."""
    return HEADER + "".join(
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


if __name__ == "__main__":
    print(options_table(), end="")
