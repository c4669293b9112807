"""Programs in processes that are forked from one which has imported PyTorch and nothing else: none waits for that.

A program finds what it would find in a Python of its own that has imported PyTorch. Triton's interpreter is off in it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVER = """
import json, os, sys
import torch

for line in sys.stdin:
    program, folder, output = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(output, os.O_WRONLY), 1)
    os.dup2(1, 2)
    exec(program, {"__name__": "__main__"})
    break
"""


def run(program: str, folder: Path = ROOT) -> str:
    """Run the program in the folder, and return what it prints on either stream. If it fails, the error shows that."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.NamedTemporaryFile() as output:
        try:
            print(json.dumps([program, str(folder), output.name]), file=server.stdin, flush=True)
            status = int(server.stdout.readline())
        except BaseException:  # it may still be at work on this program, and would answer the next one too late
            with server:
                os.killpg(server.pid, signal.SIGKILL)
            _server.cache_clear()
            raise
        printed = Path(output.name).read_text()
    if status != 0:
        raise RuntimeError(f"{program} failed:\n{printed}")
    return printed


@cache
def _server() -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that its children can be ended with it
    )
