"""Configs of dense runs: read as data, changed by entries, lengths and warm-ups, resumption, starting weights."""

import hashlib
import http.server
import re
import threading
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader

from vicinal.errors import UserError
from vicinal.train.dense.configs import prepare, read_config
from vicinal.train.dense.entries import set_entries
from vicinal.train.dense.options import DenseModel, DenseRun, DenseTrain
from vicinal.train.dense.record import read_assignments, read_record, registered_only, write_record
from vicinal.train.dense.resume import compare_with_checkpoint, find_checkpoint, latest_checkpoint, read_resumable
from vicinal.train.dense.run import check_backbone_weights
from vicinal.train.dense.schedule import count_iterations, fit_warmup
from vicinal.zoo.mmlab.weights import guard, load_starting_weights

DETECT, SEGMENT, EPOCHS = "shapes_mask_rcnn_nat_pico", "shapes_semantic_fpn_nat_pico", "mask_rcnn_nat_mini_1x"


@pytest.mark.parametrize(
    ("task", "name"), [("detect", DETECT), ("segment", SEGMENT), ("segment", "upernet_nat_mini_160k")]
)
def test_a_run_s_config_is_read_back_as_data(task: str, name: str, tmp_path: Path):
    cfg = read_config(task, name)
    names = ("{{ fileBasename }}", "it's {{$HOME:x}}", '"quoted"', "plain")
    cfg.train_dataloader.dataset.metainfo = {"classes": names}
    write_record(cfg, tmp_path)
    read = read_record(tmp_path)
    assert read.to_dict() == cfg.to_dict()
    # MMEngine's own reading leaves the names as they are too
    assert Config.fromfile(str(tmp_path / "config.py")).train_dataloader.dataset.metainfo["classes"] == names


@pytest.mark.parametrize(
    "text",
    [
        "import os",
        "x = open('mark', 'w')",
        "x = [1 for _ in range(2)]",
        "x = dict(**{})",
        "x = dict([1])",
        "x = f'{1}'",
        "x = y",
        "x.y = 1",
        "x = 1 + 1",
        "def f(): pass",
        "x = (",
        "x = " + "[" * 300 + "]" * 300,
        "x = type('A', (), {})",
    ],
)
def test_a_config_of_more_than_data_is_refused_unread(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text(f"a = 1\n{text}\n")
    with pytest.raises(UserError, match=r"more than data, or broken .*--checkpoint"):
        read_record(tmp_path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "text",
    [
        "model = dict(type='subprocess.call', args='x')",
        "model = dict(a=[dict(type='os.system')])",
        "model = dict(type='evil.Class')",
        "default_scope = 'evil'",
        "model = dict(_scope_='evil', type='A')",
        "custom_imports = dict(imports=['evil'])",
        "custom_imports = dict(imports='vicinal.zoo.mmlabs')",
    ],
)
def test_a_config_names_registered_components_only(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(UserError, match="no registered component"):
        read_record(tmp_path)


def test_a_plain_name_is_never_looked_up_among_modules():
    from mmengine.registry import MODELS

    with registered_only(), pytest.raises(KeyError, match="antigravity"):
        MODELS.build({"type": "antigravity"})
    # the usual way is back afterwards
    assert MODELS.build({"type": "torch.nn.Identity"}) is not None


def test_assignments_are_plain_values():
    text = "'''about'''\na = dict(x=-1.5, y=(1, [None, True]), z={'k v': 'w'})\nb = 'two'\n"
    assert read_assignments(text) == {"a": {"x": -1.5, "y": (1, [None, True]), "z": {"k v": "w"}}, "b": "two"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"model.test_cfg.rcnn.scor_thr": 0.1}, "did you mean score_thr"),
        ({"modle.x": 1}, "did you mean model"),
        ({"optim_wrapper.optimizer.lr": "fast"}, "it is a number, 0.002"),
        ({"optim_wrapper.optimizer.weigth_decay": 0.1}, "did you mean weight_decay"),
        ({"optim_wrapper.optimizer.type": "AdamWW"}, "no component of this name"),
        ({"train_dataloader.batchsize": 3}, "did you mean batch_size"),
        ({"model": 3}, "entries of its own: type"),
        ({"model.backbone.model.x": 3}, "is 'nat_pico', and has no entries"),
        ({"param_scheduler.7.end": 3}, "a list of 2, counted from 0"),
        ({"val_dataloader.persistent_workers": "perhaps"}, "true or false, false, in the config"),
        ({"work_dir": "x"}, "use --output"),
        ({"resume": True}, "use --resume"),
    ],
)
def test_entries_that_the_config_has_no_place_for_are_refused(entry: dict, message: str):
    cfg = read_config("detect", DETECT)
    before = cfg.to_dict()
    with pytest.raises(UserError, match=re.escape(message)):
        set_entries(cfg, entry)
    assert cfg.to_dict() == before


def test_entries_that_a_component_takes_may_be_new():
    cfg = read_config("detect", DETECT)
    new = {
        "optim_wrapper.paramwise_cfg.layer_decay": 0.5,
        "optim_wrapper.optimizer.eps": 1e-6,
        "param_scheduler.0.end": 7,
    }
    set_entries(cfg, {**new, "model.backbone.norm_eval": True, "model.roi_head.bbox_head.reg_class_agnostic": True})
    assert cfg.optim_wrapper.paramwise_cfg.layer_decay == 0.5
    assert cfg.optim_wrapper.optimizer.eps == 1e-6
    assert cfg.param_scheduler[0].end == 7
    assert cfg.model.backbone.norm_eval is True


def test_the_length_is_one_option_whichever_way_it_is_given():
    entries = {"train_cfg.max_iters": 60}
    by_entry = prepare("detect", DenseTrain(DETECT, run=DenseRun(set=entries)))
    by_flag = prepare("detect", DenseTrain(DETECT, run=DenseRun(iterations=60)))
    assert by_entry.to_dict() == by_flag.to_dict()
    assert [scheduler.end for scheduler in by_flag.param_scheduler] == [6, 60]
    with pytest.raises(UserError, match="use --iterations alone"):
        prepare("detect", DenseTrain(DETECT, run=DenseRun(iterations=50, set=entries)))


def test_a_warm_up_that_nobody_gave_takes_a_tenth_of_a_short_run():
    cfg = prepare("detect", DenseTrain(EPOCHS, run=DenseRun(epochs=3, batch_size=4)))
    # 50 images for two processes are 25 each, 7 batches of 4
    assert count_iterations(cfg, 50, 2) == 21
    notes = fit_warmup(cfg, 21, {})
    assert cfg.param_scheduler[0].end == 2
    assert "warm-up of 2 iterations in place of 500: the run has 21" in notes[0]
    whole = prepare("detect", DenseTrain(EPOCHS))
    assert fit_warmup(whole, count_iterations(whole, 117266, 8), {}) == []
    assert whole.param_scheduler[0].end == 500


def test_a_warm_up_of_iterations_moves_what_follows_it():
    cfg = read_config("segment", "upernet_nat_mini_160k")
    assert fit_warmup(cfg, 100, {})
    assert [(each.get("begin"), each.end) for each in cfg.param_scheduler] == [(0, 10), (10, 160000)]


def test_a_warm_up_that_was_given_stays_or_is_refused():
    entries = {"param_scheduler.0.end": 30}
    cfg = read_config("detect", EPOCHS)
    set_entries(cfg, entries)
    assert fit_warmup(cfg, 40, entries) == []
    assert cfg.param_scheduler[0].end == 30
    with pytest.raises(UserError, match="a warm-up of 30 iterations in a run of 20"):
        fit_warmup(cfg, 20, entries)


def test_weights_go_into_the_backbone_that_was_put_in(tmp_path: Path):
    for model in (DenseModel(backbone="nat_pico"), DenseModel(), DenseModel(backbone="davit_pico_vicinal")):
        cfg = prepare(
            "detect", DenseTrain(DETECT, model=DenseModel(model.backbone, backbone_weights="/no/such/file.pth"))
        )
        assert cfg.model.backbone.pretrained == "/no/such/file.pth"
        with pytest.raises(UserError, match=r"--backbone-weights /no/such/file\.pth: no weights at"):
            check_backbone_weights(cfg)


@pytest.mark.parametrize(("weights", "message"), [("nosuch", "no such file, and"), ("released", "nat_pico has none")])
def test_released_weights_that_are_not_there_are_an_error_before_the_run(weights: str, message: str):
    cfg = prepare("detect", DenseTrain(DETECT, model=DenseModel(backbone_weights=weights)))
    with pytest.raises(UserError, match=message):
        check_backbone_weights(cfg)


def test_other_stages_of_the_backbone_change_the_neck():
    cfg = prepare("detect", DenseTrain(DETECT, model=DenseModel(backbone_kwargs={"out_indices": [0, 1, 2]})))
    assert cfg.model.neck.in_channels == [32, 64, 128]


def test_the_last_checkpoint_is_found_in_a_folder_that_moved(tmp_path: Path):
    assert latest_checkpoint(tmp_path) is None
    for number in (2, 10, 9):
        (tmp_path / f"iter_{number}.pth").touch()
    assert latest_checkpoint(tmp_path).name == "iter_10.pth"
    (tmp_path / "last_checkpoint").write_text("/gone/iter_9.pth\n")
    assert latest_checkpoint(tmp_path).name == "iter_9.pth"
    assert find_checkpoint(tmp_path, str(tmp_path)).name == "iter_9.pth"
    with pytest.raises(UserError, match="is not empty"):
        find_checkpoint(tmp_path, None)
    (tmp_path / "empty" / "20260101_120000").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint in that folder"):
        find_checkpoint(tmp_path, str(tmp_path / "empty"))
    # a run that never began
    assert find_checkpoint(tmp_path / "empty", None) is None


@cache
def checkpoint_text() -> str:
    """The config of a checkpoint, which takes seconds to format."""
    return read_config("detect", DETECT).pretty_text


def checkpoint_of(*classes: str) -> dict:
    return {"meta": {"epoch": 0, "iter": 2, "cfg": checkpoint_text(), "seed": 0, "dataset_meta": {"classes": classes}}}


def with_classes(*names: str) -> Config:
    cfg = read_config("detect", DETECT)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        cfg[loader].dataset.metainfo = {"classes": names}
    cfg.randomness = {"seed": 0}
    return cfg


def test_resumption_takes_the_classes_in_the_checkpoint_s_order():
    cfg = with_classes("b", "a")
    old = checkpoint_of("a", "b")
    assert compare_with_checkpoint(cfg, old, Path("x.pth")) == ["classes in the order of x.pth: a, b"]
    assert {cfg[f"{kind}_dataloader"].dataset.metainfo["classes"] for kind in ("train", "val", "test")} == {("a", "b")}
    with pytest.raises(UserError, match="trained on the classes a, b; the data has a, b, c"):
        compare_with_checkpoint(with_classes("a", "b", "c"), old, Path("x.pth"))
    with pytest.raises(UserError, match="trained on the classes a, b; the data has a, z"):
        compare_with_checkpoint(with_classes("a", "z"), old, Path("x.pth"))


@pytest.mark.parametrize(
    ("entries", "refused", "said"),
    [
        ({}, None, []),
        ({"optim_wrapper.optimizer.lr": 0.5}, "optim_wrapper.optimizer.lr is 0.002 there and 0.5 here", []),
        ({"optim_wrapper.optimizer.type": "SGD"}, "optimizer.type is 'AdamW' there and 'SGD' here", []),
        ({"model.backbone.drop_path_rate": 0.3}, "model.backbone.drop_path_rate is None there and 0.3 here", []),
        ({"model.neck.norm_cfg.type": "SyncBN"}, "'GN' there and 'BN' here", []),
        ({"randomness.seed": 4}, None, ["seed 4 from here on"]),
        ({"train_cfg.val_interval": 5}, None, ["train_cfg.val_interval is 600 there and 5 here"]),
        ({"train_dataloader.num_workers": 3}, None, []),
    ],
)
def test_resumption_refuses_what_would_be_ignored(entries: dict, refused: str | None, said: list):
    cfg, old = with_classes("a"), checkpoint_of("a")
    cfg.merge_from_dict(entries)
    if refused:
        with pytest.raises(UserError, match=re.escape(refused)):
            compare_with_checkpoint(cfg, old, Path("x.pth"))
        return
    notes = compare_with_checkpoint(cfg, old, Path("x.pth"))
    assert len(notes) == len(said)
    assert all(start in note for start, note in zip(said, notes, strict=True))


def test_a_file_of_weights_alone_cannot_be_resumed(tmp_path: Path):
    torch.save({"state_dict": {"w": torch.zeros(1)}, "meta": {}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"no optimizer, param_schedulers, message_hub, epoch, iter.*load_from="):
        read_resumable(tmp_path / "w.pth")


def test_starting_weights_fit_but_for_the_heads_shapes(tmp_path: Path):
    model = torch.nn.Module()
    model.backbone, model.head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)
    saved = {key: value + 1 for key, value in model.state_dict().items()}
    other = {**saved, "head.weight": torch.zeros(5, 2), "head.bias": torch.zeros(5)}
    torch.save({"state_dict": other}, tmp_path / "w.pth")
    guard()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert load_starting_weights(model, str(tmp_path / "w.pth")) == ["head.weight", "head.bias"]
    assert torch.equal(model.backbone.weight, before["backbone.weight"] + 1)
    assert torch.equal(model.head.weight, before["head.weight"])
    for wrong, message in (
        ({key: value for key, value in saved.items() if key != "backbone.bias"}, "missing: backbone.bias"),
        ({**saved, "foo.bar": torch.zeros(1)}, "left over: foo.bar"),
        ({**saved, "backbone.bias": torch.zeros(7)}, "another shape: backbone.bias"),
    ):
        torch.save({"state_dict": wrong}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=message):
            load_starting_weights(model, str(tmp_path / "w.pth"))


class Answers(http.server.BaseHTTPRequestHandler):
    """What a server says at each path: (status, length that it announces, body)."""

    said: ClassVar[dict] = {}

    def do_GET(self):
        status, length, body = self.said[self.path]
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_downloads_are_whole_and_cached_by_their_address(server: str, tmp_path: Path):
    bodies = {}
    for number in (1, 2):
        torch.save({"state_dict": {"w": torch.full((1,), float(number))}}, tmp_path / "w.pth")
        bodies[number] = (tmp_path / "w.pth").read_bytes()
    size = len(bodies[1])
    right = hashlib.sha256(bodies[1]).hexdigest()
    hashed = next(right[:length] for length in range(8, 65) if re.search("[a-f]", right[:length]))
    page = b"<html>not here</html>"
    Answers.said = {
        "/one/b.pth": (200, size, bodies[1]),
        "/two/b.pth": (200, len(bodies[2]), bodies[2]),
        "/404/b.pth": (404, 0, b""),
        "/cut/b.pth": (200, size, bodies[1][:-9]),
        # whole as a file, and less than the server meant to send
        "/less/b.pth": (200, size + 5, bodies[1]),
        "/page/b.pth": (200, len(page), page),
        "/empty/b.pth": (200, 0, b""),
        f"/b-{hashed}.pth": (200, size, bodies[1]),
        "/b-deadbeef.pth": (200, size, bodies[1]),
    }
    guard()
    for path, value in (("/one/b.pth", 1), ("/two/b.pth", 2), (f"/b-{hashed}.pth", 1)):
        assert CheckpointLoader.load_checkpoint(server + path)["state_dict"]["w"].item() == value
    kept = sorted((tmp_path / "hub" / "checkpoints").iterdir())
    for path in ("/404/b.pth", "/cut/b.pth", "/less/b.pth", "/page/b.pth", "/empty/b.pth", "/b-deadbeef.pth"):
        with pytest.raises(ValueError, match=f"download of {server}{path} .*failed"):
            CheckpointLoader.load_checkpoint(server + path)
    assert sorted((tmp_path / "hub" / "checkpoints").iterdir()) == kept
    # what came whole is not asked for again
    Answers.said = {}
    assert CheckpointLoader.load_checkpoint(server + "/two/b.pth")["state_dict"]["w"].item() == 2


def test_endings_of_a_config_s_own_stay_mmsegmentations():
    from vicinal.train.dense.check import adapt_config

    cfg = read_config("segment", SEGMENT)
    cfg.train_dataloader.dataset.seg_map_suffix = "_labels.png"
    adapted = adapt_config(cfg, "segment")
    assert adapted.train_dataloader.dataset.type == "ADE20KDataset"
    assert adapted.val_dataloader.dataset.type == "PairedADE20KDataset"


def test_one_class_is_right_where_every_pixel_is_it():
    """MMSegmentation alone calls a single channel's pixels class 1, which does not exist."""
    from dense_samples import segmentation_batch
    from mmengine.registry import MODELS

    from vicinal.train.dense.check import adapt_config
    from vicinal.train.dense.configs import set_num_classes
    from vicinal.train.dense.run import replace_sync_bn

    cfg = read_config("segment", SEGMENT)
    set_num_classes(cfg.model, 1)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        cfg[loader].dataset.update(type="BaseSegDataset", metainfo={"classes": ("all",)})
    cfg = adapt_config(cfg, "segment")
    replace_sync_bn(cfg)
    init_default_scope("mmseg")
    model = MODELS.build(cfg.model).eval()
    torch.nn.init.constant_(model.decode_head.conv_seg.bias, 9.0)
    found = model.test_step(segmentation_batch(1, (64, 64)))
    assert all((sample.pred_sem_seg.data == 0).all() for sample in found)
