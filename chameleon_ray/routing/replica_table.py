"""What one router believes about its cluster's replicas, in arrays: every decision looks at all of them.

What others at a replica cost a request (``ReplicaTable.waiting_s``) follows from how full the replica is. Two things
can be full: its seats (``max_num_seqs``) and its KV memory, which mostly fills first. Both are counted as shares:

    seats = (running + waiting + unseen) / max_num_seqs
    memory = kv_used_share + (waiting + unseen) * mean share of the KV pool that a running request holds
    taken = the larger one

unseen: this router's requests that the replica's last report does not show yet, less those that have ended since. They
count with the mean share: what they will hold is not known to the router.

Up to 1, requests share the steps that do the prefill, which delays by ``ttft * taken``. Beyond, a request waits until
others have given back what it lacks; in a service time, all that is taken is given back once:
``service * (taken + its own share - 1)``. What a replica reports as waiting counts as lacking at least.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chameleon_ray.policy.adapter import Tier
from chameleon_ray.routing.replica_load import ReplicaLoad

UNKNOWN_TTFT_S = 0.05
UNKNOWN_SERVICE_S = 1.0
UNKNOWN_MAX_NUM_SEQS = 16.0
"""Stand-ins while no replica has reported the real value; they set how soon a router without hints leaves a home."""

Floats = NDArray[np.float64]
Tiers = NDArray[np.int64]
Rows = NDArray[np.int64]
Weights = NDArray[np.uint64]

_COLUMNS = 8


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """What the router believes about one live replica (hints, not truth).

    tier: where it holds those adapters of which nothing else is known.
    in_flight: requests that this router has sent there and that have not ended.
    load: its last published load; None when nothing was ever published or it is too old to trust.
    report_in_flight: how many of this router's requests were in flight there when ``load`` was heard of.
    """

    replica_id: str
    tier: Tier
    in_flight: int
    load: ReplicaLoad | None = None
    report_in_flight: int = 0


@dataclass(frozen=True, slots=True)
class _Means:
    """What the reports say taken together: means over the replicas that reported a value, else the stand-ins.

    max_num_seqs, service_s, request_share: by row. request_share: of a replica, what one more request takes.
    kv_share: mean share of the KV pool that a running request holds; 0 when unknown.
    """

    is_reported: bool
    ttft_s: float
    kv_share: float
    max_num_seqs: Floats
    service_s: Floats
    request_share: Floats


class ReplicaTable:
    """The views of all live replicas; rows are in no order."""

    def __init__(self) -> None:
        self.views: dict[str, ReplicaView] = {}
        """By replica id; change them by ``put`` and ``remove``."""
        self.ids: list[str] = []
        """Replica ids by row."""
        self._rows: dict[str, int] = {}
        self._numbers = np.zeros((_COLUMNS, 16))
        self._tiers = np.zeros(16, np.int64)
        self._hashes = np.zeros(16, np.uint64)
        self._cached_means: _Means | None = None

    def put(self, view: ReplicaView) -> None:
        """A replica is new, or what is believed of it has changed."""
        known = self.views.get(view.replica_id)
        row = self._add(view.replica_id) if known is None else self._rows[view.replica_id]
        if known is None or known.load is not view.load:
            self._cached_means = None
        self.views[view.replica_id] = view
        self._tiers[row] = view.tier
        self._numbers[:, row] = _numbers(view)

    def remove(self, replica_id: str) -> None:
        """A replica is gone; one that is not known is none."""
        if self.views.pop(replica_id, None) is None:
            return
        row, last = self._rows.pop(replica_id), self.ids.pop()
        if last != replica_id:
            self.ids[row], self._rows[last] = last, row
            for array in (self._numbers, self._tiers, self._hashes):
                array[..., row] = array[..., len(self.ids)]
        self._cached_means = None

    @property
    def is_reported(self) -> bool:
        """Whether any replica's load is known."""
        return self._means().is_reported

    @property
    def ttft_s(self) -> float:
        """Seconds to first token where nobody else is and nothing is loaded. One for all replicas: it depends on the
        request, not on what a replica happened to serve before it."""
        return self._means().ttft_s

    def waiting_s(self) -> Floats:
        """Seconds that others add to a request's TTFT, by row: see the module's head."""
        means = self._means()
        running, waiting, unseen, kv_used_share = self._numbers[:4, : len(self.ids)]
        others = waiting + unseen
        seats = (running + others) / means.max_num_seqs
        taken = np.maximum(np.maximum(seats, kv_used_share + others * means.kv_share), 0)
        lacking = np.maximum(np.maximum(taken + means.request_share - 1, waiting * means.request_share), 0)
        delays_s: Floats = means.ttft_s * np.minimum(taken, 1) + means.service_s * lacking
        return delays_s

    def eviction_costs_s(self) -> Floats:
        """``ReplicaLoad.eviction_cost_s`` by row; 0 where nothing is reported."""
        return self._numbers[4, : len(self.ids)]

    def tiers(self, holders: Mapping[str, Tier]) -> Tiers:
        """Where each replica holds an adapter, by row. holders: what is known of it, by replicas, alive or not."""
        tiers = self._tiers[: len(self.ids)].copy()
        for replica_id, tier in holders.items():
            if (row := self._rows.get(replica_id)) is not None:
                tiers[row] = tier
        return tiers

    def weights(self, key: str) -> Weights:
        """``rendezvous_weight`` of the key and each replica, by row."""
        return _mixed(self._hashes[: len(self.ids)] ^ np.uint64(_hash(key)))

    def home(self, key: str) -> str:
        """The replica with the highest rendezvous weight for the key. There must be one."""
        return self.ids[int(self.weights(key).argmax())]

    def check(self) -> None:
        """AssertionError unless the rows say what the views do."""
        assert sorted(self.ids) == sorted(self.views) and len(self._rows) == len(self.ids)
        for replica_id, view in self.views.items():
            row = self._rows[replica_id]
            assert self.ids[row] == replica_id
            assert (self._tiers[row], self._hashes[row]) == (view.tier, _hash(replica_id))
            assert tuple(self._numbers[:, row]) == _numbers(view)

    def _add(self, replica_id: str) -> int:
        row = self._rows[replica_id] = len(self.ids)
        self.ids.append(replica_id)
        if row == len(self._tiers):
            self._numbers = np.concatenate([self._numbers, np.zeros_like(self._numbers)], axis=1)
            self._tiers = np.concatenate([self._tiers, np.zeros_like(self._tiers)])
            self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)])
        self._hashes[row] = _hash(replica_id)
        return row

    def _means(self) -> _Means:
        if self._cached_means is None:
            running, _, _, kv_used_share, _, max_num_seqs, service_s, ttft_s = self._numbers[:, : len(self.ids)]
            num_holding = float(running @ (kv_used_share > 0))
            kv_share = float(kv_used_share.sum()) / num_holding if num_holding else 0.0
            seats = _known_or_mean(max_num_seqs, UNKNOWN_MAX_NUM_SEQS)
            self._cached_means = _Means(
                is_reported=bool(max_num_seqs.any()),
                ttft_s=_mean(ttft_s, UNKNOWN_TTFT_S),
                kv_share=kv_share,
                max_num_seqs=seats,
                service_s=_known_or_mean(service_s, UNKNOWN_SERVICE_S),
                request_share=np.maximum(1 / seats, kv_share),
            )
        return self._cached_means


def rendezvous_weight(key: str, replica_id: str) -> int:
    """The 64-bit weight of a replica for a key; the highest weight is the key's home (highest random weight hashing).

    Adding a replica moves only the keys whose home it becomes, one in the new number of replicas; removing one moves
    only its own. Source: Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998.
    """
    return int(_mixed(np.array([_hash(key) ^ _hash(replica_id)], np.uint64))[0])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _mixed(values: Weights) -> Weights:
    """A bijection in which every bit of the input changes every bit of the output with probability one half.

    Source: the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _numbers(view: ReplicaView) -> tuple[float, ...]:
    """The columns of a replica's row; 0 where nothing is reported."""
    if (load := view.load) is None:
        return 0, 0, view.in_flight, 0, 0, 0, 0, 0
    return (
        load.num_running,
        load.num_waiting,
        view.in_flight - view.report_in_flight,
        load.kv_used_share,
        load.eviction_cost_s,
        load.max_num_seqs,
        load.service_s,
        load.ttft_s,
    )


def _mean(values: Floats, otherwise: float) -> float:
    """Of those above 0."""
    num_known = np.count_nonzero(values)
    return float(values.sum()) / num_known if num_known else otherwise


def _known_or_mean(values: Floats, otherwise: float) -> Floats:
    return values if values.all() else np.where(values > 0, values, _mean(values, otherwise))
