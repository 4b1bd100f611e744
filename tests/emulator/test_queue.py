"""Command queues: in order, never blocking the host, overlapping only where the program says that they may."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tensors import OpenMesh, chips, put

from disagg_tt.device import emulator as ttnn
from disagg_tt.device.emulator import waits
from disagg_tt.device.emulator.queue import CommandQueue, Event
from disagg_tt.errors import DeviceError

PATIENCE_S = 60.0  # longer than any wait here should last; nothing sleeps that long


@pytest.fixture
def queues() -> Any:
    """Two command queues, closed after the test."""
    made = [CommandQueue(f"queue {i}", PATIENCE_S) for i in range(2)]
    yield made
    for queue in made:
        queue.close()


@pytest.fixture
def two_queues(open_mesh: OpenMesh) -> Any:
    return open_mesh(1, 2, num_command_queues=2)


class Gate:
    """Work that waits, as a receive does, until the test opens the gate."""

    def __init__(self) -> None:
        self._open = threading.Event()

    def __call__(self) -> None:
        assert self._open.wait(PATIENCE_S)

    def open(self) -> None:
        self._open.set()


def test_work_that_cannot_wait_runs_at_once_on_the_callers_thread(queues: list[CommandQueue]) -> None:
    threads: list[threading.Thread] = []
    queues[0].submit("add", lambda: threads.append(threading.current_thread()))
    assert threads == [threading.current_thread()]


def test_enqueueing_behind_a_wait_does_not_block_and_keeps_the_order(queues: list[CommandQueue]) -> None:
    queue, gate, order = queues[0], Gate(), []
    queue.submit("receive", gate, waits=True)
    for i in range(50):
        queue.submit("add", lambda i=i: order.append(i))  # type: ignore[misc]
    assert order == [], "work ran ahead of the receive before it"
    gate.open()
    queue.wait()
    assert order == list(range(50))
    assert queue.idle


def test_who_waits_for_a_queue_that_is_closed_is_told(queues: list[CommandQueue]) -> None:
    queue, gate = queues[0], Gate()
    queue.submit("receive", gate, waits=True)
    queue.submit("add", lambda: None)
    waiting: list[BaseException] = []

    def wait() -> None:
        try:
            queue.wait()
        except DeviceError as error:
            waiting.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    closing = threading.Thread(target=queue.close)
    closing.start()
    while not queue._closing:
        pass
    gate.open()
    for each in (thread, closing):
        each.join(PATIENCE_S)
        assert not each.is_alive()
    assert "was closed with work pending" in str(waiting[0])


def test_another_queue_runs_on_while_one_waits(queues: list[CommandQueue]) -> None:
    gate, done = Gate(), []
    queues[0].submit("receive", gate, waits=True)
    queues[1].submit("add", lambda: done.append(1))
    queues[1].wait()
    assert done == [1]
    assert queues[0].completed == 0
    gate.open()
    queues[0].wait()


def test_a_queue_that_waits_for_an_event_stalls_until_it(queues: list[CommandQueue]) -> None:
    gate, order = Gate(), []
    queues[0].submit("receive", gate, waits=True)
    queues[0].submit("fill", lambda: order.append("fill"))
    queues[1].stall(Event(queues[0], None))
    queues[1].submit("read", lambda: order.append("read"))
    assert order == []
    gate.open()
    queues[1].wait()
    assert order == ["fill", "read"]


def test_the_error_of_queued_work_reaches_whoever_waits_and_whoever_enqueues(
    queues: list[CommandQueue],
) -> None:
    def fail() -> None:
        raise DeviceError("no such peer")

    ran: list[int] = []
    queues[0].submit("receive", fail, waits=True)
    event = Event(queues[0], None)
    with pytest.raises(DeviceError, match="no such peer"):
        queues[0].wait()
    with pytest.raises(DeviceError, match="no such peer"):
        queues[0].submit("add", lambda: ran.append(1))
    queues[1].stall(event)
    with pytest.raises(DeviceError, match="no such peer"):
        queues[1].wait()
    assert ran == []


def test_work_rejected_at_once_leaves_the_queue_usable(mesh: Any) -> None:
    ids = put(mesh, torch.tensor([[9]]), ttnn.uint32, ttnn.ROW_MAJOR_LAYOUT)
    table = put(mesh, torch.eye(4), layout=ttnn.ROW_MAJOR_LAYOUT)
    with pytest.raises(DeviceError, match=r"ids reach from 9 to 9; the table has rows 0\.\.3"):
        ttnn.embedding(ids, table)
    ttnn.synchronize_device(mesh)
    assert chips(ttnn.embedding(ttnn.zeros_like(ids), table))[0].tolist() == [[[1, 0, 0, 0]]]


def test_what_a_queue_waits_for_wins_over_the_hosts_own_limit() -> None:
    """The host's limit is over long before that of the wait in the queue's work, which says what is missing."""
    queue, waiting = CommandQueue("mesh 0, queue 0", 0.001), threading.Event()

    def receive() -> None:
        with waits.Wait("a matching send", list, limit_s=0.2) as wait:
            waiting.set()
            while True:
                wait.pause()

    try:
        queue.submit("receive", receive, waits=True)
        assert waiting.wait(PATIENCE_S)
        with pytest.raises(DeviceError, match="a matching send did not happen within 0.2 s"):
            queue.wait()
    finally:
        queue.close()


def test_a_wait_that_makes_no_progress_says_where_it_is() -> None:
    queue, gate = CommandQueue("mesh 0, queue 1", 0.05), Gate()
    try:
        queue.submit("recv_async", gate, waits=True)
        queue.submit("add", lambda: None)
        with pytest.raises(
            DeviceError,
            match=r"progress of mesh 0, queue 1 \(at recv_async, 1 operations behind it\) did not happen",
        ):
            queue.wait()
    finally:
        gate.open()
        queue.close()


# ---------------------------------------------------------------- tensors across queues


def test_using_a_tensor_of_another_queue_needs_an_event(two_queues: Any) -> None:
    mesh = two_queues
    x = put(mesh, torch.ones(32, 32))
    y = ttnn.add(x, x)
    with (
        ttnn.command_queue(1),
        pytest.raises(DeviceError, match=r"add on .*queue 1 uses a tensor that .*queue 0 writes"),
    ):
        ttnn.add(y, y)
    ttnn.wait_for_event(1, ttnn.record_event(mesh, 0))
    with ttnn.command_queue(1):
        z = ttnn.add(y, y)
    with pytest.raises(DeviceError, match="to_torch on .*queue 0 uses a tensor that .*queue 1 writes"):
        chips(z)
    with ttnn.command_queue(1):
        assert chips(z)[1].unique().tolist() == [4]


def test_an_event_covers_only_what_was_enqueued_before_it(two_queues: Any) -> None:
    mesh = two_queues
    x = put(mesh, torch.ones(32, 32))
    event = ttnn.record_event(mesh, 0)
    y = ttnn.add(x, x)
    ttnn.wait_for_event(1, event)
    with ttnn.command_queue(1):
        ttnn.add(x, x)
        with pytest.raises(DeviceError, match="without waiting for it"):
            ttnn.add(y, y)


def read_on_queue_1(mesh: Any) -> tuple[Any, Any]:
    """Return a tensor of queue 0 and what queue 1 computes from it."""
    x = ttnn.add(*[put(mesh, torch.ones(32, 32))] * 2)
    ttnn.wait_for_event(1, ttnn.record_event(mesh, 0))
    with ttnn.command_queue(1):
        return x, ttnn.add(x, x)


def test_what_the_host_has_waited_for_may_be_used_on_any_queue(two_queues: Any) -> None:
    x, result = read_on_queue_1(two_queues)
    with pytest.raises(DeviceError, match="without waiting for it"):
        ttnn.add(x, result)
    ttnn.synchronize_device(two_queues)
    assert chips(ttnn.add(x, result))[0].unique().tolist() == [6]


def test_freeing_a_tensor_that_another_queue_may_be_reading_is_an_error(two_queues: Any) -> None:
    x, _ = read_on_queue_1(two_queues)
    with pytest.raises(
        DeviceError, match=r"freed while work on .*queue 1 may still be reading it.*event_synchronize"
    ):
        ttnn.deallocate(x)
    ttnn.event_synchronize(ttnn.record_event(two_queues, 1))
    ttnn.deallocate(x)


def test_dropping_a_tensor_that_another_queue_may_be_reading_is_an_error(two_queues: Any) -> None:
    x, result = read_on_queue_1(two_queues)
    del x
    with pytest.raises(DeviceError, match="freed while work on .*queue 1 may still be reading it"):
        put(two_queues, torch.ones(32, 32)), ttnn.synchronize_device(two_queues)
    assert result.is_allocated()


def test_dropping_a_tensor_is_fine_once_the_host_has_waited(two_queues: Any) -> None:
    x, result = read_on_queue_1(two_queues)
    ttnn.synchronize_device(two_queues)
    del x
    ttnn.synchronize_device(two_queues)
    with ttnn.command_queue(1):
        assert chips(result)[0].unique().tolist() == [4]


def test_overwriting_a_tensor_that_another_queue_may_be_reading_is_an_error(two_queues: Any) -> None:
    mesh = two_queues
    x, _ = read_on_queue_1(mesh)
    host = ttnn.from_torch(torch.zeros(32, 32), dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT)
    with pytest.raises(
        DeviceError, match="copy_host_to_device_tensor on .*queue 0 overwrites a tensor that .*queue 1 may"
    ):
        ttnn.copy_host_to_device_tensor(host, x)
    ttnn.wait_for_event(0, ttnn.record_event(mesh, 1))
    ttnn.copy_host_to_device_tensor(host, x)
    assert chips(x)[0].unique().tolist() == [0]


def test_a_tensor_freed_behind_queued_work_of_its_own_queue_is_still_used_by_it(mesh: Any) -> None:
    gate = Gate()
    x = put(mesh, torch.ones(32, 32))
    mesh.queue().submit("receive", gate, waits=True)
    y = ttnn.add(x, x)
    ttnn.deallocate(x)
    gate.open()
    assert chips(y)[0].unique().tolist() == [2]


@pytest.mark.parametrize("queues_asked", [0, 3])
def test_only_the_queues_that_dispatch_cores_serve_can_be_opened(
    open_mesh: OpenMesh, queues_asked: int
) -> None:
    with pytest.raises(DeviceError, match=f"num_command_queues={queues_asked}; with ETH dispatch 1..2"):
        open_mesh(1, 2, num_command_queues=queues_asked)
    worker = ttnn.DispatchCoreConfig(type=ttnn.DispatchCoreType.WORKER)
    with pytest.raises(DeviceError, match="No more available dispatch cores"):
        open_mesh(1, 2, num_command_queues=2, dispatch_core_config=worker)


def test_an_unopened_queue_cannot_be_chosen(mesh: Any) -> None:
    with (
        ttnn.command_queue(1),
        pytest.raises(DeviceError, match=r"command queue 1 of a mesh opened with .*=1; allowed: 0\.\.0"),
    ):
        put(mesh, torch.ones(32, 32))
