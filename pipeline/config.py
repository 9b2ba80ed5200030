"""The options of every operator of a flow, composed from one spec."""

import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from operators.answer_schema import built_in_schema
from operators.attempts import FURTHER_ATTEMPTS
from operators.decode.clips import DecodeClipsConfig
from operators.decode.documents import DecodeDocumentsConfig
from operators.endpoint.ask import AskEndpointConfig
from operators.endpoint.pictures import EncodeConfig
from operators.engine.scheduler import SchedulerConfig
from operators.fetch import FetchConfig
from operators.generate import GenerateConfig
from operators.minicpmv.family import Family
from operators.minicpmv.packing import PackedConfig
from operators.minicpmv.requirements import activation_dtype
from operators.minicpmv.slicing import SliceConfig
from operators.minicpmv.temporal import FramesConfig, StackedConfig
from operators.parse.completions import ParseCompletionsConfig
from operators.prepare import PrepareConfig
from operators.probe import ProbeConfig
from operators.prompts import prompt_for
from operators.read import MODEL_ID, ReadPagesConfig
from operators.skip import SkipSegmentsConfig
from pipeline.answers import FindAnswersConfig
from pipeline.dials import LARGEST_SEGMENT_PIXELS_BYTES, clip_slicing, page_slicing, segment_bytes, temporal_config
from pipeline.endpoint import ask_config, frame_sampling, frame_size, picture_settings, sampling_of
from pipeline.endpoint import segment_bytes as sent_segment_bytes
from pipeline.reading import Reading
from pipeline.second_look import second_look as second_look_of
from pipeline.sink import WriteRecordsConfig
from pipeline.spec import RunSpec
from pipeline.versions import versions
from schemas.errors import ConfigError
from schemas.ids import canonical_json, digest

RULES_VERSION = "2"
"""Raised when a change of ours changes what rows say: how text layers are judged, answers parsed, frames chosen. A new
column raises the schema version instead, which no key holds: rows of an older one stay, and lack it."""

MAX_NEW_TOKENS = 4096
GPU_SCHEDULER = SchedulerConfig(slot_count=64, chunk_tokens=4096, encode_ahead=16)
CPU_SCHEDULER = SchedulerConfig(slot_count=8, chunk_tokens=1024, encode_ahead=4)
"""On a CPU there is nothing to gain from width: a batch of eight long clips took 3.8 GB in float32 (seen)."""

MOST_ASKED_ROWS = 32
"""What is under way is computed again when the server is lost."""

BATCH_PIXELS_BYTES = 256 * 2**20

SECONDS_PER_PICTURE = 0.5
"""Time for each picture of a segment with many: one of a 4K video and the two frames before it took 0.2 s on a loaded
machine of two cores (measured)."""

DECODER_PACKAGES = ("pymupdf", "decord", "av")


class FlowConfig(BaseModel):
    """Options of each operator, and the workers a flow may use.

    Attributes:
        encode: None when no server reads; it takes the place of the two before.
        find: None when answers that were given before are not looked for.
        generate: None when no model reads here.
        ask: None when no server reads.
        read: None when the CPU engine is not needed.
        skip_videos: set when no engine of this run reads videos.
        decode_workers: most workers of each head.
        read_workers: most workers of the CPU engine.
        gpu_workers: workers of the generate step.
        gpus_per_worker: what each of them takes, a share of one where several fit; 0 when the model runs on the CPU.
        record_rows: records that one call of the step gets in which a model answers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    probe: ProbeConfig
    documents: DecodeDocumentsConfig
    videos: DecodeClipsConfig
    skip_videos: SkipSegmentsConfig | None
    prepare_pages: PrepareConfig
    prepare_clips: PrepareConfig
    encode: EncodeConfig | None
    find: FindAnswersConfig | None
    generate: GenerateConfig | None
    ask: AskEndpointConfig | None
    parse: ParseCompletionsConfig
    read: ReadPagesConfig | None
    write: WriteRecordsConfig
    settings_digest: str
    decode_workers: int
    read_workers: int
    gpu_workers: int
    gpus_per_worker: float
    record_rows: int


@dataclass(frozen=True)
class Settings:
    """Everything that determines the rows of a run, and nothing else.

    Attributes:
        pages: what determines the row of a page, as JSON.
        segments: what determines the row of a segment, as JSON.
        text: both, and how sources are cut, as JSON.
        digest: of `text`.
    """

    pages: str
    segments: str
    text: str
    digest: str


def planning_settings(spec: RunSpec, reading: Reading) -> Settings:
    """Return the settings under which `spec` plans and keys its records."""
    found = versions()
    shared: dict[str, Any] = {
        "task": spec.task,
        "engine": reading.engine,
        "model": _model_identity(reading),
        "dtype": _dtype(spec, reading),
        "decode_params": json.loads(_decode_params(spec, reading)),
        "thinking": spec.thinking,
        "use_image_id": spec.use_image_id,
        "decoders": {name: found[name] for name in DECODER_PACKAGES},
        "cpu_engine": _cpu_engine(),
        "rules": RULES_VERSION,
    }
    pages = shared | {
        "text_layer": spec.text_layer,
        "render": {"mode": "reference", "dpi": spec.dpi, "max_pixels": spec.max_pixels},
        "slicing": page_slicing(spec, reading.model).model_dump(),
        "prompt": prompt_for(spec.task, "pdf", spec.prompt).sha256,
    }
    schema = _answer_schema(spec, reading)
    if schema:
        pages["answer_schema"] = digest(schema)
    looks = second_look_of(spec, reading)
    if looks:
        pages["second_look"] = looks.other.model_dump()
    segments = shared | {
        "temporal": _temporal(spec, reading).model_dump(),
        "slicing": _clip_slicing(spec, reading).model_dump(),
        "prompt": prompt_for(spec.task, "video", spec.prompt).sha256,
    }
    if reading.server:
        # A server slices pages as it likes; what it is sent is the whole.
        pages["slicing"] = picture_settings(spec)
        segments["pictures"] = picture_settings(spec)
    text = canonical_json({"pages": pages, "segments": segments, "segment_seconds": spec.segment_seconds})
    return Settings(
        pages=digest(canonical_json(pages)), segments=digest(canonical_json(segments)), text=text, digest=digest(text)
    )


def probe_config(spec: RunSpec, settings: Settings) -> ProbeConfig:
    """Return what is owed of each source."""
    return ProbeConfig(
        task=spec.task,
        page_settings=settings.pages,
        segment_settings=settings.segments,
        segment_seconds=spec.segment_seconds,
        fetch=FetchConfig(),
    )


def probe_digest(config: ProbeConfig) -> str:
    """Return a digest of what decides how the bytes of a source are understood, whatever is asked of it."""
    found = versions()
    return digest(canonical_json([RULES_VERSION, {name: found[name] for name in DECODER_PACKAGES}, config.max_pages]))


def compose(
    spec: RunSpec,
    reading: Reading,
    *,
    run_uri: str,
    run_id: str,
    worker_count: int,
    gpu_count: int,
    has_videos: bool = True,
    pass_index: int = 0,
    is_second_look: bool = False,
    find: FindAnswersConfig | None = None,
) -> FlowConfig:
    """Return the options of every operator.

    Args:
        spec: what was asked for.
        reading: who reads.
        run_uri: where rows go.
        run_id: this call.
        worker_count: operators that can work at once.
        gpu_count: GPUs there are; 0 runs the model on the CPU.
        has_videos: whether segments are among the records; their pixels bound how many go together.
        pass_index: above 0, rows of this call replace those of earlier passes.
        is_second_look: pages are shown to the model with other slices than those it failed on.
        find: where answers are that were given before.
    """
    settings = planning_settings(spec, reading)
    looks = second_look_of(spec, reading)
    folder = str(reading.model.folder) if reading.model else None
    family = _family(reading)
    pages, clips = page_slicing(spec, reading.model), _clip_slicing(spec, reading)
    if is_second_look and looks:
        pages = looks.other
    temporal = _temporal(spec, reading)
    fetch = FetchConfig()
    decode_params = _content_settings(spec, reading)
    prepare: dict[str, Any] = {
        "model_folder": folder,
        "use_image_id": spec.use_image_id,
        "thinking": spec.thinking,
        "custom_prompt": spec.prompt,
    }
    schema = _answer_schema(spec, reading)
    page_params = canonical_json([decode_params, digest(schema)]) if schema else decode_params
    reads_pages = spec.task in ("ocr", "parse") and spec.text_layer != "only"
    gpus = min(gpu_count, spec.gpus) if spec.gpus is not None else gpu_count
    return FlowConfig(
        probe=probe_config(spec, settings),
        documents=DecodeDocumentsConfig(
            dpi=spec.dpi,
            max_pixels=spec.max_pixels,
            text_layer=spec.text_layer,
            read_route="model" if reading.asks_model else "cpu",
            layout=spec.task == "parse",
            fetch=fetch,
        ),
        videos=DecodeClipsConfig(
            temporal=temporal,
            slicing=clips,
            max_segment_bytes=LARGEST_SEGMENT_PIXELS_BYTES,
            segment_timeout_seconds=max(120.0, SECONDS_PER_PICTURE * temporal.most_pictures(spec.segment_seconds)),
            fetch=fetch,
        ),
        skip_videos=None if reading.asks_model else SkipSegmentsConfig(reason="the CPU engine reads pages, not videos"),
        prepare_pages=PrepareConfig(slicing=pages, decode_params=page_params, **prepare),
        prepare_clips=PrepareConfig(slicing=clips, decode_params=decode_params, **prepare),
        encode=EncodeConfig(
            encoding=spec.endpoint_image,
            jpeg_quality=spec.endpoint_jpeg_quality,
            custom_prompt=spec.prompt,
            decode_params=decode_params,
        )
        if reading.server
        else None,
        find=find,
        generate=_generate(spec, reading) if reading.model else None,
        ask=ask_config(spec, reading.server) if reading.server else None,
        parse=ParseCompletionsConfig(
            cpu_fallback=reads_pages,
            second_look=None if is_second_look else looks,
            is_second_look=is_second_look,
        ),
        read=ReadPagesConfig() if reads_pages else None,
        write=WriteRecordsConfig(
            run_uri=run_uri,
            run_id=run_id,
            repro_template=spec.repro_template(),
            downsample_mode=pages.downsample_mode if family and family.connector == "merger" else None,
            max_slice_nums=pages.max_slices if reading.model else None,
            clip_max_slice_nums=clips.max_slices if reading.model else None,
            max_attempts=(spec.attempts if reading.model else 1) * (2 if looks else 1) if reading.asks_model else None,
            pass_index=pass_index,
            answers=find.index if find else None,
        ),
        settings_digest=settings.digest,
        decode_workers=spec.workers or worker_count,
        read_workers=spec.workers or worker_count,
        gpu_workers=_gpu_workers(spec, gpus) if reading.uses_gpu else 1,
        gpus_per_worker=spec.gpus_per_worker if reading.uses_gpu else 0.0,
        record_rows=_record_rows(spec, reading, has_videos=has_videos),
    )


def _generate(spec: RunSpec, reading: Reading) -> GenerateConfig:
    assert reading.model is not None
    return GenerateConfig.model_validate(
        {
            "model_folder": str(reading.model.folder),
            "model_id": reading.model_id,
            "model_revision": reading.model_revision,
            "weights_kind": reading.weights_kind,
            "device": "cuda" if reading.uses_gpu else "cpu",
            "dtype": _dtype(spec, reading),
            "gpu_count": max(1, int(spec.gpus_per_worker)) if reading.uses_gpu else 1,
            "gpu_share": min(1.0, spec.gpus_per_worker) if reading.uses_gpu else 1.0,
            "max_new_tokens": _max_new_tokens(spec, reading),
            "scheduler": GPU_SCHEDULER if reading.uses_gpu else CPU_SCHEDULER,
            "temperature": spec.temperature,
            "cuda_graphs": spec.cuda_graphs,
            "further_attempts": FURTHER_ATTEMPTS[: spec.attempts - 1],
            "answer_schema": _answer_schema(spec, reading),
        }
    )


def _answer_schema(spec: RunSpec, reading: Reading) -> str | None:
    """Return the JSON schema that answers about pages are held to; None where they are free."""
    if reading.model is None or spec.prompt is not None or spec.constrain == "never":
        return None
    return built_in_schema(spec.task, "pdf")


def _temporal(spec: RunSpec, reading: Reading) -> StackedConfig | PackedConfig | FramesConfig:
    return frame_sampling(spec) if reading.server else temporal_config(spec, _family(reading))


def _clip_slicing(spec: RunSpec, reading: Reading) -> SliceConfig:
    return frame_size(spec) if reading.server else clip_slicing(spec, reading.model)


def _gpu_workers(spec: RunSpec, gpus: int) -> int:
    """Return how many models work at once.

    Raises:
        ConfigError: there are too few GPUs for one.
    """
    # A plain loop takes the GPUs it finds, which its worker counts.
    if spec.gpus_per_worker > gpus and not spec.local:
        raise ConfigError(f"a worker is to take {spec.gpus_per_worker:g} GPUs, and there are {gpus} to use")
    return max(1, int(gpus / spec.gpus_per_worker))


def _model_identity(reading: Reading) -> list[str | None]:
    """Return what tells one model from another: a local folder may move, the hash of its files stays."""
    name = reading.model_id if reading.weights_kind == "released" or reading.server else None
    return [name, reading.model_revision, reading.weights_kind]


def _dtype(spec: RunSpec, reading: Reading) -> str | None:
    if reading.model is None:
        return None
    return activation_dtype(reading.model.quantization, spec.dtype, on_gpu=reading.uses_gpu)


def _record_rows(spec: RunSpec, reading: Reading, *, has_videos: bool) -> int:
    """Return how many records go to the model together: segments hold tens of MB of pixels each."""
    most = 32 if reading.uses_gpu else 8
    if reading.server:
        most = min(spec.endpoint_concurrency, MOST_ASKED_ROWS)
    largest = sent_segment_bytes(spec) if reading.server else segment_bytes(spec, _family(reading))
    return max(1, min(most, int(BATCH_PIXELS_BYTES // largest))) if has_videos else most


def _max_new_tokens(spec: RunSpec, reading: Reading) -> int:
    own = reading.model.generation.max_new_tokens if reading.model else None
    return spec.max_new_tokens or own or MAX_NEW_TOKENS


def _decode_params(spec: RunSpec, reading: Reading) -> str:
    if reading.server:
        return canonical_json(sampling_of(spec).model_dump(exclude={"logprobs"}))
    if reading.model is None:
        return "{}"
    further = [attempt.model_dump() for attempt in FURTHER_ATTEMPTS[: spec.attempts - 1]]
    return canonical_json(
        {
            "max_new_tokens": _max_new_tokens(spec, reading),
            "temperature": spec.temperature,
            "further_attempts": further,
        }
    )


def _content_settings(spec: RunSpec, reading: Reading) -> str:
    """Return what determines the answer beside what is shown, as JSON: a part of the content key."""
    if not reading.asks_model:
        return canonical_json(_cpu_engine())
    return canonical_json([*_model_identity(reading), _dtype(spec, reading), _decode_params(spec, reading)])


def _cpu_engine() -> list[Any]:
    return [MODEL_ID, versions()["rapidocr-onnxruntime"], ReadPagesConfig().model_dump(exclude={"threads"})]


def _family(reading: Reading) -> Family | None:
    return reading.model.family if reading.model else None
