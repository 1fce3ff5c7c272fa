import pytest
from queue_room import SIZING, Room, queues, request, step

from chameleon_ray.policy.adapter import Adapter
from chameleon_ray.policy.admission import Admission, Obstacle
from chameleon_ray.policy.disciplines import UNLIMITED, QueueOptions
from chameleon_ray.policy.queues import QueueError
from chameleon_ray.policy.sizing import SizingOptions


def add(under_test, *requests, now_s=0.0):
    for one in requests:
        under_test.add(one, now_s)


def many(prefix, count, tokens):
    return [request(f"{prefix}{index}", tokens) for index in range(count)]


# --- Algorithm 1, by hand: four static queues of 300 tokens -----------------------------------------------------------


def test_phase_one_admits_from_every_queue_within_its_own_quota_smallest_first():
    waiting = queues()
    add(waiting, *many("d", 2, 200), *many("c", 3, 150), *many("b", 4, 100), *many("a", 7, 50))
    assert step(waiting) == ["a0", "a1", "a2", "a3", "a4", "a5", "b0", "b1", "b2", "c0", "c1", "d0"]
    assert [queue.used_tokens for queue in waiting.state().queues] == [300, 300, 300, 200]


def test_phase_two_offers_what_emptied_queues_leave_in_the_same_order():
    waiting = queues()
    add(waiting, *many("c", 3, 150), *many("b", 4, 100), *many("a", 7, 50))
    admitted = step(waiting)
    assert admitted[:11] == ["a0", "a1", "a2", "a3", "a4", "a5", "b0", "b1", "b2", "c0", "c1"]
    assert admitted[11:] == ["a6", "b3", "c2"]  # 50 + 100 + 150 of the last queue's 300
    assert [queue.used_tokens for queue in waiting.state().queues] == [300] * 4
    for lent in ("a6", "b3", "c2"):
        waiting.finish(lent, 1.0, 10)
    assert [queue.used_tokens for queue in waiting.state().queues] == [300, 300, 300, 0]


def test_a_queue_stops_at_its_first_request_that_does_not_fit():
    waiting = queues()
    add(waiting, request("d0", 200), request("d1", 200), request("d2", 160), *many("c", 3, 150), *many("b", 4, 100))
    # d1 lacks 100 in phase 1; the first queue's 300 are spare: b3 100, c2 150, then 50 + 100 of its own are not 200.
    assert step(waiting)[-2:] == ["b3", "c2"]
    assert [one.request_id for one in waiting.waiting(3)] == ["d1", "d2"]


def test_quota_of_a_queue_with_waiting_requests_is_not_lent():
    room = Room()
    room.admissions["slow"] = Admission.LOADING
    waiting = queues(room=room)
    sizing_bytes_fit = request("waits", 160, "slow")
    add(waiting, sizing_bytes_fit, *many("a", 40, 50))
    assert len(step(waiting)) == 18  # 300 own and 2 * 300 of two empty queues, not the loading one's


@pytest.mark.parametrize("way", ["finish", "abort", "preempt", "squash"])
def test_tokens_return_on_every_way_out(way):
    waiting = queues()
    add(waiting, *many("a", 7, 50))
    step(waiting)
    for one in many("a", 7, 50):
        if way == "finish":
            waiting.finish(one.request_id, 1.0, 5)
        elif way == "abort":
            waiting.remove(one.request_id)
        else:
            waiting.requeue(one.request_id, 1.0, squashed=way == "squash")
        waiting.check()
    assert [queue.used_tokens for queue in waiting.state().queues] == [0] * 4
    assert waiting.num_waiting == (7 if way in ("preempt", "squash") else 0)


def test_an_adapter_is_borrowed_for_once_for_as_long_as_anybody_uses_it():
    waiting = queues(sizing=SizingOptions(1, max_input_tokens=100, max_output_tokens=100, max_adapter_bytes=40))
    adapter = Adapter("x", rank=8, size_bytes=40)
    add(waiting, request("small", 50, adapter), request("large", 150, adapter))
    assert step(waiting) == ["small", "large"]
    assert [queue.used_tokens for queue in waiting.state().queues] == [50 + 40, 0, 150, 0]
    waiting.finish("small", 1.0, 25)
    waiting.check()
    assert [queue.used_tokens for queue in waiting.state().queues] == [0, 0, 150 + 40, 0], "its memory is in use yet"
    waiting.remove("large")
    waiting.check()
    assert [queue.used_tokens for queue in waiting.state().queues] == [0] * 4


def test_a_preempted_request_returns_to_its_old_place():
    waiting = queues(total_tokens=400)
    add(waiting, *many("a", 3, 50))
    add(waiting, *many("b", 1, 100), *many("c", 1, 150), *many("d", 1, 200))
    assert step(waiting)[:2] == ["a0", "a1"]
    waiting.requeue("a1", 1.0)
    waiting.requeue("a0", 1.0)
    assert [one.request_id for one in waiting.waiting(0)] == ["a0", "a1", "a2"]


def test_admission_reports_queue_and_wait_and_a_preempted_request_waits_anew():
    waiting = queues()
    waiting.add(request("b", 100), 1.0)
    waiting.begin_step(3.5)
    waiting.peek()
    first = waiting.admit("b")
    assert (first.queue, first.waited_s, first.bypass) == (1, 2.5, False)
    waiting.requeue("b", 5.0)
    waiting.begin_step(6.0)
    waiting.peek()
    assert waiting.admit("b").waited_s == 1.0


# --- Loading adapters -------------------------------------------------------------------------------------------------


def test_a_request_with_a_loading_adapter_is_passed_over_and_keeps_its_place():
    room = Room()
    waiting = queues(room=room)
    room.admissions["x"] = Admission.LOADING
    add(waiting, request("old", 40, "x"), request("young", 40))
    assert step(waiting) == ["young"]
    assert waiting.state().queues[0].num_loading == 1
    waiting.requeue("young", 0.0)
    room.admissions["x"] = Admission.READY
    assert step(waiting) == ["old", "young"]


def test_a_driver_that_starts_the_load_itself_is_not_asked_again_while_it_loads():
    room = Room()
    waiting = queues(room=room)
    room.admissions["x"] = Admission.FITS
    add(waiting, request("first", 40, "x"), request("second", 40, "x"))
    waiting.begin_step(0.0)
    assert waiting.peek().request_id == "first"
    room.admissions["x"] = Admission.LOADING
    waiting.pass_over("first", Obstacle.LOADING)
    assert waiting.peek() is None
    add(waiting, request("third", 40, "x"))
    assert step(waiting) == [] and waiting.state().queues[0].num_loading == 3
    room.admissions["x"] = Admission.READY
    assert step(waiting) == ["first", "second", "third"]


def test_a_slow_first_load_stalls_nobody():
    room = Room()
    room.admissions["slow"] = Admission.LOADING
    waiting = queues(room=room, max_overtakes=2)
    add(waiting, request("old", 40, "slow"))
    for number in range(50):
        add(waiting, request(f"young{number}", 40))
        assert step(waiting) == [f"young{number}"]
        waiting.finish(f"young{number}", 1.0, 5)
    assert waiting.state().num_holds == 0


def three_hundred_loading():
    room = Room()
    waiting = queues(room=room)
    for number in range(300):
        room.admissions[f"x{number}"] = Admission.LOADING
        add(waiting, request(f"cold{number}", 40, f"x{number}"))
    return room, waiting


def test_hundreds_of_loading_adapters_do_not_hide_a_ready_request_for_long():
    room, waiting = three_hundred_loading()
    add(waiting, request("ready", 40))
    steps = next(count for count in range(1, 20) if step(waiting) == ["ready"])
    assert steps == 13  # 24 looked at in each step
    room.admissions["x299"] = Admission.READY
    assert any(step(waiting) == ["cold299"] for _ in range(25))  # 12 asked about in each step


def test_an_adapter_that_has_moved_is_asked_about_first():
    room, waiting = three_hundred_loading()
    for _ in range(13):
        assert step(waiting) == []  # all are set aside
    for number in (299, 17):
        room.admissions[f"x{number}"] = Admission.READY
        waiting.adapter_moved(f"x{number}")
    waiting.adapter_moved("nobody waits for it")
    assert step(waiting) == ["cold17", "cold299"]


def test_an_adapter_that_is_lost_again_and_again_makes_the_queue_wait():
    room = Room()
    waiting = queues(room=room, max_overtakes=3)
    full = {"unlucky": Obstacle.NO_MEMORY}
    add(waiting, request("unlucky", 40, "x"))
    assert step(waiting, obstacles=full) == []  # its adapter was ready once
    room.admissions["x"] = Admission.LOADING
    passed = 0
    for number in range(10):
        add(waiting, request(f"young{number}", 40))
        passed += len(step(waiting))
    assert passed == 3
    room.admissions["x"] = Admission.READY
    assert step(waiting)[0] == "unlucky"


# --- Bypass and squash ------------------------------------------------------------------------------------------------


def busy_replica(room, **options):
    """40 requests taught 0.1 s per token; ``hog`` runs until 2 s by prediction; ``head`` lacks room until then."""
    waiting = queues(room=room, total_tokens=4000, **options)
    for number in range(40):
        add(waiting, request(f"past{number}", 20))
        step(waiting)
        waiting.finish(f"past{number}", 1.0, 10)
    add(waiting, request("hog", 40))
    waiting.begin_step(0.0)
    waiting.peek()
    waiting.admit("hog")
    room.admissions["big"] = Admission.NO_ROOM
    room.needed_ends = frozenset({"hog"})
    add(waiting, request("head", 40, "big"))
    return waiting


def test_a_short_request_bypasses_a_head_without_room_and_a_long_one_does_not():
    room = Room()
    waiting = busy_replica(room)
    add(waiting, request("long", 42), request("short", 38))  # 21 tokens end at 2.1 s, 19 at 1.9 s
    assert step(waiting) == ["short"]
    state = waiting.state()
    assert (state.num_bypasses, state.num_squashes) == (1, 0)
    assert [one.request_id for one in waiting.waiting(0)] == ["head", "long"]


def test_without_a_prediction_of_room_nobody_bypasses():
    room = Room()
    waiting = busy_replica(room)
    room.needed_ends = frozenset({"hog", "somebody unknown"})
    add(waiting, request("short", 4))
    assert step(waiting) == []


def test_other_queues_go_on_while_a_head_has_no_room():
    room = Room()
    waiting = busy_replica(room)
    add(waiting, request("long", 42), request("other queue", 90))
    assert step(waiting) == ["other queue"]


def test_fifo_has_no_bypass():
    room = Room()
    room.admissions["big"] = Admission.NO_ROOM
    waiting = queues("fifo", room)
    add(waiting, request("head", 40, "big"), request("short", 4))
    assert step(waiting) == []


def test_bypasses_stay_within_the_share_that_squashes_may_have():
    room = Room()
    waiting = busy_replica(room)  # 41 admissions: 5% is 2.05
    add(waiting, *many("short", 5, 10))
    assert step(waiting) == ["short0", "short1"]


def test_a_bypasser_is_squashed_when_its_room_would_do_for_the_head():
    room = Room()
    waiting = busy_replica(room)
    add(waiting, request("short", 38))
    assert step(waiting) == ["short"]
    assert waiting.squashes() == ()
    room.needed_ends = frozenset({"short"})  # the hog ended early: only the bypasser is in the way
    waiting.finish("hog", 0.5, 5)
    assert waiting.squashes() == ("short",)
    assert waiting.squashes() == ("short",)  # a question
    waiting.requeue("short", 0.5, squashed=True)
    assert waiting.state().num_squashes == 1
    assert [one.request_id for one in waiting.waiting(0)] == ["head", "short"]
    room.admissions["big"] = Admission.READY
    assert step(waiting, 0.5) == ["head", "short"]
    waiting.check()


def test_a_squash_returns_quota_enough_for_the_head_as_well():
    room = Room()
    waiting = queues(room=room, total_tokens=240, max_squash_share=1.0)  # four quotas of 60
    add(waiting, request("hog", 98))
    step(waiting)
    add(waiting, request("past", 20))
    step(waiting)
    waiting.finish("past", 1.0, 10)
    room.admissions["big"] = Admission.NO_ROOM
    room.needed_ends = frozenset({"hog"})
    add(waiting, request("head", 40, "big"), request("one", 30), request("two", 28))
    assert step(waiting) == ["one", "two"]
    room.needed_ends = frozenset({"two"})  # 28 would be room enough, but with the 2 left no quota for 41
    assert waiting.squashes() == ("two", "one")


def test_a_head_aborted_while_another_bypasses_it_leaves_no_bypass():
    room = Room()
    waiting = busy_replica(room)
    add(waiting, request("short", 4))
    waiting.begin_step(0.0)
    assert waiting.peek().request_id == "short"
    waiting.remove("head")
    assert not waiting.admit("short").bypass
    waiting.check()


def test_no_squash_when_the_head_has_room_or_left():
    room = Room()
    waiting = busy_replica(room)
    add(waiting, request("short", 38))
    step(waiting)
    room.needed_ends = frozenset({"short"})
    room.admissions["big"] = Admission.FITS
    assert waiting.squashes() == ()
    room.admissions["big"] = Admission.NO_ROOM
    waiting.remove("head")
    assert waiting.squashes() == ()
    waiting.check()


def test_a_squashed_request_does_not_bypass_again():
    room = Room()
    waiting = busy_replica(room, max_squash_share=1.0)
    add(waiting, request("short", 4))
    assert step(waiting) == ["short"]
    waiting.requeue("short", 0.0, squashed=True)
    assert step(waiting) == []


# --- Starvation -------------------------------------------------------------------------------------------------------


def test_an_endless_bypass_ends():
    room = Room()
    waiting = busy_replica(room, max_squash_share=1.0, max_overtakes=3)
    passed = 0
    for number in range(20):
        add(waiting, request(f"short{number}", 4))
        for admitted in step(waiting):
            waiting.finish(admitted, 0.2, 2)
            passed += 1
    assert passed == 3


def test_a_request_above_any_quota_runs_when_nobody_else_does():
    waiting = queues(total_tokens=100)
    add(waiting, request("giant", 500))
    assert step(waiting) == ["giant"]
    waiting.finish("giant", 1.0, 5)
    waiting.check()


def test_a_request_above_any_quota_gets_its_turn_under_a_stream_of_small_ones():
    waiting = queues(max_overtakes=8)
    waiting.add(request("seed", 50), 0.0)
    step(waiting)
    waiting.add(request("giant", 900), 0.0)
    overtaken = 0
    for number in range(500):
        add(waiting, request(f"a{number}", 50), request(f"b{number}", 100), request(f"c{number}", 150))
        admitted = step(waiting, float(number))
        if "giant" in admitted:
            break
        overtaken += len(admitted)
        for running in [
            one for one in [f"a{number - 3}", f"b{number - 3}", f"c{number - 3}", "seed"] if one in waiting
        ]:
            if running not in [one.request_id for queue in range(4) for one in waiting.waiting(queue)]:
                waiting.finish(running, float(number), 5)
    else:
        pytest.fail("the giant starved")
    assert overtaken <= 2 * 8 + 3 * 4
    assert waiting.state().num_holds == 1


def test_large_requests_get_seats_when_seats_run_out_before_tokens():
    waiting = queues(total_tokens=10**6, max_num_seqs=8)
    add(waiting, *many("d", 20, 200), *many("a", 100, 50))
    step(waiting, max_admitted=8)
    running = [queue.num_running for queue in waiting.state().queues]
    assert running == [6, 0, 0, 2]  # a quarter each; the smallest also took what the two empty queues left


def test_seats_are_kept_for_queues_with_waiting_requests():
    room = Room()
    room.admissions["x"] = Admission.LOADING
    waiting = queues(room=room, total_tokens=10**6, max_num_seqs=8)
    add(waiting, request("large", 200, "x"), *many("a", 20, 50))
    assert len(step(waiting)) == 6  # two of its share, four of two empty queues; the loading one's stay free


def test_a_driver_that_never_gets_to_the_last_queue_is_made_to():
    waiting = queues(total_tokens=10**6, max_overtakes=4)
    add(waiting, request("large", 200))
    for number in range(30):
        add(waiting, *(request(f"a{number}.{index}", 50) for index in range(2)))
        if "large" in (admitted := step(waiting, float(number), max_admitted=1)):
            break
        waiting.finish(admitted[0], number + 0.5, 5)
    assert number <= 2 * 4 + 1


def test_what_the_engine_waits_for_elsewhere_holds_up_nobody():
    waiting = queues(max_overtakes=2)
    add(waiting, request("session", 40))
    for number in range(30):
        add(waiting, request(f"a{number}", 50))
        assert step(waiting, obstacles={"session": Obstacle.NOT_READY}) == [f"a{number}"]
        waiting.finish(f"a{number}", 1.0, 5)


def test_holding_for_what_the_engine_is_not_ready_for_ends_at_once():
    waiting = queues(total_tokens=10**6, max_overtakes=2)
    add(waiting, request("busy", 50))
    step(waiting)
    add(waiting, request("session", 200))
    served = 0
    for number in range(60):
        add(waiting, request(f"a{number}", 50))
        for admitted in step(waiting, max_admitted=1, obstacles={"session": Obstacle.NOT_READY}):
            waiting.finish(admitted, 1.0, 5)
            served += 1
    assert waiting.state().num_holds > 0 and served >= 45


def test_nobody_is_held_up_while_a_request_held_for_loads_for_the_first_time():
    room = Room()
    waiting = busy_replica(room, max_overtakes=2)
    for number in range(6):
        add(waiting, request(f"b{number}", 90))
        step(waiting)
    assert waiting.state().num_holds == 1 and step(waiting) == []
    add(waiting, request("other", 90))
    assert step(waiting) == []
    room.admissions["big"] = Admission.LOADING
    assert "other" in step(waiting)
    room.admissions["big"] = Admission.READY
    assert "head" in step(waiting)


def test_a_request_that_can_never_fit_does_not_hold_the_replica_for_ever():
    room = Room()
    room.admissions["huge"] = Admission.NO_ROOM
    waiting = queues(room=room, max_overtakes=2)
    add(waiting, request("impossible", 40, "huge"))
    served = 0
    for number in range(60):
        add(waiting, request(f"b{number}", 90))
        for admitted in step(waiting, float(number)):
            waiting.finish(admitted, number + 0.5, 5)
            served += 1
    assert served >= 40


# --- Disciplines ------------------------------------------------------------------------------------------------------


def test_fifo_admits_in_order_of_arrival_and_stops_where_memory_ends():
    waiting = queues("fifo")
    add(waiting, request("large", 200), request("small", 10), request("middle", 100))
    assert step(waiting, obstacles={"middle": Obstacle.NO_MEMORY}) == ["large", "small"]
    waiting.requeue("small", 1.0)
    assert step(waiting, obstacles={"small": Obstacle.NO_MEMORY}) == []


def test_sjf_admits_by_predicted_size_whatever_the_age():
    waiting = queues("sjf")
    add(waiting, request("large", 200), now_s=0.0)
    add(waiting, request("middle", 100), request("small", 10), now_s=100.0)
    assert step(waiting, 100.0) == ["small", "middle", "large"]


def test_sjf_starves_large_requests():
    waiting = queues("sjf", max_overtakes=1)
    add(waiting, request("large", 200))
    for number in range(100):
        add(waiting, request(f"a{number}", 50))
        assert step(waiting, obstacles={"large": Obstacle.NO_MEMORY}) == [f"a{number}"]


def test_static_has_four_equal_queues_for_ever():
    waiting = queues("static")
    layout = waiting.refresh(0.0)
    add(waiting, *many("a", 200, 50))
    assert waiting.refresh(1000.0) == layout
    assert layout.cutoffs == (0.25, 0.5, 0.75) and layout.quotas == (300,) * 4


def busy_chameleon(**options):
    """Queues by thirds of size: 20, 60 and 180 tokens. A boost counts at most 1.2 s of age (an SLO of 24 s)."""
    waiting = queues("chameleon", total_tokens=100, scheduler_slo_s=24.0, **options)
    for number in range(200):
        add(waiting, request(f"a{number}", 20), request(f"m{number}", 60), request(f"z{number}", 180), now_s=number)
    while waiting.num_waiting:
        for admitted in step(waiting, 600.0, max_admitted=1):
            waiting.finish(admitted, 600.0, 10)
    waiting.refresh(600.0)
    return waiting


def test_chameleons_classes_are_thirds_of_recent_requests():
    waiting = busy_chameleon()
    add(waiting, request("large", 180), request("small", 20), request("medium", 60), now_s=1000.0)
    assert [[one.request_id for one in waiting.waiting(queue)] for queue in range(3)] == [
        ["small"],
        ["medium"],
        ["large"],
    ]
    equal = queues("chameleon")
    add(equal, *many("a", 100, 40))
    equal.refresh(0.0)
    assert len(equal.waiting(0)) == 100


def test_chameleon_takes_the_earliest_boosted_arrival_of_all_queues():
    waiting = busy_chameleon()
    add(waiting, request("large", 180), now_s=1000.0)
    add(waiting, request("small", 20), now_s=1001.1)  # 1.2 s earlier, after 1.2 s
    add(waiting, request("late medium", 60), now_s=1001.1)  # 0.6 s earlier
    add(waiting, request("second large", 180), now_s=1001.2)
    add(waiting, request("late small", 20), now_s=1002.6)
    assert step(waiting, 2000.0) == ["small", "large", "late medium", "second large", "late small"]


def test_chameleon_goes_by_arrival_while_requests_are_young():
    waiting = busy_chameleon()
    add(waiting, request("large", 180), now_s=1000.0)
    add(waiting, request("small", 20), now_s=1000.5)
    assert step(waiting, 1000.9, max_admitted=1) == ["large"]  # small counts as of 1000.1


def test_chameleon_reserves_nothing_for_a_queue():
    waiting = busy_chameleon()
    add(waiting, request("waits", 180, "x"), *many("a", 10, 20), now_s=1000.0)
    assert len(step(waiting, 1000.0, obstacles={"waits": Obstacle.NOT_READY})) == 10
    assert {queue.quota_tokens for queue in waiting.state().queues} == {UNLIMITED}


def test_chameleons_order_stops_at_a_request_without_kv_memory():
    waiting = busy_chameleon()
    add(waiting, request("large", 180), now_s=1000.0)
    add(waiting, request("small", 20), now_s=1500.0)
    assert step(waiting, 1500.0, obstacles={"large": Obstacle.NO_MEMORY}) == []


def test_paper_learns_its_queues_from_traffic():
    waiting = queues("paper", total_tokens=10_000)
    assert len(waiting.state().queues) == 1
    for number in range(40):
        add(waiting, request(f"a{number}", 20), request(f"z{number}", 180), now_s=number * 0.1)
    waiting.begin_step(4.0)
    state = waiting.state()
    assert [queue.max_size for queue in state.queues] == [pytest.approx(0.5), float("inf")]
    assert [queue.num_waiting for queue in state.queues] == [40, 40]
    # Equal rates and durations: quotas go by the largest request, 20 to 180.
    assert [queue.quota_tokens for queue in state.queues] == [1000, 9000]


def test_paper_has_no_queue_that_its_largest_request_does_not_fit():
    def quotas(total_tokens):
        waiting = queues("paper", total_tokens=total_tokens)
        for number in range(40):
            add(waiting, request(f"a{number}", 20), request(f"z{number}", 180), now_s=number * 0.1)
        return waiting.refresh(4.0).quotas

    assert quotas(200) == (20, 180)
    assert quotas(199) == (199,)


def test_paper_reports_quotas_that_cannot_hold_the_slo():
    waiting = queues("paper", total_tokens=100, scheduler_slo_s=1.0)
    add(waiting, *many("a", 100, 200), now_s=0.0)
    waiting.begin_step(1.0)
    assert 0 < waiting.state().minima_scale < 1


def test_unknown_discipline_names_the_choices():
    with pytest.raises(QueueError, match="chameleon, paper, fifo, sjf, static"):
        queues("lifo")


@pytest.mark.parametrize(
    "bad", [{"total_tokens": 0}, {"max_overtakes": 0}, {"scheduler_refresh_s": 0}, {"max_num_seqs": -1}]
)
def test_unusable_options_are_refused(bad):
    with pytest.raises(ValueError):
        QueueOptions(**{"total_tokens": 100, "sizing": SizingOptions(1), **bad})


# --- Order and refresh ------------------------------------------------------------------------------------------------


def test_priority_orders_equals_and_is_worth_bounded_seniority():
    waiting = queues()
    add(waiting, request("normal", 40), request("urgent", 40, priority=-1), request("later", 40, priority=1))
    assert step(waiting) == ["urgent", "normal", "later"]
    add(waiting, request("patient", 40, priority=10**9), now_s=0.0)
    add(waiting, request("newcomer", 40, priority=-(10**9)), now_s=20.5)
    assert step(waiting, 20.5) == ["patient", "newcomer"]  # at most ten levels each way: 20 s


def test_refresh_moves_waiting_requests_in_order_and_comes_early_while_they_wait():
    waiting = queues("paper", total_tokens=300)
    for number in range(64):
        add(waiting, request(f"r{number}", 20 if number % 2 else 180), now_s=number * 0.01)
    step(waiting, 1.0)
    order = [int(one.request_id[1:]) for queue in range(2) for one in waiting.waiting(queue)]
    running = waiting.num_running
    assert 0 < running < 64 and len(order) == 64 - running
    refreshes = waiting.state().num_refreshes
    step(waiting, 60.9)
    assert waiting.state().num_refreshes == refreshes
    step(waiting, 61.1)
    assert waiting.state().num_refreshes == refreshes + 1
    for queue in range(len(waiting.state().queues)):
        numbers = [int(one.request_id[1:]) for one in waiting.waiting(queue)]
        assert numbers == sorted(numbers)
    waiting.check()


def test_refresh_comes_every_five_minutes_while_nobody_waits():
    waiting = queues("chameleon")
    add(waiting, request("a", 40), now_s=0.0)
    assert step(waiting, 1.0) == ["a"]
    refreshes = waiting.state().num_refreshes
    step(waiting, 300.9)
    assert waiting.state().num_refreshes == refreshes
    step(waiting, 301.1)
    assert waiting.state().num_refreshes == refreshes + 1


def test_refresh_ends_the_step_under_way():
    waiting = queues()
    add(waiting, request("a", 40))
    waiting.begin_step(0.0)
    waiting.peek()
    waiting.refresh(0.0)
    assert waiting.peek() is None
    with pytest.raises(QueueError):
        waiting.admit("a")


# --- Misuse changes nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "misuse",
    [
        lambda waiting: waiting.add(request("a", 40), 0.0),
        lambda waiting: waiting.admit("b"),
        lambda waiting: waiting.pass_over("b", Obstacle.LOADING),
        lambda waiting: waiting.pass_over("a", Obstacle.QUOTA),
        lambda waiting: waiting.finish("a", 0.0, 1),
        lambda waiting: waiting.requeue("a", 0.0),
        lambda waiting: waiting.remove("unknown"),
    ],
)
def test_misuse_is_refused_and_changes_nothing(misuse):
    waiting = queues()
    add(waiting, request("a", 40), request("b", 40))
    waiting.begin_step(0.0)
    assert waiting.peek().request_id == "a"
    before = waiting.state()
    with pytest.raises(QueueError):
        misuse(waiting)
    assert waiting.state() == before and waiting.peek().request_id == "a"
    waiting.check()


def test_aborting_the_candidate_gives_the_next():
    waiting = queues()
    add(waiting, request("a", 40), request("b", 40))
    waiting.begin_step(0.0)
    assert waiting.peek().request_id == "a"
    waiting.remove("a")
    assert waiting.peek().request_id == "b" and "a" not in waiting
    waiting.check()


def test_base_and_adapter_requests_share_queues():
    sizing = SizingOptions(kv_token_bytes=1000, max_input_tokens=100, max_output_tokens=100)
    waiting = queues(sizing=sizing)
    assert sizing != SIZING
    add(waiting, request("base", 40), request("lora", 40, "x"))
    assert step(waiting) == ["base", "lora"]
