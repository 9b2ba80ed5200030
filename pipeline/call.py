"""One call of `run`: what it was asked for, what it holds, and what each of its phases needs."""

import time
from datetime import UTC, datetime
from typing import Any

from pipeline.answers import FindAnswersConfig
from pipeline.commits import utc_now
from pipeline.config import FlowConfig, compose, planning_settings
from pipeline.executor import Executor, LocalExecutor, RayExecutor
from pipeline.lease import Lease
from pipeline.progress import Observer, Progress
from pipeline.reading import choose_reading
from pipeline.request import check_request
from pipeline.runfile import check_same_settings, write_run_file
from pipeline.shared_ledger import shared_ledger
from pipeline.spec import RunSpec
from pipeline.storage import Storage
from schemas.errors import ConfigError
from schemas.ids import digest

WHAT_IS_LISTED = ("inputs", "pages", "start_seconds", "stop_seconds")


class Call:
    """One call of `run`, from the moment that nothing speaks against it.

    Args:
        spec: what was asked for.
        observer: told how far the run is.

    Attributes:
        run_id: this call.
        reading: who reads.
        storage: the run folder.
        shared: the ledger that it shares with other runs; None without one.
        settings: what determines its rows.
        executor: where its flows run; not started.
        lists_the_same: whether the call before this one listed the same inputs.
        lease: of the run folder, for whoever goes through phases; it is to be entered first.
        seconds: of each phase.
        gpus_held: that the workers of its last flow took together.

    Raises:
        ConfigError: it cannot run as written; nothing was written or started.
    """

    def __init__(self, spec: RunSpec, observer: Observer) -> None:
        self.spec = spec
        self.observer = observer
        self.run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{digest(time.perf_counter_ns())[:6]}"
        self.began = time.perf_counter()
        self.started_at = utc_now()
        self.progress = Progress()
        self.seconds: dict[str, float] = {}
        self.gpus_held = 0.0
        check_request(spec)
        self.reading = choose_reading(spec)
        self.settings = planning_settings(spec, self.reading)
        self.shared = shared_ledger(spec)
        self.storage = Storage(spec.output)
        # This makes the folder: what can be refused without it is refused before.
        self.storage.probe_writable()
        self.executor: Executor = LocalExecutor(spec.output) if spec.local else RayExecutor(spec)
        before = check_same_settings(self.storage, spec, self.settings)
        now = spec.stored()
        self.lists_the_same = before is not None and all(
            before["spec"].get(name) == now[name] for name in WHAT_IS_LISTED
        )
        self.lease = Lease(self.storage, utc_now)
        observer.note(self.reading.sentence(spec.task))

    def phase(self, name: str) -> None:
        """Go on to a phase, as long as the run is ours."""
        self.progress.phase = name
        self.lease.check()

    def start(self) -> None:
        """Start the executor, where it is not yet."""
        self.phase("start")
        began = time.perf_counter()
        for note in self.executor.start():
            self.observer.note(note)
        self.seconds["start"] = self.seconds.get("start", 0.0) + time.perf_counter() - began

    def write_run_file(self, outcome: dict[str, Any] | None = None) -> None:
        """Write what the run is, and what came of this call."""
        write_run_file(self.storage, self.spec, self.reading, self.settings, self.run_id, outcome)

    def flow_config(
        self,
        *,
        has_videos: bool = False,
        pass_index: int = 0,
        is_second_look: bool = False,
        find: FindAnswersConfig | None = None,
    ) -> FlowConfig:
        """Return the options of every operator on what the executor has; see `compose`.

        Raises:
            ConfigError: a GPU is needed and there is none.
        """
        gpus = self.executor.gpu_count() if self.reading.uses_gpu else 0
        if self.reading.uses_gpu and not gpus:
            raise ConfigError(f"no GPU is in the cluster at {self.spec.address}: use --device cpu or --engine cpu")
        config = compose(
            self.spec,
            self.reading,
            run_uri=self.spec.output,
            run_id=self.run_id,
            worker_count=self.executor.worker_count,
            gpu_count=gpus,
            has_videos=has_videos,
            pass_index=pass_index,
            is_second_look=is_second_look,
            find=find,
        )
        self.gpus_held = config.gpu_workers * config.gpus_per_worker
        return config
