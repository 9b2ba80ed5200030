"""The flows, top to bottom. What each step reads and adds is declared on its operator.

::

    sources --- PlanSources ---> units, written to the ledger

    units of documents --- DecodeDocuments - PrepareImages - FindAnswers ---.
                                                                            |--- Generate - ParseCompletions ---.
    units of videos ------ DecodeClips ----- PrepareClips -- FindAnswers ---'                                   |
                                                                                WriteRecords --- ReadPages -----'

What a record shows may have been answered before, for another file or in an earlier run: `FindAnswers` fills that in,
and a second record that shows what is being asked leaves the flow, still owed, for the next round.

A page on which the model failed may leave the flow owed a second look: the same steps then run once more over these
pages, with other slices, and their rows replace the first.

A dash joins steps of one worker; three dashes are a hand-over through the object store. Where a server reads, the steps
before the meeting are `EncodePages` and `EncodeClips`, and `AskEndpoint` stands in the place of `Generate`.
"""

import math

from operators.decode.clips import DecodeClips
from operators.decode.documents import DecodeDocuments
from operators.endpoint.ask import AskEndpoint
from operators.endpoint.pictures import EncodeClips, EncodePages
from operators.generate import Generate
from operators.parse.completions import ParseCompletions
from operators.prepare import PrepareClips, PrepareImages
from operators.read import ReadPages
from operators.skip import SkipSegments
from pipeline.answers import FindAnswers
from pipeline.config import FlowConfig
from pipeline.planning import PlanSources, PlanSourcesConfig
from pipeline.sink import WriteRecords
from pipeline.step import Flow, Step
from schemas.source import SOURCE

DOCUMENT_HEAD = "documents"
VIDEO_HEAD = "videos"
HEADS = (DOCUMENT_HEAD, VIDEO_HEAD)
"""In the order in which units are handed out."""

NO_PROGRESS_SECONDS = 3600
"""A worker shows a sign of life at each page, and at each step of the model. Without one it may load a model of full
size, or the copy of a large video, from a slow store."""

SLOW_PROGRESS_SECONDS = 6 * 3600
"""A batch that is asked of a busy server shows no sign until its last answer is there, a task of the plan not until it
has read its sources."""

BATCHES_IN_FLIGHT = 2
"""Batches of a model's worker at once: while the last answers of one are written, the next fills the free slots."""


def head_of(kind: str) -> str:
    """Return the head that units of a kind go through."""
    return VIDEO_HEAD if kind == "video" else DOCUMENT_HEAD


def plan_flow(config: FlowConfig, run_uri: str | None, part_number: int | None = None) -> Flow:
    """Sources to units: each file is hashed, recognised by content, and cut into page and time ranges."""
    plan = PlanSourcesConfig(
        probe=config.probe, run_uri=run_uri, settings_digest=config.settings_digest, part_number=part_number
    )
    return Flow(
        heads={"sources": [Step(PlanSources, plan, workers=(1, config.decode_workers))]},
        incoming=SOURCE,
        no_progress_seconds=SLOW_PROGRESS_SECONDS,
    )


def record_flow(config: FlowConfig) -> Flow:
    """Units to rows: documents and videos differ in their heads and share everything after."""
    return Flow(
        heads={DOCUMENT_HEAD: document_head(config), VIDEO_HEAD: video_head(config)},
        trunk=record_trunk(config),
        no_progress_seconds=SLOW_PROGRESS_SECONDS if config.ask else NO_PROGRESS_SECONDS,
    )


def document_head(config: FlowConfig) -> list[Step]:
    """Units of PDFs and images to one record a page."""
    return [
        Step(DecodeDocuments, config.documents, workers=(1, config.decode_workers), rows_per_batch=1),
        Step(EncodePages, config.encode, same_worker=True)
        if config.encode
        else Step(PrepareImages, config.prepare_pages, same_worker=True),
        *find_step(config),
    ]


def video_head(config: FlowConfig) -> list[Step]:
    """Units of videos to one record a segment."""
    if config.skip_videos:
        return [Step(SkipSegments, config.skip_videos, cpus=0.25)]
    return [
        Step(DecodeClips, config.videos, workers=(1, config.decode_workers), rows_per_batch=1),
        Step(EncodeClips, config.encode, same_worker=True)
        if config.encode
        else Step(PrepareClips, config.prepare_clips, same_worker=True),
        *find_step(config),
    ]


def find_step(config: FlowConfig) -> list[Step]:
    """Answers that were given before to the same pixels and prompt."""
    return [Step(FindAnswers, config.find, same_worker=True)] if config.find else []


def record_trunk(config: FlowConfig) -> list[Step]:
    """Records to committed rows: the model answers, answers are judged, the CPU engine reads what is left."""
    answered = generate_step(config) or ask_step(config)
    judge = Step(ParseCompletions, config.parse, cpus=0.25, same_worker=bool(answered))
    read = [Step(ReadPages, config.read, workers=(1, config.read_workers), rows_per_batch=4)] if config.read else []
    return [
        *answered,
        judge,
        *read,
        Step(WriteRecords, config.write, cpus=0.25, workers=(1, 2), rows_per_batch=32),
    ]


def generate_step(config: FlowConfig) -> list[Step]:
    """The only step that needs a GPU; nothing when no model reads here."""
    if config.generate is None:
        return []
    return [
        Step(
            Generate,
            config.generate,
            cpus=1.0,
            gpus=config.gpus_per_worker,
            workers=(config.gpu_workers, config.gpu_workers),
            rows_per_batch=config.record_rows,
            calls_at_once=BATCHES_IN_FLIGHT,
        )
    ]


def ask_step(config: FlowConfig) -> list[Step]:
    """The step that waits for a server; nothing when none reads. One worker holds all connections."""
    if config.ask is None:
        return []
    batches = math.ceil(config.ask.server.concurrency / config.record_rows)
    return [
        Step(
            AskEndpoint,
            config.ask,
            cpus=0.5,
            rows_per_batch=config.record_rows,
            # One more than fill the connections, for while the last answers of one come in.
            calls_at_once=batches + 1,
        )
    ]
