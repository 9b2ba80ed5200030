"""One engine for several callers: batches that arrive while others run fill the slots that these leave free."""

import threading
from collections.abc import Sequence
from typing import Generic, TypeVar

from operators.engine.engine import Engine
from operators.engine.request import Outcome, Request
from schemas.errors import PagereelError

V = TypeVar("V")


class SharedEngine(Generic[V]):
    """Lets several threads generate at once on one engine.

    One of the waiting threads drives the engine for all; when its own requests have ended it hands over to another. A
    batch therefore never waits for the slowest request of the batch before it.

    Args:
        engine: what runs the requests; nobody else may drive it.
    """

    def __init__(self, engine: Engine[V]) -> None:
        self.engine = engine
        self._changed = threading.Condition()
        self._arrived: list[tuple[int, Sequence[Request[V]]]] = []
        self._calls = 0
        self._tickets: dict[int, list[int]] = {}
        self._ended: dict[int, Outcome] = {}
        self._is_driven = False
        self._failures: dict[int, BaseException] = {}

    def generate(self, requests: Sequence[Request[V]]) -> list[Outcome]:
        """Return what became of each request, in their order.

        Raises:
            WorkerLostError: the device does not answer any more; every caller gets it.
        """
        with self._changed:
            call, self._calls = self._calls, self._calls + 1
            self._arrived.append((call, requests))
        while True:
            with self._changed:
                while self._is_driven and not self._is_done(call) and call not in self._failures:
                    self._changed.wait()
                if call in self._failures:
                    raise self._failures.pop(call)
                if self._is_done(call):
                    return [self._ended.pop(ticket) for ticket in self._tickets.pop(call)]
                self._is_driven = True
            self._drive(call)

    def _drive(self, call: int) -> None:
        """Run the engine until this call is done, then let another thread go on."""
        try:
            while not self._is_done(call):
                self._take_arrived()
                if call in self._failures:
                    return
                self.engine.step()
                self._hand_out()
        except BaseException as error:
            self._give_up(call, error)
            raise
        finally:
            with self._changed:
                self._is_driven = False
                self._changed.notify_all()

    def _give_up(self, driver: int, error: BaseException) -> None:
        """Let every call under way end with this error; one that is done keeps its answers."""
        with self._changed:
            done = {call: tickets for call, tickets in self._tickets.items() if self._is_done(call)}
            waiting = {*self._tickets, *(call for call, _ in self._arrived)} - {driver, *done}
            self._failures |= dict.fromkeys(waiting, error)
            for call, tickets in self._tickets.items():
                for ticket in tickets if call not in done else ():
                    self.engine.abort(ticket)
            self.engine.collect()
            kept = {ticket for tickets in done.values() for ticket in tickets}
            self._ended = {ticket: outcome for ticket, outcome in self._ended.items() if ticket in kept}
            self._tickets, self._arrived = done, []

    def _take_arrived(self) -> None:
        """Put what has arrived into the engine; a call that it refuses ends with the reason, the others go on."""
        with self._changed:
            arrived, self._arrived = self._arrived, []
            for call, requests in arrived:
                try:
                    self._tickets[call] = self.engine.submit(requests)
                except PagereelError as error:
                    self._failures[call] = error
                    self._changed.notify_all()

    def _hand_out(self) -> None:
        ended = self.engine.collect()
        if ended:
            with self._changed:
                self._ended |= ended
                self._changed.notify_all()

    def _is_done(self, call: int) -> bool:
        return call in self._tickets and all(ticket in self._ended for ticket in self._tickets[call])
