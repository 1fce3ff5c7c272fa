"""Names of adapters, and the library that turns a name's URI into validated files on this node."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from chameleon_ray.adapters.base_model import BaseModelShapes
from chameleon_ray.adapters.errors import (
    AdapterChangedError,
    AdapterError,
    AdapterNameError,
    AdapterNotFoundError,
    AdapterSourceError,
)
from chameleon_ray.adapters.record import AdapterRecord
from chameleon_ray.adapters.sources import AdapterSource, LocalSource, local_path, source_for
from chameleon_ray.adapters.store import AdapterStore
from chameleon_ray.adapters.validate import AdapterInfo, validate_adapter
from chameleon_ray.config import AdaptersConfig

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_MIB, _GIB = 1 << 20, 1 << 30
_PROGRESS_EVERY = 100


def check_name(name: str, base_name: str) -> None:
    """Raises AdapterNameError unless ``name`` can be an adapter's name beside the base model ``base_name``."""
    if not _NAME.fullmatch(name):
        raise AdapterNameError(
            f"{name!r} cannot be an adapter's name: use up to 128 letters, digits and . _ - / and begin with a letter "
            "or digit"
        )
    if name == base_name:
        raise AdapterNameError(f"{name!r} is the base model's name: give the adapter another one")


def split_model(model: str, base_name: str) -> str | None:
    """The adapter that a request's ``model`` names, flat or as ``base:adapter``; None: the base model itself.

    Whether there is such an adapter is for the catalog to say.
    """
    if model == base_name:
        return None
    return model.removeprefix(f"{base_name}:")


@dataclass(frozen=True, slots=True)
class ScanResult:
    """records: the usable adapters by name; errors: what is wrong with each of the others."""

    records: Mapping[str, AdapterRecord]
    errors: Mapping[str, AdapterError]


class AdapterLibrary:
    """Fetching, validation and the node's store behind one door. All methods block; any thread may call them."""

    def __init__(self, config: AdaptersConfig, shapes: BaseModelShapes, base_name: str) -> None:
        """base_name: the base model's name in the API, which no adapter may have.

        Raises AdapterStoreError when the store cannot be opened.
        """
        self._config = config
        self._shapes = shapes
        self._base_name = base_name
        self._roots = _roots(config)
        self._max_bytes = config.max_adapter_mib * _MIB
        self._store = AdapterStore(Path(config.store_dir), int(config.store_max_gib * _GIB))
        self._rules_mark = _rules_mark(config, shapes)
        self._validated: set[str] = set()

    def inspect(self, name: str, uri: str) -> AdapterRecord:
        """A new record for a run-time load: the adapter at ``uri`` is fetched, validated and put in the store.

        Raises AdapterError. The caller gives the record its version.
        """
        check_name(name, self._base_name)
        return self._inspect(name, uri, self._fingerprint(uri)).model_copy(update={"origin": "runtime"})

    def scan(self, known: Mapping[str, AdapterRecord]) -> ScanResult:
        """Records of all adapters that the configuration names.

        Adapters whose files have not changed since their ``known`` record keep it, unread. One broken adapter harms no
        other. Raises AdapterSourceError when the configured folder itself cannot be read.
        """
        uris, errors = self._configured()
        records: dict[str, AdapterRecord] = {}
        if uris:
            logger.info("Checking %d adapters", len(uris))
        with ThreadPoolExecutor(self._config.fetch_concurrency, thread_name_prefix="adapters") as pool:
            pending = {pool.submit(self._rescan, name, uri, known.get(name)): name for name, uri in uris.items()}
            for done, future in enumerate(as_completed(pending), start=1):
                name = pending[future]
                try:
                    records[name] = future.result()
                except AdapterError as error:
                    errors[name] = error
                    logger.warning("Adapter %s is not served: %s", name, error)
                if done % _PROGRESS_EVERY == 0 or done == len(pending):
                    logger.info("Checked %d of %d adapters, %d unusable", done, len(pending), len(errors))
        return ScanResult({name: records[name] for name in uris if name in records}, errors)

    def ensure(self, record: AdapterRecord) -> Path:
        """The folder with the record's files, fetched if they are not in the store, validated either way.

        The folder may be evicted any time; hold it with ``use`` instead while somebody reads it. Raises AdapterError;
        AdapterChangedError when the source holds other content by now.
        """
        folder = self._store.ensure(
            record.digest, self._source(record.uri), record.uri, self._validate, max_bytes=self._max_bytes
        )
        if record.digest not in self._validated:  # it may have come into the store under other rules
            self._validate(folder)
            self._validated.add(record.digest)
        return folder

    @contextmanager
    def use(self, record: AdapterRecord) -> Iterator[Path]:
        """As ``ensure``, and the files stay until the block ends."""
        with ExitStack() as stack:
            for attempts_left in (2, 1, 0):
                self.ensure(record)
                try:
                    folder = stack.enter_context(self._store.use(record.digest))
                    break
                except AdapterNotFoundError:  # evicted in between
                    if not attempts_left:
                        raise
            yield folder

    def holds(self, digest: str) -> bool:
        """Whether the adapter's files are on this node."""
        return self._store.path(digest) is not None

    def stored(self) -> frozenset[str]:
        """Digests of all adapters whose files are on this node. Raises AdapterStoreError."""
        return self._store.digests()

    def _rescan(self, name: str, uri: str, known: AdapterRecord | None) -> AdapterRecord:
        fingerprint = self._fingerprint(uri)
        if known is not None and not known.deleted and (known.uri, known.fingerprint) == (uri, fingerprint):
            return known
        return self._inspect(name, uri, fingerprint)

    def _inspect(self, name: str, uri: str, fingerprint: str) -> AdapterRecord:
        stored = self._store.add(self._source(uri), uri, self._validate, max_bytes=self._max_bytes)
        self._validated.add(stored.digest)
        if self._fingerprint(uri) != fingerprint:  # what was read may be half old, half new
            raise AdapterChangedError(
                f"the files at {uri!r} changed while they were read: load it again when they are complete"
            )
        return AdapterRecord(
            name=name,
            digest=stored.digest,
            uri=uri,
            rank=stored.info.rank,
            size_bytes=stored.info.size_bytes,
            base_model=stored.info.base_model,
            fingerprint=fingerprint,
        )

    def _fingerprint(self, uri: str) -> str:
        return f"{self._source(uri).fingerprint(uri)}:{self._rules_mark}"

    def _source(self, uri: str) -> AdapterSource:
        return source_for(uri, self._roots)

    def _validate(self, folder: Path) -> AdapterInfo:
        return validate_adapter(
            folder,
            self._shapes,
            max_rank=self._config.max_rank,
            max_bytes=self._max_bytes,
            check_finite=self._config.check_finite,
        )

    def _configured(self) -> tuple[dict[str, str], dict[str, AdapterError]]:
        """URIs by name, from the folder and the list, and the names that cannot be served."""
        uris: dict[str, str] = {}
        errors: dict[str, AdapterError] = {}
        named = [(entry.name, entry.uri) for entry in self._config.preload]
        for name, uri in [*_folder_adapters(self._config.folder), *named]:
            try:
                check_name(name, self._base_name)
                if name in uris:
                    raise AdapterNameError(f"two adapters are called {name!r}: {uris[name]} is served, {uri} is not")
            except AdapterNameError as error:
                errors[name] = error
                logger.warning("Adapter %s: %s", name, error)
            else:
                uris[name] = uri
        return uris, errors


def _folder_adapters(folder: str | None) -> list[tuple[str, str]]:
    """(name, path) of each sub-folder that is not hidden, sorted."""
    if folder is None:
        return []
    root = Path(folder).expanduser().absolute()
    try:
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise AdapterSourceError(f"adapters.folder {folder} cannot be read: {error.strerror}") from error
    return [(name, str(root / name)) for name in names]


def _roots(config: AdaptersConfig) -> list[Path]:
    """Folders that local adapters may be read from: what the operator configured, and the preloaded adapters' own."""
    folders = [*config.allowed_roots] if config.folder is None else [config.folder, *config.allowed_roots]
    roots = [Path(folder).expanduser().absolute() for folder in folders]
    for entry in config.preload:
        with suppress(AdapterError):  # the scan reports it
            if isinstance(source_for(entry.uri, roots), LocalSource) and os.path.isabs(path := local_path(entry.uri)):
                roots.append(Path(path))
    return roots


def _rules_mark(config: AdaptersConfig, shapes: BaseModelShapes) -> str:
    """Changes with all that validation depends on, so that no record outlives the rules it was made under."""
    rules = [config.max_rank, config.max_adapter_mib, config.check_finite, sorted(shapes.modules.items())]
    return hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:16]
