"""Any member of the family: pictures and prompts in, logits out.

Letters: `B` sequences, `T` tokens, `Q` visual tokens, `D` width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from operators.minicpmv.budget import SlotBudget, keep_to_share
from operators.minicpmv.canvas import canvas_positions
from operators.minicpmv.config import Attention, ModelConfig, read_model_config
from operators.minicpmv.device import DTYPES
from operators.minicpmv.encoder import VisionEncoder
from operators.minicpmv.graphs import DecodeGraphs, padded_shape
from operators.minicpmv.language import run_text, use_slots
from operators.minicpmv.load import load_network
from operators.minicpmv.memory import estimate_memory
from operators.minicpmv.slicing import MERGED_PATCHES_PER_SIDE
from operators.minicpmv.slots import SlotCache, decode_call, padded_call, prefill_call
from operators.minicpmv.visual import Visual
from operators.transfer import on_device
from schemas.errors import GenerationError


@dataclass(frozen=True)
class Prepared:
    """A prompt with its pictures, ready for the text model.

    Shapes:
        token_ids: (T,) int64.
        features: (Q, D) in the order of the placeholders; None without pictures.
        positions: (T,) int64, or (3, T) where the model has three.

    Attributes:
        next_position: of the first token of the answer.
        visual_counts: visual tokens before each token and before the end, on the host.
    """

    token_ids: Tensor
    features: Tensor | None
    positions: Tensor
    next_position: int
    visual_counts: NDArray[np.int64]


class MiniCPMV:
    """One loaded model: encodes pictures, and appends to sequences that live in slots.

    Args:
        folder: config, tokenizer and safetensors of the model.
        device: where it runs.
        dtype: of weights and activations.
        attention: attention implementation of the text model.
        more_devices: others that share the layers of a text model which is too large for `device`.
        memory_share: of each GPU that this model may fill, where several share one.
        pass_tokens: most prompt tokens that go through the text model at once.
        records_steps: whether steps of decoding are recorded as CUDA graphs; on a CPU, with quantised weights or on
            several devices they are not.

    Raises:
        ConfigError: the folder holds no such model, or tensors are missing or do not belong to it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        attention: Attention,
        more_devices: Sequence[torch.device] = (),
        memory_share: float = 1.0,
        pass_tokens: int = 4096,
        records_steps: bool = False,
    ) -> None:
        self.config: ModelConfig = read_model_config(folder)
        self.device = device
        keep_to_share((device, *more_devices), memory_share)
        self.network = load_network(folder, dtype, attention, (device, *more_devices))
        self.slots: SlotCache | None = None
        self._ahead: list[int] = []
        self.encoder = VisionEncoder(self.network, self.config.family, self.config.slicing.patch_px, device)
        self.budget = self._slot_budget(dtype, memory_share, pass_tokens)
        self.graphs: DecodeGraphs | None = None
        if records_steps and device.type == "cuda" and not more_devices and self.config.quantization is None:
            self.graphs = DecodeGraphs(self.padded_step, device)

    @property
    def stop_ids(self) -> Sequence[int]:
        """Return the tokens that end an answer."""
        return self.config.stop_ids

    @property
    def max_positions(self) -> int:
        """Return the longest sequence, prompt and completion together."""
        return self.config.max_positions

    def _slot_budget(self, dtype: torch.dtype, share: float, pass_tokens: int) -> SlotBudget:
        name = next(name for name, own in DTYPES.items() if own == dtype)
        memory = estimate_memory(self.config, name, self.encoder.patches_per_call)
        return SlotBudget(
            self.network.text.config,
            self._layer_devices(),
            self.network.embed.weight.dtype,
            share=share,
            pass_bytes=memory.widest_pass(pass_tokens),
            row_bytes=memory.logits_per_record,
        )

    def _layer_devices(self) -> list[torch.device]:
        return [next(layer.parameters()).device for layer in self.network.text.layers]

    def slots_that_fit(self, token_count: int) -> int | None:
        """Return how many slots with room for so many tokens there is memory for; None on a CPU."""
        if self.slots is None:
            return self.budget.slots_that_fit(token_count, 0, 0)
        return self.budget.slots_that_fit(token_count, self.slots.slot_count, self.slots.capacity_tokens)

    def open_slots(self, slot_count: int, capacity_tokens: int) -> None:
        """Have this many slots, each with room for so many tokens; those that there were keep what they hold."""
        with torch.inference_mode():
            if self.slots is not None and self.slots.holds(slot_count, capacity_tokens):
                return
            self._forget_graphs()
            if self.slots is not None:
                self.slots.resize(slot_count, capacity_tokens)
                self._ahead = (self._ahead + [0] * slot_count)[:slot_count]
                return
            use_slots(self.network.text)
            config, dtype = self.network.text.config, self.network.embed.weight.dtype
            self.slots = SlotCache(config, slot_count, capacity_tokens, self._layer_devices(), dtype)
            self._ahead = [0] * slot_count

    def close_slots(self) -> None:
        """Have no slots, and give their memory back."""
        self._forget_graphs()
        self.slots = None

    def encode(self, prompts: Sequence[Sequence[int]], visuals: Sequence[Visual | None]) -> list[Prepared]:
        """Return each prompt with its visual tokens; pictures that are the same object are encoded once.

        Raises:
            GenerationError: a prompt's placeholders do not fit its pictures.
        """
        levels = [self._merge_levels(ids, visual) for ids, visual in zip(prompts, visuals, strict=True)]
        different = {
            (id(visual), own): visual for visual, own in zip(visuals, levels, strict=True) if visual is not None
        }
        with torch.inference_mode():
            encoded = self.encoder.encode(list(different.values()), [own for _, own in different]) if different else []
            features = dict(zip(different, encoded, strict=True))
            return [
                self._prepared(ids, visual, own, features.get((id(visual), own)))
                for ids, visual, own in zip(prompts, visuals, levels, strict=True)
            ]

    def _prepared(self, ids: Sequence[int], visual: Visual | None, levels: int, features: Tensor | None) -> Prepared:
        token_ids = on_device(ids, self.device)
        tokens = self.config.tokens
        placeholders = np.isin(np.asarray(ids), (tokens.image_pad, tokens.video_pad))
        counts = np.concatenate([[0], placeholders.cumsum()])
        if not self.config.family.canvas_positions:
            return Prepared(token_ids, features, torch.arange(len(ids), device=self.device), len(ids), counts)
        positions, following = canvas_positions(ids, self._crop_grids(visual, levels), tokens)
        return Prepared(token_ids, features, on_device(positions, self.device), following, counts)

    def append_prompt(self, prepared: Sequence[Prepared], slots: Sequence[int], start: int, count: int) -> Tensor:
        """Append `count` prompt tokens to slots that hold `start`; return the logits after them, (B, vocabulary)."""
        cache = self._open_cache()
        with torch.inference_mode():
            part = slice(start, start + count)
            embeddings = torch.stack([self._embedded(one, part) for one in prepared])
            positions = torch.stack([one.positions[..., part] for one in prepared], dim=-2)
            call = prefill_call(slots, start, count, self.device, embeddings.dtype)
            for one, slot in zip(prepared, slots, strict=True):
                self._ahead[slot] = one.next_position - len(one.token_ids)
            hidden = run_text(self.network.text, embeddings, positions, cache, call)
            return self.network.logits(hidden[:, -1]).to(self.device)

    def _embedded(self, prepared: Prepared, part: slice) -> Tensor:
        """Return the embeddings of a part of a prompt, (T, D), visual tokens in the place of placeholders."""
        token_ids = prepared.token_ids[part]
        embeddings: Tensor = self.network.embed(token_ids)
        if prepared.features is None:
            return embeddings
        place = self._is_placeholder(token_ids)
        features = prepared.features[prepared.visual_counts[part.start] :].to(embeddings.dtype)
        return embeddings.masked_scatter(place[:, None], features)

    def append_tokens(self, token_ids: Sequence[int], held_tokens: Sequence[int], active: Sequence[bool]) -> Tensor:
        """Append one token to each active one of the first slots; return the logits after them, (B, vocabulary)."""
        cache = self._open_cache()
        with torch.inference_mode():
            ahead = self._ahead[: len(held_tokens)]
            places = [held + own for held, own in zip(held_tokens, ahead, strict=True)]
            rows = [token_ids, places, held_tokens, active]
            if self.graphs is not None:
                stop = max((held for held, used in zip(held_tokens, active, strict=True) if used), default=0) + 1
                shape = padded_shape(len(held_tokens), stop, cache.slot_count, cache.capacity_tokens)
                found = self.graphs.run(rows, shape)
                if found is not None:
                    return found
            # All numbers of the step in one transfer.
            numbers = on_device(rows, self.device)
            embeddings = self.network.embed(numbers[0])[:, None]
            call = decode_call(held_tokens, active, self.device, embeddings.dtype, numbers[2:])
            hidden = run_text(self.network.text, embeddings, numbers[1][:, None], cache, call)
            return self.network.logits(hidden[:, -1]).to(self.device)

    def padded_step(self, numbers: Tensor, stop: int) -> Tensor:
        """Return the logits of a step in a shape that comes again: see `DecodeGraphs`.

        Shapes:
            numbers: (4, B) int64: token, position, end and whether it is active, of each of the first slots.
            result: (B, vocabulary).
        """
        embeddings = self.network.embed(numbers[0])[:, None]
        call = padded_call(numbers[2], numbers[3].bool(), stop, embeddings.dtype)
        hidden = run_text(self.network.text, embeddings, numbers[1][:, None], self._open_cache(), call)
        return self.network.logits(hidden[:, -1])

    def move_slot(self, source: int, target: int, held_tokens: int) -> None:
        """Copy what one slot holds into another."""
        with torch.inference_mode():
            self._open_cache().move(source, target, held_tokens)
            self._ahead[target] = self._ahead[source]

    def _forget_graphs(self) -> None:
        if self.graphs is not None:
            self.graphs.forget()

    def _open_cache(self) -> SlotCache:
        assert self.slots is not None, "no slots are open"
        return self.slots

    def release_memory(self) -> None:
        """Give memory that is not in use back to the device, before less is tried."""
        self.budget.forget()
        self._forget_graphs()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _crop_grids(self, visual: Visual | None, merge_levels: int) -> list[tuple[int, int]]:
        """Return rows and columns of visual tokens of each slice."""
        side = self.config.slicing.patch_px * 2**merge_levels
        return [(size.height_px // side, size.width_px // side) for size in visual.shapes] if visual else []

    def _is_placeholder(self, token_ids: Tensor) -> Tensor:
        tokens = self.config.tokens
        return (token_ids == tokens.image_pad) | (token_ids == tokens.video_pad)

    def _merge_levels(self, prompt_ids: Sequence[int], visual: Visual | None) -> int:
        """Return how often four neighbours become one, as the prompt counts; 0 without pictures or with a resampler.

        Raises:
            GenerationError: the prompt holds more or fewer placeholders than its pictures become tokens.
        """
        tokens, slicing = self.config.tokens, self.config.slicing
        placeholders = sum(1 for token in prompt_ids if token in (tokens.image_pad, tokens.video_pad))
        if slicing.query_count is not None:
            groups = len(visual.shapes if visual.packs is None else visual.packs) if visual else 0
            if placeholders != groups * slicing.query_count:
                raise GenerationError(
                    f"{placeholders} placeholders do not fit {groups} slices or packs of {slicing.query_count} tokens"
                )
            return 0
        patches = visual.patch_count(slicing.patch_px) if visual else 0
        if not placeholders and not patches:
            return 0
        for side in MERGED_PATCHES_PER_SIDE.values():
            if placeholders * side**2 == patches:
                return side.bit_length() - 1
        raise GenerationError(f"{placeholders} placeholders do not fit {patches} patches in any downsample mode")
