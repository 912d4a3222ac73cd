"""A hundred thousand tickets in the real service: what they weigh, and that nothing stays of them."""

from __future__ import annotations

from tests.admission.real import Edge, Stage
from tests.support.figures import resident, say
from tidegate.admission.v1 import admission_pb2 as pb
from tidegate.lifecycle.v1 import lifecycle_pb2 as lpb

MODELS, EACH, BATCH = 10, 10_000, 2_000


def _stopped(name: str) -> lpb.ModelSupply:
    return lpb.ModelSupply(model=name, state=lpb.MODEL_STATE_STOPPED, max_queue=EACH)


async def _say(edge: Edge, operations: list[pb.Operation]) -> None:
    """One message, and a heartbeat: the service must hear it in the midst of the flood."""
    await edge.say(operations)
    await edge.beat()


async def test_a_hundred_thousand_tickets_cost_little_and_leave_nothing(stage: Stage) -> None:
    """Less than 1 KiB each while they wait; when they are cancelled no state of their models is left, and as
    many again need no more memory."""
    names = [f"m{i}" for i in range(MODELS)]
    await stage.start(*map(_stopped, names))
    edge = stage.edge()
    await edge.hello()
    total = MODELS * EACH
    memory = [resident(stage.service.pid)]
    for round_ in range(2):
        ns = range(round_ * total + 1, (round_ + 1) * total + 1)
        for first in ns[::BATCH]:
            batch = range(first, first + BATCH)
            await _say(edge, [pb.Operation(acquire=pb.Acquire(n=n, model=names[n % MODELS])) for n in batch])
        await edge.until(lambda books: sum(model.queue.waiting for model in books.models) == total)
        memory.append(resident(stage.service.pid))
        for first in ns[::BATCH]:
            batch = range(first, first + BATCH)
            await _say(edge, [pb.Operation(done=pb.Done(n=n)) for n in batch])
        await edge.until(lambda books: not books.models)
    each = (memory[1] - memory[0]) * 2**20 / total
    say(f"{each:.0f} bytes a ticket; memory in MiB: {memory}")
    assert each < 1024
    assert memory[2] < memory[1] * 1.15
