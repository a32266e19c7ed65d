"""``vicinal detect`` and ``vicinal segment``: runs, resumption, refusals, pictures, the proof of learning."""

import itertools
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner
from PIL import Image
from safetensors.torch import load_file

from vicinal.__main__ import main
from vicinal.errors import UserError
from vicinal.train.dense import run
from vicinal.train.dense.check import adapt_config, check_data
from vicinal.train.dense.configs import prepare, read_config, set_data, set_num_classes
from vicinal.train.dense.options import DenseData, DenseRun, DenseTrain
from vicinal.train.dense.seeding import PlacingSampler, seed_images

DETECT = ["shapes_mask_rcnn_nat_pico", "--threads", "1", "--batch-size", "2"]
SEGMENT = ["shapes_semantic_fpn_nat_pico", "--threads", "1", "--batch-size", "2"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "shapes"
    arguments = ["--train-images", "8", "--val-images", "3", "--img-size", "64"]
    assert main(["shapes", str(root), *arguments]) == 0
    return root


def own_coco(scenes: Path) -> list[str]:
    return ["--train", f"{scenes}/train.json", "--val", f"{scenes}/val.json", "--images", f"{scenes}/images"]


@pytest.fixture(scope="module")
def detector(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four iterations with a checkpoint after each second one."""
    folder = tmp_path_factory.mktemp("runs") / "detector"
    keep = ["--set", "default_hooks.checkpoint.interval=2", "default_hooks.checkpoint.max_keep_ckpts=9"]
    arguments = [*DETECT, *own_coco(scenes), "--iterations", "4", "--output", str(folder), *keep]
    assert main(["detect", "train", *arguments]) == 0
    return folder


def test_scenes_agree_in_boxes_masks_and_maps(scenes: Path):
    content = json.loads((scenes / "train.json").read_text())
    assert [category["name"] for category in content["categories"]] == ["rectangle", "circle", "triangle"]
    assert len(content["images"]) == 8
    for entry in content["annotations"]:
        image = content["images"][entry["image_id"]]
        labels = np.array(Image.open(scenes / "annotations" / image["file_name"]))
        x, y, width, height = entry["bbox"]
        inside = labels[y : y + height, x : x + width] == entry["category_id"]
        # the outline's pixels are drawn too, so that the polygon's area is a little less than the count
        assert entry["area"] <= inside.sum() <= entry["area"] + 2 * (width + height)
        assert inside.any(0).all()
        assert inside.any(1).all()


def test_scenes_follow_from_the_seed(scenes: Path, tmp_path: Path):
    arguments = ["--train-images", "8", "--val-images", "3", "--img-size", "64"]
    assert main(["shapes", str(tmp_path / "again"), *arguments]) == 0
    assert main(["shapes", str(tmp_path / "other"), *arguments, "--seed", "1"]) == 0
    files = [path.relative_to(scenes) for path in scenes.rglob("*") if path.is_file()]
    assert all((tmp_path / "again" / file).read_bytes() == (scenes / file).read_bytes() for file in files)
    assert (tmp_path / "other" / "train.json").read_bytes() != (scenes / "train.json").read_bytes()


def test_a_run_leaves_config_checkpoint_and_weights(detector: Path):
    assert {"config.py", "iter_2.pth", "iter_4.pth", "model.safetensors"} <= {path.name for path in detector.iterdir()}
    assert "num_classes=3" in (detector / "config.py").read_text()
    assert (detector / "last_checkpoint").read_text().strip().endswith("iter_4.pth")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_the_uninterrupted_one(workers: int, detector: Path, scenes: Path, tmp_path: Path):
    """The uninterrupted run loads its images by itself: loader processes change nothing either."""
    arguments = [*DETECT, *own_coco(scenes), "--iterations", "4", "--output", str(tmp_path / "resumed")]
    arguments += ["--resume", str(detector / "iter_2.pth"), "--workers", str(workers)]
    assert main(["detect", "train", *arguments]) == 0
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (detector, tmp_path / "resumed"))
    assert whole.keys() == resumed.keys()
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_places_of_images_go_on_where_a_run_stopped():
    data = list(range(5))

    def sampler(kind: str) -> PlacingSampler:
        return PlacingSampler(data, 0, {"type": kind, "shuffle": True})

    whole = [(int(index), index.place) for index in itertools.islice(sampler("InfiniteSampler"), 12)]
    assert [place for _, place in whole] == list(range(12))
    resumed = sampler("InfiniteSampler")
    resumed.skip(7)
    assert [(int(index), index.place) for index in itertools.islice(resumed, 5)] == whole[7:]
    epochs = sampler("DefaultSampler")
    assert not hasattr(epochs, "skip")
    epochs.set_epoch(2)
    second = list(epochs)
    assert [index.place for index in second] == [10, 11, 12, 13, 14]
    assert [(index, index.place) for index in pickle.loads(pickle.dumps(second))] == [(i, i.place) for i in second]


@pytest.mark.slow
def test_epochs_in_batches_of_one_aspect_ratio_repeat_with_loader_processes(scenes: Path):
    def load(workers: int, epoch: int) -> list[torch.Tensor]:
        """The images of an epoch as the published schedules load them, with the light changes of the first light."""
        data = DenseData(train=f"{scenes}/train.json", val=f"{scenes}/val.json", images=f"{scenes}/images")
        cfg = prepare("detect", DenseTrain("mask_rcnn_nat_mini_1x", data, run=DenseRun(workers=workers)))
        cfg.train_dataloader.dataset.pipeline = read_config("detect", DETECT[0]).train_pipeline
        init_default_scope(cfg.default_scope)
        loader = Runner.build_dataloader(seed_images(cfg, 0).train_dataloader, seed=0)
        loader.batch_sampler.sampler.set_epoch(epoch)
        return [image for batch in loader for image in batch["inputs"]]

    first, again, second = load(0, 0), load(2, 0), load(0, 1)
    assert len(first) == 8
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not all(any(torch.equal(x, y) for y in first) for x in second)


def test_resumption_without_the_seeds_of_its_iterations_would_differ(detector: Path, scenes: Path, tmp_path: Path):
    arguments = [*DETECT, *own_coco(scenes), "--iterations", "4", "--output", str(tmp_path / "resumed"), "--seed", "1"]
    assert main(["detect", "train", *arguments, "--resume", str(detector / "iter_2.pth")]) == 0
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (detector, tmp_path / "resumed"))
    assert any(not torch.equal(whole[key], resumed[key]) for key in whole)


def test_test_prints_the_evaluators_figures(detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["detect", "test", str(detector), "--threads", "1", "--json", str(tmp_path / "result.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {"coco/bbox_mAP", "coco/segm_mAP"} <= printed.keys()
    assert json.loads((tmp_path / "result.json").read_text()) == printed


def test_show_draws_annotations_beside_predictions(detector: Path, scenes: Path, tmp_path: Path):
    picture, files = tmp_path / "picture.png", sorted((scenes / "images" / "training").iterdir())[:2]
    assert main(["detect", "show", str(detector), "--count", "2", "--score", "0", "--output", str(picture)]) == 0
    both = np.array(Image.open(picture))
    arguments = ["--files", *map(str, files), "--output", str(tmp_path / "files.JPG")]
    assert main(["detect", "show", str(detector), *arguments]) == 0
    with Image.open(tmp_path / "files.JPG") as opened:
        assert opened.format == "JPEG"
        alone = np.array(opened)
    # two rows of two panels, of 64 pixels enlarged to 320, and two rows of one
    assert (both.shape, alone.shape) == ((664, 664, 3), (664, 336, 3))
    left, right = both[8:328, 8:328], both[8:328, 336:656]
    assert not np.array_equal(left, right)


def test_a_segmenter_trains_measures_and_draws(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "run"
    backbone = ["--backbone", "davit_pico_vicinal", "--precision", "bfloat16"]
    data = ["--data", str(scenes), "--set", "model.data_preprocessor.size=[64,64]"]
    arguments = [*SEGMENT, *data, *backbone, "--iterations", "2", "--output", str(folder)]
    assert main(["segment", "train", *arguments]) == 0
    capsys.readouterr()
    assert main(["segment", "test", str(folder)]) == 0
    assert "mIoU" in json.loads(capsys.readouterr().out)
    assert main(["segment", "show", str(folder), "--count", "1", "--output", str(tmp_path / "map.png")]) == 0
    assert Image.open(tmp_path / "map.png").size == (664, 336)
    config = (folder / "config.py").read_text()
    assert "davit_pico_vicinal" in config
    assert "dtype='bfloat16'" in config


@pytest.mark.slow
def test_a_segmenter_fits_the_scenes_it_sees(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Labels shifted, or off by one, or flipped apart from their images could not be fitted."""
    folder = tmp_path / "run"
    seen = {"img_path": "images/training", "seg_map_path": "annotations/training"}
    loaders = ("val_dataloader", "test_dataloader")
    prefixes = [f"{each}.dataset.data_prefix.{key}={path}" for each in loaders for key, path in seen.items()]
    data = ["--data", str(scenes), "--set", "model.data_preprocessor.size=[64,64]", *prefixes]
    length = ["--batch-size", "8", "--iterations", "150"]
    arguments = [*SEGMENT[:3], *data, *length, "--output", str(folder)]
    assert main(["segment", "train", *arguments]) == 0
    capsys.readouterr()
    assert main(["segment", "test", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["mIoU"] >= 80


def test_a_classifiers_run_becomes_the_backbone(scenes: Path, tmp_path: Path):
    """Nothing but the classifier's own norm and head is left behind, and the frozen backbone keeps the rest."""
    classifying = ["--model", "nat_pico", "--data", "synthetic/16/4", "--img-size", "32", "--batch-size", "8"]
    classifying += ["--epochs", "1", "--warmup-epochs", "0", "--workers", "0", "--output", str(tmp_path / "classifier")]
    assert main(["train", *classifying]) == 0
    weights = ["--backbone-weights", str(tmp_path / "classifier" / "last"), "--backbone-kwargs", "frozen_stages=4"]
    arguments = [*DETECT, *own_coco(scenes), "--iterations", "1", "--output", str(tmp_path / "run"), *weights]
    assert main(["detect", "train", *arguments]) == 0
    classifier = load_file(tmp_path / "classifier" / "last" / "model.safetensors")
    trained = load_file(tmp_path / "run" / "model.safetensors")
    inside = {key: value for key, value in classifier.items() if not key.startswith(("head.", "norm."))}
    assert {f"backbone.model.{key}" for key in inside} == {key for key in trained if key.startswith("backbone.model.")}
    assert all(torch.equal(trained[f"backbone.model.{key}"], value) for key, value in inside.items())


def test_heads_take_another_number_of_classes():
    mask2former = read_config("segment", "mask2former_transnext_tiny_160k").model
    set_num_classes(mask2former, 3)
    assert mask2former.decode_head.num_classes == 3
    # the last weight is for no object
    assert mask2former.decode_head.loss_cls.class_weight == [1.0, 1.0, 1.0, 0.1]
    weighted = read_config("segment", SEGMENT[0]).model
    own = list(weighted.decode_head.loss_decode.class_weight)
    set_num_classes(weighted, 4)
    assert weighted.decode_head.loss_decode.class_weight == own
    set_num_classes(weighted, 2)
    assert weighted.decode_head.loss_decode.class_weight == [1.0, 1.0]


@pytest.mark.slow
def test_two_processes_train_one_model(scenes: Path, tmp_path: Path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "vicinal", "detect", "train", *DETECT, *own_coco(scenes), "--iterations", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "run")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # one process prints
    assert done.stdout.count("iteration 2/2") == 1
    assert (tmp_path / "run" / "model.safetensors").is_file()


class Bomb:
    """Leaves a file behind where it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("door", ["test", "show", "resume", "backbone"])
def test_a_malicious_checkpoint_is_refused(door: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    mark, checkpoint = tmp_path / "mark", tmp_path / "bomb.pth"
    torch.save({"meta": {}, "state_dict": {"weight": torch.zeros(1)}, "optimizer": Bomb(mark)}, checkpoint)
    arguments = {
        "test": ["test", DETECT[0], "--checkpoint", str(checkpoint), *own_coco(scenes)],
        "show": ["show", DETECT[0], "--checkpoint", str(checkpoint), *own_coco(scenes)],
        "resume": ["train", *DETECT, "--resume", str(checkpoint), *own_coco(scenes)],
        "backbone": ["train", *DETECT, "--backbone-weights", str(checkpoint), *own_coco(scenes)],
    }[door]
    if door in ("resume", "backbone"):
        arguments += ["--output", str(tmp_path / "run")]
    assert main(["detect", *arguments]) == 2
    assert str(checkpoint) in capsys.readouterr().err
    assert not mark.exists()
    with pytest.raises(pickle.UnpicklingError, match="system"):
        torch.load(checkpoint, weights_only=True)


def test_mmengines_own_loading_is_guarded_too(tmp_path: Path):
    from mmengine.runner import load_checkpoint

    from vicinal.zoo.mmlab.weights import guard

    guard()
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "extra": Bomb(tmp_path / "mark")}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="refused to load"):
        load_checkpoint(torch.nn.Linear(1, 1), str(tmp_path / "bomb.pth"))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["detect", "train", "mask_rcn_nat_mini_3x"], "did you mean mask_rcnn_nat_mini_3x"),
        (["detect", "train", DETECT[0], "--train", "a.json"], "--train, --val and --images belong together"),
        (["detect", "train", DETECT[0], "--data", "nowhere"], "no file nowhere/annotations/instances_train2017.json"),
        (["detect", "train", DETECT[0], "--epochs", "3"], "counts iterations; use --iterations"),
        (["detect", "train", DETECT[0], "--backbone", "nat_mino"], "did you mean nat_mini"),
        (["detect", "train", DETECT[0], "--backbone", "shvit_s1_vicinal"], "strides \\[16, 32, 64\\]"),
        (["detect", "train", DETECT[0], "--backbone-kwargs", "depth=3", "--backbone", "nat_pico"], "depth"),
        (["detect", "test", DETECT[0]], "give its weights by --checkpoint"),
        (["segment", "train", SEGMENT[0], "--data", "nowhere"], "no images in nowhere/images/training"),
        (["segment", "fly", SEGMENT[0]], "unknown action 'fly'"),
        (["shapes", "out", "--img-size", "8"], "--img-size 8"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(arguments: list, message: str, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error), error


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch) -> list[Runner]:
    """MMEngine's runners of the commands that follow."""
    built: list[Runner] = []
    build = run.build_runner
    monkeypatch.setattr(run, "build_runner", lambda *arguments: built.append(build(*arguments)) or built[-1])
    return built


def weights_of(runner: Runner) -> dict[str, torch.Tensor]:
    return runner.model.state_dict()


@pytest.mark.parametrize("left_behind", ["load_from='{run}/iter_2.pth'", "load_from='/gone/iter_2.pth'\nresume=True"])
def test_test_measures_the_weights_of_the_run(
    left_behind: str, detector: Path, tmp_path: Path, runners: list, capsys: pytest.CaptureFixture
):
    """And not those that the run started from, which its config may name."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((detector / "model.safetensors").read_bytes())
    lines = (detector / "config.py").read_text().splitlines()
    lines = [line for line in lines if not line.startswith(("load_from", "resume"))]
    (folder / "config.py").write_text("\n".join([*lines, left_behind.format(run=detector)]))
    assert main(["detect", "test", str(folder), "--threads", "1"]) == 0
    wanted, measured = load_file(folder / "model.safetensors"), weights_of(runners[0])
    assert [key for key in wanted if not torch.equal(wanted[key], measured[key].cpu())] == []


def test_a_run_s_folder_runs_no_code(detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((detector / "model.safetensors").read_bytes())
    text = (detector / "config.py").read_text()
    for extra in (
        f"open({str(tmp_path / 'mark')!r}, 'w')",
        f"x = dict(type='os.mkdir', path={str(tmp_path / 'mark')!r})",
    ):
        (folder / "config.py").write_text(f"{text}\n{extra}\n")
        for action in ("test", "show"):
            assert main(["detect", action, str(folder)]) == 2
            assert capsys.readouterr().err.startswith(f"error: {folder}/config.py")
    assert not (tmp_path / "mark").exists()


def reversed_categories(file: Path, target: Path) -> str:
    content = json.loads(file.read_text())
    content["categories"].reverse()
    target.write_text(json.dumps(content))
    return str(target)


def test_a_file_with_its_categories_in_another_order_is_measured_by_their_names(
    detector: Path, scenes: Path, tmp_path: Path, runners: list
):
    other = reversed_categories(scenes / "val.json", tmp_path / "val.json")
    assert main(["detect", "test", str(detector), "--val", other, "--images", f"{scenes}/images"]) == 0
    dataset = runners[0].test_dataloader.dataset
    content = json.loads((scenes / "val.json").read_text())
    assert dataset.metainfo["classes"] == ("rectangle", "circle", "triangle")
    for place, image in enumerate(content["images"]):
        labels = [entry["category_id"] - 1 for entry in content["annotations"] if entry["image_id"] == image["id"]]
        assert [instance["bbox_label"] for instance in dataset.get_data_info(place)["instances"]] == labels
    # the annotations as predictions of the classes' numbers: nothing to improve
    assert perfect_precision(runners[0].test_evaluator.metrics[0], content) == 1.0


def perfect_precision(metric, content: dict) -> float:
    for image in content["images"]:
        entries = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        boxes = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([entry["category_id"] - 1 for entry in entries])
        found = {"bboxes": boxes, "scores": torch.full((len(boxes),), 0.9), "labels": labels}
        metric.process({}, [{"img_id": image["id"], "ori_shape": (64, 64), "pred_instances": found}])
    metric.metrics = ["bbox"]
    return metric.compute_metrics(metric.results)["bbox_mAP"]


def test_a_measure_without_a_class_or_a_detection_is_one_nevertheless(scenes: Path, tmp_path: Path):
    from vicinal.train.dense.boxes import CheckedCocoMetric

    content = json.loads((scenes / "val.json").read_text())
    first = content["annotations"][0]["category_id"]
    content["categories"] = [entry for entry in content["categories"] if entry["id"] == first]
    content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] == first]
    (tmp_path / "val.json").write_text(json.dumps(content))
    for is_empty, expected in ((False, 1.0), (True, 0.0)):
        metric = CheckedCocoMetric(str(tmp_path / "val.json"), ("rectangle", "circle", "triangle"))
        metric.dataset_meta = {"classes": ("rectangle", "circle", "triangle")}
        seen = {**content, "annotations": []} if is_empty else content
        assert perfect_precision(metric, seen) == expected


def test_resumption_with_another_order_of_categories_equals_the_run(
    detector: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    files = [reversed_categories(scenes / f"{split}.json", tmp_path / f"{split}.json") for split in ("train", "val")]
    data = ["--train", files[0], "--val", files[1], "--images", f"{scenes}/images"]
    arguments = [*DETECT, *data, "--iterations", "4", "--output", str(tmp_path / "run")]
    assert main(["detect", "train", *arguments, "--resume", str(detector / "iter_2.pth")]) == 0
    assert "classes in the order of" in capsys.readouterr().out
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (detector, tmp_path / "run"))
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
    content = json.loads(Path(files[0]).read_text())
    content["categories"].append({"id": 9, "name": "star"})
    Path(files[0]).write_text(json.dumps(content))
    arguments[-1] = str(tmp_path / "more")
    assert main(["detect", "train", *arguments, "--resume", str(detector / "iter_2.pth")]) == 2
    assert "trained on the classes rectangle, circle, triangle; the data has" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def test_show_draws_a_turned_photo_as_it_is_seen(detector: Path, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (96, 64), (0, 0, 255)).save(tmp_path / "photo.jpg", exif=exif)
    arguments = ["--files", str(tmp_path / "photo.jpg"), "--output", str(tmp_path / "picture.png"), "--score", "1"]
    assert main(["detect", "show", str(detector), *arguments]) == 0
    # 64 wide and 96 high, enlarged by five, and the gaps
    assert Image.open(tmp_path / "picture.png").size == (320 + 16, 480 + 16)


def test_a_segmenter_loads_whatever_lies_in_its_folders(tmp_path: Path):
    """Two formats, a label map of 16 bits, and a hidden file, through the loaders that a run has."""
    for split, names in (("training", ("a.webp", "b.png")), ("validation", ("c.bmp",))):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
            (tmp_path / kind / split / ".DS_Store").write_bytes(b"x")
        for name in names:
            Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "images" / split / name, lossless=True)
            labels = Image.fromarray(np.tile(np.uint16([0, 1, 255, 1]), (64, 16)))
            labels.save((tmp_path / "annotations" / split / name).with_suffix(".png"))
    (tmp_path / "classes.txt").write_text("sky\nsea\n")
    cfg = prepare("segment", DenseTrain(SEGMENT[0], DenseData(data=str(tmp_path))))
    assert check_data(cfg, "segment", ("train_dataloader", "val_dataloader")).images == {
        "train_dataloader": 2,
        "val_dataloader": 1,
    }
    init_default_scope("mmseg")
    cfg.train_dataloader.dataset.pipeline = cfg.val_dataloader.dataset.pipeline
    cfg = adapt_config(cfg, "segment")
    for loader, count in (("train_dataloader", 2), ("val_dataloader", 1)):
        dataset = DATASETS.build(cfg[loader].dataset)
        assert len(dataset) == count
        for item in dataset:
            assert item["inputs"][:, 0, 0].tolist() == [0, 0, 255]
            assert item["data_samples"].gt_sem_seg.data[0, 0, :4].tolist() == [0, 1, 255, 1]
    assert cfg.model.decode_head.num_classes == 2
    # the labels of a model that was trained elsewhere must mean the same
    set_data(cfg, "segment", DenseData(data=str(tmp_path)), ("val_dataloader",), ("sky", "sea"))
    with pytest.raises(UserError, match="names sky, sea, and the model was trained on sea, sky"):
        set_data(cfg, "segment", DenseData(data=str(tmp_path)), ("val_dataloader",), ("sea", "sky"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "file/run"], "--output file/run: .*file is a file"),
        (["--output", "file"], "--output file: is a file"),
        (["--set", "model.test_cfg.rcnn.scor_thr=0.1"], "did you mean score_thr"),
        (["--set", "load_from=/no/such.pth"], "load_from: no checkpoint at '/no/such.pth'"),
        (["--backbone", "nat_pico", "--backbone-weights", "/no/such/file.pth"], "no weights at '/no/such/file.pth'"),
        (["--resume", "/no/such.pth"], "no checkpoint at '/no/such.pth'"),
        (["--lr", "-1"], "--lr -1.0"),
        (["--workers", "-1"], "--workers -1"),
        (["--seed", "-1"], "--seed -1"),
        (["--iterations", "20", "--set", "param_scheduler.0.end=20"], "a warm-up of 20 iterations in a run of 20"),
    ],
)
def test_a_run_that_cannot_begin_leaves_nothing(arguments: list, message: str, scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    output = [] if "--output" in arguments else ["--output", "run"]
    assert main(["detect", "train", *DETECT, *own_coco(scenes), *output, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shapes", "file/scenes"], "file is a file"),
        (["shapes", "file"], "file: is a file"),
        (["detect", "test", "RUN", "--json", "file/x.json"], "--json file/x.json: .*file is a file"),
        (["detect", "show", "RUN", "--output", "file/x.png"], "--output file/x.png: .*file is a file"),
        (
            ["detect", "show", "RUN", "--output", "x.gif"],
            "x.gif: the suffix chooses the format; use one of .png, .jpg",
        ),
        (["segment", "show", "RUN", "--output", "x"], "--output x: the suffix chooses the format"),
        (["detect", "test", "RUN", "--data", "."], "COCO files of its own"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(
    arguments: list, message: str, detector, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main([str(detector) if argument == "RUN" else argument for argument in arguments]) == 2
    assert re.search(f"error: .*{message}", capsys.readouterr().err)


@pytest.mark.slow
def test_a_detector_learns_the_shapes(tmp_path: Path, capsys: pytest.CaptureFixture):
    scenes = tmp_path / "scenes"
    assert main(["shapes", str(scenes)]) == 0
    assert main(["detect", "train", *DETECT[:3], *own_coco(scenes), "--output", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["detect", "test", str(tmp_path / "run")]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["coco/bbox_mAP"] >= 0.60
    assert figures["coco/segm_mAP"] >= 0.55


@pytest.mark.slow
def test_a_segmenter_learns_the_shapes(tmp_path: Path, capsys: pytest.CaptureFixture):
    scenes = tmp_path / "scenes"
    assert main(["shapes", str(scenes)]) == 0
    assert main(["segment", "train", *SEGMENT[:3], "--data", str(scenes), "--output", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["segment", "test", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["mIoU"] >= 80
