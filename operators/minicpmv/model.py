"""Any member of the family: pictures and prompts in, logits out.

Letters: `B` sequences, `T` tokens, `Q` visual tokens, `D` width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from operators.minicpmv.canvas import canvas_positions
from operators.minicpmv.config import Attention, ModelConfig, read_model_config
from operators.minicpmv.encoder import VisionEncoder
from operators.minicpmv.load import load_network
from operators.minicpmv.slicing import MERGED_PATCHES_PER_SIDE
from operators.minicpmv.visual import Visual
from schemas.errors import GenerationError


@dataclass
class BatchState:
    """A running batch.

    Shapes:
        mask: (B, T) int64, 0 on padding, which lies to the left.
        positions: (B, 1) int64, position of the next token of each sequence.
    """

    cache: Any
    mask: Tensor
    positions: Tensor


class MiniCPMV:
    """Prefill and decode of one loaded model.

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
        self.encoder = VisionEncoder(self.network, self.config.family, self.config.slicing.patch_px, device)

    @property
    def stop_ids(self) -> Sequence[int]:
        """Return the tokens that end an answer."""
        return self.config.stop_ids

    @property
    def max_positions(self) -> int:
        """Return the longest sequence, prompt and completion together."""
        return self.config.max_positions

    def prefill(self, prompts: Sequence[Sequence[int]], visuals: Sequence[Visual | None]) -> tuple[Tensor, BatchState]:
        """Return the logits after each prompt and the state of the batch.

        Shapes:
            logits: (B, vocabulary) in the model's dtype.

        Raises:
            GenerationError: a prompt's placeholders do not fit its pictures.
        """
        levels = [self._merge_levels(ids, visual) for ids, visual in zip(prompts, visuals, strict=True)]
        with torch.inference_mode():
            token_ids, mask = self._pad(prompts)
            embeddings = self.network.embed(token_ids)
            features = self._encode(visuals, levels)
            if features is not None:
                place = self._is_placeholder(token_ids).unsqueeze(-1)
                embeddings = embeddings.masked_scatter(place, features.to(embeddings.dtype))
            positions, following = self._positions(prompts, visuals, levels, mask)
            state = BatchState(
                cache=DynamicCache(config=self.network.text.config),
                mask=mask,
                positions=following,
            )
            return self._logits(embeddings, positions, state), state

    def decode(self, state: BatchState, token_ids: Sequence[int]) -> Tensor:
        """Append one token to each sequence; return the logits after it, (B, vocabulary), and update `state`."""
        with torch.inference_mode():
            tokens = torch.tensor(token_ids, device=self.device)[:, None]
            state.mask = torch.cat([state.mask, torch.ones_like(tokens)], dim=1)
            positions = state.positions
            state.positions = state.positions + 1
            return self._logits(self.network.embed(tokens), positions, state)

    def keep(self, state: BatchState, rows: Sequence[int]) -> None:
        """Drop from `state` all sequences but those at `rows`, which stay in this order."""
        with torch.inference_mode():
            index = torch.tensor(rows, device=self.device)
            state.cache.reorder_cache(index)
            state.mask = state.mask[index]
            state.positions = state.positions[index]

    def release_memory(self) -> None:
        """Give cached device memory back before a smaller batch is tried."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _logits(self, embeddings: Tensor, positions: Tensor, state: BatchState) -> Tensor:
        output = self.network.text(
            inputs_embeds=embeddings,
            attention_mask=state.mask,
            position_ids=positions,
            past_key_values=state.cache,
            use_cache=True,
        )
        # Of the last position only: the logits of a whole batch of prompts would take tens of gigabytes.
        return self.network.logits(output.last_hidden_state[:, -1]).to(self.device)

    def _pad(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return (B, T) token ids and their mask, padded on the left.

        Linear-attention layers carry a state from left to right, so padding must come before it.
        """
        longest = max(len(ids) for ids in prompts)
        pad = self.config.tokens.text_end
        rows = [[pad] * (longest - len(ids)) + list(ids) for ids in prompts]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        return torch.tensor(rows, device=self.device), torch.tensor(mask, device=self.device)

    def _positions(
        self,
        prompts: Sequence[Sequence[int]],
        visuals: Sequence[Visual | None],
        levels: Sequence[int],
        mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the positions of a padded batch, (B, T) or (3, B, T), and of the next token of each, (B, 1)."""
        if not self.config.family.canvas_positions:
            return (mask.cumsum(dim=1) - 1).clamp(min=0), mask.sum(dim=1, keepdim=True)
        positions = torch.zeros(3, *mask.shape, dtype=torch.int64)
        following = []
        for row, (ids, visual, own) in enumerate(zip(prompts, visuals, levels, strict=True)):
            found, after = canvas_positions(ids, self._crop_grids(visual, own), self.config.tokens)
            positions[:, row, mask.shape[1] - len(ids) :] = torch.from_numpy(found)
            following.append([after])
        return positions.to(self.device), torch.tensor(following, device=self.device)

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

    def _encode(self, visuals: Sequence[Visual | None], levels: Sequence[int]) -> Tensor | None:
        """Return the visual tokens of the batch, (Q, D), in the order of its placeholders."""
        pairs = [(visual, own) for visual, own in zip(visuals, levels, strict=True) if visual is not None]
        if not pairs:
            return None
        return torch.cat(self.encoder.encode([visual for visual, _ in pairs], [own for _, own in pairs]))
