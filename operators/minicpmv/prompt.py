"""Text and picture sizes become prompt ids, directly: nothing is parsed out of a text again.

Placeholders of one image: `[<image_id>i</image_id>]<image>P</image>`, then rows of `<slice>P</slice>`, rows apart by
one newline. P is one pad token for each visual token. Images, and the text after them, are apart by one newline. The
pictures of a clip, or the packs of its frames, stand like images where `Family.separates_frames`, else one after the
other behind at most one id.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, takewhile
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer

from operators.minicpmv.config import ModelConfig, SpecialTokens
from operators.minicpmv.slicing import MERGED_PATCHES_PER_SIDE, Size, SliceConfig
from schemas.errors import ConfigError, PrepareError, PromptTooLongError
from schemas.image import Grid

Piece = int | str
"""A special token's id, or a text; texts side by side are encoded as one."""

NEWLINE: Final = "\n"


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
    """One image, or one pack of frames, as the prompt sees it.

    Attributes:
        grid: rows and columns of slices.
        counts: visual tokens of the overview, then of each slice row by row.
        frames: frames that the visual tokens stand for.
    """

    grid: Grid
    counts: tuple[int, ...]
    frames: int = 1

    def __post_init__(self) -> None:
        wanted = 1 + self.grid.rows * self.grid.cols
        if len(self.counts) != wanted:
            raise PrepareError(f"{len(self.counts)} slices for a grid that holds {wanted}")


def require_thinking(config: ModelConfig, thinking: bool) -> None:
    """Raise `ConfigError` when a thought is asked of a model that has none."""
    if thinking and not config.thinks:
        raise ConfigError(f"{config.family.title} does not think before it answers: leave thinking out")


def visual_tokens(shape: Size, config: SliceConfig) -> int:
    """Return how many visual tokens a slice of this size becomes.

    Raises:
        PrepareError: a side is not a multiple of what merges into one token.
    """
    if shape.height_px % config.step_px or shape.width_px % config.step_px:
        raise PrepareError(f"a slice of {tuple(shape)} px has sides that {config.step_px} does not divide")
    if config.query_count is not None:
        return config.query_count
    patches = (shape.height_px // config.patch_px) * (shape.width_px // config.patch_px)
    return patches // MERGED_PATCHES_PER_SIDE[config.downsample_mode] ** 2


def image_tokens(
    shapes: Sequence[Size], grids: Sequence[Grid], config: SliceConfig, frame_counts: Sequence[int] | None = None
) -> list[ImageTokens]:
    """Return the token counts of each image or pack, given the shapes of all slices in order.

    Args:
        shapes: of an image: its overview, then its slices row by row. Of a pack: the overviews of its frames, then
            their first slices, then their second slices, and so on.
        grids: one for each image or pack.
        config: how slices become visual tokens.
        frame_counts: frames of each pack; None: every grid is an image of its own.

    Raises:
        PrepareError: the grids hold more or fewer slices than there are shapes, or frames are packed where nothing
            resamples them.
    """
    frame_counts = [1] * len(grids) if frame_counts is None else frame_counts
    if len(frame_counts) != len(grids):
        raise PrepareError(f"frame counts of {len(frame_counts)} packs, and {len(grids)} grids")
    if config.query_count is None and any(frames != 1 for frames in frame_counts):
        raise PrepareError("frames are packed, and the model has no resampler")
    images: list[ImageTokens] = []
    start = 0
    for grid, frames in zip(grids, frame_counts, strict=True):
        stop = start + frames * (1 + grid.rows * grid.cols)
        counts = tuple(visual_tokens(shape, config) for shape in shapes[start:stop])
        images.append(ImageTokens(grid, counts[::frames], frames))
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
            self._plain = Tokenizer.from_str(json.dumps(without_added_tokens(json.loads(text))))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        self._full = Tokenizer.from_str(text)
        self._opening = opening_ids(self._full)
        self._limit = config.max_positions - 1
        self._config = config
        newline = config.tokens.newline
        if newline is not None and self.encode(NEWLINE) != [newline]:
            raise ConfigError(f"{path}: a newline is not the one token {newline} that config.json says")

    @property
    def tokens(self) -> SpecialTokens:
        """Return the ids of the special tokens."""
        return self._config.tokens

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
            text: the instruction; whether spaces around it matter is the model's matter.
            images: the images, or for a clip its pictures or packs in time order.
            settings: dials of the prompt.

        Raises:
            PrepareError: a thought is asked of a model that has none.
            PromptTooLongError: the prompt fits neither the model nor `max_prompt_tokens`.
        """
        tokens = self.tokens
        pieces: list[Piece] = [*self._system_turn(), tokens.turn_start, "user\n"]
        pieces += self._turn(text, self._visual_parts(images, settings))
        pieces += [tokens.turn_end, NEWLINE, tokens.turn_start, "assistant\n"]
        pieces += self._thought(thinking=settings.thinking)
        ids = [*self._opening, *self._encode_pieces(pieces)]
        self._require_length(ids, settings)
        return ids

    def _encode_pieces(self, pieces: Sequence[Piece]) -> Iterator[int]:
        """Yield the ids of `pieces`; tokens may span neighbouring texts, so those are encoded together."""
        for is_text, group in groupby(pieces, key=lambda piece: isinstance(piece, str)):
            run: list[Any] = list(group)
            yield from self.encode("".join(run)) if is_text else run

    def _system_turn(self) -> list[Piece]:
        text = self._config.system_text
        return [] if text is None else [self.tokens.turn_start, f"system\n{text}", self.tokens.turn_end, NEWLINE]

    def _turn(self, text: str, parts: Sequence[Sequence[Piece]]) -> list[Piece]:
        """Return the pictures and the text of a turn."""
        pieces = [piece for part in parts for piece in (*part, NEWLINE)]
        if not self._config.family.trims_turn:
            return [*pieces, text]
        # The turn is trimmed as a whole: before the text there may be an image, after an image there may be no text.
        words = text.rstrip() if parts else text.strip()
        return [*pieces, words] if words else pieces[:-1]

    def _visual_parts(self, images: Sequence[ImageTokens], settings: PromptSettings) -> list[list[Piece]]:
        """Return the pieces of each image, or of what a newline separates in a clip."""
        family, tokens = self._config.family, self.tokens
        is_clip = settings.kind == "video"
        pad = tokens.video_pad if is_clip else tokens.image_pad
        numbered = settings.use_image_id and (family.numbers_clips or not is_clip)
        pictures = [self._placeholders(image, pad) for image in images]
        if is_clip and not family.separates_frames:
            clip = [piece for picture in pictures for piece in picture]
            return [self._image_id(0, numbered) + clip] if images else []
        # A pack has the number of its first frame.
        numbers = accumulate((image.frames for image in images), initial=0)
        return [self._image_id(number, numbered) + picture for number, picture in zip(numbers, pictures, strict=False)]

    def _image_id(self, number: int, numbered: bool) -> list[Piece]:
        return [self.tokens.image_id_start, str(number), self.tokens.image_id_end] if numbered else []

    def _placeholders(self, image: ImageTokens, pad: int) -> list[Piece]:
        tokens = self.tokens
        pieces: list[Piece] = [tokens.image_start, *[pad] * image.counts[0], tokens.image_end]
        for row in range(image.grid.rows):
            if row:
                pieces.append(NEWLINE)
            for count in image.counts[1 + row * image.grid.cols :][: image.grid.cols]:
                pieces += [tokens.slice_start, *[pad] * count, tokens.slice_end]
        return pieces

    def _thought(self, *, thinking: bool) -> list[Piece]:
        start, end = self.tokens.think_start, self.tokens.think_end
        if not self._config.thinks or start is None or end is None:
            if thinking:
                raise PrepareError(f"{self._config.family.title} does not think before it answers")
            return []
        return [start, "\n"] if thinking else [start, "\n\n", end, "\n\n"]

    def _require_length(self, ids: Sequence[int], settings: PromptSettings) -> None:
        limit = min(self._limit, settings.max_prompt_tokens or self._limit)
        if len(ids) > limit:
            raise PromptTooLongError(f"the prompt has {len(ids)} tokens, at most {limit} fit")


def without_added_tokens(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a `tokenizer.json` that knows no added tokens, for texts between them.

    Some tokenizers put a space before the first text of a string. Every prompt begins with an added token, so no text
    of it comes first, although each is encoded alone.
    """
    splitters = settings.get("pre_tokenizer") or {}
    for splitter in (splitters, *splitters.get("pretokenizers", ())):
        if splitter.get("prepend_scheme") == "first":
            splitter["prepend_scheme"] = "never"
    return settings | {"added_tokens": []}


def opening_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that a tokenizer puts before every text, such as a token that begins texts."""
    encoding = tokenizer.encode("x")
    marked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return [token for token, is_special in takewhile(lambda pair: bool(pair[1]), marked)]
