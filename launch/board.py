"""Where the ranks of all nodes tell each other that one of them has failed: torchrun's rendezvous store.

Theory of operation: the first rank that fails raises the alarm. Every rank looks for it now and then, and answers with
how far it has come; the first one tells from the answers what hung and who is missing, and puts up its state as the
cause. So each node knows why the run ended, without a disk that they share. While all is well it costs one look per
interval.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta

from truedag.launch.rank_state import RankState

_TIMEOUT = timedelta(seconds=10)
_POLL_S = 0.05


class BoardLostError(Exception):
    """The store has gone: torchrun has ended on the node that keeps it, or that node is out of reach."""


class Board:
    """One rank's access to the board; any thread may use it. Made after torchrun has set the environment."""

    def __init__(self, rank: int, world_size: int) -> None:
        from torch._C._distributed_c10d import PrefixStore, TCPStore

        self._rank = rank
        self._world_size = world_size
        # A connection of its own: that of torch.distributed is taken while a rank waits there.
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=_TIMEOUT,
        )
        attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._store = PrefixStore(f"truedag/{attempt}", store)

    def share(self, key: str, value: str | None) -> str:
        """Put up a value, or with None wait for the one that another rank puts up; return it."""
        if value is not None:
            self._store.set(key, value)
            return value
        self._store.wait([key], timedelta(minutes=5))
        return str(self._store.get(key).decode())

    def meet(self, key: str) -> None:
        """Wait until every rank has come here. No communication that a recorder would see."""
        if int(self._store.add(f"met/{key}", 1)) == self._world_size:
            self._store.set(f"all met/{key}", "")
        else:
            self._store.wait([f"all met/{key}"], timedelta(minutes=5))

    def is_alarmed(self) -> bool:
        """Whether a rank has failed or was told to end.

        Raises:
            BoardLostError: the store does not answer.
        """
        try:
            return bool(self._store.check(["alarm"]))
        except RuntimeError as error:
            raise BoardLostError from error

    def raise_alarm(self) -> bool:
        """Say that this rank has failed or was told to end; return whether it is the first."""
        try:
            return int(self._store.add("alarm", 1)) == 1
        except RuntimeError:
            return True

    def answer(self, state: RankState) -> None:
        """Tell the others this rank's state."""
        try:
            self._store.set(f"answer/{self._rank}", state.model_dump_json())
        except RuntimeError:
            return

    def gather(self, patience_s: float) -> dict[int, RankState]:
        """Return the answers by rank; those that have not come in time are absent."""
        deadline = time.monotonic() + patience_s
        found: dict[int, RankState] = {}
        try:
            while len(found) < self._world_size:
                for rank in range(self._world_size):
                    if rank not in found and self._store.check([f"answer/{rank}"]):
                        found[rank] = RankState.model_validate_json(self._store.get(f"answer/{rank}"))
                if time.monotonic() > deadline:
                    break
                time.sleep(_POLL_S)
        except RuntimeError:
            pass  # what was heard is what there is
        return found

    def put_cause(self, state: RankState) -> None:
        """Say which rank ended the run, and why."""
        try:
            self._store.set("cause", state.model_dump_json())
        except RuntimeError:
            return

    def wait_for_cause(self, patience_s: float) -> RankState | None:
        """Return what the first rank that raised the alarm put up; None: nothing in time."""
        deadline = time.monotonic() + patience_s
        try:
            while not self._store.check(["cause"]):
                if time.monotonic() > deadline:
                    return None
                time.sleep(_POLL_S)
            return RankState.model_validate_json(self._store.get("cause"))
        except RuntimeError:
            return None
