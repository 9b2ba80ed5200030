"""Answers that are JSON of a given schema: which tokens may come next, for all rows of a step together.

A grammar reads bytes: any tokens that spell an allowed text are allowed, and so are the tokens that end an answer
where the text is complete. Every answer keeps in sight how it could end, so that one that runs out of room can be
closed. Knows no torch and no pictures.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from operators.engine.schema_bounds import longest_end_bytes
from schemas.errors import ConfigError, GenerationError

# Where nobody asks for a schema the engine runs without this library.
if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

STYLE: Final[Any] = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_pattern": r" ?|\n {0,16}",
    "coerce_one_of": False,
    "lenient": False,
    "json_allow_general_unicode_escapes": False,
}
"""Between two members a space, or a line with its indent: the ways in which models write JSON, and no room to go on
with blanks for ever. Characters stand for themselves: escapes of them could spell halves of surrogate pairs."""

PARALLEL_ROWS: Final = 8
MOST_THREADS: Final = 8
"""A row takes 20 microseconds with 248,000 tokens. Fewer rows are done before other threads have woken up; on 2 cores
under load these made each row two to six times as slow (measured)."""

QUOTE, BACKSLASH = b'"\\'
LETTERS: Final = bytes(range(ord("a"), ord("z") + 1)) + b"0123456789_- " + bytes(range(ord("A"), ord("Z") + 1))
ENDING_ORDERS: Final = tuple(
    (b'}]:,0123456789"ntf-.' + opening + b"eE+", b'"' + letters)
    for letters in (LETTERS, LETTERS[::-1])
    for opening in (b"[{", b"{[")
)
"""Bytes that end JSON soon, the soonest first, outside of strings and inside: what closes comes before what goes on,
and short values before those that have members. Where one order goes from object to object without an end, as a
schema that contains itself may have it, another finds the way out."""


class Place(NamedTuple):
    """Where in JSON text a byte stands: inside a string, and right behind a backslash."""

    in_string: bool = False
    escaped: bool = False

    def after(self, text: bytes) -> "Place":
        """Return the place behind `text`."""
        in_string, escaped = self
        if not escaped and QUOTE not in text and BACKSLASH not in text:
            return self
        for byte in text:
            if escaped:
                escaped = False
            elif byte == QUOTE:
                in_string = not in_string
            else:
                escaped = in_string and byte == BACKSLASH
        return Place(in_string, escaped)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that grammars choose from.

    Attributes:
        tokenizer: bytes of each token.
        stop_ids: tokens that end an answer.
        byte_ids: the token of each single byte that has one.
    """

    tokenizer: "LLTokenizer"
    stop_ids: tuple[int, ...]
    byte_ids: Mapping[int, int]

    def spell(self, text: bytes) -> list[int]:
        """Return the tokens of `text`, one for each byte."""
        return [self.byte_ids[byte] for byte in text]


@dataclass(frozen=True)
class AllowedTokens:
    """What the grammars of some rows allow next.

    Attributes:
        rows: of the step; others are free.

    Shapes:
        bits: (rows, bytes) uint8; bit `n % 8` of byte `n // 8` is set where token `n` is allowed; those beyond are
            not.
    """

    rows: Sequence[int]
    bits: NDArray[np.uint8]


class Grammars:
    """The grammars of one engine: each schema is compiled once, the tokenizer is read once.

    Args:
        tokenizer: text of a `tokenizer.json`.
        stop_ids: tokens that end an answer, allowed exactly where a grammar accepts the end.

    Raises:
        ConfigError: the tokenizer cannot be read.
    """

    def __init__(self, tokenizer: str, stop_ids: Sequence[int]) -> None:
        from llguidance import LLExecutor, LLTokenizer

        try:
            known = LLTokenizer(tokenizer, eos_token=list(stop_ids))
        except ValueError as error:
            raise ConfigError(f"the tokenizer serves no grammars: {one_line(str(error))}") from error
        self._vocabulary = Vocabulary(known, tuple(stop_ids), byte_tokens(known))
        self._compiled: dict[str, Grammar] = {}
        threads = min(MOST_THREADS, (os.cpu_count() or 1) // 2)
        self._executor = LLExecutor(threads) if threads > 1 else None
        self._words = np.zeros((0, -(-known.vocab_size // 32)), np.int32)

    def compile(self, schema: str) -> "Grammar":
        """Return the grammar of a JSON schema.

        Raises:
            ConfigError: the schema is none, or asks for what grammars cannot hold.
        """
        if schema not in self._compiled:
            self._compiled[schema] = Grammar(schema, self._vocabulary)
        return self._compiled[schema]

    def allowed(self, matchers: Mapping[int, "Matcher"]) -> AllowedTokens:
        """Return which tokens may come next in each answer, by row; valid until the next call.

        Raises:
            GenerationError: a grammar became too complex.
        """
        if len(self._words) < len(matchers):
            self._words = np.zeros((len(matchers), self._words.shape[1]), np.int32)
        words = self._words[: len(matchers)]
        states = [matcher.state for matcher in matchers.values()]
        if self._executor is None or len(states) < PARALLEL_ROWS:
            for state, own in zip(states, words, strict=True):
                state.unsafe_compute_mask_ptr(own.ctypes.data, own.nbytes)
        else:
            pairs = [(state, row) for row, state in enumerate(states)]
            self._executor.unsafe_compute_mask_ptr(pairs, words.ctypes.data, words[0].nbytes, len(words))
        for state in states:
            if state.is_error():
                raise GenerationError(f"the grammar of the answer gave up: {one_line(state.get_error())}")
        return AllowedTokens(list(matchers), words.view(np.uint8))


class Grammar:
    """One compiled schema.

    Attributes:
        vocabulary: what it chooses from.
        longest_end_tokens: any answer can be ended with so many tokens, wherever it stands; None: that is not known.
        shortest_tokens: of a whole answer, as far as it could be found.

    Raises:
        ConfigError: the schema is none, or asks for what grammars cannot hold.
    """

    def __init__(self, schema: str, vocabulary: Vocabulary) -> None:
        from llguidance import LLMatcher

        self.vocabulary = vocabulary
        self._start = LLMatcher(vocabulary.tokenizer, schema_grammar(schema, vocabulary.tokenizer), log_level=0)
        # A token spells a byte or more.
        self.longest_end_tokens = longest_end_bytes(json.loads(schema))
        self.shortest_tokens = len(self.start().end(SHORTEST_ROOM) or ())

    def start(self) -> "Matcher":
        """Return a new answer's way through the grammar."""
        return Matcher(self, self._start.deep_copy())


SHORTEST_ROOM: Final = 1024
"""Tokens in which the shortest answer is looked for when a schema is compiled."""


class Matcher:
    """One answer's way through its grammar.

    Attributes:
        state: the library's own.
    """

    def __init__(self, grammar: Grammar, state: "LLMatcher") -> None:
        self.state = state
        self._grammar = grammar
        self._place = Place()
        # Tokens that end the answer from here; None where nobody has looked.
        self._end: tuple[int, ...] | None = None
        self._is_hopeless = False

    def accept(self, token_id: int, room_tokens: int) -> bool:
        """Go on with a token, unless the answer could then not be ended any more although it can be now.

        Args:
            token_id: one that is allowed; not one that ends the answer.
            room_tokens: that may follow it.

        Returns:
            Whether the token was taken; if not, `end` says how to end without it.
        """
        longest = self._grammar.longest_end_tokens
        before = self._place
        self._go_on(token_id)
        if self._is_hopeless or (longest is not None and room_tokens >= longest) or self.state.is_error():
            self._end = None
            return True
        known, self._end = self._end, self._next_end(token_id, room_tokens)
        if self._end is not None:
            return True
        self.state.rollback(1)
        self._place, self._end = before, known
        if self.end(room_tokens + 1) is not None:
            return False
        self._is_hopeless = True
        self._go_on(token_id)
        return True

    def end(self, room_tokens: int) -> tuple[int, ...] | None:
        """Return few tokens that end the answer from here; None where no more than `room_tokens` were found."""
        if self._end is None and not self._is_hopeless:
            self._end = self._search(room_tokens)
        return self._end if self._end is not None and len(self._end) <= room_tokens else None

    def _go_on(self, token_id: int) -> None:
        self.state.consume_token(token_id)
        self._place = self._place.after(self._grammar.vocabulary.tokenizer.decode_bytes([token_id]))

    def _next_end(self, token_id: int, room_tokens: int) -> tuple[int, ...] | None:
        """Return what ends the answer after this token: what was known before, where it still does."""
        known = self._end
        if self.state.is_accepting():
            return ()
        if known:
            known = known[1:] if known[0] == token_id else known
            if len(known) <= room_tokens and self._ends(known):
                return known
        return self._search(room_tokens)

    def _ends(self, token_ids: Sequence[int]) -> bool:
        stop = self._grammar.vocabulary.stop_ids[0]
        return self.state.validate_tokens([*token_ids, stop]) == len(token_ids) + 1

    def _search(self, room_tokens: int) -> tuple[int, ...] | None:
        """Return an end that fits, by the first of `ENDING_ORDERS` that finds one; None where they find none."""
        if self.state.is_accepting():
            return ()
        for most_bytes in (64, 1024, MOST_BYTES_A_TOKEN * room_tokens + 1):
            for order in ENDING_ORDERS:
                found = self._closing_tokens(order, most_bytes)
                if found is not None and len(found) <= room_tokens:
                    return found
        return None

    def _closing_tokens(self, order: tuple[bytes, bytes], most_bytes: int) -> tuple[int, ...] | None:
        text = self._closing_text(order, most_bytes)
        return None if text is None else self._tokens_of(text)

    def _tokens_of(self, text: bytes) -> tuple[int, ...]:
        """Return the tokens that spell an end, few of them where the grammar takes these."""
        vocabulary = self._grammar.vocabulary
        short = vocabulary.tokenizer.tokenize_bytes(text)
        return tuple(short if self._ends(short) else vocabulary.spell(text))

    def _closing_text(self, order: tuple[bytes, bytes], most_bytes: int) -> bytes | None:
        """Return bytes that end the answer, chosen one by one in an order; None where that takes too many."""
        state, place, text = self.state.deep_copy(), self._place, b""
        while not state.is_accepting():
            following = state.compute_ff_bytes() or self._closing_byte(state, order[place.in_string])
            if not following or len(text) >= most_bytes:
                return None
            if not state.consume_tokens(self._grammar.vocabulary.spell(following)):
                return None
            text, place = text + following, place.after(following)
        return text

    def _closing_byte(self, state: "LLMatcher", order: bytes) -> bytes:
        """Return the first allowed byte of `order`, any other that is allowed, or none."""
        byte_ids = self._grammar.vocabulary.byte_ids
        for byte in order:
            if byte in byte_ids and state.validate_tokens([byte_ids[byte]]):
                return bytes([byte])
        bits = np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8), bitorder="little")
        return bytes([byte for byte, token in byte_ids.items() if bits[token]][:1])


MOST_BYTES_A_TOKEN: Final = 8
"""More text than this a token is not worth looking at for an end: what closes JSON is spelled in short tokens."""


def require_schema(schema: str) -> None:
    """Raise `ConfigError` where no grammar can be made of a JSON schema."""
    schema_grammar(schema, None)


def schema_grammar(schema: str, tokenizer: "LLTokenizer | None") -> str:
    """Return the grammar of a JSON schema, in the library's own form.

    Raises:
        ConfigError: the schema is none, or asks for what grammars cannot hold.
    """
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=STYLE)
    except ValueError as error:
        raise ConfigError(f"the answer schema is no JSON: {one_line(str(error))}") from error
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
    if is_error:
        raise ConfigError(f"the answer schema cannot be used: {one_line(' '.join(messages))}")
    return grammar


def byte_tokens(tokenizer: "LLTokenizer") -> dict[int, int]:
    """Return the token of each single byte that has one."""
    found: dict[int, int] = {}
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode_bytes([token])
        if len(text) == 1 and not tokenizer.is_special_token(token):
            found.setdefault(text[0], token)
    return found


def one_line(text: str) -> str:
    """Return `text` without its line breaks."""
    return " ".join(text.split())
