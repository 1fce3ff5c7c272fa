"""The servers under load: what they are called, where they are, which models they offer."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from chameleon_ray.bench.load.errors import LoadError

LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Target:
    """name: in tables. url: without ``/v1``."""

    name: str
    url: str


@dataclass(frozen=True, slots=True)
class Offer:
    """What ``/v1/models`` lists: a base model, adapters by name, and the context window where the server tells it."""

    base: str
    adapters: tuple[str, ...]
    context_window: int | None


def parse_target(text: str) -> Target:
    """``NAME=URL`` or ``URL``, named after its host and port then. Raises LoadError."""
    name, _, url = text.rpartition("=") if "=" in text.partition("://")[0] else ("", "", text)
    url = url.rstrip("/").removesuffix("/v1")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise LoadError(f"--target {text}: give http://HOST:PORT or NAME=http://HOST:PORT")
    return Target(name or parts.netloc, url)


def discover(target: Target, headers: Mapping[str, str]) -> Offer:
    """What the target serves. Raises LoadError."""
    try:
        answer = httpx.get(f"{target.url}/v1/models", headers=dict(headers), timeout=LIMIT_S).raise_for_status()
        cards = answer.json()["data"]
        bases = [card for card in cards if not card.get("parent")]
        adapters = tuple(sorted(card["id"] for card in cards if card.get("parent")))
        base = bases[0]["id"] if bases else next(card["parent"] for card in cards)
    except (httpx.HTTPError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise LoadError(f"{target.name}: {target.url}/v1/models lists no models: {error!r}") from error
    return Offer(base, adapters, next((card["max_model_len"] for card in bases if card.get("max_model_len")), None))


def common_models(offers: Mapping[str, Offer], only_base: bool) -> tuple[str, ...]:
    """The adapters that every target has (all of them must have the same), or the base model where there are none."""
    (first_name, first), *others = offers.items()
    models = () if only_base else first.adapters
    for name, offer in others:
        different = set(models) ^ set(() if only_base else offer.adapters)
        if different:
            raise LoadError(f"{first_name} and {name} serve different adapters: {_some(sorted(different))}")
        if not models and offer.base != first.base:
            raise LoadError(f"{first_name} serves {first.base}, {name} {offer.base}: give them the same served name")
    return models or (first.base,)


def ranks_by_pattern(models: Sequence[str], pattern: str) -> dict[str, int | None]:
    """The rank in each name: group 1 of ``pattern``, None where it does not match. Raises LoadError."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise LoadError(f"--rank-pattern {pattern}: {error}") from error
    if compiled.groups != 1:
        raise LoadError(f"--rank-pattern {pattern}: needs one group around the rank, such as -r(\\d+)-")
    found = {model: compiled.search(model) for model in models}
    try:
        return {model: int(match[1]) if match else None for model, match in found.items()}
    except (ValueError, TypeError) as error:
        raise LoadError(f"--rank-pattern {pattern}: the group does not hold a number: {error}") from error


def ranks_from_file(models: Sequence[str], path: Path) -> dict[str, int | None]:
    """Ranks from a JSON object, adapter name to rank. Raises LoadError."""
    try:
        ranks: Any = json.loads(path.read_text())
        known = {str(name): int(rank) for name, rank in ranks.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise LoadError(f"--adapter-ranks {path}: needs a JSON object of adapter names and ranks: {error}") from error
    missing = [model for model in models if model not in known]
    if missing:
        raise LoadError(f"--adapter-ranks {path} lacks {_some(missing)}")
    return {model: known[model] for model in models}


def few_adapters(ranks: Mapping[str, int | None], count: int) -> dict[str, int | None]:
    """``count`` of the models, in equal numbers of each rank as far as there are."""
    groups: dict[int, list[str]] = {}
    for model, rank in ranks.items():
        groups.setdefault(rank or 0, []).append(model)
    if not 0 < count <= len(ranks):
        raise LoadError(f"--num-adapters is {count}; the targets serve {len(ranks)}")
    in_turn = sorted((place, rank, model) for rank, group in groups.items() for place, model in enumerate(group))
    chosen = {model for _, _, model in in_turn[:count]}
    return {model: rank for model, rank in ranks.items() if model in chosen}


def server_count(target: Target, model: str, headers: Mapping[str, str], text: str) -> int:
    """Tokens in ``text`` by the target's own count. Raises LoadError."""
    body = {"model": model, "prompt": text, "max_tokens": 1}
    try:
        answer = httpx.post(f"{target.url}/v1/completions", json=body, headers=dict(headers), timeout=LIMIT_S)
        return int(answer.raise_for_status().json()["usage"]["prompt_tokens"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise LoadError(
            f"{target.name} does not tell how many tokens a prompt has ({error!r}); give --tokenizer"
        ) from error


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
