"""Engines on the counting model, and the requests that it answers."""

from operators.engine.engine import Engine
from operators.engine.repetition import RepetitionLimits
from operators.engine.request import Request, SamplingParams
from operators.engine.scheduler import SchedulerConfig
from tests.operators.counting_model import STOP

LIMITS = RepetitionLimits(min_tokens=24, min_repeats=4, max_period=10, check_tokens=4)


def request(*prompt, max_new_tokens=100, **options):
    sampling = {name: options.pop(name) for name in list(options) if name in SamplingParams.model_fields}
    return Request(prompt, SamplingParams(max_new_tokens=max_new_tokens, **sampling), **options)


def engine(model, slot_count=8, repetition=None, is_exempt=None, known_good=None, **options):
    config = SchedulerConfig(slot_count=slot_count, **options)
    return Engine(model, config, repetition, is_exempt, known_good=known_good)


def counted(one):
    """What the counting model answers to a request without loops."""
    return tuple(range(one.prompt_ids[-1] + 1, STOP))[: one.sampling.max_new_tokens]


def tokens(answers):
    return [answer.token_ids for answer in answers]


class Faults:
    """Raises errors at the calls that were asked for: `{(call, number): error}`; counts all calls."""

    def __init__(self, errors):
        self.errors = errors
        self.calls = {}

    def __call__(self, call, prompts):
        number = self.calls[call] = self.calls.get(call, 0) + 1
        if (call, number) in self.errors:
            raise self.errors[call, number]
