import json
import random

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from operators.answer_schema import PAGE_BLOCKS, built_in_schema
from operators.engine.schema_bounds import longest_end_bytes
from operators.engine.structured import Grammars, Place, require_schema
from operators.parse.blocks import parse_blocks
from schemas.errors import ConfigError
from tests.operators.answer_schemas import SCHEMAS, STRING, TEXTS, assert_valid, closed
from tests.operators.members import MARKERS, THOUGHT, llama_tokenizer, qwen_tokenizer

ROOM = 10**6


class Words:
    """A tokenizer, and the grammars of its tokens."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.stops = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|im_start|>")]
        self.grammars = Grammars(tokenizer.to_str(), self.stops)

    def text(self, token_ids):
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def letter(self, text):
        found = self.tokenizer.token_to_id(text)
        return self.tokenizer.token_to_id(f"<0x{ord(text):02X}>") if found is None else found

    def allowed(self, matcher):
        [bits] = self.grammars.allowed({0: matcher}).bits
        return np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()


SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *MARKERS, *THOUGHT)


@pytest.fixture(scope="module", params=[qwen_tokenizer, llama_tokenizer])
def words(request):
    return Words(request.param(SPECIAL))


def walk(words, name, seed, most_tokens=60):
    """What follows an answer, its tokens and the allowed ones, as it grows by any of these and comes to its end."""
    generator = random.Random(f"{name} {seed}")
    matcher, token_ids = words.grammars.compile(TEXTS[name]).start(), []
    while True:
        allowed = words.allowed(matcher)
        yield matcher, token_ids, allowed
        following = [token for token in allowed if token not in words.stops]
        if not following:
            return
        # What closes JSON is rare among all tokens.
        short = [token for token in following if len(words.text([token])) == 1] or following
        token = generator.choice(short if generator.random() < 0.5 else following)
        if len(token_ids) >= most_tokens:
            end = matcher.end(ROOM)
            if not end:
                return
            token = end[0]
        token_ids.append(token)
        assert matcher.accept(token_ids[-1], ROOM)


def is_valid(name, text):
    try:
        return Draft202012Validator(SCHEMAS[name]).is_valid(json.loads(text))
    except ValueError:
        return False


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_may_end_exactly_where_it_is_json_of_its_schema(words, name):
    ends = 0
    for seed in range(4):
        for _, token_ids, allowed in walk(words, name, seed):
            text = words.text(token_ids)
            may_end = is_valid(name, text)
            assert [stop in allowed for stop in words.stops] == [may_end] * 2, text
            ends += may_end
    assert ends >= 4


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_can_be_closed_wherever_it_stands_within_the_bound_of_its_schema(words, name):
    longest = words.grammars.compile(TEXTS[name]).longest_end_tokens
    for seed in range(3):
        for matcher, token_ids, _ in walk(words, name, seed):
            end = matcher.end(1000)
            assert end is not None
            assert_valid(name, words.text([*token_ids, *end]))
            assert longest is None or len(end) <= longest


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_with_little_room_is_closed_in_time(words, name):
    grammar = words.grammars.compile(TEXTS[name])
    for seed in range(6):
        generator = random.Random(f"{name} {seed}")
        room = generator.randint(grammar.shortest_tokens, 90)
        matcher, token_ids = grammar.start(), []
        while following := [token for token in words.allowed(matcher) if token not in words.stops]:
            token = generator.choice(following)
            if not matcher.accept(token, room - len(token_ids) - 1):
                break
            token_ids.append(token)
        token_ids += matcher.end(room - len(token_ids))
        assert len(token_ids) <= room
        assert_valid(name, words.text(token_ids))


def test_a_refused_token_leaves_the_answer_as_it_was(words):
    matcher = words.grammars.compile(TEXTS["text"]).start()
    quote, letter = words.letter('"'), words.letter("e")
    assert matcher.accept(quote, 1)
    before = words.allowed(matcher)
    assert not matcher.accept(letter, 0)
    assert words.allowed(matcher) == before
    assert matcher.end(1) == (quote,)
    assert matcher.accept(quote, 0)
    assert matcher.end(0) == ()


def test_where_nothing_fits_the_answer_goes_on(words):
    matcher = words.grammars.compile(TEXTS["nested"]).start()
    token_ids = []
    for room in range(9, -1, -1):
        token = next(token for token in words.allowed(matcher) if token not in words.stops)
        assert matcher.accept(token, room)
        token_ids.append(token)
    assert matcher.end(0) is None
    assert words.text(token_ids).startswith("{")


def test_special_tokens_are_never_part_of_an_answer(words):
    special = {words.tokenizer.token_to_id(text) for text in SPECIAL}
    for name in SCHEMAS:
        for _, _, allowed in walk(words, name, 9, most_tokens=40):
            assert special.isdisjoint(set(allowed) - set(words.stops))


def test_rows_of_a_step_get_their_own_bits(words):
    matchers = {row: words.grammars.compile(TEXTS[name]).start() for row, name in zip((4, 0, 7), SCHEMAS, strict=False)}
    many = {row + 100: words.grammars.compile(TEXTS["numbers"]).start() for row in range(20)}
    found = words.grammars.allowed(matchers | many)
    bits = found.bits.copy()
    assert list(found.rows) == [*matchers, *many]
    for own, matcher in zip(bits, [*matchers.values(), *many.values()], strict=True):
        assert (own == words.grammars.allowed({0: matcher}).bits[0]).all()


def test_a_schema_is_compiled_once(words):
    assert words.grammars.compile(TEXTS["open"]) is words.grammars.compile(TEXTS["open"])


BAD = {
    "no JSON": "{",
    "a list": "[]",
    "an unknown type": '{"type": "strin"}',
    "no such reference": '{"$ref": "#/nowhere"}',
    "a broken pattern": '{"type": "string", "pattern": "("}',
    "what grammars cannot say": '{"type": "array", "items": {"type": "integer"}, "uniqueItems": true}',
    "one of several": '{"oneOf": [{"type": "string"}, {"const": "a"}]}',
    "what no value is": '{"type": "integer", "minimum": 5, "maximum": 3}',
}


@pytest.mark.parametrize("schema", BAD.values(), ids=BAD)
def test_a_schema_that_cannot_be_used_is_refused_in_one_line(words, schema):
    for refuse in (require_schema, words.grammars.compile):
        with pytest.raises(ConfigError, match=r"\Athe answer schema [^\n]+\Z"):
            refuse(schema)


def test_a_schema_cannot_loosen_how_json_is_written(words):
    loose = {"type": "array", "items": {"type": "integer"}, "x-guidance": {"whitespace_pattern": "x*", "lenient": True}}
    matcher = words.grammars.compile(json.dumps(loose)).start()
    for text in "[1":
        assert matcher.accept(words.letter(text), ROOM)
    assert words.letter("]") in words.allowed(matcher)
    assert words.letter("x") not in words.allowed(matcher)


def test_a_tokenizer_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="tokenizer"):
        Grammars("{}", [0])


def test_quotes_behind_backslashes_do_not_end_a_string():
    place = Place()
    for text, wanted in (
        (b'{"a', (True, False)), (b"\\", (True, True)), (b'"', (True, False)), (b"\\\\", (True, False)),
        (b'":', (False, False)), (b"\\", (False, False)), (b"1", (False, False)),
    ):  # fmt: skip
        place = place.after(text)
        assert place == wanted


def test_bounds_are_known_where_schemas_are_plain_and_only_there():
    known = {name for name, schema in SCHEMAS.items() if longest_end_bytes(schema) is not None}
    assert known == {"page blocks", "nested", "enums", "numbers", "arrays", "optional", "anyOf", "text"}
    for schema in (
        True, {"type": "string", "pattern": "a{9}"}, {"type": "number", "minimum": 1e300},
        {"type": "number", "multipleOf": 7}, {"type": "array"}, closed(("b",), a=STRING), {"anyOf": [STRING, {}]},
        {"enum": []}, {"type": ["string", "thing"]},
    ):  # fmt: skip
        assert longest_end_bytes(schema) is None
    assert longest_end_bytes({"type": ["string", "null"], "minLength": 100}) > 100


def test_the_schema_of_page_blocks_is_what_its_parser_calls_ok():
    assert built_in_schema("parse", "pdf") == built_in_schema("parse", "image") == PAGE_BLOCKS
    assert (
        {built_in_schema(task, "pdf") for task in ("ocr", "caption")} == {built_in_schema("parse", "video")} == {None}
    )
    answer = '[{"label":"title","bbox":[1,2,30,40],"text":"A"}]'
    assert_valid("page blocks", answer)
    assert parse_blocks(answer, 100, 100).status == "ok"
    assert list(json.loads(PAGE_BLOCKS)["items"]["properties"]) == ["label", "bbox", "text"]
