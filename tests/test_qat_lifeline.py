"""What `--gpus N` starts does not outlive it. The processes here stand for fp4conv, torch's launcher and its worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import sys, time
from fp4conv.qat.lifeline import end_with_starter
end_with_starter()
print("trains", file=sys.stderr, flush=True)
time.sleep(300)
"""
# As torch's elastic agent does.
LAUNCHER = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {WORKER!r}], start_new_session=True).wait()
"""
STARTER = f"""
import os, signal, sys
from fp4conv.qat import lifeline
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, and its children, ignore it
sys.exit(lifeline.run([sys.executable, "-c", {LAUNCHER!r}], os.environ))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
def test_workers_end_with_the_process_that_started_them(how: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, "-c", STARTER]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True) as starter:
        assert starter.stderr is not None
        assert starter.stderr.readline() == b"trains\n"
        starter.send_signal(how)
        starter.communicate(timeout=60)  # to the end of stderr, which each of the three holds
    assert starter.returncode != 0


def test_the_exit_code_is_that_of_the_command() -> None:
    from fp4conv.qat import lifeline

    assert lifeline.run([sys.executable, "-c", "raise SystemExit(7)"], os.environ) == 7
