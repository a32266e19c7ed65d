from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vicinal.__main__ import main
from vicinal.errors import UserError
from vicinal.eval.classify import load_model
from vicinal.eval.report import NUM_EXAMPLES, _round_robin, choose_examples
from vicinal.train.config import TrainConfig
from vicinal.train.data.decode import UnreadableImage
from vicinal.train.data.images import open_images
from vicinal.train.data.transforms import InputSpec, eval_transform
from vicinal.train.recipe import read_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    arguments = ["--config", "first_run", "--epochs", "2", "--warmup-epochs", "0", "--device", "cpu"]
    arguments += ["--val-fraction", "0.8"]  # the fewer to train on, the sooner
    assert main(["train", *arguments, "--output", str(folder)]) == 0
    return folder


def test_a_run_with_report_ends_with_accuracy_checkpoint_and_picture(tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = ["--config", "first_run", "--model", "test_resnet", "--epochs", "1", "--warmup-epochs", "0"]
    assert main(["train", *arguments, "--device", "cpu", "--output", str(folder)]) == 0
    lines = capsys.readouterr().out.strip().splitlines()[-3:]
    assert lines[0].startswith("val accuracy: ")
    assert lines[1] == f"checkpoint: {folder / 'best'}"
    assert lines[2] == f"picture: {folder / 'report.png'}"
    # A network without attention modules has no maps, and still its picture.
    assert Image.open(folder / "report.png").format == "PNG"


def test_picture_is_drawn_and_not_blank(run):
    with Image.open(run / "report.png") as picture:
        assert min(picture.size) > 600
        colors = np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)
    assert len(colors) > 1000


def test_report_command_draws_it_again(run, capsys):
    (run / "report.png").unlink()
    assert main(["report", str(run)]) == 0
    assert str(run / "report.png") in capsys.readouterr().out
    assert (run / "report.png").is_file()


def test_examples_tell_the_truth(run):
    config = TrainConfig(**read_recipe(run / "config.yaml"))
    examples = choose_examples(load_model(run / "best"), config)
    assert len(examples) == NUM_EXAMPLES
    assert len({example.target for example in examples}) >= NUM_EXAMPLES - 2
    for example in examples:
        assert example.pixels.shape == (32, 32, 3)
        assert example.is_right == (example.prediction == example.target)
        assert 0 < example.probability <= 1
        assert [attention.shape for attention in example.attention] == [(8, 8), (4, 4)]


class PartlyUnreadable:
    """Images of which one in three cannot be read, or none."""

    def __init__(self, images, step):
        self.images, self.step, self.targets, self.classes = images, step, images.targets, images.classes

    def load(self, index):
        if index % self.step == 0:
            raise UnreadableImage(f"cannot read image {index}.png")
        return self.images.load(index)


def test_unreadable_images_are_left_out_and_named(run, monkeypatch, capsys):
    config = TrainConfig(**read_recipe(run / "config.yaml"))
    train, val = open_images(replace(config.data, val_fraction=0.02))
    monkeypatch.setattr("vicinal.eval.report.open_images", lambda _: (train, PartlyUnreadable(val, 3)))
    model = load_model(run / "best")
    examples = choose_examples(model, config)
    assert len(examples) == NUM_EXAMPLES
    shown = {example.pixels.tobytes() for example in examples}
    transform = eval_transform(InputSpec.resolve(config.data, model.pretrained_cfg))
    pixels = [transform(val.load(index)).permute(1, 2, 0).numpy().tobytes() for index in range(len(val.targets))]
    assert shown <= {each for index, each in enumerate(pixels) if index % 3}
    assert capsys.readouterr().err.splitlines() == [
        f"note: cannot read image {index}.png; it is left out of the report"
        for index in _round_robin(val.targets)
        if index % 3 == 0
    ]
    monkeypatch.setattr("vicinal.eval.report.open_images", lambda _: (train, PartlyUnreadable(val, 1)))
    with pytest.raises(UserError, match="none of the val images can be read"):
        choose_examples(model, config)


@pytest.mark.parametrize(
    ("files", "message"), [({}, "holds no config.yaml"), ({"config.yaml": "run:\n"}, "no epoch is finished")]
)
def test_report_of_no_run_is_one_line(tmp_path, capsys, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
