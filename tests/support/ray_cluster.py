"""A Ray cluster of several nodes on this machine, each with an address and a disk of its own.

The nodes are those of `ray.cluster_utils`. A node's disk is a folder, which it sees at a path that is the same on all
nodes: it is started from a thread with a mount namespace of its own, in which the folder is mounted there.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filesystems import MOUNTS_REQUIRED

_CLONE_NEWNS = 0x20000
_STORE = 80 << 20  # bytes of memory for a node's objects, the least that Ray takes
_SYSTEM = {"health_check_initial_delay_ms": 2000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


class Nodes:
    """The nodes of a cluster, the first of which is the head; node `n` sees the folder `disk(n)` at `local`."""

    def __init__(self, root: Path) -> None:
        from ray.cluster_utils import Cluster

        self.local = root / "local"
        self.local.mkdir(parents=True)
        self._root = root
        self._cluster = Cluster()
        self._nodes: dict[int, Any] = {}
        self._stop = threading.Event()

    @property
    def address(self) -> str:
        """What --ray takes."""
        return str(self._cluster.address)

    @property
    def alive(self) -> list[int]:
        """The numbers of the nodes, in the order of their addresses."""
        return sorted(self._nodes)

    def disk(self, number: int) -> Path:
        """The folder that is a node's disk, as this process sees it."""
        return self._root / f"disk{number}"

    def add(self) -> int:
        """Start a node with one processor; its number."""
        number = len(list(self._root.glob("disk*")))
        self.disk(number).mkdir()
        failed: list[BaseException] = []
        started = threading.Event()

        def start() -> None:
            try:
                if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
                    raise OSError(ctypes.get_errno(), "unshare")
                subprocess.run(["mount", "--make-rprivate", "/"], check=True)
                subprocess.run(["mount", "--bind", self.disk(number), self.local], check=True)
                self._nodes[number] = self._cluster.add_node(
                    node_ip_address=f"127.0.1.{number + 1}",
                    num_cpus=1,
                    object_store_memory=_STORE,
                    include_dashboard=False,
                    **({"_system_config": _SYSTEM} if number == 0 else {}),
                )
            except BaseException as error:
                failed.append(error)
            started.set()
            self._stop.wait()  # Linux ends the node's processes with the thread that started them

        threading.Thread(target=start, daemon=True).start()
        started.wait()
        if failed:
            raise failed[0]
        return number

    def kill(self, number: int) -> None:
        """End a node and all that runs on it, without a farewell."""
        self._cluster.remove_node(self._nodes.pop(number), allow_graceful=False)

    def shutdown(self) -> None:
        """End all."""
        self._cluster.shutdown()
        self._stop.set()


@contextmanager
def ray_nodes(root: Path, count: int) -> Iterator[Nodes]:
    """A block in which there is a cluster. Where none can be mounted, the test is skipped, or fails if told to."""
    if os.geteuid() != 0:
        if os.environ.get(MOUNTS_REQUIRED):
            pytest.fail("mounting a disk for each node takes root")
        pytest.skip("mounting a disk for each node takes root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # it would end the tests in Ray's way, and can be set by the main thread only
        patch.setattr("ray._private.utils.set_sigterm_handler", lambda handler: None)
        nodes = Nodes(root)
        try:
            for _ in range(count):
                nodes.add()
            yield nodes
        finally:
            nodes.shutdown()
