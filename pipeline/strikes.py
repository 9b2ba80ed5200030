"""Who died with what: which records were in the hands of a worker each time that one ended.

A record that was in flight at three deaths is condemned: it is not run again. What it takes to say so fairly:

* A worker comes back as another incarnation; whatever the last one held and had not given back gets a strike.
* A record that a worker survives is cleared. The suspects of one death are therefore run in ever smaller company, and
  only the culprit is left (see `pipeline/quarantine.py`).
* A node that is gone takes its workers with it, and that is nobody's fault.
* A worker that dies with three different records, each alone, and survives none between them, is itself at fault: what
  it struck is forgiven, and the run stops.

Strikes lie in the run folder, one file a death, so that they outlive this process.
"""

import json
import logging
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from pydantic import BaseModel, ConfigDict

from pipeline.storage import Storage
from schemas.errors import TransientError, one_line

logger = logging.getLogger(__name__)

STRIKES: Final = "ledger/strikes"

MOST_DEATHS: Final = 3
"""Deaths in flight after which a record is not run again."""

MOST_LONE_RECORDS: Final = 3
"""Different records that may each end the same worker alone, with none survived between them, before it is the worker
that is broken."""

MOST_UNBUILT: Final = 3
"""Deaths in a row of a worker that is not built yet, before it is given up: a model that the machine cannot hold."""


class Touch(BaseModel):
    """Records that are handed to an operator together.

    Attributes:
        step: name of the operator.
        keys: what tells the records apart.
        batch_id: the batch that they came in, and `batch_size` its records.
        depth: how often the batch was cut: 0 whole, 1 a group of it, 2 one record.
    """

    model_config = ConfigDict(frozen=True)

    step: str
    keys: tuple[str, ...]
    batch_id: str
    batch_size: int
    depth: int = 0


class LastWords(BaseModel):
    """What a process said as it ended.

    Attributes:
        exit_signal: the signal that ended it.
        message: what it said itself, or the stack of a fault in native code.
    """

    model_config = ConfigDict(frozen=True)

    exit_signal: int | None = None
    message: str | None = None


class Death(BaseModel):
    """The end of a worker, and who was suspected of it.

    Attributes:
        touch: what it held.
        last_words: None where it ended in silence, as by SIGKILL.
    """

    model_config = ConfigDict(frozen=True)

    death_id: str
    worker: str
    node: str
    touch: Touch
    last_words: LastWords | None = None


@dataclass(frozen=True)
class Standing:
    """What is held against records, and against the worker that is about to run them.

    Attributes:
        strikes: by key; those that have none are left out.
        lone_records: different records that ended this worker alone since it last survived one.
        broken: why nobody should go on; None where there is no reason.
    """

    strikes: Mapping[str, int]
    lone_records: int = 0
    broken: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Why a record is not run again.

    Attributes:
        deaths: that it was in flight at, oldest first.
        may_pass: True where the next call of the run should try it again: its worker has not survived anything since,
            or ended in silence, which may have come from outside.
    """

    deaths: Sequence[Death]
    may_pass: bool


@dataclass
class _Worker:
    incarnation: str | None = None
    name: str = "?"
    node: str = ""
    in_flight: dict[int, Touch] = field(default_factory=dict)
    is_built: bool = False
    unbuilt: int = 0
    has_survived: bool = False
    lone: list[str] = field(default_factory=list)
    since_survival: list[Death] = field(default_factory=list)


class Strikes:
    """The strikes of a run. One object serves all its workers.

    Calls may come twice: each says again what is true, and changes nothing then.

    Args:
        run_uri: the run folder; what it holds is read here.
    """

    def __init__(self, run_uri: str) -> None:
        self._storage = Storage(run_uri)
        self._workers: dict[str, _Worker] = {}
        self._deaths: dict[str, list[Death]] = {}
        self._stored: dict[str, tuple[Death, set[str]]] = {}
        self._broken: str | None = None
        self._count = 0
        for name, data in zip(*self._read(), strict=True):
            if data is not None:
                self._take(name, data)

    def arrive(
        self,
        worker: str,
        incarnation: str,
        node: str,
        living_nodes: Sequence[str],
        last_words: LastWords | None = None,
        name: str = "?",
    ) -> str | None:
        """Note that a worker starts; what its last incarnation held gets a strike.

        Args:
            worker: stays the same over its incarnations.
            incarnation: this one.
            node: where it is.
            living_nodes: all that are up; a worker that was on another has ended with its node.
            last_words: of the last incarnation, where they were found.
            name: what it does, for people.

        Returns:
            Why it should not be built, None where there is no reason.
        """
        known = self._workers.setdefault(worker, _Worker())
        if known.incarnation == incarnation:
            return self._broken
        if known.incarnation is not None:
            known.name = name
            self._end(worker, known, lost_its_node=known.node not in living_nodes, last_words=last_words)
        known.incarnation, known.node, known.is_built = incarnation, node, False
        known.in_flight = {}
        return self._broken

    def built(self, worker: str, incarnation: str) -> None:
        """Note that a worker is ready to be given records."""
        known = self._known(worker, incarnation)
        if known is not None:
            known.is_built, known.unbuilt = True, 0

    def standing(self, worker: str, keys: Sequence[str]) -> Standing:
        """Return what is held against `keys`, and against the worker."""
        known = self._workers.get(worker) or _Worker()
        strikes = {key: len(self._deaths[key]) for key in keys if key in self._deaths}
        return Standing(strikes, len(known.lone), self._broken)

    def touch(self, worker: str, incarnation: str, number: int, touch: Touch, only_clean: bool) -> Standing:
        """Note that a worker is handed records.

        Args:
            worker: who.
            incarnation: which of it.
            number: tells its touches apart.
            touch: the records.
            only_clean: True notes nothing where one of them has a strike.
        """
        standing = self.standing(worker, touch.keys)
        known = self._known(worker, incarnation)
        if known is not None and standing.broken is None and not (only_clean and standing.strikes):
            known.in_flight[number] = touch
        return standing

    def survived(self, worker: str, incarnation: str, number: int, touch: Touch) -> None:
        """Note that a worker has given the records of a touch back, and clear them."""
        known = self._known(worker, incarnation)
        if known is not None:
            known.in_flight.pop(number, None)
            known.has_survived, known.lone, known.since_survival = True, [], []
        self._clear(touch.keys)

    def withdraw(self, worker: str, incarnation: str, number: int) -> None:
        """Note that a touch ended without a result, in good order: that says nothing of its records."""
        known = self._known(worker, incarnation)
        if known is not None:
            known.in_flight.pop(number, None)

    def verdicts(self, worker: str, keys: Sequence[str]) -> dict[str, Verdict]:
        """Return why each of the condemned among `keys` is not run again.

        One that the next call should try again has no strikes in the run folder from here on.
        """
        found = {}
        for key in keys:
            deaths = self._deaths.get(key, [])
            if len(deaths) < MOST_DEATHS:
                continue
            may_pass = deaths[-1].last_words is None or not self._workers.get(worker, _Worker()).has_survived
            found[key] = Verdict(tuple(deaths), may_pass)
            if may_pass:
                self._erase([key])
        return found

    def pardon(self) -> None:
        """Forget the strikes of the condemned: they are to be tried again."""
        self._clear([key for key, deaths in self._deaths.items() if len(deaths) >= MOST_DEATHS])

    def _known(self, worker: str, incarnation: str) -> _Worker | None:
        """Return what is known of a worker; None for an incarnation that has been replaced."""
        known = self._workers.setdefault(worker, _Worker())
        if known.incarnation is None:
            # This object was built again, and has never heard of it.
            known.incarnation, known.is_built = incarnation, True
        return known if known.incarnation == incarnation else None

    def _end(self, worker: str, known: _Worker, *, lost_its_node: bool, last_words: LastWords | None) -> None:
        if lost_its_node:
            return
        if not known.is_built:
            known.unbuilt += 1
            if known.unbuilt >= MOST_UNBUILT:
                times = f"{known.unbuilt} times in a row while it was built"
                self._broken = f"a worker of {known.name} died {times}{_said(last_words)}"
            return
        deaths = [
            Death(death_id=self._new_id(), worker=worker, node=known.node, touch=touch, last_words=last_words)
            for touch in known.in_flight.values()
        ]
        struck: set[str] = set()
        for death in deaths:
            self._strike(death, set(death.touch.keys) - struck)
            struck |= set(death.touch.keys)
        known.since_survival += deaths
        known.has_survived = known.has_survived and not deaths
        if len(struck) == 1:
            known.lone += struck - set(known.lone)
            if len(known.lone) >= MOST_LONE_RECORDS:
                self._give_up(worker, known, last_words)

    def _new_id(self) -> str:
        """Return the name of a death: names sort as deaths came, whatever the clocks of machines say."""
        self._count += 1
        return f"{self._count:08d}-{uuid.uuid4().hex[:8]}"

    def _give_up(self, worker: str, known: _Worker, last_words: LastWords | None) -> None:
        """Hold the worker to be broken, and forgive what it struck since it last survived a record."""
        step = known.since_survival[-1].touch.step
        self._broken = (
            f"the worker of {step} on node {known.node or '?'} died {len(known.since_survival)} times, with "
            f"{len(known.lone)} different records one after the other{_said(last_words)}; they stay owed"
        )
        logger.warning("%s (worker %s)", self._broken, worker)
        forgiven = {death.death_id for death in known.since_survival}
        for key in {key for death in known.since_survival for key in death.touch.keys}:
            left = [death for death in self._deaths.get(key, []) if death.death_id not in forgiven]
            self._clear([key])
            for death in left:
                self._strike(death, {key})
        known.since_survival = []

    def _strike(self, death: Death, keys: set[str]) -> None:
        if not keys:
            return
        for key in keys:
            self._deaths.setdefault(key, []).append(death)
        _, before = self._stored.get(death.death_id, (death, set()))
        self._stored[death.death_id] = (death, before | keys)
        self._write([death.death_id])

    def _clear(self, keys: Iterable[str]) -> None:
        suspected = [key for key in keys if key in self._deaths]
        self._erase(suspected)
        for key in suspected:
            del self._deaths[key]

    def _erase(self, keys: Iterable[str]) -> None:
        """Take `keys` out of the run folder."""
        changed: set[str] = set()
        for key in keys:
            for death in self._deaths[key]:
                _, stored = self._stored.get(death.death_id, (death, set()))
                if key in stored:
                    stored.discard(key)
                    changed.add(death.death_id)
        self._write(sorted(changed))

    def _write(self, death_ids: Iterable[str]) -> None:
        """Write each death with the keys that are still suspected of it, or remove it where none is."""
        for death_id in death_ids:
            death, keys = self._stored[death_id]
            name = f"{STRIKES}/{death_id}.json"
            try:
                if keys:
                    text = json.dumps({"death": death.model_dump(mode="json"), "suspected": sorted(keys)})
                    self._storage.put(name, text.encode())
                else:
                    del self._stored[death_id]
                    self._storage.delete(name)
            except TransientError as error:
                # A strike that only this process remembers is better than a run that ends for want of one.
                logger.warning("a strike is not kept: %s", one_line(error))

    def _read(self) -> tuple[list[str], list[bytes | None]]:
        names = [name for name in self._storage.list(STRIKES) if name.endswith(".json")]
        return names, self._storage.get_many(names)

    def _take(self, name: str, data: bytes) -> None:
        found = json.loads(data)
        death = Death.model_validate(found["death"])
        self._count = max(self._count, int(death.death_id.split("-")[0]))
        self._stored[death.death_id] = (death, set(found["suspected"]))
        for key in found["suspected"]:
            self._deaths.setdefault(key, []).append(death)
        logger.debug("%s: %s suspected", name, len(found["suspected"]))


def _said(last_words: LastWords | None) -> str:
    if last_words is None:
        return " without a word, as by SIGKILL or for lack of memory"
    if last_words.exit_signal is not None:
        return f" by signal {last_words.exit_signal}"
    lines = (last_words.message or "").strip().splitlines()
    return f": {lines[0]}" if lines else ""
