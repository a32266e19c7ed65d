"""``--profile``: where the time of a few updates goes."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP = 5


class UpdateProfiler:
    """Records updates with torch.profiler into ``profile.json`` (a Chrome trace) and ``profile.txt`` (a table).

    Args:
        updates: how many, after :data:`WARM_UP`; 0 records none.
        folder: where the files go.
    """

    def __init__(self, updates: int, folder: Path):
        self.folder, self.updates = folder, updates
        self._profiler = None
        if updates:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            plan = schedule(wait=0, warmup=WARM_UP, active=updates, repeat=1)
            self._profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
            self._profiler.start()

    def _write(self, profiler: profile) -> None:
        profiler.export_chrome_trace(str(self.folder / "profile.json"))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60)
        (self.folder / "profile.txt").write_text(table, encoding="utf-8")

    def step(self) -> str | None:
        """An update is done; a sentence once the last one is recorded."""
        if self._profiler is None:
            return None
        self._profiler.step()
        if self._profiler.step_num < WARM_UP + self.updates:
            return None
        self.close()
        return f"profile of {self.updates} updates: {self.folder / 'profile.txt'}, {self.folder / 'profile.json'}"

    def close(self) -> None:
        """End recording."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
