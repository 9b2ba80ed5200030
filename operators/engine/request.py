"""What goes into the engine and what comes out."""

from dataclasses import dataclass, field
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from schemas.errors import RecordError

V = TypeVar("V")

FinishReason = Literal["stop", "length", "repetition", "abort"]


class SamplingParams(BaseModel):
    """How the tokens of one completion are chosen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: Annotated[int, Field(ge=1, description="Longest completion.")]
    temperature: Annotated[float, Field(ge=0, description="0 is greedy; larger values flatten the choice.")] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1, description="Keep the likeliest tokens that sum to this.")] = 1.0
    top_k: Annotated[int, Field(ge=0, description="Keep this many of the likeliest tokens; 0 keeps all.")] = 0
    repetition_penalty: Annotated[
        float, Field(ge=1, description="Makes tokens of the completion so far less likely; 1 changes nothing.")
    ] = 1.0


@dataclass(frozen=True)
class ThoughtBudget:
    """Ends a thought that grows too long.

    Attributes:
        max_tokens: tokens a thought may have.
        end_id: the token that ends a thought.
        forced_ids: what is written when the budget is spent; begins with `end_id`.
    """

    max_tokens: int
    end_id: int
    forced_ids: tuple[int, ...]


@dataclass(frozen=True)
class Request(Generic[V]):
    """One prompt and its sampling options.

    Attributes:
        prompt_ids: tokens of the prompt.
        sampling: how the completion is chosen.
        visual: what the model puts in the place of placeholders; the engine does not look at it.
        seed: of this request's own random draws, so that a batch does not change them.
        thought: budget of the thought the prompt has opened; None when it opened none or none is set.
        rungs: how tokens are chosen when an answer goes round in circles: one further attempt for each.
        visual_key: requests with equal keys show equal pictures, which are encoded once; None: not shared.
        expected_tokens: of the answer, where something is known; longer answers are begun first.
        answer_schema: JSON schema, as text, of which the answer is a value; what comes before the end of a thought is
            free. None: the answer is any text.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    visual: V | None = None
    seed: int = 0
    thought: ThoughtBudget | None = None
    rungs: tuple[SamplingParams, ...] = ()
    visual_key: str | None = None
    expected_tokens: int = 0
    answer_schema: str | None = None


@dataclass(frozen=True)
class Completion:
    """The tokens that answer one request.

    Attributes:
        token_ids: generated tokens without the one that ended the answer.
        finish_reason: why it ended.
        mean_logprob: mean log-probability under the model of the generated tokens, the ending one included: of the
            model as it is, whatever a grammar ruled out, and without the tokens that the engine wrote by itself.
        output_tokens: generated tokens, the ending one included.
        attempt: 1, or more where earlier ones went round in circles.
        wasted_tokens: that earlier attempts wrote.
        closed_tokens: at the end, written by the engine so that an answer which ran out of room, or looped, is a value
            of its schema all the same.
        tokens_saved: that the loops of all attempts would have gone on to write up to the bound.
        queue_seconds: time from the call until it got a slot.
        generate_seconds: time from then to its end, shared with all that ran beside it.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    mean_logprob: float
    output_tokens: int
    attempt: int = 1
    wasted_tokens: int = 0
    tokens_saved: int = 0
    closed_tokens: int = 0
    queue_seconds: float = field(default=0.0, compare=False)
    generate_seconds: float = field(default=0.0, compare=False)


Outcome = Completion | RecordError
"""What became of a request."""
