"""Imports vLLM once, then forks a process for each answer, which saves ten seconds of processor time a start.

The fork happens where generate.py would go on after its own import of vLLM. Plugins, the configuration, the model and
all workers come after that, as in a start of generate.py. Runs in vLLM's environment.

Standard input is a socket. Each message on it is one JSON object, the environment of the process to fork, with three
file descriptors: the process's standard input, output and error. Two lines answer it: the process's id, and its exit
status once it has ended.
"""

from __future__ import annotations

import json
import os
import socket

import generate
from vllm import LLM, SamplingParams  # noqa: F401 - imported for generate.py

MAX_BYTES = 1 << 20


def main() -> None:
    """Fork for each message, until the socket is closed; in a forked process: answer, and return."""
    requests = socket.socket(fileno=os.dup(0))
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, MAX_BYTES, 3)
        if not message:
            return
        process = os.fork()
        if process == 0:
            requests.close()
            os.setsid()
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
                os.close(descriptor)
            os.environ.clear()
            os.environ.update(json.loads(message))
            generate.main()
            return
        for descriptor in descriptors:
            os.close(descriptor)
        requests.sendall(f"{process}\n".encode())
        _, status = os.waitpid(process, 0)
        requests.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    main()
