"""Files of a run that are odd rather than missing: one line, and no more is lost than has to be."""

import json
import pickle
import shutil

import pytest
import torch
from launch import assert_identical, weights
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties

from vicinal.__main__ import main
from vicinal.eval.classify import find_model
from vicinal.train.run.folder import find_best, find_damage
from vicinal.train.run.fsdp import load_shards, save_shards
from vicinal.train.run.log import read_records


@pytest.fixture(scope="module")
def finished(tmp_path_factory, jpeg_tree):
    """A run of two epochs, to be copied; its flags."""
    root = tmp_path_factory.mktemp("finished")
    flags = ("--model", "test_vit", "--img-size", 32, "--threads", 1, "--device", "cpu", "--warmup-epochs", 0)
    flags += ("--data", jpeg_tree, "--workers", 0, "--batch-size", 12, "--log-interval", 1, "--crop", "none")
    assert main(["train", *map(str, flags), "--epochs", "2", "--output", str(root / "run")]) == 0
    return root / "run", flags


@pytest.fixture
def resume(finished, tmp_path, capsys):
    """Change a copy of the run, resume it; returns (exit code, stdout, lines of stderr, folder)."""

    def call(change, *more):
        source, flags = finished
        folder = tmp_path / "run"
        shutil.copytree(source, folder, dirs_exist_ok=True)
        change(folder)
        capsys.readouterr()
        code = main(
            ["train", *map(str, (*flags, *(more or ("--epochs", 2)))), "--output", str(folder), "--resume", "auto"]
        )
        out, err = capsys.readouterr()
        return code, out, err.strip().splitlines(), folder

    return call


MANIFESTS = {
    "list": "[]",
    "number": "3",
    "empty": "",
    "no files": '{"files": {}}',
    "files a list": '{"files": ["trainer.pt"]}',
    "entry a number": '{"files": {"trainer.pt": 3}}',
    "entry empty": '{"files": {"trainer.pt": {}}}',
    "elsewhere": '{"files": {"trainer.pt": {"bytes": 1, "sha256": ""}, "../config.yaml": {"bytes": 1, "sha256": ""}}}',
    "absolute": '{"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}, "trainer.pt": {"bytes": 1, "sha256": ""}}}',
    "a name that no file has": json.dumps(
        {"files": {"a\0b": {"bytes": 1, "sha256": ""}, "trainer.pt": {"bytes": 1, "sha256": ""}}}
    ),
    "a long name": json.dumps(
        {"files": {"a" * 9999: {"bytes": 1, "sha256": ""}, "trainer.pt": {"bytes": 1, "sha256": ""}}}
    ),
    "deep": "[" * 100_000,
    "binary": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_an_odd_manifest_is_damage(finished, tmp_path, kind):
    source, _ = finished
    shutil.copytree(source / "last", tmp_path / "last")
    assert find_damage(tmp_path / "last", needed="trainer.pt") is None
    content = MANIFESTS[kind]
    (tmp_path / "last" / "manifest.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert find_damage(tmp_path / "last", needed="trainer.pt")
    # What the odd manifest says of the run's progress counts for nothing.
    assert find_best(tmp_path)[0] == tmp_path / "last"


def test_an_odd_manifest_gives_way_to_the_checkpoint_before(resume, finished):
    code, out, _, folder = resume(lambda run: (run / "last" / "manifest.json").write_text('{"files": {"a": 3}}'))
    assert code == 0
    assert "last is damaged: manifest.json cannot be read: " in out
    assert "previous" in out
    assert_identical(weights(folder), weights(finished[0]))


LINES = {
    "binary": b"\xff\xfe\x00\x01\n",
    "torn": b'{"event": "step", "epo',
    "a number": b"3\n",
    "a list": b"[1, 2]\n",
    "no step": b'{"event": "step"}\n',
    "a step that is none": b'{"event": "step", "step": "one", "epoch": 1}\n',
    "no event": b'{"step": 3}\n',
}


@pytest.mark.parametrize("kind", LINES)
@pytest.mark.parametrize("place", ["in front", "in the middle", "at the end"])
def test_records_that_cannot_be_read_are_left_out_and_no_others(finished, tmp_path, kind, place):
    lines = (finished[0] / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    number = {"in front": 0, "in the middle": len(lines) // 2, "at the end": len(lines)}[place]
    odd = LINES[kind] if LINES[kind].endswith(b"\n") else LINES[kind] + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*lines[:number], odd, *lines[number:]]))
    assert read_records(tmp_path / "metrics.jsonl", last_epoch=2, last_step=4) == [json.loads(line) for line in lines]


def test_a_resumed_run_says_which_records_it_leaves_out(resume, finished, records):
    def spoil(run):
        lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (run / "metrics.jsonl").write_bytes(lines[0] + b"\xff\x00\n3\n" + b"".join(lines[1:]))

    code, out, _, folder = resume(spoil)
    assert code == 0
    assert "metrics.jsonl: 2 lines are no records and are left out" in out
    assert records(folder) == records(finished[0])


TRAINER = {
    "a list": lambda p: [1],
    "no epoch": lambda p: {k: v for k, v in p.items() if k != "epoch"},
    "epoch a text": lambda p: {**p, "epoch": "two"},
    "epoch negative": lambda p: {**p, "epoch": -1},
    "position true": lambda p: {**p, "position": True},
    "unreadable a number": lambda p: {**p, "unreadable": [3]},
    "no optimizer": lambda p: {k: v for k, v in p.items() if k != "optimizer"},
    "optimizer empty": lambda p: {**p, "optimizer": {}},
    "groups a text": lambda p: {**p, "optimizer": {**p["optimizer"], "param_groups": "abc"}},
    "state a list": lambda p: {**p, "optimizer": {**p["optimizer"], "state": [1]}},
    "state of another shape": lambda p: {
        **p,
        "optimizer": {
            **p["optimizer"],
            "state": {0: {**p["optimizer"]["state"][0], "exp_avg": torch.zeros(1, 2)}},
        },
    },
    "state a text": lambda p: {
        **p,
        "optimizer": {**p["optimizer"], "state": {0: {**p["optimizer"]["state"][0], "exp_avg": "zero"}}},
    },
    "scaler a number": lambda p: {**p, "scaler": 3},
    "no settings": lambda p: {k: v for k, v in p.items() if k != "settings"},
    "settings empty": lambda p: {**p, "settings": {}},
    "settings odd": lambda p: {**p, "settings": {**p["settings"], "config": {"model": []}}},
}


@pytest.mark.parametrize("kind", TRAINER)
def test_an_odd_trainer_state_is_one_line(resume, kind):
    def spoil(run):
        shutil.rmtree(run / "previous")
        path = run / "last" / "trainer.pt"
        torch.save(TRAINER[kind](torch.load(path, weights_only=True)), path)
        sign(run / "last")

    code, _, lines, folder = resume(spoil, "--epochs", 3)
    assert code == 2
    (line,) = lines
    assert "--resume" in line
    assert (folder / "last").name in line


def sign(folder):
    """A manifest that agrees with the files: whoever changes the one can change the other."""
    from vicinal.train.run.folder import digest_files, list_files

    names = [name for name in list_files(folder) if name != "manifest.json"]
    (folder / "manifest.json").write_text(json.dumps({"facts": {}, "files": digest_files(folder, names)}))


class SetsAttributes:
    """A pickle that fills something that it may name, but that is none of the metadata's entries."""

    def __init__(self, owner, state):
        self.content = pickle.dumps(owner, protocol=2)[:-1] + pickle.dumps(state, protocol=2)[2:-1] + b"b."


@pytest.mark.parametrize(
    ("owner", "state"),
    [
        (TensorProperties, (None, {"marked": True})),
        (Metadata, (None, {"marked": True})),
        (Metadata({}), {"marked": True}),
        (Metadata({}), (None, {"marked": True})),
    ],
    ids=["a class", "another class", "a field that is none", "by slots"],
)
def test_metadata_of_shards_sets_no_attributes_but_its_own(tmp_path, owner, state):
    saved = {"weight": torch.arange(6.0)}
    save_shards(tmp_path / "shards", saved)
    read = {"weight": torch.zeros(6)}
    load_shards(tmp_path / "shards", read)
    assert torch.equal(read["weight"], saved["weight"])
    (tmp_path / "shards" / ".metadata").write_bytes(SetsAttributes(owner, state).content)
    with pytest.raises(ValueError, match="checkpoint metadata sets attributes of"):
        load_shards(tmp_path / "shards", read)
    assert not hasattr(TensorProperties, "marked")
    assert not hasattr(Metadata, "marked")


@pytest.mark.parametrize("elsewhere", ["../outside", "/etc/hostname"])
def test_shards_are_read_from_their_folder_only(tmp_path, elsewhere):
    import torch.distributed.checkpoint as dcp

    save_shards(tmp_path / "shards", {"weight": torch.arange(6.0)})
    metadata = dcp.FileSystemReader(tmp_path / "shards").read_metadata()
    for place in metadata.storage_data.values():
        place.relative_path = elsewhere
    (tmp_path / "shards" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="names files that lie elsewhere"):
        load_shards(tmp_path / "shards", {"weight": torch.zeros(6)})


def test_a_folder_that_holds_only_the_weights_under_training_is_no_model(finished, tmp_path, capsys):
    """timm would take whatever file of weights lies there."""
    shutil.copytree(finished[0] / "last", tmp_path / "last")
    (tmp_path / "last" / "model.safetensors").rename(tmp_path / "last" / "training_weights.safetensors")
    assert main(["eval", str(tmp_path / "last"), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith("holds no model.safetensors")
    assert find_model(str(tmp_path / "last"))[0] == tmp_path / "last"
