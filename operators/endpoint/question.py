"""What is sent: one prompt with its pictures, as the body of a chat request."""

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from operators.picture_files import MEDIA_TYPES, picture_file

MARK: Final = "@pictures@"
"""Stands in the body for what is put in afterwards."""


class Sampling(BaseModel):
    """How the server chooses tokens. What is left at its default is not sent: some servers refuse what they lack."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: Annotated[int, Field(ge=1, description="Longest answer, a thought included.")] = 4096
    temperature: Annotated[float, Field(ge=0, description="0 is greedy; larger is more varied.")] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1, description="Keep the likeliest tokens that sum to this.")] = 1.0
    thinking: Annotated[bool, Field(description="Ask the chat template for a thought before the answer.")] = False
    logprobs: Annotated[bool, Field(description="Ask for the probability of each token.")] = False


@dataclass(frozen=True)
class Question:
    """One prompt and its pictures.

    Attributes:
        prompt: what is asked about the pictures.
        files: PNG or JPEG files, in the order in which they are shown.
        encoding: of the files, `png` or `jpeg`.
        seed: of the draws for this answer, where tokens are drawn.
    """

    prompt: str
    files: tuple[bytes | memoryview, ...]
    encoding: str = "png"
    seed: int = 0


def request_body(model_id: str, question: Question, sampling: Sampling) -> bytes:
    """Return the JSON of a chat request: the pictures, then the prompt, in one message of the user."""
    message = {"role": "user", "content": [MARK, {"type": "text", "text": question.prompt}]}
    # Messages come first, so that the first mark is ours whatever the model is called.
    body: dict[str, Any] = {
        "messages": [message],
        "model": model_id,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
    }
    if sampling.temperature > 0:
        body["seed"] = question.seed
    if sampling.top_p < 1:
        body["top_p"] = sampling.top_p
    if sampling.thinking:
        body["chat_template_kwargs"] = {"enable_thinking": True}
    if sampling.logprobs:
        # One, not none: to llama.cpp none means no probabilities at all.
        body |= {"logprobs": True, "top_logprobs": 1}
    before, after = json.dumps(body).encode().split(json.dumps(MARK).encode() + b", ", 1)
    # Base64 needs no escapes: a JSON encoder would look at each of several million characters again.
    return b"".join([before, *_picture_parts(question), after])


def _picture_parts(question: Question) -> Iterator[bytes]:
    for file in question.files:
        yield b'{"type": "image_url", "image_url": {"url": "data:'
        yield MEDIA_TYPES[question.encoding].encode()
        yield b";base64,"
        yield base64.b64encode(file)
        yield b'"}}, '


def known_good_question() -> Question:
    """Return a question that a working server answers: a small picture, and a word about it."""
    picture = np.full((224, 224, 3), 255, np.uint8)
    picture[64:160, 64:160] = (200, 30, 30)
    return Question("What colour is the square? One word.", (picture_file(picture, "png", 90),))
