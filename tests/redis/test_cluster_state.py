"""The follower's state against a model, through random histories."""

from hypothesis import given, settings
from hypothesis import strategies as st

from chameleon_ray.placement.messages import Beat
from chameleon_ray.placement.state import ClusterState
from chameleon_ray.policy.adapter import Tier
from chameleon_ray.routing.replica_load import ReplicaLoad

tiers = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(Tier), max_size=6)
steps = st.lists(
    st.tuples(st.sampled_from(["r1", "r2", "r3"]), st.sampled_from(["delta", "lost", "whole", "drop"]), tiers)
)


def beat(replica_id: str, seq: int) -> Beat:
    return Beat(
        replica_id=replica_id, node_id="n", run="run", seq=seq, load=ReplicaLoad(), failed={}, catalog_version=0
    )


@settings(deadline=None)
@given(steps)
def test_index_and_old_views_hold_through_any_history(history):
    state = ClusterState()
    truth: dict[str, dict[str, Tier]] = {}
    seqs: dict[str, int] = {}
    pictures = []
    for now_s, (replica_id, kind, change) in enumerate(history):
        if kind == "drop":
            state.drop_replica(replica_id)
            truth.pop(replica_id, None)
        else:
            previous = seqs.get(replica_id, 0)
            seqs[replica_id] = previous + (2 if kind == "lost" else 1)
            message = beat(replica_id, seqs[replica_id])
            known = replica_id in truth
            whole = change if kind == "whole" else {**truth.get(replica_id, {}), **change}
            applied = state.apply_report(message, None if kind == "whole" else change, now_s)
            assert applied == (known and kind == "delta")
            if not applied:
                state.set_report(message, whole, now_s)
            truth[replica_id] = {digest: tier for digest, tier in whole.items() if tier is not Tier.ABSENT}
            assert state.apply_report(message, {"a": Tier.GPU}, now_s), "a message twice is like once"
        state.check()
        view = state.view()
        assert {r: dict(status.tiers) for r, status in view.replicas.items()} == truth
        assert state.view() is view
        pictures.append((view, {digest: dict(held) for digest, held in view.holders.items()}))
    for view, holders in pictures:
        assert {digest: dict(held) for digest, held in view.holders.items()} == holders
