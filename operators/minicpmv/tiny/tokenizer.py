"""Tokenizers with one token a byte and no merges, and the tokens that prompts of each member need.

Unlike the released ones they know no words, split no text before they look it up, and lack the tokens that no prompt
needs, so their ids are small. Otherwise they are built alike: byte-level, with `<unk>` among the ordinary tokens, where
the text model is a Qwen; characters, bytes for the rest, and `<unk>`, `<s>`, `</s>` first, where it is a Llama.
"""

from collections.abc import Sequence
from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

Ids = dict[str, int]
"""Id of each added token by its text."""

MARKERS: Final = ("<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>")
THOUGHT: Final = ("<think>", "</think>")
PLAIN_ADDED_TOKENS: Final = THOUGHT
"""Added tokens that are not special: they stay when an answer is turned into text."""

TURNS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGER_TOKENS: Final = (
    "<|endoftext|>",
    *sorted((*MARKERS, *THOUGHT, "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>")),
)
QWEN2_TOKENS: Final = ("<unk>", *TURNS, *MARKERS)
QWEN3_TOKENS: Final = ("<unk>", *TURNS, "<|image_pad|>", "<|video_pad|>", *THOUGHT, *MARKERS)
"""The pads are tokens of the text model here and mean nothing: the placeholder is `<unk>`."""

CONTROLS: Final = ("<unk>", "<s>", "</s>")
LLAMA_TOKENS: Final = (*CONTROLS, *MARKERS, "<|im_end|>", "<|im_start|>")

SPACE_SYMBOL: Final = "\u2581"


def byte_tokenizer(added: Sequence[str]) -> Tokenizer:
    """Return a byte-level tokenizer; an `<unk>` is in the vocabulary itself, as it is in the released one."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + [text for text in added if text == "<unk>"]
    tokenizer = Tokenizer(models.BPE(vocab=numbered(symbols), merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return with_added(tokenizer, added)


def character_tokenizer(added: Sequence[str]) -> Tokenizer:
    """Return a tokenizer of ASCII characters, with bytes for everything else, that begins every text with `<s>`.

    A released tokenizer of this kind may put a space before a text; this one does not.
    """
    printable = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    symbols = [*CONTROLS, *(f"<0x{byte:02X}>" for byte in range(256)), SPACE_SYMBOL, *printable]
    tokenizer = Tokenizer(models.BPE(vocab=numbered(symbols), merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE_SYMBOL)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_SYMBOL, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = with_added(tokenizer, added)
    begin = "<s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return tokenizer


def numbered(symbols: Sequence[str]) -> dict[str, int]:
    """Return the place of each symbol."""
    return {symbol: index for index, symbol in enumerate(symbols)}


def with_added(tokenizer: Tokenizer, added: Sequence[str]) -> Tokenizer:
    """Return `tokenizer` with these tokens; those it has already keep their ids."""
    tokenizer.add_tokens([AddedToken(text, special=text not in PLAIN_ADDED_TOKENS, normalized=False) for text in added])
    return tokenizer


def ids_of(tokenizer: Tokenizer) -> Ids:
    """Return the ids of the added tokens."""
    return {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}


def printable_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of tokens that are one printable ASCII character, in ascending order."""
    texts = ((index, tokenizer.decode([index])) for index in range(tokenizer.get_vocab_size()))
    return [index for index, text in texts if len(text) == 1 and " " <= text <= "~"]
