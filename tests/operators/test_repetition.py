import itertools
import random

import pytest

from operators.engine.repetition import RepetitionLimits, RepetitionWatch
from operators.engine.request import Request, SamplingParams
from operators.engine.running import Answer

DEFAULTS = RepetitionLimits()


def covered(tokens, period):
    """Tokens at the end that are a pattern of `period` tokens over and over, counted one by one."""
    count = 0
    while count + period < len(tokens) and tokens[-1 - count] == tokens[-1 - count - period]:
        count += 1
    return count + period if len(tokens) >= period else 0


def loops(tokens, limits, exempt=()):
    """Whether the answer loops, by the words of the definition."""
    for period in range(1, limits.max_period + 1):
        factor = limits.exempt_factor if set(tokens[-period:]) <= set(exempt) else 1
        if covered(tokens, period) >= factor * max(limits.min_tokens, limits.min_repeats * period):
            return True
    return False


def found_at(tokens, limits=DEFAULTS, is_exempt=None):
    """Tokens after which the watch finds a loop; None if it never does."""
    watch = RepetitionWatch(limits, is_exempt)
    return next((count for count in range(1, len(tokens) + 1) if watch.is_looping(tokens[:count])), None)


def random_limits(generator):
    return RepetitionLimits(
        min_tokens=generator.randint(2, 40),
        min_repeats=generator.randint(3, 7),
        max_period=generator.randint(1, 30),
        exempt_factor=generator.randint(1, 4),
        check_tokens=generator.choice((1, 1, 2, 5, 16)),
    )


def random_answer(generator):
    """Text of few or many different tokens, with runs of patterns in it, most of them cut off or a little wrong."""
    vocabulary = generator.choice((1, 2, 3, 20, 200_000))
    tokens = []
    for _ in range(generator.randint(1, 6)):
        pattern = generator.choices(range(vocabulary), k=generator.randint(1, 35))
        run = pattern * generator.randint(1, 12)
        if generator.random() < 0.5:
            run[generator.randrange(len(run))] = generator.randrange(vocabulary)
        tokens += generator.choices(range(vocabulary), k=generator.randint(0, 30)) + run[: generator.randint(1, 200)]
    return tokens


@pytest.mark.parametrize("first_seed", range(0, 300, 50))
def test_every_look_finds_what_the_definition_finds(first_seed):
    verdicts = []
    for seed in range(first_seed, first_seed + 50):
        generator = random.Random(seed)
        limits, tokens = random_limits(generator), random_answer(generator)
        exempt = generator.choice(((), (0, 1), (0,)))
        watch = RepetitionWatch(limits, lambda pattern, own=exempt: set(pattern) <= set(own))
        for count in range(1, len(tokens) + 1):
            verdict = watch.is_looping(tokens[:count])
            wanted = count % limits.check_tokens == 0 and loops(tokens[:count], limits, exempt)
            assert verdict == wanted, (seed, count)
            verdicts.append(verdict)
    assert {True, False} == set(verdicts)


@pytest.mark.parametrize("period", [*range(1, 13), 47, 48, 49, 95, 96, 97, 150, 191, 192])
def test_a_loop_of_any_period_is_found_in_time(period):
    generator = random.Random(period)
    text = [generator.randrange(1000, 50_000) for _ in range(generator.randint(0, 700))]
    pattern = generator.sample(range(1000), period)
    wanted = len(text) + max(DEFAULTS.min_tokens, DEFAULTS.min_repeats * period)
    assert wanted <= found_at(text + pattern * 2000) < wanted + DEFAULTS.check_tokens


def test_a_pattern_that_holds_itself_in_part_is_found():
    row = [1, 2, 1, 2, 1, 2, 3, 1, 2, 1, 2, 4]
    assert found_at(row * 100) == 384
    same_but_for_the_last = [7] * 60 + [8]
    assert found_at(same_but_for_the_last * 30) == 496


def test_longer_patterns_are_not_looked_for():
    generator = random.Random(0)
    assert found_at(generator.sample(range(1000), 193) * 40) is None


def test_text_does_not_loop():
    generator = random.Random(0)
    assert found_at([generator.randrange(30) for _ in range(20_000)]) is None


def test_rows_that_differ_in_a_number_do_not_loop():
    rows = [[10, 11, *(100 + int(digit) for digit in f"{number:03}"), 12, 13, 14] for number in range(400)]
    assert found_at(list(itertools.chain(*rows))) is None


@pytest.mark.parametrize(
    ("what", "tokens"),
    [
        ("a dozen columns of 0.00 between names", [5, 6, 7, *[1, 2, 3, 3, 4] * 12, 8]),
        ("twelve rows of a form that read alike", list(range(30)) * 12),
        ("seven labels of an address", list(range(60)) * 7),
        ("a line of forty words", [9] * 40),
    ],
)
def test_what_documents_hold_is_left_alone(what, tokens):
    generator = random.Random(1)
    around = [generator.randrange(1000, 9000) for _ in range(300)]
    assert found_at(around + tokens + around[::-1]) is None, what


def test_exempt_patterns_may_repeat_four_times_as_long():
    def is_exempt(pattern):
        return set(pattern) <= {1, 2, 3}

    assert found_at([1, 2, 3] * 1000, is_exempt=is_exempt) == 4 * 384
    assert found_at([1, 2, 3] * 400 + [5, 6] * 400, is_exempt=is_exempt) == 1200 + 384
    assert found_at([1, 2, 3, 4] * 1000, is_exempt=is_exempt) == 384


def test_an_exempt_pattern_is_shown_in_full():
    seen = []
    found_at([1, 2, 3, 4, 5] * 100, is_exempt=lambda pattern: bool(seen.append(list(pattern))))
    assert [sorted(pattern) for pattern in seen] == [[1, 2, 3, 4, 5]]


def test_each_attempt_is_watched_from_its_beginning():
    limits = RepetitionLimits(min_tokens=8, min_repeats=3, max_period=4, check_tokens=2)
    sampling = SamplingParams(max_new_tokens=100)
    answer = Answer(Request((1,), sampling, rungs=(sampling,)), room=100, repetition=limits)
    for _ in range(2):
        while answer.finish_reason is None:
            answer.take(5, -1.0, ())
        assert (answer.finish_reason, len(answer.token_ids)) == ("repetition", 8)
        answer.next_attempt()
    assert answer.earlier_tokens == 8
