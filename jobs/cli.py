"""The command line: `pagereel ocr | parse | caption | run | plan | status | ledger | doctor`."""

import logging
import os
import signal
import sys
import traceback
from typing import Annotated, Any, TextIO

import typer

from jobs.display import JsonDisplay, LiveDisplay, PlainDisplay
from jobs.ledger import app as ledger_app
from jobs.options import command
from jobs.spec import load_spec
from jobs.terminal import VisibleFormatter, own_terminal, visible, visible_lines
from jobs.watched import InterruptOnce
from pipeline.spec import RunSpec, Task, make_spec
from schemas.errors import ConfigError, PagereelError

INTERRUPTED = 128 + signal.SIGINT
EXIT_DONE, EXIT_CONFIG, EXIT_INCOMPLETE, EXIT_ERROR_RATE = 0, 2, 3, 4

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Typer carries its own copy of click, and exports of its errors only this one's children."""

app = typer.Typer(
    name="pagereel",
    help="Batch OCR, parsing and captioning of documents and videos with MiniCPM-V on Ray Data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Inputs = Annotated[
    list[str],
    typer.Argument(help="Files, folders, globs, URLs, or manifests (.txt .csv .jsonl .parquet).", show_default=False),
]
Output = Annotated[str, typer.Option("--output", "-o", help="Run folder; the same command resumes it.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the summary.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on standard output.")]


def _task_command(task: Task, text: str) -> None:
    def run_task(inputs: Inputs, output: Output, quiet: Quiet, as_json: Json, options: dict[str, Any]) -> None:
        spec = make_spec({"task": task, "inputs": inputs, "output": output, **options})
        raise typer.Exit(execute(spec, quiet=quiet, as_json=as_json))

    run_task.__name__ = task
    run_task.__doc__ = text
    wrapped = command(run_task)
    _default(wrapped, quiet=False, as_json=False)
    app.command(task, help=text)(wrapped)


def _default(function: Any, **defaults: Any) -> None:
    """Set defaults of keyword parameters, which a signature made by hand does not carry over."""
    signature = function.__signature__
    parameters = [
        p.replace(default=defaults[p.name]) if p.name in defaults else p for p in signature.parameters.values()
    ]
    function.__signature__ = signature.replace(parameters=parameters)


_task_command("ocr", "Read pages as Markdown, and the words on screen in videos.")
_task_command("parse", "Read pages as layout blocks: label, box, reading order, tables as HTML, formulas as LaTeX.")
_task_command("caption", "Describe video segments, images and pages.")


@app.command("run")
def run_file(
    spec: Annotated[str, typer.Argument(help="A job file (YAML) that describes the run completely.")],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a job file: nightly jobs."""
    raise typer.Exit(execute(load_spec(spec), quiet=quiet, as_json=as_json))


def _plan(inputs: Inputs, task: Task, as_json: Json, options: dict[str, Any]) -> None:
    """Show what a run would do: sources, units, records, and the steps of its flow. Writes nothing."""
    from jobs.summary import print_plan
    from pipeline.preview import plan

    spec = make_spec({"task": task, "inputs": inputs, "output": "-", **options})
    print_plan(plan(spec), as_json=as_json)


_plan_command = command(_plan)
_default(_plan_command, task="ocr", as_json=False)
app.command("plan")(_plan_command)


@app.command("status")
def status(
    run: Annotated[str, typer.Argument(help="A run folder.")],
    verify: Annotated[bool, typer.Option("--verify", help="Also check the hash of every part file.")] = False,
    as_json: Json = False,
) -> None:
    """Prove by counting that every page and segment of a run is accounted for."""
    from jobs.summary import print_status
    from pipeline.runner import status_of

    accounting = status_of(run, verify=verify)
    print_status(accounting, run, as_json=as_json)
    raise typer.Exit(EXIT_DONE if accounting.complete else EXIT_INCOMPLETE)


@app.command("show")
def show_run(
    run: Annotated[str, typer.Argument(help="A run folder.")],
    chars: Annotated[int, typer.Option(min=0, help="Characters of each text.")] = 240,
    limit: Annotated[int, typer.Option(min=1, help="Rows of each table.")] = 20,
) -> None:
    """Look at the first pages, segments and errors of a run."""
    from jobs.show import show

    show(run, chars=chars, limit=limit)


app.add_typer(ledger_app, name="ledger")


@app.command("doctor")
def doctor(
    model: Annotated[str | None, typer.Option("--model", help="Also check that this model loads.")] = None,
    endpoint: Annotated[str | None, typer.Option("--endpoint", help="Also check that this server answers.")] = None,
    as_json: Json = False,
) -> None:
    """Check this machine: versions, GPU, decoders, memory, the model, a server."""
    from jobs.doctor import examine, print_report

    report = examine(model, endpoint)
    print_report(report, as_json=as_json)
    raise typer.Exit(EXIT_DONE if report.healthy else EXIT_CONFIG)


def execute(spec: RunSpec, *, quiet: bool, as_json: bool) -> int:
    """Run `spec`, show it, and return the exit status.

    Returns:
        0 every unit accounted for; 3 interrupted or incomplete; 4 complete with more errors than `max_error_rate`.

    Raises:
        ConfigError: the spec cannot run as written.
    """
    from jobs.summary import print_summary
    from pipeline.runner import run

    with own_terminal() as (output, terminal, log):
        display = _display(output, terminal, quiet=quiet, as_json=as_json)
        try:
            summary = run(spec, display, leaves_ray=False)
        except PagereelError as error:
            if not isinstance(error, ConfigError):
                error.add_note(f"details: {log}")
            raise
        finally:
            if isinstance(display, LiveDisplay):
                display.close()
        if isinstance(display, JsonDisplay):
            display.emit("summary", **summary.as_dict())
    if not as_json:
        print_summary(summary)
    if not summary.complete:
        return EXIT_INCOMPLETE
    if spec.max_error_rate is not None and summary.error_rate > spec.max_error_rate:
        return EXIT_ERROR_RATE
    return EXIT_DONE


def _display(
    output: TextIO, terminal: TextIO, *, quiet: bool, as_json: bool
) -> JsonDisplay | LiveDisplay | PlainDisplay:
    if as_json:
        return JsonDisplay(output)
    if terminal.isatty() and not quiet and os.environ.get("TERM") != "dumb":
        return LiveDisplay(terminal)
    return PlainDisplay(terminal, quiet=quiet)


def _say(message: str) -> None:
    sys.stderr.write(f"pagereel: {visible(message)}\n")


def main() -> None:
    """Run the command line and exit with its status."""
    handler = logging.StreamHandler()
    handler.setFormatter(VisibleFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in ("ray", "ray.data", "transformers", "fsspec", "s3fs", "botocore"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # An orderly end, as by Ctrl-C: a scheduler that takes the machine back sends this first.
    interrupt = InterruptOnce()
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        result = app(standalone_mode=False)
        status = result if isinstance(result, int) else EXIT_DONE
        # Typer turns an interrupt into this status of its own.
        if status == INTERRUPTED:
            raise KeyboardInterrupt
    except ConfigError as error:
        _say(" ".join(str(error).split()))
        status = EXIT_CONFIG
    except UsageError as error:
        context = getattr(error, "ctx", None)
        message = getattr(error, "format_message", error.__str__)()
        _say(f"{' '.join(message.split())} (see {context.command_path if context else 'pagereel'} --help)")
        status = EXIT_CONFIG
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted; the same command resumes")
        status = EXIT_INCOMPLETE
    except PagereelError as error:
        details = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
        _say(f"stopped: {' '.join(str(error).split())}; the same command resumes{details}")
        status = EXIT_INCOMPLETE
    except BrokenPipeError:
        status = EXIT_DONE
    except Exception as error:  # noqa: BLE001
        sys.stderr.write(visible_lines(traceback.format_exc()))
        _say(f"a defect ended the run ({type(error).__name__}, see above); the same command resumes")
        status = EXIT_INCOMPLETE
    # Only a run has loaded it, which takes seconds.
    cluster = sys.modules.get("pipeline.cluster")
    if cluster is not None:
        cluster.leave_and_exit(status)
    sys.exit(status)
