import csv
import json
import math

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from vicinal.__main__ import main
from vicinal.train import loop
from vicinal.train.build import resolve_precision
from vicinal.train.config import RunConfig
from vicinal.train.recipe import parse_arguments, read_recipe
from vicinal.train.run.log import EPOCH_FIELDS
from vicinal.train.run.world import World


def weights(folder, name="last"):
    return load_file(folder / name / "model.safetensors")


def assert_identical(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def colours(jpeg_tree):
    return ("--data", jpeg_tree, "--workers", 0, "--batch-size", 8)


def cosine(start, end, progress):
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def test_a_short_run_learns_and_leaves_everything(train, records, capsys):
    code, folder = train("--epochs", 4)
    assert code == 0
    epochs = [record for record in records(folder) if record["event"] == "epoch"]
    assert [record["epoch"] for record in epochs] == [1, 2, 3, 4]
    # Chance is 10 %.
    assert epochs[-1]["val_top1"] > 40
    assert epochs[-1]["val_loss"] < epochs[0]["val_loss"]
    assert epochs[-1]["val_images"] == 359
    out = capsys.readouterr().out
    assert f"{epochs[-1]['val_top1']:.2f} %" in out
    assert str(folder.name) in out
    assert read_recipe(folder / "config.yaml")["schedule"].epochs == 4
    assert not list(folder.rglob("*.tmp"))
    assert not list(folder.glob("*.previous"))


def test_logs_are_well_formed(train):
    _, folder = train("--epochs", 2, "--log-interval", 20)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == [20, 40, 60, 80]
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = [line for line in lines if line["event"] == "epoch"]
    assert len(rows) == len(epochs) == 2
    for row, record in zip(rows, epochs, strict=True):
        assert tuple(row) == EPOCH_FIELDS
        assert {key: float(value) for key, value in row.items()} == {key: record[key] for key in EPOCH_FIELDS}


def test_learning_rate_warms_up_and_follows_the_cosine(train, jpeg_tree, records):
    schedule = ("--epochs", 4, "--warmup-epochs", 1, "--warmup-lr", 1e-5, "--min-lr", 1e-4)
    _, folder = train(*colours(jpeg_tree), *schedule)
    rates = [record["lr"] for record in records(folder) if record["event"] == "step"]
    updates = len(rates) // 4
    expected = [1e-5 + (2e-3 - 1e-5) * step / updates for step in range(updates)]
    expected += [cosine(2e-3, 1e-4, step / (4 * updates)) for step in range(updates, 4 * updates)]
    assert rates == pytest.approx(expected, rel=1e-12)


EVERYTHING = (
    *("--mixup", 0.8, "--cutmix", 1.0, "--random-erasing", 0.25, "--auto-augment", "rand-m9-mstd0.5-inc1"),
    *("--precision", "bfloat16", "--ema-decay", 0.9, "--drop-path-rate", 0.1, "--repeats", 2),
    *("--layer-decay", 0.8, "--clip-grad", 1.0, "--channels-last", "--accumulation", 3),
)


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(train, records, monkeypatch):
    arguments = ("--epochs", 3, *EVERYTHING)
    _, whole = train(*arguments, output="whole")
    calls = iter(range(3))

    def interrupted(*given):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return evaluate(*given)

    evaluate = loop.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", interrupted)
        code, parts = train(*arguments, output="parts")
    assert code == 130
    assert max(record["epoch"] for record in records(parts)) == 2
    code, _ = train(*arguments, "--resume", "auto", output="parts")
    assert code == 0
    assert records(parts) == records(whole)
    for name in ("last", "best"):
        assert_identical(weights(parts, name), weights(whole, name))
    under_training = [load_file(folder / "last" / "training_weights.safetensors") for folder in (parts, whole)]
    assert_identical(*under_training)


@pytest.mark.parametrize("inside", ["", "last"])
def test_resume_from_another_folder_and_further(train, jpeg_tree, records, inside):
    common = (*colours(jpeg_tree), "--schedule", "constant")
    _, first = train(*common, "--epochs", 1, output="first")
    _, whole = train(*common, "--epochs", 2, output="whole")
    code, second = train(*common, "--epochs", 2, "--resume", first / inside, output="second")
    assert code == 0
    assert_identical(weights(second), weights(whole))
    assert records(second) == records(whole)
    assert (first / "last").is_dir()


def test_auto_resume_starts_where_no_checkpoint_is_and_ends_where_the_run_ended(train, jpeg_tree, records):
    code, folder = train(*colours(jpeg_tree), "--epochs", 1, "--resume", "auto")
    assert code == 0
    before = records(folder)
    assert train(*colours(jpeg_tree), "--epochs", 1, "--resume", "auto")[0] == 0
    assert records(folder) == before


def test_interrupted_swap_of_checkpoints_is_survived(train, jpeg_tree):
    _, folder = train(*colours(jpeg_tree), "--epochs", 1)
    (folder / "last").rename(folder / "previous")
    (folder / ".last.partial").mkdir()
    assert train(*colours(jpeg_tree), "--epochs", 2, "--resume", "auto")[0] == 0
    assert (folder / "last" / "trainer.pt").is_file()
    assert not (folder / ".last.partial").exists()


@pytest.mark.parametrize(
    ("batch_size", "accumulation"),
    [(8, 3), (6, 4), (4, 4)],
    ids=["one full group", "four batches", "full and partial group"],
)
def test_accumulation_equals_the_large_batch(train, small, jpeg_tree, batch_size, accumulation):
    """24 images in one epoch: one update of 24, or 4 x 4 + 2 x 4 images against the updates of 16 and 8 images."""
    common = (
        "--data",
        jpeg_tree,
        "--workers",
        0,
        "--optimizer",
        "sgd",
        "--lr",
        0.1,
        "--epochs",
        1,
        "--weight-decay",
        0,
    )
    _, accumulated = train(*common, "--batch-size", batch_size, "--accumulation", accumulation, output="accumulated")
    large = batch_size * accumulation
    expected = _plain_updates([*small, *map(str, common)], [large, 24 - large] if large < 24 else [24])
    actual = weights(accumulated)
    for name, tensor in expected.items():
        # Gradients are means over 24 images in another order of summation: an error of a few float32 roundings
        # (6e-8) of quantities up to 1, times lr 0.1, over at most two updates.
        torch.testing.assert_close(
            actual[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def _plain_updates(arguments, sizes):
    """The same epoch in updates of the given sizes, written out."""
    config = parse_arguments([*arguments, "--batch-size", "2", "--output", "plain"])
    trainer = loop.Trainer(config, World(torch.device("cpu")))
    model = trainer.state.task.get_trainable_module()
    inputs = [trainer.parts.preprocess(*batch) for batch in trainer.parts.batches]
    images, targets = (torch.cat(parts) for parts in zip(*inputs, strict=True))
    criterion = nn.CrossEntropyLoss(label_smoothing=config.optimizer.label_smoothing)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, lr=0.1)
    model.train()
    done = 0
    for step, size in enumerate(sizes):
        optimizer.param_groups[0]["lr"] = cosine(0.1, 1e-5, step / len(sizes))
        loss = criterion(model(images[done : done + size]), targets[done : done + size])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done += size
    return model.state_dict()


def test_moving_average_is_what_its_definition_says(train, jpeg_tree):
    """Two updates, at decay 0.75: timm's average starts as a copy of the weights after the first update."""
    common = ("--data", jpeg_tree, "--workers", 0, "--batch-size", 12, "--schedule", "constant", "--ema-decay", 0.75)
    _, first = train(*common, "--epochs", 1, "--accumulation", 2, output="first")
    _, second = train(*common, "--epochs", 2, "--accumulation", 2, output="second")
    start = load_file(first / "last" / "training_weights.safetensors")
    end = load_file(second / "last" / "training_weights.safetensors")
    for name, average in weights(second).items():
        # One linear interpolation in float32.
        torch.testing.assert_close(average, 0.75 * start[name] + 0.25 * end[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_clipping_bounds_what_an_update_changes(train, jpeg_tree, mode):
    common = ("--data", jpeg_tree, "--workers", 0, "--batch-size", 24, "--epochs", 1, "--optimizer", "sgd", "--lr", 1.0)
    limit = 1e-3
    start = timm.create_model("test_vit", num_classes=3, img_size=32).state_dict()
    arguments = (*common, "--weight-decay", 0, "--optimizer-kwargs", "momentum=0", "nesterov=false")
    _, clipped = train(*arguments, "--clip-grad", limit, "--clip-mode", mode, output="clipped")
    _, still = train(*arguments, "--clip-grad", 1e-12, "--clip-mode", "norm", output="still")
    change = {name: tensor - weights(still)[name] for name, tensor in weights(clipped).items()}
    assert change.keys() == start.keys()
    backbone = {name: tensor for name, tensor in change.items() if not name.startswith("head")}
    if mode == "norm":
        assert math.sqrt(sum(float(tensor.square().sum()) for tensor in change.values())) == pytest.approx(
            limit, rel=1e-2
        )
    elif mode == "value":
        # The weights are of order 1: their difference has an error of float32's 6e-8 at most.
        assert max(float(tensor.abs().max()) for tensor in change.values()) == pytest.approx(limit, rel=1e-2)
    else:
        # By unit: at most the factor times the norm of the unit's weights, or times eps where that is larger.
        name = "blocks.0.mlp.fc1.weight"
        ratio = backbone[name].norm(dim=1) / weights(still)[name].norm(dim=1).clamp(min=1e-3)
        assert float(ratio.max()) <= limit * 1.01
        assert float(change["head.weight"].norm()) > limit


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_learns(train, jpeg_tree, records, precision):
    code, folder = train(*colours(jpeg_tree), "--epochs", 6, "--precision", precision)
    assert code == 0
    # Chance is 33 %.
    assert records(folder)[-1]["val_top1"] >= 60
    assert all(tensor.dtype == torch.float32 for tensor in weights(folder).values())


def test_resume_of_float16_keeps_the_scale(train, jpeg_tree):
    common = (*colours(jpeg_tree), "--precision", "float16", "--schedule", "constant")
    _, whole = train(*common, "--epochs", 2, output="whole")
    train(*common, "--epochs", 1, output="parts")
    _, parts = train(*common, "--epochs", 2, "--resume", "auto", output="parts")
    assert_identical(weights(parts), weights(whole))
    scales = [torch.load(folder / "last" / "trainer.pt", weights_only=True)["scaler"] for folder in (parts, whole)]
    assert scales[0] == scales[1]
    # The scaler counts the updates since it last changed the scale; the second epoch alone has three.
    assert scales[0]["_growth_tracker"] > 3


def test_image_folder_with_every_augmentation_learns(train, jpeg_tree, records):
    code, folder = train(
        *("--data", jpeg_tree, "--workers", 1, "--batch-size", 6, "--epochs", 8, "--lr", 3e-3),
        *("--crop", "rrc", "--hflip", 0.5, "--auto-augment", "rand-m5-n1", "--random-erasing", 0.1),
        *("--mixup", 0.2, "--cutmix", 0.2, "--precision", "bfloat16", "--ema-decay", 0.8),
    )
    assert code == 0
    last = records(folder)[-1]
    assert last["val_images"] == 15
    # Chance is 33 %; colour alone tells the classes apart.
    assert last["val_top1"] >= 60


def test_loss_that_is_not_finite_stops_the_run(train, capsys):
    code, folder = train("--epochs", 2, "--optimizer", "sgd", "--lr", 1e30, "--min-lr", 1e30)
    assert code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "the loss is" in line
    assert "--lr" in line
    assert not (folder / "last").exists()


def test_checkpoint_rebuilds_with_timm_and_eval_reproduces_the_log(train, records, capsys):
    _, folder = train("--epochs", 2, "--ema-decay", 0.9)
    capsys.readouterr()
    model = timm.create_model(f"local-dir:{folder / 'last'}", pretrained=True)
    assert_identical(dict(model.state_dict()), weights(folder))
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert model.pretrained_cfg["label_names"] == list("0123456789")
    assert main(["eval", str(folder / "last"), "--data", "digits", "--device", "cpu", "--batch-size", "32"]) == 0
    result = json.loads(capsys.readouterr().out)
    last = records(folder)[-1]
    assert result["top1"] == last["val_top1"]
    assert result["top5"] == last["val_top5"]
    assert result["images"] == last["val_images"] == 359


def test_fine_tuning_from_a_saved_model_takes_over_its_weights(train, records, jpeg_tree):
    _, folder = train("--epochs", 1, output="digits")
    code, tuned = train(
        *("--model", f"local-dir:{folder / 'best'}", "--pretrained", "--data", jpeg_tree, "--workers", 0),
        *("--batch-size", 24, "--epochs", 1, "--lr", 1e-12, "--min-lr", 0, "--weight-decay", 0),
        output="colours",
    )
    assert code == 0
    before, after = weights(folder, "best"), weights(tuned)
    assert after["head.weight"].shape[0] == 3
    for name in before:
        if not name.startswith("head"):
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-11)


def test_compiled_model_trains_and_saves_plain_names(train, jpeg_tree, records, monkeypatch):
    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_model(model, backend="eager"))
    _, plain = train(*colours(jpeg_tree), "--epochs", 1, output="plain")
    code, compiled = train(*colours(jpeg_tree), "--epochs", 1, "--compile", output="compiled")
    assert code == 0
    assert weights(compiled).keys() == weights(plain).keys()
    assert records(compiled)[-1]["val_loss"] == pytest.approx(records(plain)[-1]["val_loss"], rel=1e-3)


def test_recomputed_activations_change_nothing(train, jpeg_tree, records):
    common = (*colours(jpeg_tree), "--epochs", 1, "--drop-path-rate", 0.2)
    _, plain = train(*common, output="plain")
    code, recomputed = train(*common, "--grad-checkpointing", output="recomputed")
    assert code == 0
    assert records(recomputed) == records(plain)
    assert_identical(weights(recomputed), weights(plain))


def test_deterministic_algorithms_are_asked_for(train, jpeg_tree):
    try:
        assert train(*colours(jpeg_tree), "--epochs", 1, "--deterministic")[0] == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("device", "precision"), [("cuda", "bfloat16"), ("cpu", "float32")])
def test_precision_goes_by_the_device(device, precision):
    assert resolve_precision(RunConfig(), torch.device(device)) == precision
    assert resolve_precision(RunConfig(precision="float16"), torch.device(device)) == "float16"
