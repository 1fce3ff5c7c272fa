"""One simulated replica: an engine with continuous batching around the product's own ``ReplicaPolicy``.

A step decodes one token for every request whose prompt is computed, and spends the rest of its token budget on prompts
(chunked prefill), oldest admission first. Decoding costs the simulator nothing per request: the step at which a request
needs its next KV block, and the one at which it ends, are known when its prompt is done. As vLLM does, memory that runs
out is first taken from idle adapters, then from the request admitted last (preempted, to be computed again).

Steps between which nothing is decided are one event, a span: no prompt is computed, nobody ends before its last step,
memory suffices, and the policy is not to be asked. What happens during a span cuts it at the end of the step under way.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.policy.admission import Obstacle
from chameleon_ray.policy.cache_types import Plan
from chameleon_ray.policy.records import QueuedRequest
from chameleon_ray.policy.replica import ReplicaConfig, ReplicaPolicy
from chameleon_ray.predictor.lengths import LengthFeatures, LengthPredictor
from chameleon_ray.routing.replica_load import RecentRequests, ReplicaLoad
from chameleon_ray.sim.costs import CostModel
from chameleon_ray.sim.link import Link
from chameleon_ray.sim.loop import Event
from chameleon_ray.sim.workload import SimRequest

_PASS_INTERVAL_S = 0.05
"""How long decisions may rest while nothing has happened that could change them."""
_MAX_SPAN_STEPS = 48
"""Steps of one span; adding them up costs less than an event, but most spans are cut."""
_NEVER = 1 << 62

Outcome = Literal["finished", "refused", "lost", "aborted"]


@dataclass(frozen=True, slots=True)
class EngineMode:
    """How the engine around the policies works.

    blocking_loads: needed adapters are loaded between steps, at most once before each, and nothing is computed
    meanwhile (S-LoRA); else beside them.
    reserve_outputs: a request starts only with KV blocks for its predicted output (S-LoRA); else they are taken as it
    grows (vLLM).
    separate_prefill: prompts are computed in steps of their own, in which nobody decodes (S-LoRA); else beside decoding
    (chunked prefill). decodes_per_pass: decode steps that follow before requests are admitted again, 10 in S-LoRA.
    check_every: full conservation checks after every so many steps; 0: only at the end.
    """

    blocking_loads: bool = False
    reserve_outputs: bool = False
    separate_prefill: bool = False
    decodes_per_pass: int = 0
    check_every: int = 0


@dataclass(slots=True, eq=False)
class Job:
    """A request at a replica, and what became of it. Times are None until they happen.

    generated: tokens given so far. prefill_tokens, prefill_left: tokens to compute before the next one (after a
    preemption, those given so far as well). end_step: number of its last step. kv_blocks: those that it had before step
    ``grow_step``, in which, as in every ``block_tokens``-th one from there on, it takes one more.
    admission: its place among all.
    """

    request: SimRequest
    features: LengthFeatures
    hit: bool = True
    num_predicted_tokens: int = 1
    admitted_s: float | None = None
    first_token_s: float | None = None
    end_s: float | None = None
    outcome: Outcome | None = None
    generated: int = 0
    prefill_tokens: int = 0
    prefill_left: int = 0
    kv_blocks: int = 0
    first_decode_step: int = 0
    end_step: int = 0
    grow_step: int = _NEVER
    num_preemptions: int = 0
    admission: int = 0

    @property
    def rank(self) -> int:
        """Rank of its adapter; 0 for the base model."""
        return self.request.adapter.rank if self.request.adapter else 0


class SimReplica:
    """Drives one policy by a cost model; its methods return the events that follow."""

    def __init__(
        self,
        costs: CostModel,
        config: ReplicaConfig,
        mode: EngineMode,
        predictor: LengthPredictor,
        ended: Callable[[Job, float], None],
        moved: Callable[[str, float], Iterable[Event]] | None = None,
    ) -> None:
        """ended: hears of every job that left. moved: hears of adapters whose tier may have changed."""
        self.costs = costs
        self.mode = mode
        self._shares_kv = config.shares_kv
        self.policy = ReplicaPolicy(config, self)
        self.jobs: dict[str, Job] = {}
        self.batch: dict[str, Job] = {}
        self.num_steps = 0
        self.busy_s = 0.0
        self.alive = True
        self.host_link = Link(costs.links.host_bytes_s, costs.links.overhead_s)
        self.disk_link = Link(costs.links.disk_bytes_s, costs.links.disk_overhead_s)
        self.source_link = Link(costs.links.source_bytes_s)
        self._predictor = predictor
        self._ended = ended
        self._moved = moved
        self._adapters: dict[str, Adapter] = {}
        self._on_disk: set[str] = set()
        self._adapter_blocks: dict[str, int] = {}
        self._held_blocks = 0
        self._kv_blocks = 0
        self._prefilling: dict[str, Job] = {}
        self._chunks: list[tuple[Job, int]] = []
        self._num_admitted = 0
        self._num_decoding = 0
        self._decode_context = 0
        self._decode_ranks = 0
        self._batch_adapters: dict[str, int] = {}
        self._batch_adapter_bytes = 0
        self._ends_at: defaultdict[int, list[Job]] = defaultdict(list)
        self._block_tokens = costs.memory.block_tokens
        self._pool_blocks = costs.memory.pool_blocks
        self._watermark = int(costs.memory.pool_blocks * costs.limits.watermark_share)
        self._growing: list[dict[str, Job]] = [{} for _ in range(self._block_tokens)]
        """Decoding requests by the remainder of the steps in which they take a block."""
        self._joins_at: defaultdict[int, list[tuple[Job, int, int]]] = defaultdict(list)
        """Step -> (request, its admission, first step in which it takes a block) of those not yet in ``_growing``."""
        self._grown_step = 0
        """The step up to which requests that decode have taken their blocks."""
        self._stepping = self._dirty = self._prefills_only = False
        self._decodes_left = 0
        self._step_ends_s: list[float] = []
        self._step_durations_s: list[float] = []
        self.stalls_s: list[float] = []
        self._stalled_by: set[str] = set()
        self._stalled_since_s = 0.0
        self._may_stall = True
        self._next_pass_s = 0.0
        self._polling = False
        self._recent = RecentRequests()

    # What the policy asks (``BlockPool``)

    def free_blocks(self) -> int:
        """Blocks that nobody holds, be it KV cache or (where they share the pool) an adapter."""
        return self._pool_blocks - self._kv_blocks - (self._held_blocks if self._shares_kv else 0)

    def kv_blocks(self, request_id: str) -> int:
        """Blocks of a running request's KV cache; as in the engine, those that it has computed."""
        job = self.batch[request_id]
        if self.mode.reserve_outputs:
            return self._blocks_of(job)
        if request_id in self._prefilling:
            return self._blocks(job.prefill_tokens - job.prefill_left)
        return self._blocks(job.prefill_tokens + self.num_steps + 1 - job.first_decode_step)

    def load(self, now_s: float) -> ReplicaLoad:
        """The load that the replica reports to routers."""
        policy, links = self.policy, self.costs.links
        return ReplicaLoad(
            num_running=policy.num_running,
            num_waiting=policy.num_waiting,
            max_num_seqs=self.costs.limits.max_num_seqs,
            service_s=self._recent.service_s,
            ttft_s=self._recent.ttft_s,
            eviction_cost_s=policy.cache.eviction_cost_s(
                policy.room.free_adapter_blocks(),
                now_s,
                lambda size_bytes: links.overhead_s + size_bytes / links.host_bytes_s,
            ),
            kv_used_share=(self._kv_blocks + (policy.room.pinned_blocks if self._shares_kv else 0)) / self._pool_blocks,
        )

    # What happens from outside

    def add_adapter(self, adapter: Adapter, tier: Tier = Tier.DISK, now_s: float = 0.0) -> None:
        """Make an adapter known at a tier of DISK or below, or with a host copy at HOST if host memory has room."""
        num_blocks = self._blocks_of_adapter(adapter)
        self.policy.add_adapter(adapter, num_blocks, on_disk=tier >= Tier.DISK)
        self._adapters[adapter.digest] = adapter
        if tier >= Tier.DISK:
            self._on_disk.add(adapter.digest)
        if tier == Tier.HOST:
            plan = self.policy.cache.plan([adapter.digest], 0, now_s)
            if plan.fetch == (adapter.digest,) and not plan.drop:
                self.policy.cache.commit(plan, now_s)
                self.policy.fetched(adapter.digest)

    def arrive(self, request: SimRequest, now_s: float) -> Iterable[Event]:
        """A request arrives; one that can never fit is refused."""
        adapter = request.adapter
        digest = adapter.digest if adapter is not None else None
        job = Job(
            request, LengthFeatures(digest, request.num_prompt_tokens, request.max_tokens, request.num_output_tokens)
        )
        if self._blocks(request.num_prompt_tokens + request.num_output_tokens) + (
            self._blocks_of_adapter(adapter) if adapter and self._shares_kv else 0
        ) > int(self.costs.memory.pool_blocks * (1 - self.costs.limits.watermark_share)):
            self._leave(job, "refused", now_s)
            return ()
        job.num_predicted_tokens = self._predictor.predict(job.features)
        queued = QueuedRequest(request.request_id, request.num_prompt_tokens, job.num_predicted_tokens, adapter)
        self.jobs[request.request_id] = job
        job.hit = self.policy.arrive(queued, now_s)
        self._dirty = True
        return self._wake(now_s)

    def abort(self, request_id: str, now_s: float) -> Iterable[Event]:
        """The client gives a request up, waiting or running. KeyError for one that is not here."""
        job = self.jobs.pop(request_id)
        if request_id in self.batch:
            self._take_out(job)
        self.policy.remove(request_id, now_s)
        self._leave(job, "aborted", now_s)
        self._dirty = True
        return self._wake(now_s)

    def fail(self, now_s: float) -> list[Job]:
        """The replica dies: everything it had is lost, none of its events happens any more. Returns its jobs."""
        self.alive = False
        lost = list(self.jobs.values())
        for job in lost:
            self._leave(job, "lost", now_s)
        self.jobs.clear()
        return lost

    def check(self) -> None:
        """AssertionError unless blocks, requests and the policy's view of them add up."""
        self.policy.check()
        self._check_blocks()
        assert sum(map(self._blocks_of, self.batch.values())) == self._kv_blocks, "KV blocks are lost"
        assert sum(self._adapter_blocks.values()) == self._held_blocks, "adapters' blocks are lost"
        assert self.policy.num_running == len(self.batch)
        assert self.policy.num_running + self.policy.num_waiting == len(self.jobs), "a request is lost"
        decoding = [job for request_id, job in self.batch.items() if request_id not in self._prefilling]
        assert self._num_decoding == len(decoding)
        if not self._stepping:
            context = sum(job.prefill_tokens + self.num_steps + 2 - job.first_decode_step for job in decoding)
            assert self._decode_context == context, f"{self._decode_context} tokens of context, not {context}"
        assert self._decode_ranks == sum(job.rank for job in decoding)

    def check_end(self) -> None:
        """``check``, and that nothing is left to do."""
        self.check()
        assert not self.jobs, f"{len(self.jobs)} requests never ended"
        for link in (self.host_link, self.disk_link, self.source_link):
            link.check_idle()

    # Steps

    def _wake(self, now_s: float) -> Iterable[Event]:
        if self._stalled_by or not self.alive:
            return ()
        if not self._stepping:
            return self._begin_step(now_s)
        last = bisect_left(self._step_ends_s, now_s)
        if last + 1 >= len(self._step_ends_s):
            return ()
        del self._step_ends_s[last + 1 :]
        return [(self._step_ends_s[last], self._end_steps)]

    def _begin_step(self, now_s: float) -> Iterable[Event]:
        """In vLLM's order: squashes, memory for those that run, admissions, loads."""
        events: list[Event] = []
        resting: tuple[str, ...] | None = None
        if (self._dirty or now_s >= self._next_pass_s) and (self._decodes_left <= 0 or not self.batch):
            self._dirty = False
            self._next_pass_s = now_s + _PASS_INTERVAL_S
            if self.mode.check_every or now_s >= self.policy.quiet_until_s():
                resting = self._begin_decisions(now_s)
        num_preempted = self._go_on(now_s, events)
        if resting is not None:
            self._decide(now_s, events, resting, may_admit=not num_preempted)
            if self._stalled_by:
                return events
        if not self.batch:
            events += self._poll(now_s)
            return events
        self._prefills_only = self.mode.separate_prefill and bool(self._prefilling)
        if self._prefills_only:
            self._decodes_left = self.mode.decodes_per_pass
            num_requests = num_tokens = context = token_ranks = 0
        else:
            num_requests = num_tokens = self._num_decoding
            context, token_ranks = self._decode_context, self._decode_ranks
        attended = float(context)
        num_requests += len(self._chunks)
        for job, chunk in self._chunks:
            computed = job.prefill_tokens - job.prefill_left
            context += computed
            attended += chunk * (computed + (chunk + 1) / 2)
            token_ranks += chunk * job.rank
            num_tokens += chunk
            job.prefill_left -= chunk
        duration_s = self.costs.step_s(
            num_tokens, context, token_ranks, self._batch_adapter_bytes, num_requests, attended
        )
        self._step_durations_s = [duration_s]
        self._step_ends_s = [now_s + duration_s]
        if not self._prefilling:
            self._extend_span()
        self._stepping = True
        events.append((self._step_ends_s[-1], self._end_steps))
        return events

    def _go_on(self, now_s: float, events: list[Event]) -> int:
        """KV blocks for what the next step computes of requests that run, and their prompts' chunks; oldest first.

        Returns how many were preempted for it.
        """
        num_preempted = 0
        apart = self.mode.separate_prefill
        if not (apart and self._prefilling):
            num_preempted = self._grow_decoding(now_s, events)
        self._chunks = []
        if not self._prefilling:
            return num_preempted
        budget = self.costs.limits.max_num_batched_tokens - (0 if apart else self._num_decoding)
        for job in list(self._prefilling.values()):
            chunk = min(budget, job.prefill_left)
            if chunk <= 0 or job.request.request_id not in self.batch:
                break
            num_blocks = self._blocks(job.prefill_tokens - job.prefill_left + chunk) - job.kv_blocks
            num_preempted += self._grow(job, num_blocks, now_s, events)
            if job.request.request_id in self.batch:
                self._chunks.append((job, chunk))
                budget -= chunk
        return num_preempted

    def _grow_decoding(self, now_s: float, events: list[Event]) -> int:
        """The blocks that requests which decode take in the next step; how many were preempted for it."""
        number = self.num_steps + 1
        num_preempted = 0
        if self._grown_step < number:
            growing = self._growing[number % self._block_tokens]
            if len(growing) <= self.free_blocks():
                self._kv_blocks += len(growing)
            else:
                for job in sorted(growing.values(), key=_admission):
                    num_preempted += self._grow(job, 1, now_s, events)
            self._grown_step = number
        if number in self._joins_at:
            for job, admission, grow_step in sorted(self._joins_at.pop(number), key=lambda join: join[1]):
                if job.admission != admission or job.request.request_id not in self.batch:
                    continue  # it was preempted since
                if grow_step <= self._grown_step:  # others took theirs before prompts were computed apart
                    num_preempted += self._grow(job, 1, now_s, events)
                    grow_step += self._block_tokens
                if job.request.request_id in self.batch:
                    self._join_growing(job, grow_step)
        return num_preempted

    def _extend_span(self) -> None:
        """Add the steps that follow the first one until something may have to be decided."""
        if self._dirty or self.mode.check_every:
            return
        quiet_until_s = self.policy.quiet_until_s()
        num_steps = self._num_undisturbed()
        if not num_steps:
            return
        durations_s = self.costs.decode_steps_s(
            num_steps, self._num_decoding, self._decode_context, self._decode_ranks, self._batch_adapter_bytes
        )
        next_pass_s, ends_s = self._next_pass_s, self._step_ends_s
        end_s = ends_s[0]
        for duration_s in durations_s:
            if end_s >= next_pass_s:
                if end_s >= quiet_until_s:
                    break
                next_pass_s = end_s + _PASS_INTERVAL_S
            end_s += duration_s
            ends_s.append(end_s)
        self._step_durations_s += durations_s
        self._next_pass_s = next_pass_s

    def _num_undisturbed(self) -> int:
        """Steps that may follow the next one before a request ends or memory runs out."""
        number, block_tokens = self.num_steps + 1, self._block_tokens
        num_steps = min(_MAX_SPAN_STEPS - 1, min(self._ends_at) - number)
        if self._joins_at:
            num_steps = min(num_steps, min(self._joins_at) - number - 1)
        free_blocks = self.free_blocks()
        if free_blocks < self._num_decoding * (num_steps // block_tokens + 1):
            for following in range(number + 1, number + num_steps + 1):
                free_blocks -= len(self._growing[following % block_tokens])
                if free_blocks < 0:
                    return following - number - 1
        return num_steps

    def _end_steps(self, now_s: float) -> Iterable[Event]:
        if not self.alive or not self._stepping or now_s != self._step_ends_s[-1]:
            return ()  # the replica died, or the span was cut and has ended before
        self._stepping = False
        self._may_stall = True
        if self._prefills_only:
            self.busy_s += self._step_durations_s[0]
        else:
            self._end_decoding(now_s)
        return self._end_prompts(now_s)

    def _end_decoding(self, now_s: float) -> None:
        num_steps = len(self._step_ends_s)
        self.busy_s = sum(self._step_durations_s[:num_steps], self.busy_s)
        self._decodes_left -= num_steps
        self._decode_context += num_steps * self._num_decoding
        first, self.num_steps = self.num_steps + 1, self.num_steps + num_steps
        if num_steps > 1:
            growing, block_tokens = self._growing, self._block_tokens
            following = range(first + 1, self.num_steps + 1)
            self._kv_blocks += sum([len(growing[number % block_tokens]) for number in following])
        self._grown_step = self.num_steps
        if (ending := self._ends_at.pop(self.num_steps, None)) is not None:
            for job in sorted(ending, key=_admission):
                if job.end_step == self.num_steps:
                    self._finish(job, now_s)

    def _end_prompts(self, now_s: float) -> Iterable[Event]:
        """Prompts that are computed begin to decode; the next step begins."""
        done = []
        for job in self._prefilling.values():
            if job.prefill_left:
                break
            done.append(job)
        for job in done:
            del self._prefilling[job.request.request_id]
            self._start_decoding(job, now_s)
        if self.mode.check_every and self.num_steps % self.mode.check_every == 0:
            self.check()
        else:
            self._check_blocks()
        return self._begin_step(now_s)

    def _poll(self, now_s: float) -> Iterable[Event]:
        """Nothing runs; if requests wait for more than a load under way, look again soon."""
        if not self.jobs or self._polling:
            return ()
        self._polling = True
        return [(now_s + _PASS_INTERVAL_S, self._polled)]

    def _polled(self, now_s: float) -> Iterable[Event]:
        self._polling = False
        return self._wake(now_s)

    def _begin_decisions(self, now_s: float) -> tuple[str, ...]:
        """Squashes, and the beginning of a step for the policy; returns who was squashed."""
        squashed = self.policy.squashes()
        for request_id in squashed:
            self._preempt(self.batch[request_id], now_s, squashed=True)
        self.policy.begin_step(now_s)
        return squashed

    def _decide(self, now_s: float, events: list[Event], resting: Collection[str], may_admit: bool) -> None:
        """The policy's part of a step: admissions and loads. resting: who must wait for the next step."""
        policy, limits = self.policy, self.costs.limits
        budget = limits.max_num_batched_tokens - sum(chunk for _, chunk in self._chunks)
        budget -= 0 if self.mode.separate_prefill else self._num_decoding
        while may_admit and (request := policy.peek()) is not None:
            request_id = request.request_id
            if request_id in resting:
                policy.pass_over(request_id, Obstacle.NOT_READY)
                continue
            job = self.jobs[request_id]
            num_tokens = job.request.num_prompt_tokens + job.generated
            num_blocks = self._blocks_to_start(job, num_tokens)
            short = num_blocks + (self._watermark if self.batch else 0) - self.free_blocks()
            if short > 0:
                plan = policy.make_room(short, now_s, for_request=request_id, or_nothing=True)
                self._carry_out(plan, now_s, events)
                if plan.freed_blocks < short:
                    policy.pass_over(request_id, Obstacle.NO_MEMORY)
                    continue
            if len(self.batch) >= limits.max_num_seqs or budget <= 0:  # vLLM looks at memory before this, too.
                self._dirty |= budget <= 0
                break
            policy.admit(request_id, now_s)
            chunk = min(budget, num_tokens)
            self._admit(job, num_blocks if self.mode.reserve_outputs else self._blocks(chunk), now_s)
            self._chunks.append((job, chunk))
            budget -= chunk
        prompt_blocks = 0
        for job in self._prefilling.values():
            prompt_blocks += max(0, self._blocks(job.prefill_tokens) - job.kv_blocks)
        if plan := policy.end_step(now_s, reserved_blocks=len(self.batch) + prompt_blocks):
            self._carry_out(plan, now_s, events)
        if self.mode.blocking_loads and (self._may_stall or not self.batch):
            self._stalled_by.update(plan.load[: len(plan.load) - plan.num_prefetch])
            self._may_stall = not self._stalled_by
            self._stalled_since_s = now_s

    def _admit(self, job: Job, num_blocks: int, now_s: float) -> None:
        if job.admitted_s is None:
            job.admitted_s = now_s
        self._num_admitted += 1
        job.admission = self._num_admitted
        job.prefill_tokens = job.prefill_left = job.request.num_prompt_tokens + job.generated
        job.kv_blocks = num_blocks
        self._kv_blocks += num_blocks
        request_id = job.request.request_id
        self.batch[request_id] = self._prefilling[request_id] = job
        if (adapter := job.request.adapter) is not None:
            count = self._batch_adapters.get(adapter.digest, 0)
            self._batch_adapters[adapter.digest] = count + 1
            if not count:
                self._batch_adapter_bytes += adapter.size_bytes

    def _start_decoding(self, job: Job, now_s: float) -> None:
        """The prompt is computed: that gives a token, and fixes the steps at which the request grows and ends."""
        job.generated += 1
        if job.first_token_s is None:
            job.first_token_s = now_s
        self._num_decoding += 1
        self._decode_context += job.prefill_tokens + 1
        self._decode_ranks += job.rank
        job.first_decode_step = self.num_steps + 1
        left = job.request.num_output_tokens - job.generated
        job.end_step = self.num_steps + left
        if left == 0:
            self._finish(job, now_s)
            return
        self._ends_at[job.end_step].append(job)
        self._plan_growth(job)

    def _plan_growth(self, job: Job) -> None:
        grow_step = job.first_decode_step + job.kv_blocks * self._block_tokens - job.prefill_tokens
        join_step = max(job.first_decode_step, grow_step - self._block_tokens + 1)
        if join_step == job.first_decode_step and grow_step > self._grown_step:
            self._join_growing(job, grow_step)
        elif join_step <= job.end_step:
            self._joins_at[join_step].append((job, job.admission, grow_step))

    def _join_growing(self, job: Job, grow_step: int) -> None:
        job.grow_step = grow_step
        self._growing[grow_step % self._block_tokens][job.request.request_id] = job

    def _grow(self, job: Job, num_blocks: int, now_s: float, events: list[Event]) -> int:
        """More KV blocks, from idle adapters or from whoever was admitted last if need be; how many were preempted."""
        request_id = job.request.request_id
        num_preempted = 0
        while request_id in self.batch and (short := num_blocks - self.free_blocks()) > 0:
            plan = self.policy.make_room(short, now_s, for_request=request_id)
            self._carry_out(plan, now_s, events)
            if not plan.evict:
                self._preempt(next(reversed(self.batch.values())), now_s)
                num_preempted += 1
        if request_id in self.batch and num_blocks > 0:
            self._take_blocks(job, num_blocks)
        return num_preempted

    def _take_blocks(self, job: Job, num_blocks: int) -> None:
        job.kv_blocks += num_blocks
        self._kv_blocks += num_blocks
        if job.grow_step != _NEVER:
            job.grow_step += num_blocks * self._block_tokens

    def _preempt(self, job: Job, now_s: float, squashed: bool = False) -> None:
        if job.request.request_id not in self._prefilling:
            job.generated += self.num_steps + 1 - job.first_decode_step
        self._take_out(job)
        job.num_preemptions += 1
        self.policy.requeue(job.request.request_id, now_s, squashed=squashed)
        self._dirty = True

    def _finish(self, job: Job, now_s: float) -> None:
        self._take_out(job)
        request_id = job.request.request_id
        del self.jobs[request_id]
        job.generated = job.request.num_output_tokens
        self.policy.finish(request_id, now_s, job.generated)
        assert job.admitted_s is not None and job.first_token_s is not None
        self._recent.record(job.first_token_s - job.admitted_s, now_s - job.admitted_s)
        self._predictor.observe(job.features, job.generated)
        self._leave(job, "finished", now_s)
        self._dirty = True

    def _take_out(self, job: Job) -> None:
        """Out of the batch; its blocks are free."""
        request_id = job.request.request_id
        del self.batch[request_id]
        if self._prefilling.pop(request_id, None) is None:
            self._num_decoding -= 1
            self._decode_context -= job.prefill_tokens + self.num_steps + 2 - job.first_decode_step
            self._decode_ranks -= job.rank
        self._kv_blocks -= self._blocks_of(job)
        if job.grow_step != _NEVER:
            del self._growing[job.grow_step % self._block_tokens][request_id]
        job.kv_blocks, job.grow_step, job.end_step = 0, _NEVER, 0
        if (adapter := job.request.adapter) is not None:
            self._batch_adapters[adapter.digest] -= 1
            if not self._batch_adapters[adapter.digest]:
                del self._batch_adapters[adapter.digest]
                self._batch_adapter_bytes -= adapter.size_bytes

    def _leave(self, job: Job, outcome: Outcome, now_s: float) -> None:
        job.end_s, job.outcome = now_s, outcome
        self._ended(job, now_s)

    # Adapters

    def _carry_out(self, plan: Plan, now_s: float, events: list[Event]) -> None:
        for eviction in plan.evict:
            self._held_blocks -= self._adapter_blocks.pop(eviction.digest)
            events += self._announce(eviction.digest, now_s)
        for digest in plan.drop:
            events += self._announce(digest, now_s)
        for digest in plan.load:
            num_blocks = self._blocks_of_adapter(self._adapters[digest])
            self._adapter_blocks[digest] = num_blocks
            self._held_blocks += num_blocks
            events += self.host_link.transfer(self._adapters[digest].size_bytes, partial(self._loaded, digest), now_s)
        for digest in plan.fetch:
            link, done = self.disk_link, self._fetched
            if digest not in self._on_disk:
                link, done = self.source_link, self._downloaded
            events += link.transfer(self._adapters[digest].size_bytes, partial(done, digest), now_s)

    def _downloaded(self, digest: str, now_s: float) -> Iterable[Event]:
        self._on_disk.add(digest)
        return self.disk_link.transfer(self._adapters[digest].size_bytes, partial(self._fetched, digest), now_s)

    def _fetched(self, digest: str, now_s: float) -> Iterable[Event]:
        if not self.alive:
            return ()
        self.policy.fetched(digest)
        self._dirty = True
        return [*self._announce(digest, now_s), *self._wake(now_s)]

    def _loaded(self, digest: str, now_s: float) -> Iterable[Event]:
        if not self.alive:
            return ()
        self.policy.loaded(digest)
        if self._stalled_by == {digest}:
            self.stalls_s.append(now_s - self._stalled_since_s)
        self._stalled_by.discard(digest)
        self._dirty = True
        return [*self._announce(digest, now_s), *self._wake(now_s)]

    def _announce(self, digest: str, now_s: float) -> Iterable[Event]:
        return self._moved(digest, now_s) if self._moved is not None else ()

    # Sizes

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)

    def _blocks_of_adapter(self, adapter: Adapter) -> int:
        return self.costs.adapter_blocks(adapter.size_bytes) if self._shares_kv else 1

    def _blocks_of(self, job: Job) -> int:
        return job.kv_blocks + max(0, (self._grown_step - job.grow_step) // self._block_tokens + 1)

    def _blocks_to_start(self, job: Job, num_tokens: int) -> int:
        if self.mode.reserve_outputs:
            num_tokens = max(num_tokens, job.request.num_prompt_tokens + job.num_predicted_tokens)
        return self._blocks(num_tokens)

    def _check_blocks(self) -> None:
        assert self._kv_blocks >= 0 and self._held_blocks >= 0 and self.free_blocks() >= 0, (
            f"{self._kv_blocks} blocks of KV cache and {self._held_blocks} of adapters in a pool of "
            f"{self.costs.memory.pool_blocks}"
        )


def _admission(job: Job) -> int:
    return job.admission
