"""Any member of the family: pictures and prompts in, logits out.

Letters: `B` sequences, `T` tokens, `Q` visual tokens, `D` width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from operators.minicpmv.canvas import canvas_positions
from operators.minicpmv.config import Attention, ModelConfig, read_model_config
from operators.minicpmv.encoder import VisionEncoder
from operators.minicpmv.language import run_text, use_slots
from operators.minicpmv.load import load_network
from operators.minicpmv.slicing import MERGED_PATCHES_PER_SIDE
from operators.minicpmv.slots import SlotCache, decode_call, prefill_call
from operators.minicpmv.visual import Visual
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
    """

    token_ids: Tensor
    features: Tensor | None
    positions: Tensor
    next_position: int


class MiniCPMV:
    """One loaded model: encodes pictures, and appends to sequences that live in slots.

    Args:
        folder: config, tokenizer and safetensors of the model.
        device: where it runs.
        dtype: of weights and activations.
        attention: attention implementation of the text model.
        more_devices: others that share the layers of a text model which is too large for `device`.

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
    ) -> None:
        self.config: ModelConfig = read_model_config(folder)
        self.device = device
        self.network = load_network(folder, dtype, attention, (device, *more_devices))
        self.slots: SlotCache | None = None
        self._ahead: list[int] = []
        self.encoder = VisionEncoder(self.network, self.config.family, self.config.slicing.patch_px, device)

    @property
    def stop_ids(self) -> Sequence[int]:
        """Return the tokens that end an answer."""
        return self.config.stop_ids

    @property
    def max_positions(self) -> int:
        """Return the longest sequence, prompt and completion together."""
        return self.config.max_positions

    def open_slots(self, slot_count: int, capacity_tokens: int) -> None:
        """Have this many slots, each with room for so many tokens; as many as before keep what they hold."""
        with torch.inference_mode():
            if self.slots is not None and self.slots.slot_count == slot_count:
                self.slots.grow(capacity_tokens)
                return
            self.slots = None
            use_slots(self.network.text)
            text = self.network.text
            devices = [next(layer.parameters()).device for layer in text.layers]
            self.slots = SlotCache(text.config, slot_count, capacity_tokens, devices, self.network.embed.weight.dtype)
            self._ahead = [0] * slot_count

    def close_slots(self) -> None:
        """Have no slots, and give their memory back."""
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
        token_ids = torch.tensor(ids, device=self.device)
        if not self.config.family.canvas_positions:
            return Prepared(token_ids, features, torch.arange(len(ids), device=self.device), len(ids))
        positions, following = canvas_positions(ids, self._crop_grids(visual, levels), self.config.tokens)
        return Prepared(token_ids, features, torch.from_numpy(positions).to(self.device), following)

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
        before = int(self._is_placeholder(prepared.token_ids[: part.start]).sum()) if part.start else 0
        features = prepared.features[before:].to(embeddings.dtype)
        return embeddings.masked_scatter(place[:, None], features)

    def append_tokens(self, token_ids: Sequence[int], held_tokens: Sequence[int], active: Sequence[bool]) -> Tensor:
        """Append one token to each active one of the first slots; return the logits after them, (B, vocabulary)."""
        cache = self._open_cache()
        with torch.inference_mode():
            embeddings = self.network.embed(torch.tensor(token_ids, device=self.device))[:, None]
            ahead = self._ahead[: len(held_tokens)]
            places = [held + own for held, own in zip(held_tokens, ahead, strict=True)]
            call = decode_call(held_tokens, active, self.device, embeddings.dtype)
            positions = torch.tensor(places, device=self.device)[:, None]
            hidden = run_text(self.network.text, embeddings, positions, cache, call)
            return self.network.logits(hidden[:, -1]).to(self.device)

    def move_slot(self, source: int, target: int, held_tokens: int) -> None:
        """Copy what one slot holds into another."""
        with torch.inference_mode():
            self._open_cache().move(source, target, held_tokens)
            self._ahead[target] = self._ahead[source]

    def _open_cache(self) -> SlotCache:
        assert self.slots is not None, "no slots are open"
        return self.slots

    def release_memory(self) -> None:
        """Give memory that is not in use back to the device, before less is tried."""
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
