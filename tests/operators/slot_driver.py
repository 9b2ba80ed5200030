"""Batches of sequences on a model's slots: prefill, decode, keep."""

import dataclasses
import itertools
import random

import torch


@dataclasses.dataclass
class SlotState:
    """A batch: the slot of each of its sequences."""

    slots: list


class SlotDriver:
    """Drives a model's slots by hand.

    Slots that no sequence of a batch is in are gaps of its steps, whether they are empty or hold another batch.

    Args:
        model: one with `open_slots`, `encode`, `append_prompt` and `append_tokens`.
        slot_count: slots of the model; all batches together need no more.
        answer_tokens: most tokens to decode.
        chunk_tokens: prompts go in parts of so many tokens, a part of each in turn; None: whole.
        seed: of the order in which slots are taken; None: the lowest first.
    """

    def __init__(self, model, *, slot_count=16, answer_tokens=64, chunk_tokens=None, seed=None):
        self.model = model
        self.slot_count = slot_count
        self.answer_tokens = answer_tokens
        self.chunk_tokens = chunk_tokens
        self.free = list(range(slot_count))
        if seed is not None:
            random.Random(seed).shuffle(self.free)
        self.held = [0] * slot_count

    def prefill(self, prompts, visuals):
        """Logits after each prompt, (B, vocabulary), and the batch."""
        self.model.open_slots(self.slot_count, max(map(len, prompts)) + self.answer_tokens)
        slots, self.free = self.free[: len(prompts)], self.free[len(prompts) :]
        assert len(slots) == len(prompts), "no slot is left"
        prepared = self.model.encode(prompts, visuals)
        logits = [None] * len(prompts)
        for start, count, rows in self._parts([len(prompt) for prompt in prompts]):
            found = self.model.append_prompt(
                [prepared[row] for row in rows], [slots[row] for row in rows], start, count
            )
            for row, scores in zip(rows, found, strict=True):
                logits[row] = scores
                self.held[slots[row]] = start + count
        return torch.stack(logits), SlotState(slots)

    def _parts(self, lengths):
        """Start, token count and rows of each part; the first parts of equal length go together."""
        size = self.chunk_tokens or max(lengths)
        for start in range(0, max(lengths), size):
            owed = [row for row, length in enumerate(lengths) if length > start]
            counts = {row: min(size, lengths[row] - start) for row in owed}
            owed.sort(key=counts.get)
            groups = itertools.groupby(owed, key=counts.get)
            for count, rows in [(count, list(rows)) for count, rows in groups]:
                yield from [(start, count, rows)] if start == 0 else [(start, count, [row]) for row in rows]

    def decode(self, state, token_ids):
        """Append a token to each sequence of a batch; logits after it, (B, vocabulary)."""
        row_count = max(state.slots) + 1
        tokens, active = [0] * row_count, [False] * row_count
        for slot, token in zip(state.slots, token_ids, strict=True):
            tokens[slot], active[slot] = token, True
        logits = self.model.append_tokens(tokens, self.held[:row_count], active)
        for slot in state.slots:
            self.held[slot] += 1
        return logits[state.slots]

    def keep(self, state, rows):
        """Drop all sequences of a batch but those at `rows`; these stay in their slots, in this order."""
        kept = [state.slots[row] for row in rows]
        for slot in state.slots:
            if slot not in kept:
                self.held[slot] = 0
                self.free.append(slot)
        state.slots = kept
