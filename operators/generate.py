"""The model's answer to each prepared record. The only operator that needs a GPU."""

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from operators.answers import ANSWERED, asks_model, with_answers
from operators.attempts import FurtherAttempt, attempts_before, lost_attempts
from operators.base import Operator, OperatorConfig
from operators.engine.repetition import RepetitionLimits
from operators.engine.request import Completion, Outcome, Request, SamplingParams, ThoughtBudget
from operators.engine.scheduler import SchedulerConfig
from operators.fillers import is_filler
from operators.minicpmv.config import Attention, quantization_method, read_json
from operators.minicpmv.prompt import PromptBuilder, PromptSettings, image_tokens
from operators.minicpmv.slicing import Size
from operators.minicpmv.visual import Visual, equal_content
from operators.minicpmv.weights import ModelRef, WeightsKind, locate_model
from operators.prepare import read_pictures
from schemas.errors import RecordError, WorkerLostError
from schemas.generation import FAILURES, GENERATION, IDENTITY, REQUEST, ROUTE
from schemas.ids import canonical_json, digest
from schemas.image import PIXELS, Grid
from schemas.video import SEGMENT_FACTS

MAX_NEW_TOKENS: Final = 2048
"""Where neither the job nor the model says: what the released chat function of the family allows."""


class GenerateConfig(OperatorConfig):
    """Which model answers, where, and how tokens are chosen."""

    model_folder: Annotated[str, Field(description="Folder of the model's files.")]
    model_id: Annotated[
        str | None, Field(description="Name the model was asked by; fetched by it where the folder is absent.")
    ] = None
    model_revision: Annotated[str | None, Field(description="Commit or hash; null: the files are hashed.")] = None
    weights_kind: Annotated[WeightsKind | None, Field(description="Null: local, or what a demo model says.")] = None
    device: Annotated[Literal["auto", "cuda", "cpu"], Field(description="auto takes CUDA where it is.")] = "auto"
    dtype: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"],
        Field(description="auto: bf16 on CUDA, fp16 there for AWQ weights, fp32 on CPU."),
    ] = "auto"
    gpu_count: Annotated[int, Field(ge=1, description="GPUs that the layers of one model are spread over.")] = 1
    gpu_share: Annotated[
        float, Field(gt=0, le=1, description="Share of each GPU's memory to fill; less where workers share one.")
    ] = 1.0
    cuda_graphs: Annotated[
        Literal["auto", "never"], Field(description="auto records steps of decoding on a GPU, which saves launches.")
    ] = "never"
    attention: Annotated[Attention, Field(description="Attention implementation of transformers.")] = "sdpa"
    max_new_tokens: Annotated[
        int | None, Field(ge=1, description="Longest answer, thought included; null: the model's own, or 2048.")
    ] = None
    temperature: Annotated[float, Field(ge=0, description="0 is greedy; larger is more varied.")] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1, description="Keep the likeliest tokens that sum to this.")] = 1.0
    top_k: Annotated[int, Field(ge=0, description="Keep this many of the likeliest tokens; 0 keeps all.")] = 0
    repetition_penalty: Annotated[
        float, Field(ge=1, description="Makes tokens of the answer so far less likely; 1.2 damages tables.")
    ] = 1.0
    further_attempts: Annotated[
        tuple[FurtherAttempt, ...], Field(description="After a loop the same is asked again, once for each of these.")
    ] = ()
    max_thought_tokens: Annotated[
        int | None, Field(ge=1, description="A longer thought is ended, so that an answer follows; null: no bound.")
    ] = None
    answer_schema: Annotated[
        str | None,
        Field(description="JSON schema, as text, that answers follow, but for segments of parse; null: none does."),
    ] = None
    scheduler: SchedulerConfig = SchedulerConfig(slot_count=32)
    repetition: Annotated[
        RepetitionLimits | None, Field(description="When an answer is ended as going round in circles; null: never.")
    ] = RepetitionLimits()


class Generate(Operator[GenerateConfig]):
    """Fill the generation columns of every record that is routed to the model; other records pass untouched.

    Raises:
        ConfigError: from the constructor, when the model or the device is not there, or the schema cannot be used.
        WorkerLostError: when the device fails in a way that this process does not survive.
    """

    reads = pa.schema(
        [
            *(IDENTITY.field(name) for name in ("task", "kind")),
            *ROUTE,
            SEGMENT_FACTS.field("temporal_ids"),
            *PIXELS,
            *REQUEST,
            *FAILURES,
        ]
    )
    adds = ANSWERED
    stage: ClassVar[str] = "generate"
    engine_name: ClassVar[str] = "torch"

    def __init__(self, config: GenerateConfig) -> None:
        super().__init__(config)
        # Here and not above: the driver names this class, and only the worker that runs it should pay for torch.
        from operators.engine.engine import Engine
        from operators.engine.shared import SharedEngine
        from operators.engine.structured import Grammars
        from operators.minicpmv.device import choose_devices, choose_dtype
        from operators.minicpmv.model import MiniCPMV

        self.model_ref: ModelRef = locate_model(
            config.model_folder, config.model_id, config.model_revision, config.weights_kind
        )
        devices = choose_devices(config.device, config.gpu_count)
        self.device = devices[0]
        quantization = quantization_method(read_json(self.model_ref.folder / "config.json"))
        self._model = MiniCPMV(
            self.model_ref.folder,
            device=self.device,
            dtype=choose_dtype(config.dtype, self.device, quantization),
            attention=config.attention,
            more_devices=devices[1:],
            memory_share=config.gpu_share,
            pass_tokens=config.scheduler.chunk_tokens,
            records_steps=config.cuda_graphs == "auto",
        )
        self._text = PromptBuilder(self._model.config)
        grammars = None
        if config.answer_schema is not None:
            tokenizer = (self.model_ref.folder / "tokenizer.json").read_text(encoding="utf-8")
            grammars = Grammars(tokenizer, self._model.stop_ids)
            grammars.compile(config.answer_schema)
        self._engine: SharedEngine[Visual] = SharedEngine(
            Engine(self._model, config.scheduler, config.repetition, self._may_repeat, grammars, self.known_good())
        )
        self._packs_frames = self._model.config.family.clip_rule == "packed"
        self._sampling = SamplingParams(
            max_new_tokens=config.max_new_tokens or self._model.config.generation.max_new_tokens or MAX_NEW_TOKENS,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            repetition_penalty=config.repetition_penalty,
        )
        self._rungs = tuple(freer(self._sampling, attempt) for attempt in config.further_attempts)
        thought = {"max_thought_tokens": config.max_thought_tokens}
        further = {"further_attempts": [attempt.model_dump() for attempt in config.further_attempts]}
        self.decode_params: str = canonical_json(self._sampling.model_dump() | thought | further)
        self._warm_up()

    def _warm_up(self) -> None:
        """Answer a small request before the first real one.

        Kernels are chosen and compiled, and a model that cannot work says so now.
        """
        [outcome] = self._engine.generate([self.known_good()])
        if isinstance(outcome, RecordError):
            raise WorkerLostError(f"the model in {self.model_ref.folder} fails on a small request: {outcome}")
        self._engine.engine.forget_stats()

    def known_good(self) -> Request[Visual]:
        """Return a request that a model which works answers: a grey square, and what it is."""
        config = self._model.config
        side_px = 2 * config.slicing.step_px
        size = Size(side_px, side_px)
        images = image_tokens([size], [Grid(0, 0)], config.slicing)
        settings = PromptSettings(kind="image", use_image_id=config.use_image_id)
        return Request(
            tuple(self._text.build("What is it?", images, settings)),
            SamplingParams(max_new_tokens=1),
            Visual(np.full(3 * side_px**2, 127, np.uint8), (size,)),
        )

    def process(self, table: pa.Table) -> pa.Table:
        """Return `table` with the answers of its records: same rows, same order."""
        outcomes = self.outcomes(table)
        answers = {row: self._answer(table, row, outcome) for row, outcome in outcomes.items()}
        lost = {row: self._lost(table, row, outcome) for row, outcome in outcomes.items()}
        return with_answers(table, answers, outcomes, type(self).__name__, lost)

    def at_risk(self, table: pa.Table) -> list[bool]:
        """Return for each row whether it asks the model."""
        return [asks_model(table, row) for row in range(table.num_rows)]

    def work_done(self) -> int:
        """Return how much the engine has done: each step of it counts."""
        stats = self._engine.engine.stats
        return stats.decode_steps + stats.prefill_tokens + stats.encoded_requests

    def close(self) -> None:
        """Give the model's memory back."""
        self._model.release_memory()

    def outcomes(self, table: pa.Table) -> dict[int, Outcome]:
        """Return what became of each row that asks the model, by row: its tokens, or its error."""
        began = time.perf_counter()
        outcomes: dict[int, Outcome] = {}
        requests: dict[int, Request[Visual]] = {}
        for row in range(table.num_rows):
            if not asks_model(table, row):
                continue
            if not table["prompt_ids"][row].is_valid:
                continue
            try:
                requests[row] = self._request(table, row)
            except RecordError as error:
                outcomes[row] = error
        asked = with_visual_keys(list(requests.values()))
        waited = time.perf_counter() - began
        for row, outcome in zip(requests, self._engine.generate(asked), strict=True):
            outcomes[row] = later(outcome, waited)
        return outcomes

    def _request(self, table: pa.Table, row: int) -> Request[Visual]:
        pictures = read_pictures(table, row, packed=self._packs_frames)
        prompt_ids = tuple(table["prompt_ids"][row].as_py())
        schema = self._answer_schema(table, row)
        return Request(
            prompt_ids=prompt_ids,
            sampling=self._sampling,
            visual=Visual(pictures.pixels, pictures.shapes, pictures.slice_packs()),
            # Equal content draws equal numbers, in whatever batch or run it comes.
            seed=int(digest(table["content_key"][row].as_py())[:16], 16),
            thought=self._thought_budget(prompt_ids, schema),
            rungs=self._rungs,
            answer_schema=schema,
        )

    def _answer_schema(self, table: pa.Table, row: int) -> str | None:
        """Return the schema that the answer of a row follows."""
        is_plain_text = table["task"][row].as_py() == "parse" and table["kind"][row].as_py() == "video"
        return None if is_plain_text else self.config.answer_schema

    def _thought_budget(self, prompt_ids: tuple[int, ...], schema: str | None) -> ThoughtBudget | None:
        end, most = self._model.config.tokens.think_end, self.config.max_thought_tokens
        if schema is not None and most is None:
            # Where the thought ends, the schema begins to count.
            most = self._sampling.max_new_tokens
        if most is None or end is None or not self._opens_thought(prompt_ids):
            return None
        return ThoughtBudget(most, end, (end, *self._text.encode("\n\n")))

    def _opens_thought(self, prompt_ids: tuple[int, ...]) -> bool:
        """Return whether the prompt ends inside a thought; never where the model has none."""
        tokens = self._model.config.tokens
        if tokens.think_start is None:
            return False
        for token in reversed(prompt_ids):
            if token in (tokens.think_start, tokens.think_end):
                return token == tokens.think_start
        return False

    def _answer(self, table: pa.Table, row: int, outcome: Outcome) -> dict[str, Any]:
        """Return the generation columns of one row."""
        answer: dict[str, Any] = dict.fromkeys(GENERATION.names)
        prompt_ids = tuple(table["prompt_ids"][row].as_py())
        attempt = outcome.attempt if isinstance(outcome, Completion) else 1
        answer |= {
            "attempt": attempts_before(table["recovered"][row].as_py()) + attempt,
            "temperature": (self._sampling, *self._rungs)[attempt - 1].temperature,
            "prompt_tokens": len(prompt_ids),
            "engine": self.engine_name,
            "weights_kind": self.model_ref.weights_kind,
            "model_id": self.model_ref.model_id,
            "model_revision": self.model_ref.revision,
            "decode_params": self._decode_params_of(table, row),
        }
        if not isinstance(outcome, Completion):
            return answer
        thought, completion = self._split(outcome.token_ids, opened=self._opens_thought(prompt_ids))
        return answer | {
            "completion": completion,
            "thought": thought,
            "finish_reason": outcome.finish_reason,
            "output_tokens": outcome.output_tokens,
            "tokens_saved": outcome.tokens_saved,
            "tokens_wasted": outcome.wasted_tokens,
            "mean_logprob": outcome.mean_logprob,
            "queue_ms": outcome.queue_seconds * 1000,
            "generate_ms": outcome.generate_seconds * 1000,
        }

    def _decode_params_of(self, table: pa.Table, row: int) -> str:
        schema = self._answer_schema(table, row)
        if schema is None:
            return self.decode_params
        return canonical_json(json.loads(self.decode_params) | {"answer_schema": digest(schema)})

    def _lost(self, table: pa.Table, row: int, outcome: Outcome) -> list[dict[str, Any]]:
        """Return the failures of the attempts before the one that ended the row, values of the `ERROR` struct."""
        if not isinstance(outcome, Completion) or outcome.attempt == 1:
            return []
        before = attempts_before(table["recovered"][row].as_py())
        return lost_attempts(before, outcome.attempt - 1, type(self).__name__)

    def _may_repeat(self, pattern: Sequence[int]) -> bool:
        """Return whether a pattern of tokens is only markup of tables, rules or leaders, which repeat by nature."""
        return is_filler(self._text.decode([*pattern, *pattern]))

    def _split(self, token_ids: tuple[int, ...], *, opened: bool) -> tuple[str | None, str]:
        """Return the thought, None when there is none, and the answer."""
        end = self._model.config.tokens.think_end
        if opened and end is not None and end in token_ids:
            place = token_ids.index(end)
            return self._text.decode(token_ids[:place]).strip(), self._text.decode(token_ids[place + 1 :]).strip()
        if opened:
            return self._text.decode(token_ids).strip(), ""
        return None, self._text.decode(token_ids).strip()


def freer(sampling: SamplingParams, attempt: FurtherAttempt) -> SamplingParams:
    """Return how tokens are chosen in a further attempt."""
    return sampling.model_copy(
        update={
            "temperature": max(sampling.temperature, attempt.temperature),
            "top_p": attempt.top_p,
            "repetition_penalty": max(sampling.repetition_penalty, attempt.repetition_penalty),
        }
    )


def with_visual_keys(requests: Sequence[Request[Visual]]) -> list[Request[Visual]]:
    """Return the requests, those with keys that show the same pictures: they are encoded once."""
    shown = [request.visual for request in requests]
    keys = iter(equal_content([visual for visual in shown if visual is not None]))
    return [
        request if request.visual is None else dataclasses.replace(request, visual_key=next(keys))
        for request in requests
    ]


def later(outcome: Outcome, seconds: float) -> Outcome:
    """Return `outcome` with `seconds` more of waiting."""
    if not isinstance(outcome, Completion):
        return outcome
    return dataclasses.replace(outcome, queue_seconds=outcome.queue_seconds + seconds)
