"""Further attempts at an answer that went round in circles: how they choose tokens, and what is kept of failed ones.

Only a loop is tried again with the same pixels. An answer that ends at the bound would cost the most of all once more
and most likely end there again; one that cannot be parsed has ended by itself, its parts are salvaged where there are
any, and what is left of it is better asked with other pixels.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from schemas.errors import GenerationError, error_struct


class FurtherAttempt(BaseModel):
    """How one further attempt chooses tokens; where the first is freer, it stays as free."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: Annotated[float, Field(ge=0, description="0 is greedy; larger is more varied.")]
    top_p: Annotated[float, Field(gt=0, le=1, description="Keep the likeliest tokens that sum to this.")]
    repetition_penalty: Annotated[
        float, Field(ge=1, description="Makes tokens of the answer so far less likely; 1.2 damages tables.")
    ] = 1.05


FURTHER_ATTEMPTS: Final = (
    FurtherAttempt(temperature=0.3, top_p=0.9),
    FurtherAttempt(temperature=0.6, top_p=0.9),
    FurtherAttempt(temperature=0.8, top_p=0.9),
    FurtherAttempt(temperature=1.0, top_p=0.95),
)
"""In the order in which they are made, each freer than the one before.

A small penalty alone leaves a loop as it is whose tokens are all but certain, and a draw alone is drawn back into it:
so the first has both. 1.05 is the penalty of the released chat functions; the 1.2 of their beams damages tables, where
the same words and markup come again by right. 0.3 with a `top_p` of 0.9 keeps to what is nearly as likely as the greedy
choice. The last go beyond the 0.7 of the released chat functions: a loop is no reading at all. Chosen by argument: no
released weights were at hand to measure with."""

MOST_ATTEMPTS: Final = 1 + len(FURTHER_ATTEMPTS)


def lost_attempts(before: int, count: int, component: str) -> list[dict[str, Any]]:
    """Return the failures of the first `count` attempts of a call, values of the `ERROR` struct.

    Args:
        before: attempts at the record in earlier calls.
        count: how many of this call went round in circles before the one that ended it.
        component: who made them.
    """
    return [
        error_struct(GenerationError(f"attempt {number} stopped in a loop", code="repetition"), component, None, number)
        for number in range(before + 1, before + count + 1)
    ]


def attempts_before(survived: Sequence[dict[str, Any]] | None) -> int:
    """Return the number of the model's last attempt among the failures that a row survived; 0 where there is none."""
    return max((failure["attempt"] or 0 for failure in survived or ()), default=0)
