"""The README's Python runs as it stands, from top to bottom."""

import re
from pathlib import Path

import pytest
import torch
from golden import FOLDER, Golden

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    golden = Golden(FOLDER / "dinat" / "dinat_mini.json")
    torch.save({"state_dict": golden.state_dict()}, "dinat_mini_in1k_224.pth")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["logits"].shape == (2, 10)
    assert names["output"].shape == (2, 28, 30, 4, 32)
    printed = capsys.readouterr().out
    assert "[(1, 96, 64, 80), (1, 192, 32, 40), (1, 384, 16, 20), (1, 768, 8, 10)]" in printed
    assert "neighborhood_attention: tiled" in printed
    assert "\nwindow_attention\n" in printed
