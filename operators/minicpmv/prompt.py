"""Text and picture sizes become prompt ids, directly: nothing is parsed out of a text again.

Placeholders of one image: `[<image_id>i</image_id>]<image>P</image>`, then rows of `<slice>P</slice>`, rows apart by
one newline. P is one pad token for each visual token. A clip is its pictures one after the other, with at most one id.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer

from operators.minicpmv.config import ModelConfig
from operators.minicpmv.slicing import MERGED_PATCHES_PER_SIDE, Size, SliceConfig
from schemas.errors import ConfigError, PrepareError, PromptTooLongError
from schemas.image import Grid


class PromptSettings(BaseModel):
    """Dials of one kind of prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Annotated[Literal["image", "video"], Field(description="Separate images, or the pictures of one clip.")]
    use_image_id: Annotated[bool, Field(description="Number each image; a clip gets one number for all pictures.")]
    thinking: Annotated[bool, Field(description="Ask for a thought before the answer.")] = False
    max_prompt_tokens: Annotated[
        int | None, Field(gt=0, description="Longest prompt allowed; the model's own limit holds as well.")
    ] = None


@dataclass(frozen=True)
class ImageTokens:
    """One image as the prompt sees it.

    Attributes:
        grid: rows and columns of slices.
        counts: visual tokens of the overview, then of each slice row by row.
    """

    grid: Grid
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        wanted = 1 + self.grid.rows * self.grid.cols
        if len(self.counts) != wanted:
            raise PrepareError(f"{len(self.counts)} slices for a grid that holds {wanted}")


def visual_tokens(shape: Size, config: SliceConfig) -> int:
    """Return how many visual tokens a slice of this size becomes.

    Raises:
        PrepareError: a side is not a multiple of what merges into one token.
    """
    if shape.height_px % config.step_px or shape.width_px % config.step_px:
        raise PrepareError(f"a slice of {tuple(shape)} px has sides that {config.step_px} does not divide")
    patches = (shape.height_px // config.patch_px) * (shape.width_px // config.patch_px)
    return patches // MERGED_PATCHES_PER_SIDE[config.downsample_mode] ** 2


def image_tokens(shapes: Sequence[Size], grids: Sequence[Grid], config: SliceConfig) -> list[ImageTokens]:
    """Return the token counts of each image, given the shapes of all slices in order.

    Raises:
        PrepareError: the grids hold more or fewer slices than there are shapes.
    """
    images: list[ImageTokens] = []
    start = 0
    for grid in grids:
        stop = start + 1 + grid.rows * grid.cols
        images.append(ImageTokens(grid, tuple(visual_tokens(shape, config) for shape in shapes[start:stop])))
        start = stop
    if start != len(shapes):
        raise PrepareError(f"{len(shapes)} slices for grids that hold {start}")
    return images


class PromptBuilder:
    """Builds prompts for one model.

    Texts are encoded by the model's tokenizer without its added tokens, so that a text that spells `<image>` or
    `<|im_end|>` stays a text.
    """

    def __init__(self, config: ModelConfig) -> None:
        path = config.folder / "tokenizer.json"
        try:
            text = path.read_text(encoding="utf-8")
            self._plain = Tokenizer.from_str(json.dumps(json.loads(text) | {"added_tokens": []}))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        self._full = Tokenizer.from_str(text)
        self._limit = config.max_positions - 1
        self.tokens = config.tokens

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; none of them is a special token."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids, special tokens left out."""
        text: str = self._full.decode(list(ids), skip_special_tokens=True)
        return text

    def build(self, text: str, images: Sequence[ImageTokens], settings: PromptSettings) -> list[int]:
        """Return the ids of a user's turn with its images before the text, and the opening of the answer.

        Args:
            text: the instruction; spaces after it do not matter.
            images: the images, or for a clip its pictures in time order.
            settings: dials of the prompt.

        Raises:
            PromptTooLongError: the prompt fits neither the model nor `max_prompt_tokens`.
        """
        parts = self._visual_parts(images, settings)
        ids = [self.tokens.turn_start, *self.encode("user\n")]
        for part in parts:
            ids += part
            if part is not parts[-1]:
                ids += self.encode("\n")
        # The template trims the turn as a whole: before the text there may be an image.
        words = text.rstrip() if parts else text.strip()
        # One call for newline and text: byte-pair merges may span them.
        ids += self.encode("\n" + words if parts and words else words)
        ids += [self.tokens.turn_end, *self.encode("\n"), self.tokens.turn_start, *self.encode("assistant\n")]
        ids += self._thought(thinking=settings.thinking)
        self._require_length(ids, settings)
        return ids

    def _visual_parts(self, images: Sequence[ImageTokens], settings: PromptSettings) -> list[list[int]]:
        if settings.kind == "image":
            pad = self.tokens.image_pad
            return [
                self._image_id(index, settings) + self._placeholders(image, pad) for index, image in enumerate(images)
            ]
        pictures = [token for image in images for token in self._placeholders(image, self.tokens.video_pad)]
        return [self._image_id(0, settings) + pictures] if images else []

    def _image_id(self, index: int, settings: PromptSettings) -> list[int]:
        if not settings.use_image_id:
            return []
        return [self.tokens.image_id_start, *self.encode(str(index)), self.tokens.image_id_end]

    def _placeholders(self, image: ImageTokens, pad: int) -> list[int]:
        tokens = self.tokens
        ids = [tokens.image_start, *[pad] * image.counts[0], tokens.image_end]
        for row in range(image.grid.rows):
            if row:
                ids += self.encode("\n")
            for count in image.counts[1 + row * image.grid.cols :][: image.grid.cols]:
                ids += [tokens.slice_start, *[pad] * count, tokens.slice_end]
        return ids

    def _thought(self, *, thinking: bool) -> list[int]:
        if thinking:
            return [self.tokens.think_start, *self.encode("\n")]
        return [self.tokens.think_start, *self.encode("\n\n"), self.tokens.think_end, *self.encode("\n\n")]

    def _require_length(self, ids: Sequence[int], settings: PromptSettings) -> None:
        limit = min(self._limit, settings.max_prompt_tokens or self._limit)
        if len(ids) > limit:
            raise PromptTooLongError(f"the prompt has {len(ids)} tokens, at most {limit} fit")
