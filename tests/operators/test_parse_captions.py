import pytest

from operators.parse.captions import parse_caption


@pytest.mark.parametrize(
    ("completion", "caption"),
    [
        ("A man walks a dog.", "A man walks a dog."),
        ("  \n A man walks a dog. \n", "A man walks a dog."),
        ("```\nA man walks a dog.\n```", "A man walks a dog."),
        ("Sure! Here is a description of the clip: A man walks a dog.", "A man walks a dog."),
        ("Here's the caption:\n\nA man walks a dog.", "A man walks a dog."),
        ("Caption: A man walks a dog.", "A man walks a dog."),
        ("**Description:** A man walks a dog.", "A man walks a dog."),
        ('"A man walks a dog."', "A man walks a dog."),
        ('"Stop" says the sign. The dog "sits"', '"Stop" says the sign. The dog "sits"'),
        ("First.\\nThen.", "First.\nThen."),
        ("Here is where the river bends.", "Here is where the river bends."),
        ("```\n```", ""),
        ("", ""),
    ],
)
def test_the_caption_is_the_answer_without_its_wrapping(completion: str, caption: str) -> None:
    assert parse_caption(completion) == caption
