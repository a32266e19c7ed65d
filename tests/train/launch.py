"""Runs in processes of their own, which a test may kill."""

import json
import os
import signal
import subprocess
import sys
import time

from safetensors.torch import load_file


class Launched:
    """A training run in a process of its own, or several under torchrun; its output is read when it ends."""

    def __init__(self, cwd, arguments, processes=1, restarts=0):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        launcher += ["--max-restarts", str(restarts)]
        module = ["-m", "vicinal.train"]
        command = [sys.executable, *(launcher if processes > 1 else []), *module, *map(str, arguments)]
        self.cwd = cwd
        self.process = subprocess.Popen(
            command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )

    def wait_for_step(self, folder, step, limit=120):
        """Wait until the run has recorded an update."""
        path, end = self.cwd / folder / "metrics.jsonl", time.monotonic() + limit
        while time.monotonic() < end:
            lines = path.read_text().splitlines() if path.is_file() else []
            if sum('"event": "step"' in line for line in lines) >= step:
                return
            if self.process.poll() is not None:
                raise AssertionError(f"ended early: {self.process.communicate()[1][-3000:]}")
            time.sleep(0.01)
        raise AssertionError(f"no update {step} within {limit} s")

    def primary_pid(self, folder):
        """The process that holds the folder's lock."""
        return int((self.cwd / folder / ".lock").read_text().split()[1])

    def end(self, code=0, limit=240):
        """Wait for the end; returns (stdout, stderr)."""
        out, err = self.process.communicate(timeout=limit)
        assert self.process.returncode == code, err[-4000:]
        return out, err

    def kill(self):
        """SIGKILL for every process of the run."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def weights(folder, name="last"):
    return load_file(folder / name / "model.safetensors")


def losses(folder):
    """Loss by update, from the records."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train_loss"]) for line in lines if line["event"] == "step"]


def assert_identical(first, second):
    """Two state dicts equal bit for bit."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.equal(second[name]), name
