"""The composed policy, driven by a small engine that owns blocks and does only what it is told."""

import random

import pytest

from chameleon_ray.policy.adapter import Adapter, Tier
from chameleon_ray.policy.admission import Obstacle
from chameleon_ray.policy.cache_types import CacheConfig, IllegalChange, UnknownAdapter
from chameleon_ray.policy.disciplines import QueueOptions
from chameleon_ray.policy.queues import QueueError
from chameleon_ray.policy.records import QueuedRequest, State
from chameleon_ray.policy.replica import ReplicaConfig, ReplicaPolicy
from chameleon_ray.policy.sizing import SizingOptions

BLOCK_TOKENS = 10


class Engine:
    """A block pool, host memory and a batch; ``policy`` decides, every plan is carried out and checked.

    slots: adapters have so many blocks of their own, and take none of the pool's.
    """

    def __init__(
        self,
        pool_blocks,
        scheduler="chameleon",
        max_num_seqs=None,
        adapter_host_bytes=10**9,
        total_tokens=None,
        slots=None,
        **cache,
    ):
        total_tokens = total_tokens or pool_blocks * BLOCK_TOKENS
        self.slots = slots
        config = ReplicaConfig(
            CacheConfig(
                max_blocks=cache.pop("max_blocks", slots or pool_blocks), adapter_host_bytes=adapter_host_bytes, **cache
            ),
            QueueOptions(total_tokens, SizingOptions(kv_token_bytes=None if slots else 1), max_num_seqs=max_num_seqs),
            scheduler,
            BLOCK_TOKENS,
            shares_kv=slots is None,
        )
        self.pool_blocks = pool_blocks
        self.kv = {}
        self.held = {}
        self.reading = []
        self.adapters = {}
        self.requests = {}
        self.policy = ReplicaPolicy(config, self)

    def free_blocks(self):
        return self.pool_blocks - sum(self.kv.values()) - (0 if self.slots else sum(self.held.values()))

    def kv_blocks(self, request_id):
        return self.kv[request_id]

    def add(self, **num_blocks):
        for digest, blocks in num_blocks.items():
            self.adapters[digest] = (Adapter(digest, rank=blocks, size_bytes=blocks * BLOCK_TOKENS), blocks)
            self.policy.add_adapter(*self.adapters[digest])

    def arrive(self, request_id, digest=None, prompt=10, output=10, now_s=0.0):
        adapter = self.adapters[digest][0] if digest else None
        self.requests[request_id] = QueuedRequest(request_id, prompt, output, adapter)
        return self.policy.arrive(self.requests[request_id], now_s)

    def carry_out(self, plan):
        for eviction in plan.evict:
            assert self.held.pop(eviction.digest) == eviction.num_blocks
        for digest in plan.load:
            self.held[digest] = self.adapters[digest][1]
        self.reading += [("load", digest) for digest in plan.load] + [("fetch", digest) for digest in plan.fetch]
        assert self.free_blocks() >= 0
        assert self.slots is None or sum(self.held.values()) <= self.slots
        return plan

    def step(self, now_s=0.0):
        """One step; ids admitted, in order."""
        for request_id in self.policy.squashes():
            self.preempt(request_id, now_s, squashed=True)
        admitted = []
        self.policy.begin_step(now_s)
        while (request := self.policy.peek()) is not None:
            blocks = -(-(request.num_prompt_tokens + request.num_predicted_tokens) // BLOCK_TOKENS)
            short = blocks - self.free_blocks()
            if short > 0:
                self.carry_out(self.policy.make_room(short, now_s, for_request=request.request_id, or_nothing=True))
            if blocks > self.free_blocks():
                self.policy.pass_over(request.request_id, Obstacle.NO_MEMORY)
                continue
            self.policy.admit(request.request_id, now_s)
            self.kv[request.request_id] = blocks
            admitted.append(request.request_id)
        self.carry_out(self.policy.end_step(now_s))
        self.policy.check()
        return admitted

    def complete(self, count=None):
        """The oldest ``count`` loads and fetches under way end well."""
        done, self.reading = self.reading[:count], self.reading[len(self.reading[:count]) :]
        for what, digest in done:
            (self.policy.loaded if what == "load" else self.policy.fetched)(digest)

    def preempt(self, request_id, now_s, squashed=False):
        del self.kv[request_id]
        self.policy.requeue(request_id, now_s, squashed=squashed)

    def finish(self, request_id, now_s=0.0):
        del self.kv[request_id]
        self.policy.finish(request_id, now_s, 10)

    def abort(self, request_id, now_s=0.0):
        self.kv.pop(request_id, None)
        self.policy.remove(request_id, now_s)

    def settle(self, now_s=0.0):
        """Steps until nothing is under way; ids admitted."""
        admitted = self.step(now_s)
        while self.reading:
            self.complete()
            admitted += self.step(now_s)
        return admitted


def test_a_request_runs_once_its_adapter_is_resident_and_base_requests_at_once():
    engine = Engine(20)
    engine.add(a=2)
    assert not engine.arrive("r1", "a")
    assert engine.arrive("base")
    assert engine.step() == ["base"]
    assert engine.reading == [("fetch", "a")]
    engine.complete()
    assert engine.step() == []
    assert engine.reading == [("load", "a")]
    engine.complete()
    assert engine.step() == ["r1"]
    assert engine.arrive("r2", "a")


def test_idle_adapters_give_their_blocks_to_kv_but_never_those_of_the_request_or_of_running_ones():
    engine = Engine(10)
    engine.add(a=3, b=3)
    engine.arrive("r1", "a")
    engine.settle()
    engine.arrive("r2", "b", prompt=0, output=10)
    assert engine.settle() == ["r2"]
    engine.finish("r2")
    plan = engine.carry_out(engine.policy.make_room(10, 1.0))
    assert [eviction.digest for eviction in plan.evict] == ["b"]
    assert not engine.policy.make_room(9, 1.0, or_nothing=True)
    engine.finish("r1")
    engine.arrive("r3", "a", now_s=2.0)
    assert not engine.policy.make_room(10, 2.0, for_request="r3").evict
    assert engine.policy.cache.state("a") is State.RESIDENT
    engine.policy.check()


def test_a_blocked_adapter_holds_up_its_queue_until_a_running_request_ends():
    engine = Engine(10, scheduler="fifo")
    engine.add(big=6)
    engine.arrive("r1", prompt=50, output=10)
    assert engine.step() == ["r1"]
    engine.arrive("r2", "big")
    engine.settle()
    engine.arrive("r3")
    assert engine.step(1.0) == []
    assert engine.policy.cache.state("big") is State.HOST
    engine.finish("r1", 2.0)
    assert engine.settle(2.0) == ["r3", "r2"], "while it loads, it stalls nobody"
    engine.policy.check()


def test_adapters_in_slots_and_the_kv_cache_never_make_room_for_each_other():
    engine = Engine(10, slots=2)
    engine.add(a=1, b=1, c=1)
    for name in ("a", "b"):
        engine.arrive(name, name, prompt=20, output=10)
    assert engine.settle() == ["a", "b"]
    assert engine.free_blocks() == 4 and engine.policy.room.free_adapter_blocks() == 0
    engine.arrive("c", "c")
    assert engine.settle(1.0) == [], "free KV blocks are no slot"
    engine.finish("a", 2.0)
    assert not engine.policy.make_room(8, 2.0), "an idle slot is no KV block"
    assert engine.settle(2.0) == ["c"]
    assert set(engine.held) == {"b", "c"}
    engine.arrive("large", "b", prompt=60, output=10, now_s=3.0)
    assert engine.step(3.0) == [] and set(engine.held) == {"b", "c"}
    for name in ("b", "c"):
        engine.finish(name, 4.0)
    assert engine.step(4.0) == ["large"]
    engine.carry_out(engine.policy.evict_idle(5.0))
    assert set(engine.held) == {"b"}, "the one in use stays"


def test_requests_of_adapters_in_slots_borrow_no_quota_for_them():
    tokens = {}
    for slots in (None, 2):
        engine = Engine(20, slots=slots)
        engine.add(a=1)
        engine.arrive("r1", "a", prompt=20, output=10)
        assert engine.settle() == ["r1"]
        tokens[slots] = sum(queue.used_tokens for queue in engine.policy.queues.state().queues)
    assert tokens == {None: 40, 2: 30}


def test_a_running_request_is_to_end_for_a_slot_only_where_no_other_is_free():
    engine = Engine(10, slots=1)
    engine.add(a=1, b=1)
    engine.arrive("r1", "a", prompt=10, output=10)
    engine.settle()
    running = [engine.requests["r1"]]

    def ends_needed(prompt, digest):
        waiting = QueuedRequest("r2", prompt, 10, entry=engine.policy.cache.entry(digest))
        return engine.policy.room.ends_needed(waiting, running)

    assert ends_needed(10, "b") == 1
    assert (ends_needed(80, "a"), ends_needed(90, "a")) == (0, 1)


def test_steps_are_quiet_while_all_that_wait_were_offered_in_vain():
    engine = Engine(20, scheduler="fifo")
    policy = engine.policy
    engine.arrive("r1", prompt=100, output=50)
    assert engine.step() == ["r1"]
    engine.arrive("r2", prompt=100, output=10, now_s=1.0)
    assert policy.quiet_until_s() < 1.0, "nobody has offered it yet"
    assert engine.step(1.0) == []
    # Arrivals have doubled, so traffic was measured at 1 s; with somebody waiting, again after a fifth of 300 s.
    assert policy.quiet_until_s() == pytest.approx(61.0)
    assert engine.step(2.0) == [] and policy.quiet_until_s() > 2.0
    engine.arrive("r3", prompt=20, output=10, now_s=3.0)
    assert policy.quiet_until_s() < 3.0
    engine.step(3.0)
    engine.finish("r1", 4.0)
    assert policy.quiet_until_s() < 4.0, "its blocks and its quota are free"
    assert engine.step(4.0) == ["r2", "r3"]
    assert policy.quiet_until_s() > 4.0, "nobody waits"
    engine.finish("r2", 5.0)
    assert policy.quiet_until_s() > 5.0, "nobody waited for what became free"
    engine.policy.check()


def test_a_request_runs_in_the_step_after_its_adapter_is_loaded_however_many_others_wait_for_theirs():
    engine = Engine(1000, scheduler="fifo")
    digests = [f"a{number}" for number in range(60)]
    engine.add(**dict.fromkeys(digests, 1))
    for digest in digests:
        engine.arrive(digest, digest)
    for _ in range(5):
        assert engine.step() == []  # all are set aside
    num_admitted = 0
    while engine.reading:
        what, digest = engine.reading[-1]
        engine.reading.insert(0, engine.reading.pop())
        engine.complete(1)
        admitted = engine.step()
        assert admitted == ([digest] if what == "load" else [])
        num_admitted += len(admitted)
    assert num_admitted == 60


def test_adapters_of_requests_that_wait_for_memory_do_not_chase_each_other_out():
    engine = Engine(12, scheduler="static", total_tokens=10_000)
    engine.add(a=4, b=4)
    engine.arrive("base", prompt=50, output=10)
    assert engine.settle() == ["base"]
    engine.arrive("small", "a", prompt=40, output=10)
    engine.arrive("large", "b", prompt=40, output=200)
    for number in range(20):
        assert engine.step(float(number)) == []
        engine.complete()
    assert engine.policy.cache.stats().loads <= 2
    assert len(engine.held) == 1
    engine.finish("base", 20.0)
    assert "small" in engine.settle(20.0)


def test_a_failure_ends_the_requests_that_waited_and_nothing_is_fetched_until_the_next_one():
    engine = Engine(20)
    engine.add(a=2)
    engine.arrive("r1", "a")
    engine.arrive("r2", "a")
    engine.arrive("base")
    assert engine.step() == ["base"]
    assert engine.policy.failed("a", 1.0) == ("r1", "r2")
    engine.reading.clear()
    assert "r1" not in engine.policy.queues and engine.policy.num_waiting == 0
    assert engine.step(100.0) == [] and not engine.reading
    engine.arrive("r3", "a", now_s=101.0)
    assert engine.settle(101.0) == ["r3"]


def test_a_failed_load_gives_its_blocks_back():
    engine = Engine(20)
    engine.add(a=2)
    engine.arrive("r1", "a")
    engine.step()
    engine.complete()
    engine.step()
    assert engine.free_blocks() == 18
    assert engine.policy.failed("a", 1.0) == ("r1",)
    engine.reading.clear()
    del engine.held["a"]
    engine.policy.check()
    assert engine.policy.cache.tiers() == {"a": Tier.DISK}


def test_no_request_runs_on_an_adapter_that_has_left():
    engine = Engine(20)
    engine.add(a=2)
    engine.arrive("r1", "a")
    engine.step()
    engine.complete()
    engine.step()
    engine.complete()
    engine.policy.begin_step(1.0)
    assert engine.policy.peek().request_id == "r1"
    engine.carry_out(engine.policy.evict_idle(1.0))
    with pytest.raises(IllegalChange, match="which is host"):
        engine.policy.admit("r1", 1.0)


def test_nothing_is_loaded_for_a_request_that_was_aborted_while_its_adapter_had_no_room():
    engine = Engine(10)
    engine.add(a=6, b=6)
    engine.arrive("r1", "a")
    engine.arrive("r2", "b")
    assert engine.settle() == ["r1"]
    engine.abort("r2")
    engine.finish("r1")
    engine.settle(1.0)
    assert set(engine.held) == {"a"}, "b would have had to evict it"


def test_misuse_raises_and_changes_nothing():
    engine = Engine(20)
    engine.add(a=2)
    engine.arrive("r1", "a")
    with pytest.raises(QueueError, match="another id"):
        engine.arrive("r1", "a")
    with pytest.raises(UnknownAdapter):
        engine.policy.arrive(QueuedRequest("r2", 1, 1, Adapter("nobody", 1, 1)), 0.0)
    for call in (engine.policy.remove, engine.policy.requeue):
        with pytest.raises(QueueError):
            call("r2", 0.0)
    with pytest.raises(QueueError, match="not running"):
        engine.policy.finish("r1", 0.0, 1)
    with pytest.raises(QueueError, match="not the candidate"):
        engine.policy.admit("r1", 0.0)
    engine.policy.check()
    assert engine.settle() == ["r1"]


def test_a_retired_adapter_serves_its_requests_and_is_forgotten():
    engine = Engine(20)
    engine.add(a=2)
    engine.arrive("r1", "a")
    engine.settle()
    engine.policy.retire_adapter("a")
    engine.finish("r1", 1.0)
    engine.step(1.0)
    assert engine.held == {}
    assert not engine.policy.cache.knows("a")
    engine.add(a=2)
    engine.policy.check()


@pytest.mark.parametrize("scheduler", ["chameleon", "paper", "fifo", "sjf", "static"])
@pytest.mark.parametrize(("policy", "slots"), [("chameleon", None), ("discard", None), ("chameleon", 3)])
def test_random_histories_keep_every_request_and_every_block(scheduler, policy, slots):
    rng = random.Random(f"{scheduler}-{policy}")
    engine = Engine(
        40,
        scheduler,
        max_num_seqs=6,
        adapter_policy=policy,
        adapter_host_bytes=300,
        max_blocks=slots or 25,
        slots=slots,
    )
    engine.add(**{f"a{i}": 1 if slots else 1 + i for i in range(10)})
    live, ended, now_s = set(), 0, 0.0
    for number in range(700):
        now_s += rng.expovariate(20)
        if len(live) < 30:
            digest = rng.choice([None, *engine.adapters])
            engine.arrive(f"r{number}", digest, rng.randrange(1, 120), rng.randrange(1, 40), now_s)
            live.add(f"r{number}")
        choice = rng.random()
        if choice < 0.1:
            engine.abort(victim := rng.choice(sorted(live)), now_s)
            live.discard(victim)
        elif choice < 0.2 and engine.kv:
            engine.preempt(rng.choice(sorted(engine.kv)), now_s)
        elif choice < 0.7 and engine.kv:
            engine.finish(done := rng.choice(sorted(engine.kv)), now_s)
            live.discard(done)
            ended += 1
        if rng.random() < 0.5:
            engine.complete(1)
        engine.step(now_s)
        assert engine.policy.num_running == len(engine.kv)
        assert engine.policy.num_running + engine.policy.num_waiting == len(live)
    assert ended > 50
    for _ in range(2000):
        engine.complete()
        engine.step(now_s := now_s + 0.1)
        for request_id in list(engine.kv):
            engine.finish(request_id, now_s)
            live.discard(request_id)
        if not live:
            break
    assert not live, "a request was never admitted"
