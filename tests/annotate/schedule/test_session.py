"""How Ray is started, joined and left."""

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest

from annotate.ledger import RunStoppedError
from annotate.schedule import ray_session


class FakeStart:
    """The part of Ray that `ray_session` uses; `problems` are what the next starts end with."""

    def __init__(self, problems: Sequence[Exception], *, running: bool = False) -> None:
        self.problems, self.running = list(problems), running
        self.inits: list[dict[str, Any]] = []
        self.num_shutdowns = 0

    def is_initialized(self) -> bool:
        return self.running

    def init(self, **options: Any) -> None:
        self.inits.append(options)
        if self.problems:
            raise self.problems.pop(0)

    def shutdown(self) -> None:
        self.num_shutdowns += 1


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[FakeStart, str | None], Any]]:
    for name in ("RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.delenv(name, raising=False)

    def use(fake: FakeStart, address: str | None) -> AbstractContextManager[Any]:
        monkeypatch.setitem(sys.modules, "ray", fake)
        return ray_session(address)

    before = dict(os.environ)
    yield use
    os.environ.clear()
    os.environ.update(before)


def test_a_start_that_fails_once_is_repeated(start: Callable[..., Any]) -> None:
    fake = FakeStart([RuntimeError("busy")])
    with start(fake, None) as ray:
        assert ray is fake
        assert (len(fake.inits), fake.num_shutdowns) == (2, 1)
        assert fake.inits[1]["include_dashboard"] is False
    assert fake.num_shutdowns == 2


def test_a_start_that_fails_twice_is_an_error(start: Callable[..., Any]) -> None:
    fake = FakeStart([RuntimeError("busy"), TimeoutError("still busy")])
    message = r"Ray does not start here: still busy\. `--backend inline` needs no Ray\."
    with pytest.raises(RunStoppedError, match=message), start(fake, None):
        pass


@pytest.fixture
def address() -> Iterator[str]:
    """Where somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_cluster_that_cannot_be_joined_is_asked_once(start: Callable[..., Any], address: str) -> None:
    fake = FakeStart([ConnectionError("no cluster")])
    message = f"cannot join the Ray cluster at {address}: no cluster"
    with pytest.raises(RunStoppedError, match=message), start(fake, address):
        pass
    assert [options["address"] for options in fake.inits] == [address]


@pytest.mark.parametrize("spelling", ["{}", "ray://{}"])
def test_ray_is_not_asked_where_nobody_listens(spelling: str, start: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = spelling.format(f"127.0.0.1:{listener.getsockname()[1]}")
    fake = FakeStart([])
    message = f"cannot join the Ray cluster at {address}: .*Connection refused"
    with pytest.raises(RunStoppedError, match=message), start(fake, address):
        pass
    assert fake.inits == []


def test_ray_looks_for_a_cluster_on_this_machine_itself(start: Callable[..., Any]) -> None:
    fake = FakeStart([])
    with start(fake, "auto"):
        assert [options["address"] for options in fake.inits] == ["auto"]


def test_a_ray_that_runs_already_is_joined_and_kept(start: Callable[..., Any]) -> None:
    fake = FakeStart([], running=True)
    with start(fake, None):
        pass
    assert (fake.inits, fake.num_shutdowns) == ([], 0)


@pytest.mark.parametrize(
    ("address", "chosen", "expected"),
    [(None, None, "disabled"), (None, "token", "token"), ("auto", None, None)],
    ids=["local", "local, chosen by the user", "joined"],
)
def test_ray_is_told_to_need_no_token_only_where_it_is_started_here(
    address: str | None, chosen: str | None, expected: str | None, start: Callable[..., Any]
) -> None:
    if chosen:
        os.environ["RAY_AUTH_MODE"] = chosen
    with start(FakeStart([]), address):
        assert os.environ.get("RAY_AUTH_MODE") == expected
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
