"""Opportunistic bypass (paper: Scheduler): who may overtake a request without adapter room, and who is squashed."""

from math import inf

from chameleon_ray.policy.admission import AdapterRoom, Admission
from chameleon_ray.policy.load_window import LoadWindow
from chameleon_ray.policy.queue_set import QueueSet
from chameleon_ray.policy.size_queue import Entry, Place


class Bypasses:
    """The bypasses under way. Squashes stay within ``max_squash_share`` of admissions, whatever happens."""

    def __init__(self, queues: QueueSet, window: LoadWindow, room: AdapterRoom, max_squash_share: float) -> None:
        self.num_bypasses = 0
        self.num_squashes = 0
        self._queues = queues
        self._window = window
        self._room = room
        self._max_squash_share = max_squash_share
        self._bypassers: dict[str, Entry] = {}
        self._ends_known_for: tuple[float, int] | None = None
        self._ends: list[tuple[float, str]] = []
        self._rooms_s: dict[str, float] = {}

    def affordable(self, num_admissions: int) -> bool:
        """Whether one more bypass is allowed: if every one under way is squashed, the share must still hold."""
        worst = self.num_squashes + len(self._bypassers) + 1
        return worst <= self._max_squash_share * num_admissions

    def room_expected_s(self, head: Entry, now_s: float) -> float:
        """When enough running requests are predicted to have ended for ``head`` to fit; minus infinity when unknown."""
        if (pace_s := self._window.seconds_per_token) is None:
            return -inf
        known_for = now_s, self._queues.num_moves
        if self._ends_known_for != known_for:  # Else the same requests run as when an earlier head of this step asked.
            self._ends_known_for, self._rooms_s = known_for, {}
            self._ends = sorted(
                (max(now_s, entry.admitted_s + entry.request.num_predicted_tokens * pace_s), request_id)
                for request_id, entry in self._queues.running.items()
            )
        if (room_s := self._rooms_s.get(head.request_id)) is None:
            needed = self._room.ends_needed(head.request, [request_id for _, request_id in self._ends])
            # 0: the answer has changed since. None: nothing is predicted.
            room_s = self._rooms_s[head.request_id] = self._ends[needed - 1][0] if needed else -inf
        return room_s

    def ends_before(self, entry: Entry, now_s: float, deadline_s: float) -> bool:
        """Whether ``entry``, admitted now, is predicted to end in time. A request squashed once never tries again."""
        duration_s = entry.request.num_predicted_tokens * (self._window.seconds_per_token or inf)
        return not entry.was_squashed and now_s + duration_s < deadline_s

    def start(self, entry: Entry, head: Entry) -> None:
        """``entry`` runs and has overtaken ``head``."""
        entry.bypassed = head
        self._bypassers[entry.request_id] = entry
        self.num_bypasses += 1

    def forget(self, entry: Entry) -> None:
        """``entry`` left its place (or began to run): bypasses by it and of it are over."""
        if not self._bypassers:
            return
        self._bypassers.pop(entry.request_id, None)
        entry.bypassed = None
        for other in [other for other in self._bypassers.values() if other.bypassed is entry]:
            other.bypassed = None
            del self._bypassers[other.request_id]

    def squashes(self) -> tuple[str, ...]:
        """Bypassers to stop now: with the room they hold, the head that they overtook would fit."""
        if not self._bypassers:
            return ()
        heads = {
            entry.bypassed.order: entry.bypassed for entry in self._bypassers.values() if entry.bypassed is not None
        }
        return tuple(request_id for _, head in sorted(heads.items()) for request_id in self._squashes_for(head))

    def check(self) -> None:
        """AssertionError unless every bypasser runs and every bypassed head waits."""
        for request_id, entry in self._bypassers.items():
            assert self._queues.running.get(request_id) is entry, f"{request_id} bypasses without running"
            assert entry.bypassed is not None and entry.bypassed.place in (Place.WAITING, Place.LOADING)

    def _squashes_for(self, head: Entry) -> tuple[str, ...]:
        if head.place is not Place.WAITING or self._room.admission(head.request) is not Admission.NO_ROOM:
            return ()
        # The latest admitted have the least work to lose.
        bypassers = [entry for entry in reversed(self._bypassers.values()) if entry.bypassed is head]
        needed = self._room.ends_needed(head.request, [entry.request_id for entry in bypassers])
        if needed is None:
            return ()
        for count in range(max(1, needed), len(bypassers) + 1):
            chosen = bypassers[:count]
            if head.tokens <= head.queue.free_tokens + self._queues.returned_by(chosen, head.queue):
                return tuple(entry.request_id for entry in chosen)
        return ()
