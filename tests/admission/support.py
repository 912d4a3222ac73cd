"""What the admission tests share: an outbox that records, and short ways to say supply."""

from __future__ import annotations

from dataclasses import dataclass, field

from tidegate_admission.dispatcher import Dispatcher
from tidegate_admission.fairness import Tenants
from tidegate_admission.limits import Limits
from tidegate_admission.progress import FlowProgress
from tidegate_admission.session import Hello, Session
from tidegate_admission.supply import Instance, InstanceState, ModelSupply, Supply
from tidegate_admission.ticket import Reason, Refusal, Ticket
from tidegate_admission.views import conservation_error

READY = InstanceState.READY
TTL = 10.0


@dataclass
class Recorder:
    """An outbox that keeps what it is given. Each answer is a response of its own."""

    seq: int = 1
    answers: list[tuple[object, ...]] = field(default_factory=list)
    closed: Reason | None = None

    def _add(self, *answer: object) -> None:
        if self.closed is None:
            self.answers.append(answer)
        self.seq += 1

    def welcome(self) -> None:
        self._add("welcome")

    def grant(
        self, ticket: Ticket, address: str, waiting: int, active: int, max_concurrent: int, max_queue: int
    ) -> None:
        self._add("grant", ticket.id[1], ticket.instance_id, ticket.moves)

    def refuse(self, refusal: Refusal) -> None:
        self._add("refuse", refusal.ticket.id[1], refusal.reason)

    def lost(self, n: int, reason: Reason) -> None:
        self._add("lost", n, reason)

    def ack(self, number: int) -> None:
        self._add("ack", number)

    def query(self, number: int) -> None:
        self._add("query", number)

    def progress(self, flow: FlowProgress) -> None:
        self._add("progress", flow)

    def close(self, reason: Reason) -> None:
        self.closed = reason

    def take(self, *kinds: str) -> list[tuple[object, ...]]:
        """What came since the last time; only some kinds, when given."""
        answers, self.answers = self.answers, []
        return [answer for answer in answers if not kinds or answer[0] in kinds]


def instance(name: str = "i1", slots: int = 2, state: InstanceState = READY, old: bool = False) -> Instance:
    """An instance."""
    return Instance(name, f"http://{name}", state, slots, old)


def model(
    *instances: Instance, name: str = "m", start_deadline: float = 0.0, reason: Reason | None = None
) -> ModelSupply:
    """A model of these instances."""
    return ModelSupply(
        name, tuple(instances), start_deadline=start_deadline, reason=reason, message="words", retry_after=3.0
    )


def report(
    *models: ModelSupply,
    n: int = 1,
    whole: bool = True,
    settled: bool = True,
    catalog: int = 1,
    removed: tuple[str, ...] = (),
    roster: tuple[str, ...] | None = None,
) -> Supply:
    """A supply report of lifecycle's first boot."""
    return Supply(
        (1, n), whole, settled, tuple(models), removed, (1, catalog), roster or (), roster is not None
    )


class Desk:
    """A dispatcher with a clock that the test owns."""

    def __init__(
        self, max_queue: int = 200, queue_timeout: float = 300.0, tenants: Tenants | None = None
    ) -> None:
        self.now = 1000.0
        limits = Limits(50, max_queue, queue_timeout, tenants=tenants or Tenants())
        self.dispatcher = Dispatcher(limits, TTL, self.now)
        self.urgent: list[bool] = []
        self.dispatcher.on_demand = self.urgent.append

    def supply(self, *models: ModelSupply, **words: object) -> None:
        """A report comes."""
        self.dispatcher.supply(report(*models, **words), self.now)  # type: ignore[arg-type]

    def open(self, session_id: str = "s", seq: int = 1, **stated: object) -> tuple[Session, Recorder]:
        """A session says Hello."""
        outbox = Recorder()
        hello = Hello(session_id, seq, "host:1", **stated)  # type: ignore[arg-type]
        return self.dispatcher.hello(outbox, hello, self.now), outbox

    def acquire(self, session: Session, *ns: int, deadline: float = float("inf"), **words: object) -> None:
        """A batch of acquires."""
        name = str(words.pop("model", "m"))
        for n in ns:
            ticket = Ticket((session.id, n), name, self.now, deadline=deadline, **words)  # type: ignore[arg-type]
            self.dispatcher.acquire(session, ticket, self.now)
        self.dispatcher.settle(self.now)

    def done(self, session: Session, *ns: int, outcome: int = 1) -> None:
        """A batch of ends."""
        for n in ns:
            self.dispatcher.done(session, n, outcome, self.now)
        self.dispatcher.settle(self.now)

    def move(self, session: Session, n: int, instance_id: str, moves: int = 1) -> None:
        """A move after a failed connection."""
        self.dispatcher.move(session, n, instance_id, 4, moves, self.now)
        self.dispatcher.settle(self.now)

    def beat(self, session: Session, number: int, held: tuple[int, ...], seen: int = 10**9) -> None:
        """A heartbeat."""
        from tidegate_admission.session import digest

        self.dispatcher.heartbeat(session, number, *digest(held), seen, self.now)

    def wait(self, seconds: float) -> None:
        """Time passes; the timer ticks once at its end."""
        self.now += seconds
        self.dispatcher.tick(self.now)
        self.dispatcher.settle(self.now)

    def check(self) -> None:
        """The invariants that hold after every step."""
        assert conservation_error(self.dispatcher) == 0
