"""A server's answer to each prepared record. Takes the place of `Generate` where a server does the work."""

from typing import Annotated, Any, ClassVar, Final

import pyarrow as pa
from pydantic import Field

from operators.answers import ANSWERED, asks_model, with_answers
from operators.base import Operator, OperatorConfig
from operators.endpoint.answer import Answer, Outcome
from operators.endpoint.options import ServerOptions
from operators.endpoint.question import Question, Sampling
from operators.picture_files import MEDIA_TYPES, split_files
from operators.prompts import prompt_for
from schemas.errors import PrepareError, RecordError
from schemas.generation import FAILURES, GENERATION, IDENTITY, REQUEST, ROUTE
from schemas.ids import canonical_json, digest
from schemas.image import PIXELS

SEED_DIGITS: Final = 7
"""Hex digits of a seed: some servers keep it in 31 bits."""


class AskEndpointConfig(OperatorConfig):
    """Which server answers, as which model, and how tokens are chosen."""

    server: ServerOptions
    model_id: Annotated[str, Field(min_length=1, description="Name of the model, as the server lists it.")]
    sampling: Sampling = Sampling()
    custom_prompt: Annotated[str | None, Field(description="Takes the place of the built-in prompts.")] = None


class AskEndpoint(Operator[AskEndpointConfig]):
    """Fill the generation columns of every record that is routed to the model; other records pass untouched.

    What the server does not tell is null: visual tokens always, others as it likes.

    Raises:
        ServiceLostError: the server answers nobody any more.
    """

    reads = pa.schema([*ROUTE, *(IDENTITY.field(name) for name in ("task", "kind")), *PIXELS, *REQUEST, *FAILURES])
    adds = ANSWERED
    engine_name: ClassVar[str] = "endpoint"

    def __init__(self, config: AskEndpointConfig) -> None:
        super().__init__(config)
        # Here and not above: the driver names this class, and only the worker that runs it needs a client.
        from operators.endpoint.client import EndpointClient

        self._client = EndpointClient(config.server, config.model_id, config.sampling)
        self.decode_params: str = canonical_json(config.sampling.model_dump(exclude={"logprobs"}))

    def process(self, table: pa.Table) -> pa.Table:
        """Return `table` with the answers of its records: same rows, same order."""
        outcomes = self._outcomes(table)
        answers = {row: self._answer(outcome) for row, outcome in outcomes.items()}
        return with_answers(table, answers, outcomes, type(self).__name__)

    def close(self) -> None:
        """End the connections."""
        self._client.close()

    def _outcomes(self, table: pa.Table) -> dict[int, Outcome]:
        """Return what became of each row that asks the model, by row."""
        outcomes: dict[int, Outcome] = {}
        questions: dict[int, Question] = {}
        for row in range(table.num_rows):
            if not asks_model(table, row):
                continue
            if not table["content_key"][row].is_valid:
                continue
            try:
                questions[row] = self._question(table, row)
            except RecordError as error:
                outcomes[row] = error
        answered = self._client.ask(list(questions.values()))
        return outcomes | dict(zip(questions, answered, strict=True))

    def _question(self, table: pa.Table, row: int) -> Question:
        encoding = table["pixel_encoding"][row].as_py()
        if encoding not in MEDIA_TYPES:
            raise PrepareError(f"pictures for a server are files of {list(MEDIA_TYPES)}, found {encoding!r}")
        prompt = prompt_for(table["task"][row].as_py(), table["kind"][row].as_py(), self.config.custom_prompt)
        return Question(
            prompt=prompt.text,
            files=tuple(split_files(memoryview(table["pixels"][row].as_buffer()))),
            encoding=encoding,
            # Equal content draws equal numbers, where the server keeps its word.
            seed=int(digest(table["content_key"][row].as_py())[:SEED_DIGITS], 16),
        )

    def _answer(self, outcome: Outcome) -> dict[str, Any]:
        """Return the generation columns of one row."""
        answer: dict[str, Any] = dict.fromkeys(GENERATION.names)
        answer |= {
            "attempt": 1,
            "temperature": self.config.sampling.temperature,
            "engine": self.engine_name,
            "model_id": self.config.model_id,
            "decode_params": self.decode_params,
        }
        if not isinstance(outcome, Answer):
            return answer
        return answer | {
            "completion": outcome.text,
            "thought": outcome.thought,
            "finish_reason": outcome.finish_reason,
            "prompt_tokens": outcome.prompt_tokens,
            "output_tokens": outcome.output_tokens,
            "mean_logprob": outcome.mean_logprob,
            "queue_ms": outcome.queue_seconds * 1000,
            "generate_ms": outcome.generate_seconds * 1000,
        }
