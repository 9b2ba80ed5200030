"""A model of few tokens that knows what each of its slots holds, and fails on demand."""

import dataclasses

import torch

VOCABULARY = 60
STOP = 59
LOOP = 1
"""Prompts that begin with this go round in circles, of as many tokens as the next token says."""

FIRST = 20
"""Token at which circles begin."""


@dataclasses.dataclass
class Picture:
    """What a request shows; asking for it may fail."""

    error: Exception | None = None


@dataclasses.dataclass
class Prepared:
    """What the model makes of a prompt."""

    prompt: tuple
    picture: Picture | None


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


class CountingModel:
    """Counts up from the last token to the stop token; prompts that begin with `LOOP` go round in circles.

    It refuses what a real one would answer with nonsense: tokens behind a gap, a slot that holds something else than
    the engine believes, tokens beyond the room of a slot, a prompt without its pictures.

    Args:
        memory_tokens: tokens that all slots have room for together, a row of a pass taking one as well.
        planned_tokens: by which it says how many slots fit; None: it does not.
        fault: asked before each call, with its name and the prompts that it runs; raises what it likes.
    """

    stop_ids = (STOP,)

    def __init__(self, memory_tokens=10**9, fault=None, max_positions=200, planned_tokens=None):
        self.max_positions = max_positions
        self.memory_tokens = memory_tokens
        self.planned_tokens = planned_tokens
        self.fault = fault or (lambda call, prompts: None)
        self.slot_count = 0
        self.capacity_tokens = 0
        self.slots = {}
        self.openings = []
        self.encodings = []
        self.prefills = []
        self.decoded = []
        self.moves = 0
        self.releases = 0

    def slots_that_fit(self, token_count):
        return None if self.planned_tokens is None else self.planned_tokens // (token_count + 1)

    def open_slots(self, slot_count, capacity_tokens):
        self.fault("open_slots", ())
        room = max(capacity_tokens, self.capacity_tokens) if slot_count == self.slot_count else capacity_tokens
        if slot_count * room > self.memory_tokens:
            raise out_of_memory()
        self.slots = {slot: held[:room] for slot, held in self.slots.items() if slot < slot_count}
        self.slot_count, self.capacity_tokens = slot_count, room
        self.openings.append((slot_count, capacity_tokens))

    def close_slots(self):
        self.slots, self.slot_count, self.capacity_tokens = {}, 0, 0

    def encode(self, prompts, visuals):
        self.fault("encode", prompts)
        self.encodings.append(len({id(visual) for visual in visuals if visual is not None}))
        for visual in visuals:
            if visual is not None and visual.error is not None:
                raise visual.error
        return [Prepared(tuple(prompt), visual) for prompt, visual in zip(prompts, visuals, strict=True)]

    def append_prompt(self, prepared, slots, start, count):
        prompts = [one.prompt for one in prepared]
        self.fault("append_prompt", prompts)
        self._need(len(slots))
        assert len(set(slots)) == len(slots)
        assert max(slots) < self.slot_count
        self.prefills.append((start, count, len(slots)))
        for prompt, slot in zip(prompts, slots, strict=True):
            held = self.slots.get(slot, ()) if start else ()
            assert held == prompt[:start]
            self._hold(slot, (*held, *prompt[start : start + count]))
        return self._logits([self.slots[slot] for slot in slots])

    def append_tokens(self, token_ids, held_tokens, active):
        assert len(token_ids) == len(held_tokens) == len(active) <= self.slot_count
        used = [slot for slot, is_active in enumerate(active) if is_active]
        self.fault("append_tokens", [self.slots[slot] for slot in used])
        self._need(len(token_ids))
        self.decoded.append((len(used), len(token_ids)))
        for slot, held in enumerate(held_tokens):
            assert held in (0, len(self.slots.get(slot, ())))
            assert held or not active[slot]
        for slot in used:
            self._hold(slot, (*self.slots[slot], token_ids[slot]))
        return self._logits([self.slots[slot] if active[slot] else () for slot in range(len(active))])

    def move_slot(self, source, target, held_tokens):
        assert len(self.slots[source]) == held_tokens
        self.slots[target] = self.slots.pop(source)
        self.moves += 1

    def release_memory(self):
        self.releases += 1

    def _need(self, rows):
        if self.slot_count * self.capacity_tokens + rows > self.memory_tokens:
            raise out_of_memory()

    def _hold(self, slot, tokens):
        assert len(tokens) <= self.capacity_tokens
        self.slots[slot] = tokens

    def _logits(self, sequences):
        logits = torch.zeros(len(sequences), VOCABULARY)
        for row, sequence in enumerate(sequences):
            logits[row, following(sequence) if sequence else 0] = 3.0
        return logits


def following(sequence):
    """The token after a sequence."""
    if sequence[0] == LOOP:
        return FIRST + (sequence[-1] - FIRST + 1) % sequence[1]
    return (sequence[-1] + 1) % VOCABULARY
