"""How many slots there are, by what fits and by what runs and waits."""

import pytest

from operators.engine.layout import Layout, Planner
from operators.engine.scheduler import Job, Scheduler, SchedulerConfig


def planner(memory_tokens, longest_tokens=10_000):
    return Planner(lambda tokens: memory_tokens // tokens, longest_tokens)


def test_nothing_is_bounded_where_memory_is_not_known():
    layout = Planner(lambda tokens: None, 100).layout(50, 8)
    assert layout == Layout(8, None, 0)
    assert layout.fits(10**9)


@pytest.mark.parametrize("memory_tokens", [999, 1000, 5000, 77_777])
@pytest.mark.parametrize("token_count", [1, 10, 90, 700, 9_999])
@pytest.mark.parametrize("most_slots", [1, 7, 64])
def test_a_layout_knows_what_else_fits_and_what_would_fit_more_often(memory_tokens, token_count, most_slots):
    layout = planner(memory_tokens).layout(token_count, most_slots)
    fitting = memory_tokens // token_count
    assert layout.slot_count == max(1, min(most_slots, fitting))
    assert layout.fits(token_count)
    if fitting:
        # The longest of which there may be as many, and not one token more.
        assert layout.most_tokens == min(10_000, memory_tokens // layout.slot_count)
        assert layout.fits(layout.most_tokens)
        assert not layout.fits(layout.most_tokens + 1)
    if layout.short_tokens:
        assert min(most_slots, memory_tokens // layout.short_tokens) >= 1.25 * layout.slot_count
        assert layout.short_tokens < layout.most_tokens
    else:
        assert layout.slot_count * 1.25 > most_slots or memory_tokens < layout.slot_count * 1.25


def scheduler(layout, *running, waiting=()):
    """A scheduler of such slots in which jobs of these lengths run and wait."""
    plan = Scheduler(SchedulerConfig(slot_count=layout.slot_count))
    plan.resize(layout)
    for ticket, tokens in enumerate([*running, *waiting]):
        plan.submit([Job(ticket, 5, most_tokens=tokens, encoded=True)])
        if ticket < len(running):
            assert plan.admit()
    return plan


def lengths(jobs):
    return [job.most_tokens for job in jobs]


def test_those_for_which_there_are_few_slots_go_first():
    plan = scheduler(Layout(4, most_tokens=250, short_tokens=200), waiting=[20, 240, 30, 900, 250, 10])
    assert lengths(plan.coming()) == [240, 250, 20, 30, 10]
    assert lengths(plan.admit()) == [240, 250, 20, 30]
    assert lengths(plan.waiting) == [900, 10]


def test_more_slots_are_made_when_all_that_runs_and_comes_is_short():
    made = planner(1000)
    layout = made.layout(250, 64)
    assert layout == Layout(4, 250, 200)
    plan = scheduler(layout, 20, 30, waiting=[40] * 9)
    assert plan.next_layout(lambda tokens: made.layout(tokens, 64)) == made.layout(40, 64)
    # A long one still runs; a long one comes next; nobody waits for more slots.
    for other in (
        scheduler(layout, 20, 240, waiting=[40] * 9),
        scheduler(layout, 20, 30, waiting=[240] + [40] * 9),
        scheduler(layout, 20, 30, waiting=[40] * 2),
        scheduler(layout, 20, 30),
    ):
        assert other.next_layout(lambda tokens: made.layout(tokens, 64)) is None


def test_fewer_slots_are_made_when_they_hold_all_that_runs():
    made = planner(1000)
    layout = made.layout(20, 64)
    assert layout.slot_count == 50

    def following(plan):
        return plan.next_layout(lambda tokens: made.layout(tokens, 64))

    assert following(scheduler(layout, *[20] * 3, waiting=[250])) == made.layout(250, 64)
    assert following(scheduler(layout, *[20] * 4, waiting=[250])) is None
    # One that fits goes before it.
    assert following(scheduler(layout, *[20] * 3, waiting=[250, 10])) is None
    assert following(scheduler(layout, waiting=[250, 10])) == made.layout(250, 64)


def test_jobs_move_into_the_slots_that_are_left():
    plan = scheduler(Layout(6), *[20] * 6)
    for job in [plan.slots[slot] for slot in (0, 2, 3)]:
        plan.release(job)
    moves = plan.packing(3)
    assert sorted((job.slot, slot) for job, slot in moves) == [(4, 2), (5, 0)]
    for job, slot in moves:
        plan.move(job, slot)
    plan.resize(Layout(3))
    assert [job.ticket for job in plan.running] == [5, 1, 4]
    assert not plan.waiting
