import itertools
import random
import subprocess
import sys

import pytest

from operators.engine.layout import Layout
from operators.engine.retreat import CALM_PER_SLOT, Retreat
from operators.engine.scheduler import Job, Scheduler, SchedulerConfig

PLANNERS = ("layout", "repetition", "request", "retreat", "running", "scheduler")


def scheduler(slot_count, **options):
    return Scheduler(SchedulerConfig(slot_count=slot_count, **options))


def jobs(*prompt_tokens, first=0, **options):
    return [Job(first + number, tokens, **options) for number, tokens in enumerate(prompt_tokens)]


class Simulation:
    """What an engine does with its scheduler, on a model that knows how many tokens each slot holds, and of whom.

    Args:
        plan: the scheduler.
        lengths: tokens that each ticket answers.
    """

    def __init__(self, plan, lengths):
        self.plan = plan
        self.lengths = lengths
        self.jobs = {}
        self.held = {}
        self.ended = []
        self.admissions = []
        self.encodings = []
        self.parts = []
        self.widths = []

    def submit(self, arriving):
        self.jobs |= {job.ticket: job for job in arriving}
        self.plan.submit(arriving)

    def step(self):
        """One iteration; returns the prompt tokens that went before its step of decoding."""
        encoded = self.plan.to_encode()
        assert not any(job.encoded for job in encoded)
        for job in encoded:
            job.encoded = True
        if encoded:
            self.encodings.append([job.ticket for job in encoded])
        admitted = self.plan.admit()
        assert all(job.encoded and job.held_tokens == 0 for job in admitted)
        self.admissions += [job.ticket for job in admitted]
        self.check()
        prefilled = self.prefill()
        self.decode()
        self.check()
        return prefilled

    def prefill(self):
        room = self.plan.config.chunk_tokens
        while (part := self.plan.next_prefill(room)) is not None:
            assert part.count > 0
            assert [job.slot for job in part.jobs] == sorted({job.slot for job in part.jobs})
            for job in part.jobs:
                assert job.prefilled == part.start
                assert part.start == 0 or self.held[job.slot] == (job.ticket, part.start)
                job.prefilled += part.count
                assert job.prefilled <= job.prompt_tokens
                self.held[job.slot] = (job.ticket, job.prefilled)
                # The last part of a prompt brings the first token of its answer.
                if job.is_decoding and self.lengths[job.ticket] == 1:
                    self.end(job)
            self.parts.append((part.start, part.count, [job.ticket for job in part.jobs]))
            room -= part.count * len(part.jobs)
            assert room >= 0
        return self.plan.config.chunk_tokens - room

    def decode(self):
        for job, slot in self.plan.compaction():
            self.held[slot] = self.held[job.slot]
            self.plan.move(job, slot)
        decoding = self.plan.decoding()
        if decoding:
            self.widths.append((len(decoding), decoding[-1].slot + 1))
        for job in decoding:
            assert self.held[job.slot] == (job.ticket, job.held_tokens)
            job.generated += 1
            self.held[job.slot] = (job.ticket, job.held_tokens)
            if job.generated + 1 == self.lengths[job.ticket]:
                self.end(job)

    def end(self, job):
        self.plan.release(job)
        self.ended.append(job.ticket)

    def restart(self, taken, *, alone=False):
        for job in taken:
            job.encoded = job.ticket % 2 == 0
        self.plan.requeue(taken, alone=alone)

    def check(self):
        """No slot is used twice, nobody is in two places, nobody is lost, and who runs alone does."""
        running, waiting = self.plan.running, list(self.plan.waiting)
        assert all(self.plan.slots[job.slot] is job for job in running)
        assert all(job.slot is None and job.held_tokens == 0 for job in waiting)
        tickets = [job.ticket for job in (*running, *waiting)] + self.ended
        assert sorted(tickets) == sorted(self.jobs)
        assert len(running) == 1 or not any(job.alone for job in running)

    def run(self, most_steps=100_000):
        for _ in range(most_steps):
            if self.plan.is_idle:
                return self
            self.step()
        raise AssertionError("it does not end")


def simulate(plan, arriving, lengths):
    simulation = Simulation(plan, dict(enumerate(lengths)) if isinstance(lengths, list) else lengths)
    simulation.submit(arriving)
    return simulation


@pytest.mark.parametrize("name", PLANNERS)
def test_what_plans_imports_no_torch(name):
    code = f"import sys, operators.engine.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_a_request_is_admitted_in_the_step_after_one_ends():
    simulation = simulate(scheduler(2), jobs(5, 5, 5), [2, 9, 4])
    simulation.step()
    assert simulation.ended == [0]
    simulation.step()
    assert simulation.admissions == [0, 1, 2]
    assert [job.ticket for job in simulation.plan.decoding()] == [2, 1]
    assert simulation.run().widths[0] == (2, 2)


def test_slots_stay_full_while_requests_wait():
    generator = random.Random(5)
    lengths = [generator.randint(2, 60) for _ in range(200)]
    simulation = simulate(scheduler(8), jobs(*[10] * 200), lengths)
    while simulation.plan.waiting:
        simulation.step()
    assert {width for width, _ in simulation.widths[:-1]} == {8}
    assert simulation.run().ended != sorted(simulation.ended)


def test_a_long_prompt_leaves_room_for_answers_between_its_parts():
    simulation = simulate(scheduler(2, chunk_tokens=100), jobs(20, 1000), [40, 2])
    spent = [simulation.step() for _ in range(11)]
    assert spent == [20] + [100] * 10
    assert simulation.jobs[0].generated == 11
    assert simulation.ended == [1]
    assert [part[:2] for part in simulation.parts[1:]] == [(start, 100) for start in range(0, 1000, 100)]


def test_a_long_prompt_is_not_starved_by_short_ones():
    plan = scheduler(4, chunk_tokens=100)
    lengths = {0: 2} | dict.fromkeys(range(1, 400), 1)
    simulation = simulate(plan, jobs(1000), lengths)
    simulation.submit(jobs(*[60] * 399, first=1))
    # A part in each step from the second on, at the latest.
    for _ in range(12):
        simulation.step()
    assert simulation.ended.count(0) == 1


def test_short_prompts_go_on_before_a_long_one_is_begun_and_after_it():
    simulation = simulate(scheduler(4, chunk_tokens=100), jobs(60, 250, 30, 40), [50] * 4)
    spent = [simulation.step() for _ in range(4)]
    assert simulation.parts == [
        (0, 60, [0]), (0, 30, [2]), (0, 100, [1]), (100, 100, [1]), (200, 50, [1]), (0, 40, [3]),
    ]  # fmt: skip
    assert spent == [90, 100, 100, 90]


def test_a_prompt_that_fits_is_not_split():
    simulation = simulate(scheduler(3, chunk_tokens=100), jobs(70, 70, 70), [5] * 3)
    assert [simulation.step() for _ in range(3)] == [70, 70, 70]
    assert [part[:2] for part in simulation.parts] == [(0, 70)] * 3


def test_prompts_of_equal_length_go_together_as_far_as_they_fit():
    simulation = simulate(scheduler(6, chunk_tokens=100), jobs(30, 30, 20, 30, 30, 20), [5] * 6)
    simulation.step()
    assert simulation.parts == [(0, 30, [0, 1, 3])]
    simulation.step()
    assert simulation.parts[1:] == [(0, 20, [2, 5]), (0, 30, [4])]


def test_only_prompts_that_have_not_begun_go_together():
    simulation = simulate(scheduler(3, chunk_tokens=100), jobs(150, 150, 50), [5] * 3)
    simulation.step()
    simulation.step()
    assert simulation.parts == [(0, 100, [0]), (100, 50, [0]), (0, 50, [2])]


def test_the_longest_answers_are_begun_first_and_equals_in_their_order():
    arriving = jobs(5, 5, 5, 5, 5)
    for job, expected in zip(arriving, (10, 0, 300, 10, 0), strict=True):
        job.expected_tokens = expected
    simulation = simulate(scheduler(1), arriving, [3] * 5).run()
    assert simulation.admissions == [2, 0, 3, 1, 4]


def test_longest_first_shortens_the_drain():
    generator = random.Random(1)
    lengths = [int(generator.lognormvariate(4, 1)) + 2 for _ in range(60)]

    def steps(known):
        arriving = jobs(*[10] * 60)
        for job, length in zip(arriving, lengths, strict=True):
            job.expected_tokens = length if known else 0
        return len(simulate(scheduler(6), arriving, lengths).run().widths)

    least = -(-sum(length - 1 for length in lengths) // 6)
    assert least <= steps(known=True) < 1.05 * least
    assert steps(known=False) > 1.05 * steps(known=True)


def test_a_short_answer_is_not_overtaken_for_ever():
    plan = scheduler(2, most_overtaking=10, encode_ahead=1)
    lengths = dict.fromkeys(range(200), 3)
    simulation = simulate(plan, jobs(5, expected_tokens=1), lengths)
    for ticket in range(1, 100, 2):
        simulation.submit(jobs(5, 5, first=ticket, expected_tokens=50))
        simulation.step()
    # Ten came before it was in turn, and what was encoded or ran by then went before it.
    assert 5 <= simulation.admissions.index(0) <= 14


def test_one_that_runs_alone_is_not_overtaken_for_ever():
    plan = scheduler(3, most_overtaking=10)
    simulation = simulate(plan, jobs(5), dict.fromkeys(range(200), 3))
    simulation.step()
    simulation.restart(plan.running, alone=True)
    for ticket in range(1, 100, 2):
        simulation.submit(jobs(5, 5, first=ticket))
        simulation.step()
    assert 5 <= simulation.ended.index(0) <= 20


def test_alone_means_that_nobody_else_is_in_a_slot():
    plan = scheduler(4)
    simulation = simulate(plan, jobs(5, 5, 5), [9, 9, 9])
    simulation.step()
    simulation.restart(plan.running[:2], alone=True)
    together = []
    while not plan.is_idle:
        simulation.step()
        together.append([job.ticket for job in plan.running])
    assert simulation.ended == [2, 0, 1]
    assert all(len(tickets) < 2 for tickets in together)


def test_pictures_of_one_that_runs_alone_are_encoded_when_nothing_runs():
    plan = scheduler(2)
    simulation = simulate(plan, jobs(5, 5), [9, 4])
    simulation.step()
    simulation.restart([simulation.jobs[1]], alone=True)
    while simulation.jobs[0] in plan.running:
        assert plan.to_encode() == []
        simulation.step()
    assert plan.to_encode() == [simulation.jobs[1]]


def test_some_pictures_are_encoded_ahead_of_free_slots_and_no_more():
    simulation = simulate(scheduler(1, encode_ahead=3), jobs(*[5] * 7), [3] * 7).run()
    assert simulation.encodings == [[0, 1, 2], [3, 4, 5], [6]]


def test_longer_answers_that_come_later_do_not_pile_up_encoded_ones():
    plan = scheduler(1, encode_ahead=4)
    simulation = simulate(plan, jobs(*[5] * 4, expected_tokens=1), dict.fromkeys(range(100), 3))
    for ticket in range(4, 60):
        simulation.step()
        simulation.submit(jobs(5, first=ticket, expected_tokens=ticket))
        assert sum(job.encoded for job in plan.waiting) <= 4


def test_requests_with_the_same_pictures_are_encoded_together():
    arriving = jobs(*[5] * 6)
    for ticket, key in ((1, "page"), (4, "page"), (5, "other")):
        arriving[ticket].visual_key = key
    simulation = simulate(scheduler(1, encode_ahead=2), arriving, [2] * 6).run()
    assert simulation.encodings[0] == [0, 1, 4]
    assert sorted(itertools.chain(*simulation.encodings)) == list(range(6))


def test_what_starts_again_goes_before_what_waits():
    plan = scheduler(2)
    simulation = simulate(plan, jobs(*[5] * 5), [9] * 5)
    simulation.step()
    first = plan.running
    simulation.restart(first)
    assert [job.ticket for job in plan.waiting] == [0, 1, 2, 3, 4]
    assert all(job.held_tokens == 0 for job in first)
    plan.submit(jobs(5, first=9, expected_tokens=1000))
    assert [job.ticket for job in plan.waiting] == [0, 1, 9, 2, 3, 4]


def test_fewer_slots_keep_who_is_in_them():
    plan = scheduler(4)
    simulation = simulate(plan, jobs(*[5] * 6), [9] * 6)
    simulation.step()
    plan.resize(Layout(2))
    assert [job.ticket for job in plan.running] == [0, 1]
    assert [job.ticket for job in plan.waiting] == [2, 3, 4, 5]
    simulation.check()
    plan.resize(Layout(5))
    assert sorted(simulation.run().ended) == list(range(6))


def test_gaps_are_closed_only_when_nobody_waits_and_they_are_many():
    simulation = simulate(scheduler(8), jobs(*[5] * 8), [4, 9, 4, 9, 4, 9, 4, 9])
    simulation.run()
    assert simulation.widths == [(8, 8)] * 3 + [(4, 4)] * 5
    simulation = simulate(scheduler(8), jobs(*[5] * 8), [4, 9, 9, 9, 9, 9, 9, 9])
    simulation.run()
    assert simulation.widths == [(8, 8)] * 3 + [(7, 8)] * 5
    simulation = simulate(scheduler(4, chunk_tokens=100), jobs(*[5] * 4), dict(enumerate([4, 4, 4, 9, 2])))
    simulation.submit(jobs(600, first=4))
    for _ in range(4):
        simulation.step()
    # The long prompt is not done, and its slot is not moved.
    assert simulation.widths[-1] == (1, 4)


def test_nothing_to_do_is_idle():
    plan = scheduler(3)
    assert plan.is_idle
    assert plan.to_encode() == plan.admit() == plan.decoding() == plan.compaction() == []
    assert plan.next_prefill(100) is None


def test_a_retreat_goes_back_by_doubling_after_some_calm():
    retreat = Retreat(8, 8)
    retreat.halve(8)
    retreat.halve(4)
    assert (retreat.count, retreat.is_over_due) == (2, False)
    retreat.calm_answers = 2 * CALM_PER_SLOT
    assert retreat.is_over_due
    retreat.advance()
    assert (retreat.count, retreat.calm_answers) == (4, 0)
    retreat.halve(4)
    retreat.calm_answers = 2 * CALM_PER_SLOT
    assert not retreat.is_over_due
    retreat.calm_answers = 4 * CALM_PER_SLOT
    assert retreat.is_over_due
    for _ in range(3):
        retreat.advance()
    retreat.calm_answers = 10**6
    assert (retreat.count, retreat.is_over_due) == (8, False)


def random_event(simulation, generator):
    """Something that goes wrong, or is asked for, between two steps."""
    plan, event = simulation.plan, generator.random()
    if event < 0.02:
        simulation.restart(plan.decoding(), alone=True)
    elif event < 0.04:
        simulation.restart(plan.running)
        plan.resize(Layout(max(1, len(plan.slots) // 2)))
    elif event < 0.06 and plan.running:
        simulation.restart([generator.choice(plan.running)])
    elif event < 0.08 and not plan.is_idle:
        simulation.end(generator.choice([*plan.running, *plan.waiting]))
    elif event < 0.09 and not plan.running:
        plan.resize(Layout(plan.config.slot_count))


@pytest.mark.parametrize("first_seed", range(0, 400, 50))
def test_whatever_happens_every_request_ends_once(first_seed):
    for seed in range(first_seed, first_seed + 50):
        generator = random.Random(seed)
        plan = scheduler(
            generator.choice((1, 2, 3, 8, 17)),
            chunk_tokens=generator.choice((1, 7, 64, 300)),
            encode_ahead=generator.randint(1, 9),
            most_overtaking=generator.choice((0, 5, 1000)),
        )
        count = generator.randint(1, 60)
        simulation = Simulation(plan, {ticket: generator.randint(1, 40) for ticket in range(count)})
        arriving = [
            Job(
                ticket,
                generator.choice((1, 20, 33, generator.randint(1, 200))),
                expected_tokens=generator.choice((0, 0, 10, 500)),
                visual_key=generator.choice((None, None, "a", "b")),
            )
            for ticket in range(count)
        ]
        for _ in range(100_000):
            if arriving and generator.random() < 0.3:
                size = generator.randint(1, len(arriving))
                simulation.submit(arriving[:size])
                arriving = arriving[size:]
            if plan.is_idle and not arriving:
                break
            simulation.step()
            if generator.random() < 0.7:
                random_event(simulation, generator)
            simulation.check()
        assert sorted(simulation.ended) == list(range(count))
