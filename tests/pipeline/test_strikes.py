"""Strikes: three deaths condemn, innocents go free, broken workers condemn nobody, the run folder remembers."""

import itertools
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.storage import Storage
from pipeline.strikes import MOST_DEATHS, STRIKES, LastWords, Strikes, Touch

FAULT = LastWords(exit_signal=11, message="Fatal Python error: Segmentation fault")


def touch_of(*keys, depth=0, step="Generate"):
    return Touch(step=step, keys=keys, batch_id="b", batch_size=len(keys), depth=depth)


class Bench:
    """One worker and the strikes of its run."""

    def __init__(self, folder, name="w"):
        self.strikes = Strikes(str(folder))
        self.name = name
        self.incarnation = 0
        self.numbers = itertools.count()
        self.start()

    def start(self, living=("n1",), words=FAULT, node="n1"):
        self.incarnation += 1
        reason = self.strikes.arrive(self.name, f"i{self.incarnation}", node, list(living), words)
        self.strikes.built(self.name, f"i{self.incarnation}")
        return reason

    def hold(self, *keys, depth=0):
        number = next(self.numbers)
        self.strikes.touch(self.name, f"i{self.incarnation}", number, touch_of(*keys, depth=depth), False)
        return number

    def survive(self, *keys):
        number = self.hold(*keys)
        self.strikes.survived(self.name, f"i{self.incarnation}", number, touch_of(*keys))

    def die_with(self, *keys, **how):
        self.hold(*keys)
        return self.start(**how)

    def counts(self, *keys):
        return self.strikes.standing(self.name, keys).strikes


def test_what_was_in_flight_at_a_death_gets_a_strike_and_what_a_worker_survives_is_cleared(tmp_path):
    bench = Bench(tmp_path)
    bench.survive("a")
    bench.die_with("a", "b", "c")
    assert bench.counts("a", "b", "c", "d") == {"a": 1, "b": 1, "c": 1}
    bench.survive("a")
    assert bench.counts("a", "b", "c") == {"b": 1, "c": 1}


def test_two_batches_in_flight_get_one_strike_each_even_where_they_share_a_page(tmp_path):
    bench = Bench(tmp_path)
    bench.hold("a", "same")
    bench.die_with("b", "same")
    assert bench.counts("a", "b", "same") == {"a": 1, "b": 1, "same": 1}


def test_a_worker_that_went_down_with_its_node_accuses_nobody(tmp_path):
    bench = Bench(tmp_path)
    bench.die_with("a", living=("n2",), node="n2")
    assert bench.counts("a") == {}
    bench.die_with("a", living=("n2",), node="n2")
    assert bench.counts("a") == {"a": 1}


def test_an_orderly_end_accuses_nobody(tmp_path):
    bench = Bench(tmp_path)
    number = bench.hold("a")
    bench.strikes.withdraw("w", "i1", number)
    bench.start()
    assert bench.counts("a") == {}


def test_an_incarnation_that_was_replaced_cannot_hold_anything_any_more(tmp_path):
    bench = Bench(tmp_path)
    bench.start()
    bench.strikes.touch("w", "i1", 99, touch_of("a"), False)
    bench.start()
    assert bench.counts("a") == {}


def test_a_batch_with_a_suspect_is_not_taken_whole(tmp_path):
    bench = Bench(tmp_path)
    bench.die_with("a")
    standing = bench.strikes.touch("w", "i2", 50, touch_of("a", "b"), True)
    assert standing.strikes == {"a": 1}
    bench.start()
    assert bench.counts("a", "b") == {"a": 1}


def test_strikes_outlive_the_object_and_so_does_it_when_they_are_cleared(tmp_path):
    first = Bench(tmp_path)
    first.die_with("a", "b")
    first.die_with("a", "b")
    again = Bench(tmp_path)
    assert again.counts("a", "b") == {"a": 2, "b": 2}
    again.survive("b")
    third = Bench(tmp_path)
    assert third.counts("a", "b") == {"a": 2}
    third.survive("a")
    assert Storage(str(tmp_path)).list(STRIKES) == []


def test_the_deaths_of_a_verdict_come_in_their_order_after_a_restart_as_well(tmp_path):
    for size in (3, 2, 1):
        Bench(tmp_path).die_with(*"abc"[:size])
    bench = Bench(tmp_path)
    bench.survive("d")
    verdict = bench.strikes.verdicts("w", ["a"])["a"]
    assert [len(death.touch.keys) for death in verdict.deaths] == [3, 2, 1]
    assert bench.strikes.verdicts("w", ["b", "c"]) == {}


def test_a_verdict_stands_once_the_worker_has_survived_another_record(tmp_path):
    bench = Bench(tmp_path)
    for _ in range(MOST_DEATHS):
        bench.die_with("a")
    bench.survive("b")
    assert bench.strikes.verdicts("w", ["a"])["a"].may_pass is False
    assert Bench(tmp_path).counts("a") == {"a": MOST_DEATHS}


@pytest.mark.parametrize(("words", "survives"), [(None, True), (FAULT, False)], ids=["in silence", "nothing survived"])
def test_a_verdict_that_may_be_nobodys_fault_is_for_this_call_alone(tmp_path, words, survives):
    bench = Bench(tmp_path)
    for _ in range(MOST_DEATHS):
        bench.die_with("a", words=words)
    if survives:
        bench.survive("b")
    assert bench.strikes.verdicts("w", ["a"])["a"].may_pass is True
    assert bench.counts("a") == {"a": MOST_DEATHS}
    assert Bench(tmp_path).counts("a") == {}


def test_a_worker_that_dies_with_three_records_one_after_the_other_is_broken_and_accuses_nobody(tmp_path):
    bench = Bench(tmp_path)
    bench.die_with("x")
    bench.survive("y")
    bench.die_with("a", "b", "c", "x")
    assert bench.die_with("a") is None
    assert bench.die_with("b") is None
    reason = bench.die_with("c")
    assert "Generate" in reason
    assert "3 different records" in reason
    assert bench.counts("a", "b", "c", "x") == {"x": 1}
    assert bench.strikes.touch("w", "i9", 77, touch_of("z"), True).broken == reason


def test_three_records_that_kill_are_three_culprits_where_another_is_survived_between_them(tmp_path):
    bench = Bench(tmp_path)
    for key in "abc":
        for _ in range(MOST_DEATHS):
            assert bench.die_with(key) is None
        bench.survive("good")
    assert bench.counts(*"abc") == dict.fromkeys("abc", MOST_DEATHS)


def test_a_worker_that_dies_before_it_is_built_is_given_up(tmp_path):
    strikes = Strikes(str(tmp_path))
    reasons = [strikes.arrive("w", f"i{number}", "n1", ["n1"], None, "Generate") for number in range(4)]
    assert reasons[:3] == [None, None, None]
    assert "a worker of Generate died 3 times in a row while it was built" in reasons[3]


def test_a_pardon_forgets_the_condemned_and_keeps_suspects(tmp_path):
    bench = Bench(tmp_path)
    bench.die_with("a", "b")
    for _ in range(2):
        bench.die_with("a")
    bench.strikes.pardon()
    assert bench.counts("a", "b") == {"b": 1}
    assert Bench(tmp_path).counts("a", "b") == {"b": 1}


class Events:
    """What one worker may meet with three records of which some are poison, as the quarantine drives it."""

    def __init__(self, folder, poison):
        self.bench = Bench(folder)
        self.poison = poison
        self.deaths = dict.fromkeys("abc", 0)
        self.others = 0

    def run(self, keys, killed_from_outside):
        held = [key for key in keys if self.bench.counts(key).get(key, 0) < MOST_DEATHS]
        if not held:
            return
        if killed_from_outside or self.poison & set(held):
            for key in held:
                self.deaths[key] += 1
            self.bench.die_with(*held)
            # Another worker's record shows that it is not the worker.
            self.bench.survive(f"good {self.others}")
            self.others += 1
        else:
            self.bench.survive(*held)
            self.deaths |= dict.fromkeys(held, 0)


SMALL = [(keys, killed) for keys in ("abc", "ab", "a", "b", "c") for killed in (False, True)]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(SMALL), max_size=9), st.sets(st.sampled_from("abc"), max_size=2))
def test_nobody_is_condemned_before_three_deaths_in_a_row_and_poison_always_is_after_three(told, bad):
    events = Events(f"memory://{uuid.uuid4().hex}", bad)
    for keys, killed in told:
        events.run(keys, killed)
        for key, deaths in events.deaths.items():
            assert events.bench.counts(key).get(key, 0) == min(deaths, MOST_DEATHS)
    for key in sorted(bad):
        for _ in range(MOST_DEATHS):
            events.run(key, False)
        assert events.deaths[key] == MOST_DEATHS
        assert events.bench.counts(key) == {key: MOST_DEATHS}
