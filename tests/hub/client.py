"""A Python process with the real huggingface_hub, transformers and peft, pointed to a Hub on localhost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


LOOP = """
import contextlib, json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # nothing else gets between the answers
names = {}
for line in sys.stdin:
    names.pop("result", None)
    try:
        exec(json.loads(line), names)
        answer = {"value": names.get("result")}
    except BaseException as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), file=answers, flush=True)
"""


class ClientError(Exception):
    """What was raised over there: its class is the first word of the message."""


class Client:
    """Runs code and hands back what it calls `result`; names are kept from call to call."""

    def __init__(self, url: str, home: Path, token: str | None = None, offline: bool = False) -> None:
        root = Path(__file__).parents[2]
        environment = dict(
            os.environ,
            HF_ENDPOINT=url,
            HF_HOME=str(home),
            HF_HUB_OFFLINE=str(int(offline)),
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DOWNLOAD_TIMEOUT="5",
            TRANSFORMERS_VERBOSITY="error",
            PYTHONPATH=os.pathsep.join([str(root), str(root / "tests")]),
            PYTHONWARNINGS="ignore",
        )
        environment.pop("HF_TOKEN", None)
        if token is not None:
            environment["HF_TOKEN"] = token
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOP], env=environment, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True
        )

    def run(self, code: str) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise ClientError(f"{answer['error']}: {answer['message']}")
        return answer["value"]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
