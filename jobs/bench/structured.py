"""Answers that follow a JSON schema against free ones: same model, same prompts, one run."""

import dataclasses
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from jobs.bench.engine_work import write_model
from jobs.bench.machine import machine_facts
from operators.answer_schema import PAGE_BLOCKS
from operators.engine.engine import Engine
from operators.engine.request import Completion, Request, SamplingParams
from operators.engine.scheduler import SchedulerConfig
from operators.engine.stats import EngineStats
from operators.engine.structured import Grammars
from operators.minicpmv.model import MiniCPMV

PROMPT_TOKENS: Final = 64
ROOM_TOKENS: Final = 1200
"""So far from their bounds answers need not look for an end; the last few hundred tokens before one cost more."""

FEWEST_BLOCKS: Final = 2
"""Random weights would choose an empty list; once they write a text, they hardly ever end it."""

LETTERS: Final = "etaoinshrdlucmfwypvbgkqjxz"
MARKS: Final = ".,;:!?()[]{}\"'\\/<>=+-*&^%$#@~`|_ \n"


@dataclass(frozen=True)
class Work:
    """What is measured.

    Attributes:
        scale: of the network, see `jobs.bench.engine_work`.
        vocabulary: tokens of the model.
        slots: answers that are written together.
        tokens: of each answer.
        repeat: runs a side.
    """

    scale: str
    vocabulary: int
    slots: int
    tokens: int
    repeat: int


class UnendingModel(MiniCPMV):
    """A model whose answers no token ends but where a grammar allows no other."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Return none."""
        return ()


@dataclass(frozen=True)
class Side:
    """What one run took.

    Attributes:
        seconds: of all of it.
        tokens: that were written.
        stats: of the engine.
    """

    seconds: float
    tokens: int
    stats: EngineStats


def measure(work: Work, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return what both sides took."""
    with tempfile.TemporaryDirectory(prefix="pagereel-bench-") as name:
        folder = Path(name)
        write_model(folder, work.scale, device, dtype, work.vocabulary)
        model = UnendingModel(folder, device=device, dtype=dtype, attention="sdpa")
        tokenizer = grown_tokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"), work.vocabulary)
        began = time.perf_counter()
        grammars = Grammars(tokenizer, model.config.stop_ids)
        schema = json.dumps(json.loads(PAGE_BLOCKS) | {"minItems": FEWEST_BLOCKS})
        grammars.compile(schema)
        compile_seconds = time.perf_counter() - began
    engine: Engine[Any] = Engine(model, SchedulerConfig(slot_count=work.slots), grammars=grammars)
    free = make_requests(work)
    bound = [dataclasses.replace(request, answer_schema=schema) for request in free]
    run_side(engine, bound, 4)
    sides = [(run_side(engine, free, work.tokens), run_side(engine, bound, work.tokens)) for _ in range(work.repeat)]
    return result_of(work, device, dtype, compile_seconds, sides)


def result_of(
    work: Work, device: torch.device, dtype: torch.dtype, compile_seconds: float, sides: Sequence[tuple[Side, Side]]
) -> dict[str, Any]:
    """Return the figures of pairs of a free and a constrained run."""
    free = [side.seconds / side.tokens for side, _ in sides]
    bound = [side.seconds / side.tokens for _, side in sides]
    host = [side.stats.constrain_seconds / side.stats.constrained_tokens for _, side in sides]
    ratio = statistics.median(free) / statistics.median(bound)
    return {
        "bench": "structured",
        **dataclasses.asdict(work),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "ratio": round(ratio, 3),
        "ratio_means": "tokens/s of constrained answers over those of free ones",
        "of_limit": round(ratio, 3),
        "limit": "free answers",
        "compile_seconds": round(compile_seconds, 3),
        "free_us_per_token": [round(value * 1e6, 1) for value in free],
        "constrained_us_per_token": [round(value * 1e6, 1) for value in bound],
        "host_us_per_constrained_token": [round(value * 1e6, 1) for value in host],
        "added_us_per_constrained_token": round((statistics.median(bound) - statistics.median(free)) * 1e6, 1),
        "constrained_tokens": [side.stats.constrained_tokens for _, side in sides],
        "machine": machine_facts(),
    }


def run_side(engine: Engine[Any], requests: Sequence[Request[Any]], step_count: int) -> Side:
    """Return what the engine took for so many tokens of each answer; then they are aborted."""
    engine.stats = EngineStats()
    began = time.perf_counter()
    tickets = engine.submit(requests)
    while engine.stats.decode_steps < step_count:
        engine.step()
    seconds = time.perf_counter() - began
    for ticket in tickets:
        engine.abort(ticket)
    tokens = 0
    for answer in engine.collect().values():
        if not isinstance(answer, Completion):
            raise answer
        tokens += answer.output_tokens
    return Side(seconds, tokens, engine.stats)


def make_requests(work: Work) -> list[Request[Any]]:
    """Return requests with prompts of letters, which are the first tokens of the vocabulary."""
    generator = random.Random(46)
    sampling = SamplingParams(max_new_tokens=work.tokens + ROOM_TOKENS)
    return [
        Request(tuple(generator.randrange(32, 90) for _ in range(PROMPT_TOKENS)), sampling) for _ in range(work.slots)
    ]


def grown_tokenizer(text: str, vocabulary: int) -> str:
    """Return a `tokenizer.json` with made-up words behind the tokens that it has, so that there are so many."""
    settings = json.loads(text)
    known = settings["model"]["vocab"]
    spell = Tokenizer.from_str(text).pre_tokenizer.pre_tokenize_str
    # Added tokens that are none of the vocabulary would move behind it.
    known |= {token["content"]: token["id"] for token in settings["added_tokens"]}
    following = 1 + max(known.values())
    words = made_up_words()
    while following < vocabulary:
        symbols = "".join(part for part, _ in spell(next(words)))
        if symbols not in known:
            known[symbols] = following
            following += 1
    return json.dumps(settings)


def made_up_words() -> Iterator[str]:
    """Yield short words, Chinese characters, marks, and longer words without an end, as vocabularies hold them."""
    for letters in itertools.product(LETTERS, repeat=3):
        yield "".join(letters)
        yield " " + "".join(letters)
    yield from map(chr, range(0x4E00, 0x9FFF))
    generator = random.Random(45)
    while True:
        word = "".join(generator.choices(LETTERS, weights=range(26, 0, -1), k=generator.randint(4, 12)))
        kind = generator.random()
        if kind < 0.05:
            word = "".join(generator.choices(MARKS, k=generator.randint(2, 5)))
        elif kind < 0.25:
            word = "".join(chr(generator.randrange(0x4E00, 0x9FFF)) for _ in range(generator.randint(2, 4)))
        elif kind < 0.6:
            word = " " + word
        yield word


def print_result(result: dict[str, Any]) -> None:
    """Print one table, and the JSON line last."""
    table = Table(
        title=f"answers with a schema, {result['scale']} size on {result['device']}: {result['slots']} of "
        f"{result['tokens']} tokens, {result['vocabulary']} to choose from"
    )
    for column in ("", "us a token"):
        table.add_column(column, justify="left" if not column else "right")
    for name, key in (
        ("free", "free_us_per_token"),
        ("constrained", "constrained_us_per_token"),
        ("of these on the host, by grammars", "host_us_per_constrained_token"),
    ):
        table.add_row(name, f"{statistics.median(result[key]):g}")
    table.add_row("added", f"{result['added_us_per_constrained_token']:g}")
    table.add_row("ratio of tokens/s", f"{result['ratio']:g}")
    table.add_row("seconds to read the tokenizer", f"{result['compile_seconds']:g}")
    Console().print(table)
    sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
