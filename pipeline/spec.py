"""What a run was asked to do: every option of the command line, of a job file and of the Python call."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, field_validator

from pipeline.addresses import stored_uri
from pipeline.shell import shell_word
from schemas.errors import ConfigError

Task = Literal["ocr", "parse", "caption"]


def as_text(value: object) -> object:
    """Return a number as text, anything else as it is: job files write 4, the command line "4"."""
    return str(value) if isinstance(value, int) else value


class RunSpec(BaseModel):
    """One run: inputs, task, output, and how.

    None where the model decides: each member of the family has its own default, and not every member has every
    option (see `pipeline.dials`). Other defaults are argued beside the operator that uses them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Annotated[Task, Field(description="ocr: text as Markdown; parse: layout blocks; caption: captions.")]
    inputs: Annotated[
        tuple[str, ...], Field(min_length=1, description="Files, folders, globs, URLs, or manifests of them.")
    ]
    output: Annotated[str, Field(min_length=1, description="Run folder, local or an fsspec URL; resumes if it exists.")]

    engine: Annotated[
        Literal["auto", "torch", "endpoint", "cpu"],
        Field(
            description="torch runs MiniCPM-V; endpoint asks a server; cpu reads pages with RapidOCR; auto takes "
            "endpoint when one is given, torch when a model is named or a GPU is there."
        ),
    ] = "auto"
    model: Annotated[
        str | None,
        Field(
            description="Hub id, local folder, or demo (tiny random weights, meaningless text); with --endpoint the "
            "server's name for it."
        ),
    ] = None
    revision: Annotated[str | None, Field(description="Revision of a hub model.")] = None
    device: Annotated[Literal["auto", "cuda", "cpu"], Field(description="Where the model runs.")] = "auto"
    dtype: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"],
        Field(description="auto is bf16 on a GPU, fp16 there for AWQ weights, and fp32 on a CPU."),
    ] = "auto"

    pages: Annotated[str | None, Field(description="Pages to read, such as 1-5,8 or 7-; all when absent.")] = None
    password: Annotated[SecretStr | None, Field(description="Password for encrypted PDFs; never stored.")] = None
    text_layer: Annotated[
        Literal["auto", "ignore", "only"],
        Field(
            description="auto takes embedded text where it is trustworthy; ignore reads every page; only never does."
        ),
    ] = "auto"
    dpi: Annotated[float, Field(ge=36, le=600, description="Resolution at which pages are rendered.")] = 200.0
    max_pixels: Annotated[
        int, Field(ge=200_000, le=40_000_000, description="Cap on the pixels of a rendered page, whatever its size.")
    ] = 6_000_000

    downsample: Annotated[
        Literal["16x", "4x"] | None,
        Field(
            description="Visual tokens: 16x is fewer and faster, 4x reads smaller print; the model's own by default."
        ),
    ] = None
    small_image_upsize: Annotated[
        Literal["always", "never", "adaptive"] | None,
        Field(
            description="Enlarge images that are smaller than one slice; adaptive: only where their text is small and "
            "dense. The model's own by default."
        ),
    ] = None
    max_slices: Annotated[
        int | None, Field(ge=1, le=64, description="Most slices a page; more read smaller print, cost more tokens.")
    ] = None
    video_max_slices: Annotated[
        int | None,
        Field(ge=1, le=16, description="Most slices a video frame; by default 2 for 2.6, 4.0 and o 2.6, else 1."),
    ] = None
    use_image_id: Annotated[
        bool | None, Field(description="Number the images in the prompt; by default yes for pages, no for clips.")
    ] = None

    start_seconds: Annotated[float | None, Field(ge=0, description="Read videos from here on.")] = None
    stop_seconds: Annotated[float | None, Field(gt=0, description="Read videos up to here.")] = None
    segment_seconds: Annotated[float, Field(gt=0, le=600, description="Length of a video segment.")] = 30.0
    fps: Annotated[
        float | None,
        Field(gt=0, le=30, description="Frames a second of video; by default 1, for 4.5 3, which takes up to 10."),
    ] = None
    max_frames: Annotated[
        int | None,
        Field(
            ge=1,
            le=1024,
            description="Most main frames a segment, for 4.5 packs of frames; by default 128, for 4.5 180, for 2.6, "
            "4.0 and o 2.6 64.",
        ),
    ] = None
    stack_frames: Annotated[
        int | None,
        Field(
            ge=1,
            le=10,
            description="4.6, 4.7: frames seen each second, one main frame and the others in a composite; by default "
            "1.",
        ),
    ] = None
    packing: Annotated[
        Literal["auto", "1", "2", "3", "4", "5", "6"] | None,
        BeforeValidator(as_text),
        Field(description="4.5: frames that share 64 visual tokens; auto, the default, by length and max_frames."),
    ] = None
    max_packing: Annotated[
        int | None,
        Field(
            ge=1,
            le=6,
            description="4.5: most frames that auto lets share 64 visual tokens, by default 3; 6 sees twice as many "
            "frames of a long clip for the same tokens.",
        ),
    ] = None

    thinking: Annotated[bool, Field(description="Let the model think first; the thought is stored apart.")] = False
    prompt: Annotated[str | None, Field(description="Instruction in place of the task's own.")] = None
    max_new_tokens: Annotated[
        int | None, Field(ge=1, le=32768, description="Most tokens of an answer; the model's own limit, else 4096.")
    ] = None
    temperature: Annotated[float, Field(ge=0, le=2, description="0 is greedy: the same answer each time.")] = 0.0
    constrain: Annotated[
        Literal["auto", "never"],
        Field(
            description="auto holds a model that runs here to the JSON that the built-in prompt of parse asks for; "
            "never takes its answers as they come."
        ),
    ] = "auto"
    attempts: Annotated[
        int,
        Field(
            ge=1,
            le=5,
            description="Most answers to the same pixels of a model that runs here: after a loop, once more with freer "
            "sampling.",
        ),
    ] = 2
    second_look: Annotated[
        bool | None,
        Field(
            description="Show pages once more, with another --downsample or --max-slices, on which the model's answer "
            "failed and that carry no text; by default for ocr and parse where the model runs here."
        ),
    ] = None

    endpoint: Annotated[
        str | None,
        Field(
            description="A server that speaks OpenAI's chat protocol, such as http://host:8000/v1; its key comes from "
            "PAGEREEL_ENDPOINT_KEY."
        ),
    ] = None
    endpoint_concurrency: Annotated[
        int, Field(ge=1, le=1024, description="Requests to the server at the same time.")
    ] = 16
    endpoint_timeout_seconds: Annotated[
        float, Field(gt=0, description="Time for one answer of the server, its waiting in line included.")
    ] = 600.0
    endpoint_patience_seconds: Annotated[
        float, Field(ge=0, description="A run stops when the server has answered nobody for so long.")
    ] = 180.0
    endpoint_image: Annotated[
        Literal["png", "jpeg"],
        Field(description="How pictures are sent: png loses nothing; jpeg is smaller for photos and frames."),
    ] = "png"
    endpoint_jpeg_quality: Annotated[int, Field(ge=1, le=100, description="Of --endpoint-image jpeg.")] = 90
    endpoint_frame_px: Annotated[
        int,
        Field(ge=32, le=4096, description="Larger video frames are reduced to the area of a square of this side."),
    ] = 448

    address: Annotated[str | None, Field(description="A Ray cluster; a Ray of our own when absent.")] = None
    local: Annotated[bool, Field(description="A plain loop in this process instead of Ray: small runs, debugging.")] = (
        False
    )
    workers: Annotated[int | None, Field(ge=1, description="Most decode workers; the machine's cores by default.")] = (
        None
    )
    gpus: Annotated[int | None, Field(ge=0, description="GPUs to use; all by default.")] = None
    gpus_per_worker: Annotated[
        float,
        Field(
            gt=0,
            le=64,
            description="GPUs one model takes: 2 or more share the layers of a model that is too large for one; 0.5 "
            "lets two workers share a GPU.",
        ),
    ] = 1.0
    cuda_graphs: Annotated[
        Literal["auto", "never"],
        Field(description="auto records decoding steps on a GPU and replays them; untried on GPUs so far."),
    ] = "never"
    object_store_mb: Annotated[int | None, Field(ge=100, description="Size of our own Ray's object store.")] = None

    ledger: Annotated[
        str | None,
        Field(
            description="A ledger that runs share, a folder or an fsspec URL: what one of them computed is taken over "
            "from it, and what is new is given to it."
        ),
    ] = None
    retry_failed: Annotated[bool, Field(description="Read failed pages and segments of this run folder once more.")] = (
        False
    )
    limit: Annotated[int | None, Field(ge=1, description="Take only the first sources.")] = None
    max_error_rate: Annotated[
        float | None,
        Field(ge=0, le=1, description="Exit status 4 when more pages and segments fail; not set by default."),
    ] = None
    price_per_gpu_hour: Annotated[float | None, Field(ge=0, description="Prints the cost of the run.")] = None

    @field_validator("gpus_per_worker")
    @classmethod
    def _is_share_or_whole(cls, value: float) -> float:
        if value > 1 and not value.is_integer():
            raise ValueError(f"{value:g} is neither a share of one GPU nor a whole number of them")
        return value

    def stored(self) -> dict[str, Any]:
        """Return the spec as it may be written down: without the password and the secrets of URLs."""
        return self.model_dump(mode="json", exclude={"password"}) | {
            "password_given": self.password is not None,
            "inputs": [stored_uri(given) for given in self.inputs],
            "ledger": None if self.ledger is None else stored_uri(self.ledger),
            "endpoint": None if self.endpoint is None else stored_uri(self.endpoint),
        }

    def repro_template(self) -> str:
        """Return the command that reads one source again as this run does, with {source} and {part} to fill in."""
        options = [
            option_text(name, value)
            for name, value in self.model_dump(mode="json").items()
            if name not in (*HOW_ONLY, "task") and value is not None and value != type(self).model_fields[name].default
        ]
        server = [f"--endpoint {shell_word(stored_uri(self.endpoint))}"] if self.endpoint else []
        password = ["--password ..."] if self.password else []
        text = " ".join(part.replace("{", "{{").replace("}", "}}") for part in [*options, *server, *password])
        return f"pagereel {self.task} {{source}} {{part}} -o repro{' ' + text if text else ''}"


HOW_ONLY = (
    "pages", "start_seconds", "stop_seconds",
    "address", "local", "workers", "gpus", "gpus_per_worker", "cuda_graphs", "object_store_mb", "max_error_rate",
    "price_per_gpu_hour", "inputs", "output", "password", "limit", "retry_failed", "password_given", "ledger",
    "endpoint", "endpoint_concurrency", "endpoint_timeout_seconds", "endpoint_patience_seconds",
)  # fmt: skip
"""Options that say where and how fast, not what comes out: a resumed run may change them."""


def option_text(name: str, value: Any) -> str:
    """Return an option as a command line has it."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {shell_word(str(value))}"


def make_spec(options: dict[str, Any]) -> RunSpec:
    """Return the spec of `options`.

    Raises:
        ConfigError: an option is unknown or out of range, in one line.
    """
    try:
        return RunSpec.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ConfigError(f"{where}: {message}{more}" if where else f"{message}{more}") from error
