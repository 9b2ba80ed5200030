"""MiniCPM-V 4.6 on transformers' layers: pictures and prompts in, logits out.

Letters: `B` sequences, `T` tokens, `Q` visual tokens, `D` width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache, MiniCPMV4_6ForConditionalGeneration
from transformers.utils import logging as transformers_logging

from operators.minicpmv.config import Attention, ModelConfig, read_model_config
from operators.minicpmv.patches import pack_patches
from operators.minicpmv.slicing import MERGED_PATCHES_PER_SIDE, DownsampleMode
from operators.minicpmv.visual import Visual
from operators.minicpmv.weights import NAMES_OF_OLDER_FILES, UNUSED_TENSORS, require_safetensors
from schemas.errors import ConfigError, GenerationError

PATCHES_PER_CALL: Final = 65_536
"""Patches that go through the vision tower at once. Bounds its activations: about 0.6 GB in bf16 for the widest tensor
of the released model."""


@dataclass
class BatchState:
    """A running batch.

    Shapes:
        mask: (B, T) int64, 0 on padding, which lies to the left.
        lengths: (B, 1) int64, tokens of each sequence without padding.
    """

    cache: Any
    mask: Tensor
    lengths: Tensor


class MiniCPMV46:
    """Prefill and decode of one loaded model.

    Args:
        folder: config, tokenizer and safetensors of the model.
        device: where it runs.
        dtype: of weights and activations.
        attention: attention implementation of the vision tower and of the full-attention layers.

    Raises:
        ConfigError: the folder holds no such model, or tensors are missing or do not belong to it.
    """

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype, attention: Attention) -> None:
        self.config: ModelConfig = read_model_config(folder)
        self.device = device
        self.network = load_network(folder, dtype, attention).to(device).eval()

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
        modes = [self._downsample_mode(ids, visual) for ids, visual in zip(prompts, visuals, strict=True)]
        with torch.inference_mode():
            token_ids, mask = self._pad(prompts)
            embeddings = self.network.get_input_embeddings()(token_ids)
            features = self._encode(visuals, modes)
            if features is not None:
                place = self._is_placeholder(token_ids).unsqueeze(-1)
                embeddings = embeddings.masked_scatter(place, features.to(embeddings.dtype))
            state = BatchState(
                cache=DynamicCache(config=self.network.config.get_text_config()),
                mask=mask,
                lengths=mask.sum(dim=1, keepdim=True),
            )
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            return self._logits(embeddings, positions, state), state

    def decode(self, state: BatchState, token_ids: Sequence[int]) -> Tensor:
        """Append one token to each sequence; return the logits after it, (B, vocabulary), and update `state`."""
        with torch.inference_mode():
            tokens = torch.tensor(token_ids, device=self.device)[:, None]
            state.mask = torch.cat([state.mask, torch.ones_like(tokens)], dim=1)
            positions = state.lengths
            state.lengths = state.lengths + 1
            return self._logits(self.network.get_input_embeddings()(tokens), positions, state)

    def keep(self, state: BatchState, rows: Sequence[int]) -> None:
        """Drop from `state` all sequences but those at `rows`, which stay in this order."""
        with torch.inference_mode():
            index = torch.tensor(rows, device=self.device)
            state.cache.reorder_cache(index)
            state.mask = state.mask[index]
            state.lengths = state.lengths[index]

    def release_memory(self) -> None:
        """Give cached device memory back before a smaller batch is tried."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _logits(self, embeddings: Tensor, positions: Tensor, state: BatchState) -> Tensor:
        output = self.network.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=state.mask,
            position_ids=positions,
            past_key_values=state.cache,
            use_cache=True,
        )
        # Of the last position only: the logits of a whole batch of prompts would take tens of gigabytes.
        logits: Tensor = self.network.lm_head(output.last_hidden_state[:, -1])
        return logits

    def _pad(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return (B, T) token ids and their mask, padded on the left.

        The linear-attention layers carry a state from left to right, so padding must come before it.
        """
        longest = max(len(ids) for ids in prompts)
        pad = self.config.tokens.text_end
        rows = [[pad] * (longest - len(ids)) + list(ids) for ids in prompts]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        return torch.tensor(rows, device=self.device), torch.tensor(mask, device=self.device)

    def _is_placeholder(self, token_ids: Tensor) -> Tensor:
        tokens = self.config.tokens
        return (token_ids == tokens.image_pad) | (token_ids == tokens.video_pad)

    def _downsample_mode(self, prompt_ids: Sequence[int], visual: Visual | None) -> DownsampleMode | None:
        """Return the mode in which the prompt counts visual tokens; a prompt without pictures has none."""
        tokens = self.config.tokens
        placeholders = sum(1 for token in prompt_ids if token in (tokens.image_pad, tokens.video_pad))
        patches = visual.patch_count(self.config.slicing.patch_px) if visual else 0
        if not placeholders and not patches:
            return None
        for mode, side in MERGED_PATCHES_PER_SIDE.items():
            if placeholders * side**2 == patches:
                return mode
        raise GenerationError(f"{placeholders} placeholders do not fit {patches} patches in any downsample mode")

    def _encode(self, visuals: Sequence[Visual | None], modes: Sequence[DownsampleMode | None]) -> Tensor | None:
        """Return the visual tokens of the batch, (Q, D), in the order of its placeholders."""
        chunks: list[tuple[DownsampleMode, list[Visual]]] = []
        room = 0
        for visual, mode in zip(visuals, modes, strict=True):
            if visual is None or mode is None:
                continue
            patches = visual.patch_count(self.config.slicing.patch_px)
            if not chunks or chunks[-1][0] != mode or room < patches:
                chunks.append((mode, []))
                room = PATCHES_PER_CALL
            chunks[-1][1].append(visual)
            room -= patches
        encoded = [feature for mode, chunk in chunks for feature in self._encode_chunk(chunk, mode)]
        return torch.cat(encoded) if encoded else None

    def _encode_chunk(self, visuals: list[Visual], mode: DownsampleMode) -> list[Tensor]:
        packed = pack_patches(visuals, self.config.slicing.patch_px, self.device)
        features = self.network.model.get_image_features(packed.pixel_values, packed.patch_grids, downsample_mode=mode)
        pooled: list[Tensor] = features.pooler_output
        return pooled


def load_network(folder: Path, dtype: torch.dtype, attention: Attention) -> Any:
    """Return transformers' model with the weights of `folder`, on the CPU.

    Raises:
        ConfigError: the weights are not safetensors, or do not match the model.
    """
    require_safetensors(folder)
    # A worker has no terminal: its bars would be lines in somebody's log.
    transformers_logging.disable_progress_bar()
    try:
        network, found = MiniCPMV4_6ForConditionalGeneration.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            key_mapping=NAMES_OF_OLDER_FILES,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            # Reported here, and refused below with all other differences at once.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        refuse(folder, f"cannot be loaded: {error}", error)
    unused = [name for name in found["unexpected_keys"] if not name.startswith(UNUSED_TENSORS)]
    problems = {
        "missing": sorted(found["missing_keys"]),
        "unexpected": sorted(unused),
        "of another shape": sorted(str(entry[0]) for entry in found["mismatched_keys"]),
    }
    listed = [f"{kind}: {', '.join(names[:20])} ({len(names)})" for kind, names in problems.items() if names]
    if listed:
        refuse(folder, "tensors do not match the model; " + "; ".join(listed))
    return network


def refuse(folder: Path, reason: str, cause: Exception | None = None) -> NoReturn:
    """Raise `ConfigError` for the model in `folder`."""
    raise ConfigError(f"{folder}: {reason}") from cause
