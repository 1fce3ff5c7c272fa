"""Opportunistic bypass (paper: Scheduler): who may overtake a request without adapter room, and who is squashed."""

from math import inf

from chameleon_ray.policy.admission import Admission
from chameleon_ray.policy.load_window import LoadWindow
from chameleon_ray.policy.queue_set import QueueSet
from chameleon_ray.policy.records import Place, QueuedRequest
from chameleon_ray.policy.room import Room


class Bypasses:
    """The bypasses under way. Squashes stay within ``max_squash_share`` of admissions, whatever happens."""

    def __init__(self, queues: QueueSet, window: LoadWindow, room: Room, max_squash_share: float) -> None:
        self.num_bypasses = 0
        self.num_squashes = 0
        self._queues = queues
        self._window = window
        self._room = room
        self._max_squash_share = max_squash_share
        self._bypassers: dict[str, QueuedRequest] = {}
        self._ends_known_for: tuple[float, int] | None = None
        self._ends: list[tuple[float, str, QueuedRequest]] = []
        self._rooms_s: dict[str, float] = {}

    def affordable(self, num_admissions: int) -> bool:
        """Whether one more bypass is allowed: if every one under way is squashed, the share must still hold."""
        worst = self.num_squashes + len(self._bypassers) + 1
        return worst <= self._max_squash_share * num_admissions

    def room_expected_s(self, head: QueuedRequest, now_s: float) -> float:
        """When enough running requests are predicted to have ended for ``head`` to fit; minus infinity when unknown."""
        if (pace_s := self._window.seconds_per_token) is None:
            return -inf
        known_for = now_s, self._queues.num_moves
        if self._ends_known_for != known_for:  # Else the same requests run as when an earlier head of this step asked.
            self._ends_known_for, self._rooms_s = known_for, {}
            self._ends = sorted(
                (max(now_s, request.admitted_s + request.num_predicted_tokens * pace_s), request_id, request)
                for request_id, request in self._queues.running.items()
            )
        if (room_s := self._rooms_s.get(head.request_id)) is None:
            needed = self._room.ends_needed(head, [request for _, _, request in self._ends])
            # 0: the answer has changed since. None: nothing is predicted.
            room_s = self._rooms_s[head.request_id] = self._ends[needed - 1][0] if needed else -inf
        return room_s

    def ends_before(self, request: QueuedRequest, now_s: float, deadline_s: float) -> bool:
        """Whether ``request``, admitted now, is predicted to end in time. A request squashed once never tries again."""
        duration_s = request.num_predicted_tokens * (self._window.seconds_per_token or inf)
        return not request.was_squashed and now_s + duration_s < deadline_s

    def start(self, request: QueuedRequest, head: QueuedRequest) -> None:
        """``request`` runs and has overtaken ``head``."""
        request.bypassed = head
        self._bypassers[request.request_id] = request
        self.num_bypasses += 1

    def forget(self, request: QueuedRequest) -> None:
        """``request`` left its place (or began to run): bypasses by it and of it are over."""
        if not self._bypassers:
            return
        self._bypassers.pop(request.request_id, None)
        request.bypassed = None
        for other in [other for other in self._bypassers.values() if other.bypassed is request]:
            other.bypassed = None
            del self._bypassers[other.request_id]

    def squashes(self) -> tuple[str, ...]:
        """Bypassers to stop now: with the room they hold, the head that they overtook would fit."""
        if not self._bypassers:
            return ()
        heads = {one.bypassed.order: one.bypassed for one in self._bypassers.values() if one.bypassed is not None}
        return tuple(request_id for _, head in sorted(heads.items()) for request_id in self._squashes_for(head))

    def check(self) -> None:
        """AssertionError unless every bypasser runs and every bypassed head waits."""
        for one in self._bypassers.values():
            assert one.place is Place.RUNNING, f"{one.request_id} bypasses without running"
            assert one.bypassed is not None and one.bypassed.place in (Place.WAITING, Place.LOADING)

    def _squashes_for(self, head: QueuedRequest) -> tuple[str, ...]:
        if head.place is not Place.WAITING or self._room.admission(head) is not Admission.NO_ROOM:
            return ()
        # The latest admitted have the least work to lose.
        bypassers = [request for request in reversed(self._bypassers.values()) if request.bypassed is head]
        needed = self._room.ends_needed(head, bypassers)
        if needed is None:
            return ()
        for count in range(max(1, needed), len(bypassers) + 1):
            chosen = bypassers[:count]
            if head.tokens <= head.queue.free_tokens + self._queues.returned_by(chosen, head.queue):
                return tuple(request.request_id for request in chosen)
        return ()
