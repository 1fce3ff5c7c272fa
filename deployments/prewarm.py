"""What a new replica fetches before anybody asks it to."""

import fnmatch
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from chameleon_ray.adapters.errors import AdapterError
from chameleon_ray.adapters.local import LocalAdapters
from chameleon_ray.adapters.record import AdapterRecord

logger = logging.getLogger("ray.serve")


def prewarm_order(
    records: Iterable[AdapterRecord], patterns: Sequence[str], uses: Mapping[str, float], room_bytes: int
) -> list[AdapterRecord]:
    """The adapters to have here, first things first: by the first of the ``patterns`` that their names match, then by
    uses, then by name. No more than ``room_bytes`` hold together: nothing fetched ahead is to push out another.

    uses: by adapter digest.
    """
    matches = [re.compile(fnmatch.translate(_only_stars(pattern))).match for pattern in patterns]

    def rank(name: str) -> int | None:
        return next((number for number, match in enumerate(matches) if match(name)), None)

    ranked = [(number, one) for one in records if (number := rank(one.name)) is not None]
    ranked.sort(key=lambda entry: (entry[0], -uses.get(entry[1].digest, 0.0), entry[1].name))
    by_content: dict[str, AdapterRecord] = {}
    for _, record in ranked:
        by_content.setdefault(record.digest, record)
    return list(_fitting(by_content.values(), room_bytes))


async def prewarm(adapters: LocalAdapters, order: Sequence[AdapterRecord], here: Collection[str]) -> int:
    """Fetch them, one after the other, so that requests find threads free; how many came. here: digests that need not.

    What cannot be had is logged (``LocalAdapters``) and passed over.
    """
    missing = [record for record in order if record.digest not in here]
    num_fetched = 0
    for record in missing:
        try:
            async with adapters.use(record):
                num_fetched += 1
        except AdapterError:
            continue
    if missing:
        logger.info("fetched %d of %d adapters ahead", num_fetched, len(missing))
    return num_fetched


def _only_stars(pattern: str) -> str:
    """``*`` alone has a meaning."""
    return pattern.replace("[", "[[]").replace("?", "[?]")


def _fitting(records: Iterable[AdapterRecord], room_bytes: int) -> Iterator[AdapterRecord]:
    for record in records:
        room_bytes -= record.size_bytes
        if room_bytes < 0:
            return
        yield record
