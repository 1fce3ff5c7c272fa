"""Figures that a policy reports. Each is declared once: as metadata of the dataclass field that holds it.

Everything that shows figures takes name, meaning and tags from there: Prometheus in a replica and under plain
``vllm serve``, the answer of ``/v1/chameleon/queues``, ``chameleon queues``, the documentation and the dashboard.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from chameleon_ray.policy.disciplines import UNLIMITED

_KEY = "figure"


@dataclass(frozen=True, slots=True)
class Figure:
    """How a field is called outside.

    metric: its name; several fields may share one, told apart by ``tags``. is_total: a count since the start, else a
    value of the moment. key_tag: the tag whose values are the keys of a mapping, or the places of a tuple's parts.
    """

    metric: str
    description: str
    is_total: bool
    key_tag: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Series:
    """A metric that figures make up, with all their descriptions."""

    name: str
    description: str
    is_total: bool
    tag_keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """A figure's value; 0 where it stands for "no bound"."""

    name: str
    is_total: bool
    tags: Mapping[str, str]
    value: float


def total(metric: str, description: str, key_tag: str | None = None, **tags: str) -> dict[str, Figure]:
    """Metadata of a field that counts since the start."""
    return {_KEY: Figure(metric, description, True, key_tag, tags)}


def level(metric: str, description: str, key_tag: str | None = None, **tags: str) -> dict[str, Figure]:
    """Metadata of a field whose value goes up and down. Of a tuple it is the length."""
    return {_KEY: Figure(metric, description, False, key_tag, tags)}


def declared(kind: type) -> dict[str, Series]:
    """The metrics that a dataclass and those in it report, by name, in the order of the fields."""
    found: dict[str, Series] = {}
    for figure, tag_keys in _declarations(kind, ()):
        before = found.get(figure.metric)
        description = figure.description if before is None else f"{before.description} {figure.description}"
        found[figure.metric] = Series(figure.metric, description, figure.is_total, tag_keys)
    return found


def _declarations(kind: type, above: tuple[str, ...]) -> Iterator[tuple[Figure, tuple[str, ...]]]:
    hints = get_type_hints(kind)
    for one in fields(kind):
        hint, figure = hints[one.name], one.metadata.get(_KEY)
        parts = [part for part in (hint, *get_args(hint)) if isinstance(part, type) and is_dataclass(part)]
        key_tags = () if figure is None or figure.key_tag is None else (figure.key_tag,)
        if figure is not None:
            yield figure, (*above, *figure.tags, *(() if parts else key_tags))
        for part in parts:
            yield from _declarations(part, (*above, *key_tags))


def samples(report: Any) -> Iterator[Sample]:
    """Every figure of a dataclass and of those in it. What is None has no value yet and is left out."""
    yield from _samples(report, {})


def _samples(report: Any, above: Mapping[str, str]) -> Iterator[Sample]:
    for one in fields(report):
        value, figure = getattr(report, one.name), one.metadata.get(_KEY)
        if figure is not None:
            yield from _of_field(figure, value, above)
        if is_dataclass(value):
            yield from _samples(value, above)
        elif isinstance(value, tuple) and figure is not None:
            for place, part in enumerate(value):
                yield from _samples(part, {**above, figure.key_tag: str(place)})


def _of_field(figure: Figure, value: Any, above: Mapping[str, str]) -> Iterator[Sample]:
    if isinstance(value, Mapping):
        assert figure.key_tag is not None, figure
        for key, number in value.items():
            yield Sample(figure.metric, figure.is_total, {**above, figure.key_tag: str(key)}, number)
    elif value is not None:
        number = len(value) if isinstance(value, tuple) else value
        bounded = 0 if number >= UNLIMITED else number
        yield Sample(figure.metric, figure.is_total, {**above, **figure.tags}, bounded)
