"""Imports vLLM once, then forks a process for each script to run, which saves ten seconds of processor time a start.

The fork happens where a script would go on after its own import of vLLM. Plugins, the configuration, the model and all
workers come after that, as in a start of the script. Runs in vLLM's environment.

Standard input is a socket. Each message on it is one JSON object with three file descriptors: the standard input,
output and error of the process to fork. `environment` is that process's, `script` the one whose `main` it runs, and
`arguments` are its command line. Two lines answer it: the process's id, and its exit status once it has ended.
"""

from __future__ import annotations

import json
import os
import socket
import sys

import generate
import models
import reference
import reload
from vllm import LLM, SamplingParams  # noqa: F401 - imported for the scripts

SCRIPTS = {"generate": generate.main, "models": models.main, "reference": reference.main, "reload": reload.main}

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
            request = json.loads(message)
            os.environ.update(request["environment"])
            sys.argv[1:] = request["arguments"]
            SCRIPTS[request["script"]]()
            return
        for descriptor in descriptors:
            os.close(descriptor)
        requests.sendall(f"{process}\n".encode())
        _, status = os.waitpid(process, 0)
        requests.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    main()
