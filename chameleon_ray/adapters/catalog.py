"""Names of adapters, and the library that turns a name's URI into validated files on this node."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from chameleon_ray.adapters.access import Sources
from chameleon_ray.adapters.checkpoint import AdapterShape
from chameleon_ray.adapters.errors import (
    AdapterError,
    AdapterNameError,
    AdapterNotFoundError,
    AdapterSourceError,
)
from chameleon_ray.adapters.modules import ModuleTable
from chameleon_ray.adapters.peers import Peers, PeerSource
from chameleon_ray.adapters.record import AdapterRecord, Refusal
from chameleon_ray.adapters.store import AdapterStore, StoredAdapter
from chameleon_ray.adapters.validate import (
    AdapterInfo,
    Rules,
    check_fits,
    foreign_base_warning,
    read_info,
    validate_adapter,
)
from chameleon_ray.config import AdaptersConfig, ModelConfig

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_MIB = 1 << 20
_PROGRESS_EVERY = 100
_T = TypeVar("_T")


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
    """records: the usable adapters by name; errors: what is wrong with each of the others. shapes: of the usable ones
    that were read, so that the engine has not said yet whether it can hold them; each shape is one object.

    refused: tombstones of the others, where their names can be asked for. gone: names that were refused and are not
    configured any more.
    """

    records: Mapping[str, AdapterRecord]
    errors: Mapping[str, AdapterError]
    shapes: Mapping[str, AdapterShape]
    refused: Sequence[AdapterRecord]
    gone: Sequence[str]


@dataclass(frozen=True, slots=True)
class Changes:
    """changed: new records, and new versions of known ones; gone: names whose sources have no adapter any more.
    refused: see ScanResult; those only that are not known to be refused for the same reason."""

    changed: Sequence[AdapterRecord]
    gone: Sequence[str]
    refused: Sequence[AdapterRecord] = ()


@dataclass(frozen=True, slots=True)
class _Read:
    """A configured adapter's files. stored: None while the record known before is as good, as far as that can be told
    without the module table."""

    stored: StoredAdapter | None


class AdapterLibrary:
    """Fetching, validation and the node's store behind one door. All methods block; any thread may call them."""

    def __init__(
        self,
        config: AdaptersConfig,
        model: ModelConfig,
        table: Future[ModuleTable],
        peers: Peers | None = None,
        bounds: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """model: the base model; no adapter may have its name. table: which of its modules take LoRA, once the engine
        has said so; all methods wait for it, ``scan`` after it has read the files. peers: other nodes' stores, asked
        before an adapter's own source. bounds: what decides which adapters the engine can hold
        (``EngineConfig.adapter_bounds``).

        Raises AdapterStoreError when the store cannot be opened.
        """
        self._config = config
        self._model = model
        self._table = table
        self._sources = Sources(config)
        self._peers = peers
        self._rules = Rules(
            config.max_rank, config.max_adapter_mib * _MIB, config.check_finite, config.check_effect != "off"
        )
        self._store = AdapterStore(Path(config.store_dir), config.store_max_bytes)
        self._validated: set[str] = set()
        self._refreshed: Mapping[str, AdapterRecord] = {}
        self._alike: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        rules = [*astuple(self._rules), model.served_name, model.source, dict(bounds)]
        self._rules_mark = hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:16]

    def inspect(self, name: str, uri: str, credentials: str | None = None) -> AdapterRecord:
        """A new record for a run-time load: the adapter at ``uri`` is fetched, validated and put in the store.

        credentials: see ``Sources.find``. Raises AdapterError. The caller gives the record its version.
        """
        check_name(name, self._model.served_name)
        stored = self._add(uri, credentials, self._validate)
        return self._record(name, uri, credentials, stored).model_copy(update={"origin": "runtime"})

    def scan(self, known: Mapping[str, AdapterRecord]) -> ScanResult:
        """Records of all adapters that the configuration names.

        Adapters whose files have not changed since their ``known`` record keep it, unread. All others are read while
        the engine starts, those refused before as well, and compared with its modules then. One broken adapter harms no
        other. Raises AdapterSourceError when the configured folder itself cannot be read.
        """
        uris, errors = self._configured()
        if uris:
            logger.info("Checking %d adapters", len(uris))
        served = {name: one for name, one in known.items() if one.refusal is None}
        records, shapes = self._read_all(uris, served, errors)
        for name, error in errors.items():
            log_refusal(name, error)
        unusable = {name: error for name, error in errors.items() if name in uris and name not in records}
        refused = [self._unread(name, uris[name], known.get(name), error) for name, error in unusable.items()]
        return ScanResult(records, errors, shapes, refused, _refused_before(known, uris))

    def refused(self, record: AdapterRecord, error: AdapterError) -> AdapterRecord:
        """The tombstone of a configured adapter that cannot be served."""
        return record.model_copy(update={"checked": self._checked, "deleted": True, "refusal": Refusal.of(error)})

    def _unread(self, name: str, uri: str, known: AdapterRecord | None, error: AdapterError) -> AdapterRecord:
        """The same for one without a record. Its digest is that of ``known`` while the files are the same, else empty:
        of content that nobody has told."""
        credentials, fingerprint = _credentials(uri, known), ""
        with suppress(AdapterError):
            fingerprint = self._sources.find(uri, credentials).fingerprint(uri)
        same = known is not None and fingerprint != "" and (known.uri, known.fingerprint) == (uri, fingerprint)
        record = AdapterRecord(
            name=name,
            digest=known.digest if known is not None and same else "",
            uri=uri,
            credentials=credentials,
            rank=0,
            size_bytes=0,
            fingerprint=fingerprint,
        )
        return self.refused(record, error)

    def _read_all(
        self, uris: Mapping[str, str], known: Mapping[str, AdapterRecord], errors: dict[str, AdapterError]
    ) -> tuple[dict[str, AdapterRecord], dict[str, AdapterShape]]:
        read = self._for_each(uris, lambda name: self._read(uris[name], known.get(name)), errors, "Read")
        self._table.result()
        settled = self._for_each(
            read, lambda name: self._settle(name, uris[name], read[name], known.get(name)), errors, "Checked"
        )
        found = {name: settled[name] for name in uris if name in settled}
        shapes = {name: stored.info.shape for name, (_, stored) in found.items() if stored is not None}
        return {name: record for name, (record, _) in found.items()}, shapes

    def refresh(self, known: Mapping[str, AdapterRecord]) -> Changes:
        """What has changed since the ``known`` records were made: of the configured adapters, and of the remote ones
        that ``adapters.resolve`` has brought. Raises as ``scan``."""
        uris, errors = self._configured()
        live = {name: one for name, one in known.items() if one.origin == "config" and not one.deleted}
        gone = [name for name, one in live.items() if name not in uris and self._is_from_folder(one)]
        uris |= {name: one.uri for name, one in live.items() if name not in uris and name not in gone}
        # An operator's unloading holds; what was gone at the last look may be back.
        uris = {name: uri for name, uri in uris.items() if name not in known or known[name].origin == "config"}
        # Of the same content, this node's own record knows the files' dates here.
        mine = {name: one for name, one in self._refreshed.items() if name in live and _same(one, live[name])}
        self._refreshed, _ = self._read_all(uris, {**known, **mine}, errors)
        changed = [one for name, one in self._refreshed.items() if name not in live or not _same(one, live[name])]
        gone += [name for name, error in errors.items() if name in live and isinstance(error, AdapterNotFoundError)]
        refused = []
        for name, error in errors.items():
            before = known.get(name)
            if before is None or before.refusal != Refusal.of(error):
                log_refusal(name, error)
                if name in uris and name not in self._refreshed and name not in gone:
                    refused.append(self._unread(name, uris[name], before, error))
        return Changes(changed, gone + _refused_before(known, uris), tuple(refused))

    def ensure(self, record: AdapterRecord) -> Path:
        """The folder with the record's files, fetched if they are not in the store, validated either way.

        The folder may be evicted any time; hold it with ``use`` instead while somebody reads it. Raises AdapterError;
        AdapterChangedError when the source holds other content by now.
        """
        ensure = partial(
            self._store.ensure, record.digest, uri=record.uri, validator=self._validate, max_bytes=self._rules.max_bytes
        )
        folder: Path | None = None
        if self._peers is not None:
            with suppress(AdapterNotFoundError):
                folder = ensure(source=PeerSource(record.digest, self._peers))
        folder = folder or ensure(source=self._sources.find(record.uri, record.credentials))
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

    def forget_others(self, digests: Set[str]) -> None:
        """Forget what was found of all adapters but these. Their files stay until the store needs the room."""
        self._validated &= digests

    def tenant(self, uri: str, credentials: str | None) -> str:
        """Whose adapters these are: see ``Sources.tenant``."""
        return self._sources.tenant(uri, credentials)

    def holds(self, digest: str) -> bool:
        """Whether the adapter's files are on this node."""
        return self._store.path(digest) is not None

    def stored(self) -> frozenset[str]:
        """Digests of all adapters whose files are on this node. Raises AdapterStoreError."""
        return self._store.digests()

    def _for_each(
        self, names: Iterable[str], work: Callable[[str], _T], errors: dict[str, AdapterError], verb: str
    ) -> dict[str, _T]:
        """What ``work`` returns for each name; the others go to ``errors``."""
        done: dict[str, _T] = {}
        with ThreadPoolExecutor(self._config.fetch_concurrency, thread_name_prefix="adapters") as pool:
            pending = {pool.submit(work, name): name for name in names}
            for count, future in enumerate(as_completed(pending), start=1):
                name = pending[future]
                try:
                    done[name] = future.result()
                except AdapterError as error:
                    errors[name] = error
                if count % _PROGRESS_EVERY == 0 or count == len(pending):
                    logger.info("%s %d of %d adapters, %d unusable", verb, count, len(pending), len(errors))
        return done

    def _read(self, uri: str, known: AdapterRecord | None) -> _Read:
        """The first half of a scan, which needs no module table."""
        credentials = _credentials(uri, known)
        if (
            known is not None
            and known.uri == uri
            and known.checked.startswith(f"{self._rules_mark}:")
            and (known.refusal.is_permanent if known.refusal else not known.deleted)
            and known.fingerprint == self._sources.find(uri, credentials).fingerprint(uri)
        ):
            return _Read(None)
        return _Read(self._add(uri, credentials, self._read_info))

    def _settle(
        self, name: str, uri: str, read: _Read, known: AdapterRecord | None
    ) -> tuple[AdapterRecord, StoredAdapter | None]:
        """The second half: the record, once the adapter fits the engine's modules."""
        stored, credentials = read.stored, _credentials(uri, known)
        if stored is None:
            assert known is not None
            if known.checked == self._checked:
                if known.refusal is not None:
                    raise known.refusal.error()
                return known, None
            stored = self._add(uri, credentials, self._read_info)  # The base model has changed.
        check_fits(stored.info.modules, stored.info.targets, self._table.result())
        return self._record(name, uri, credentials, stored), stored

    def _add(self, uri: str, credentials: str | None, validator: Callable[[Path], AdapterInfo]) -> StoredAdapter:
        source = self._sources.find(uri, credentials)
        return self._store.add(source, uri, validator, max_bytes=self._rules.max_bytes)

    def _record(self, name: str, uri: str, credentials: str | None, stored: StoredAdapter) -> AdapterRecord:
        self._validated.add(stored.digest)
        info = stored.info
        foreign = foreign_base_warning(info.base_model, (self._model.served_name, self._model.source))
        return AdapterRecord(
            name=name,
            digest=stored.digest,
            uri=uri,
            credentials=credentials,
            rank=info.rank,
            size_bytes=info.size_bytes,
            base_model=info.base_model,
            warnings=info.warnings if foreign is None else (*info.warnings, foreign),
            fingerprint=stored.mark,
            checked=self._checked,
        )

    @property
    def _checked(self) -> str:
        """So that no record outlives what it was checked against."""
        return f"{self._rules_mark}:{self._table.result().mark}"

    def _validate(self, folder: Path) -> AdapterInfo:
        return validate_adapter(folder, self._table.result(), self._rules)

    def _read_info(self, folder: Path) -> AdapterInfo:
        info = read_info(folder, self._rules)
        # Thousands of adapters, all with the same modules: keep one list of them.
        modules, shape = (self._alike.setdefault(one, one) for one in (info.modules, info.shape))
        return replace(info, modules=modules, shape=shape)

    def _is_from_folder(self, record: AdapterRecord) -> bool:
        folder = self._config.folder
        return folder is not None and Path(record.uri).parent == Path(folder).expanduser().absolute()

    def _configured(self) -> tuple[dict[str, str], dict[str, AdapterError]]:
        """URIs by name, from the folder and the list, and the names that cannot be served."""
        uris: dict[str, str] = {}
        errors: dict[str, AdapterError] = {}
        named = [(entry.name, entry.uri) for entry in self._config.preload]
        for name, uri in [*_folder_adapters(self._config.folder), *named]:
            try:
                check_name(name, self._model.served_name)
                if name in uris:
                    raise AdapterNameError(f"two adapters are called {name!r}: {uris[name]} is served, {uri} is not")
            except AdapterNameError as error:
                errors[name] = error
                logger.warning("Adapter %s: %s", name, error)
            else:
                uris[name] = uri
        return uris, errors


def log_refusal(name: str, error: AdapterError) -> None:
    """Of an adapter that the configuration names."""
    logger.warning("Adapter %s is not served: %s", name, error)


def _refused_before(known: Mapping[str, AdapterRecord], uris: Mapping[str, str]) -> list[str]:
    """Names that are refused and not configured any more."""
    return [name for name, one in known.items() if one.refusal is not None and name not in uris]


def _credentials(uri: str, known: AdapterRecord | None) -> str | None:
    """Those that brought the adapter, where a rule of ``adapters.resolve`` did; else the first rule's."""
    return known.credentials if known is not None and known.origin == "config" and known.uri == uri else None


def _same(one: AdapterRecord, other: AdapterRecord) -> bool:
    return (one.digest, one.uri) == (other.digest, other.uri)


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
