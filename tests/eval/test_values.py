"""What the benchmarks, the report and the plots make of numbers that are known beforehand."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torch import nn

from vicinal.errors import UserError
from vicinal.eval import catalog, classify, doctor, plot, report
from vicinal.eval.attend import AttentionRecord
from vicinal.eval.bench import kernel_table, measure, models, ops, train, tune
from vicinal.eval.bench.kernel_table import Resources
from vicinal.eval.bench.measure import Ceilings
from vicinal.kernels import launch
from vicinal.train.config import DataConfig, TrainConfig
from vicinal.train.data.images import UnreadableImage
from vicinal.train.data.loader import UnreadableCounter
from vicinal.train.data.transforms import InputSpec, Preprocess, eval_batches
from vicinal.train.evaluate import evaluate
from vicinal.train.run.world import World

CPU = torch.device("cpu")

# --- Accuracy


class Noise:
    """Images of one grey each, whose class is anything; some cannot be read."""

    def __init__(self, count, unreadable=()):
        self.unreadable, self.classes = unreadable, list("abcdefgh")
        self.targets = np.random.default_rng(0).integers(0, 8, count).tolist()

    def load(self, index):
        from PIL import Image

        if index in self.unreadable:
            raise UnreadableImage(f"cannot read image {index}")
        return Image.new("RGB", (4, 4), (index * 3,) * 3)


@pytest.mark.parametrize("unreadable", [(), (3, 22)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_accuracies_and_loss_are_those_of_scikit_learn(unreadable, size):
    """23 images in batches of four, on as many processes, whose wrapped-around images count for nothing."""
    torch.manual_seed(0)
    table = torch.randn(256, 8)
    images = Noise(23, unreadable)
    spec = InputSpec((4, 4), (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0)
    counted = [index for index in range(23) if index not in unreadable]
    logits = table[[index * 3 for index in counted]]
    labels = [images.targets[index] for index in counted]
    parts = []
    for rank in range(size):
        world = World(CPU, rank=rank, size=size)
        batches = eval_batches(images, DataConfig(batch_size=4, workers=0), spec, world, UnreadableCounter(9))
        model = Lookup(table).train()
        # On one process the sums are not gathered: the parts are added up below.
        parts.append(evaluate(model, batches, Preprocess(spec, CPU, 8), nullcontext(), World(CPU)))
        assert not model.training
    assert sum(part["images"] for part in parts) == len(counted)
    weights = [part["images"] / len(counted) for part in parts]
    found = {name: sum(w * part[name] for w, part in zip(weights, parts, strict=True)) for name in parts[0]}
    classes = list(range(8))
    assert found["top1"] == pytest.approx(100 * accuracy_score(labels, logits.argmax(1)), abs=1e-4)
    assert found["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=5, labels=classes), abs=1e-4)
    expected = log_loss(labels, logits.double().softmax(1), labels=classes)
    assert found["loss"] == pytest.approx(expected, rel=1e-6)


class Lookup(nn.Module):
    """Logits by the grey of an image."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, x):
        return self.table[(x[:, 0, 0, 0] * 255).round().long()]


# --- Clocks


class Clock:
    """Process CPU time that goes on by what each call says it takes."""

    def __init__(self, monkeypatch):
        self.now, self.order = 0.0, []
        monkeypatch.setattr(measure.time, "process_time", lambda: self.now)

    def call(self, name, seconds):
        durations = iter(seconds)

        def run():
            self.order.append(name)
            self.now += next(durations)

        return run


def test_the_least_time_counts_and_the_first_call_does_not(monkeypatch):
    clock = Clock(monkeypatch)
    calls = {"a": clock.call("a", [1, 5, 3, 4]), "b": clock.call("b", [1, 2, 7, 8])}
    assert measure.least_cpu_times(calls, 3) == {"a": 3, "b": 2}
    assert clock.order == ["a", "b"] * 4


@pytest.mark.parametrize("timed", [measure.kernel_times, measure.step_times])
def test_on_a_cpu_the_least_time_counts_everywhere(monkeypatch, timed):
    clock = Clock(monkeypatch)
    assert timed({"a": clock.call("a", [9, 5, 3, 4])}, 3, "cpu") == {"a": 3}


def test_turns_swap_who_comes_first(monkeypatch):
    clock = Clock(monkeypatch)
    calls = {"a": clock.call("a", [9, 1, 2, 4]), "b": clock.call("b", [9, 16, 32, 64])}
    assert measure.turns_of_cpu_time(calls, 3) == {"a": [1, 2, 4], "b": [16, 32, 64]}
    assert "".join(clock.order) == "ab" + "ba" + "ab" + "ba"


class Events:
    """CUDA events on a clock of milliseconds, which calls move on."""

    def __init__(self, monkeypatch):
        self.now, self.flushed = 0.0, 0
        monkeypatch.setattr(measure, "_event_pair", lambda: (self.event(), self.event()))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def event(self):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.now)
        event.synchronize = lambda: None
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def call(self, milliseconds):
        durations = iter(milliseconds)

        def run():
            self.now += next(durations)

        return run


def test_on_a_gpu_the_median_counts_for_kernels_and_the_mean_for_steps(monkeypatch):
    events = Events(monkeypatch)
    # Three calls to warm up and to see what the host takes, then the turns.
    calls = {"a": events.call([99, 99, 99, 5, 1, 2]), "b": events.call([99, 99, 99, 30, 50, 40])}
    monkeypatch.setattr(measure, "FLUSHED_BYTES", 1)
    assert measure.kernel_times(calls, 3, "meta") == {"a": 2e-3, "b": 40e-3}
    assert measure.step_times({"a": events.call([99, 99, 99, 5, 1, 3])}, 3, "meta") == pytest.approx({"a": 3e-3})


@pytest.mark.parametrize(("host", "flushes"), [(0.0, 1), (25e-5, 3), (10.0, 401)])
def test_the_cache_is_overwritten_until_the_host_has_queued_the_call(monkeypatch, host, flushes):
    Events(monkeypatch)
    monkeypatch.setattr(measure, "FLUSHED_BYTES", 1)
    monkeypatch.setattr(measure, "_host_seconds", lambda call: host)
    counted = []
    monkeypatch.setattr(torch.Tensor, "zero_", lambda tensor: counted.append(tensor.numel()))
    measure.kernel_times({"a": lambda: None}, 2, "meta")
    assert counted == [1] * 2 * flushes


def test_the_host_is_timed_at_its_third_call(monkeypatch):
    Events(monkeypatch)
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock.now)
    durations = iter([50, 20, 3])
    assert measure._host_seconds(lambda: setattr(clock, "now", clock.now + next(durations))) == 3


def test_ceilings_count_bytes_read_and_written_and_two_flops_a_multiplication(monkeypatch):
    monkeypatch.setattr(measure, "kernel_times", lambda calls, repeats, device: {"copy": 0.5, "product": 0.25})
    ceilings = measure.measure_ceilings(torch.float32, "cpu")
    assert ceilings == Ceilings(2 * 2**25 / 0.5, 2 * 1024**3 / 0.25)


def test_peak_on_a_gpu_is_what_a_call_adds(monkeypatch):
    held = SimpleNamespace(now=1000, peak=5000)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(held, "peak", held.now))

    def call():
        held.peak = 1700

    assert measure.peak_bytes(call, "cuda") == 700


def test_peak_on_a_cpu_counts_what_is_held_together_and_not_what_was_before():
    before = torch.zeros(1 << 16, dtype=torch.uint8)

    def call():
        one = torch.zeros(1 << 18, dtype=torch.uint8)
        two = torch.zeros(1 << 19, dtype=torch.uint8)
        del one
        three = torch.zeros(1 << 17, dtype=torch.uint8)
        return len(two) + len(three) + len(before)

    assert measure.peak_bytes(call) == (1 << 18) + (1 << 19)


# --- Tables


def test_rows_of_an_operator(monkeypatch):
    """At 1 MiB/ms and 1 Gflop/ms; the floor is the larger of the two times."""
    times = {"tiled": 0.004, "reference": 0.01, "eager": 0.002}
    monkeypatch.setattr(ops, "kernel_times", lambda calls, repeats, device: {name: times[name] for name in calls})
    monkeypatch.setattr(ops, "peak_bytes", lambda call, device: 3 << 20)
    options = ops.BenchOptions(op="window_attention", repeats=2, shapes="small")
    for flops, larger in ((1e12, "bytes"), (1e3, "flops")):
        ceilings = Ceilings(2**20 * 1e3, flops)
        rows = list(ops._measure_case("window_attention", (2, 14, 14, 2, 16), "bfloat16", ceilings, options))
        assert [(row.step, row.implementation) for row in rows] == [
            (step, name) for step in ("forward", "backward", "forward+backward") for name in times
        ]
        row = rows[2]
        # Query, key, value and output in bfloat16, two tables of float32; two products of 49 keys.
        floor_bytes, floor_flops = 4 * 2 * 14 * 14 * 32 * 2 + 2 * 13 * 13 * 4, 2 * 2 * 2 * 14 * 14 * 32 * 49
        assert (row.op, row.bias, row.shape, row.dtype) == ("window_attention", True, "2x14x14x2x16", "bfloat16")
        assert (row.ms, row.ratio_to_tiled, row.peak_mib) == (2.0, 0.5, 3.0)
        assert row.floor_mib == pytest.approx(floor_bytes / 2**20, rel=1e-12)
        assert row.floor_gflop == pytest.approx(floor_flops / 1e9, rel=1e-12)
        floor = floor_bytes / 2**20 / 1e3 if larger == "bytes" else floor_flops / 1e3
        assert row.floor_fraction == pytest.approx(floor / 0.002, rel=1e-12)


def test_rows_of_a_model(monkeypatch):
    times = {"ours": 0.05, "timm": 0.1}
    monkeypatch.setattr(models, "step_times", lambda calls, repeats, device: dict(times))
    peaks = {"ours": 6 << 20, "timm": 5 << 20}
    monkeypatch.setattr(models, "peak_bytes", lambda call, device: peaks[call.args[1]])
    monkeypatch.setattr(models, "_replayed", lambda name, calls, repeats: {"ours, replayed": 0.025}.items())
    options = models.BenchOptions(batch_size=4)
    object.__setattr__(options, "graphs", True)
    networks = {name: (name, nullcontext) for name in times}
    rows = list(models.measure_step("net", "training", networks, torch.zeros(4, 3, 16, 24), options))
    assert rows == [
        models.Row("net", "4x16x24", "training", "ours", 50.0, 80.0, 1.0, 6.0),
        models.Row("net", "4x16x24", "training", "timm", 100.0, 40.0, 2.0, 5.0),
        models.Row("net", "4x16x24", "training", "ours, replayed", 25.0, 160.0, 0.5, 6.0),
    ]


@pytest.mark.parametrize(("step", "training"), [("training", True), ("inference", False)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_training_has_gradients_and_one_of_inference_none(step, training, dtype):
    model, seen = nn.Linear(2, 2), []
    nn.init.ones_(model.weight)
    model.register_forward_hook(lambda module, _, output: seen.append((module.training, output.dtype)))
    images, entered = torch.ones(1, 2), []

    def context():
        entered.append(torch.is_inference_mode_enabled())
        return nullcontext()

    for _ in range(2):
        models._run(step, model, images, context, dtype)
    assert seen == [(training, getattr(torch, dtype))] * 2
    assert len(entered) == 2
    if not training:
        assert model.weight.grad is None
        return
    # The gradient of the mean square, of one step and not of two.
    output = (images @ model.weight.T + model.bias).detach()
    torch.testing.assert_close(model.weight.grad, output.T @ images, rtol=1e-2, atol=0)


def test_throughput_ratios_of_training_are_of_medians():
    """Of ours over the other: the other's time over ours, of all turns and of each quarter."""
    times = {"ours": [2.0, 2.0, 4.0, 4.0, 1.0, 1.0, 10.0, 2.0], "bare": [1.0, 1.0, 6.0, 6.0, 2.0, 2.0, 3.0, 3.0]}
    ours, bare = train._rows("loop", "64 x 32 px", 64, times)
    assert (ours.part, ours.implementation, ours.images) == ("loop", "ours", "64 x 32 px")
    assert (ours.cpu_ms_per_image, ours.throughput_ratio, ours.by_quarters) == (2000 / 64, 1.0, "1.000 to 1.000")
    # Medians 2 and 2.5; by quarters 1/2, 6/4, 2/1 and 3/6.
    assert (bare.cpu_ms_per_image, bare.throughput_ratio, bare.by_quarters) == (2500 / 64, 1.25, "0.500 to 2.000")


def test_every_turn_of_the_loop_is_a_whole_epoch():
    state, seen = SimpleNamespace(position=1400), []
    trainer = SimpleNamespace(state=state, train_epoch=lambda: seen.append(state.position))
    train._train_epoch(trainer)
    assert seen == [0]


def test_a_written_table_holds_all_digits_and_how_it_came_about(tmp_path, monkeypatch, capsys):
    rows = train._rows("loop", "x", 3, {"ours": [1.0] * 4})
    monkeypatch.setattr(measure.sys, "argv", ["vicinal", "bench", "train"])
    measure.report(rows, tmp_path / "table.csv")
    header, line = (tmp_path / "table.csv").read_text().splitlines()
    assert header == "part,implementation,images,cpu_ms_per_image,throughput_ratio,by_quarters"
    assert line == f"loop,ours,x,{1000 / 3},1.0,1.000 to 1.000"
    found = json.loads((tmp_path / "table.json").read_text())
    assert set(found) == {"command", "date", "device", "torch", "triton"}
    assert (found["command"], found["torch"]) == ("vicinal bench train", torch.__version__)
    assert "333.33" in capsys.readouterr().out


def test_the_catalog_is_sorted_by_family_and_size(monkeypatch):
    sizes = {"nat_pico": (2, 1), "nat_mini": (1, 5), "nat_tiny": (1, 4), "davit_pico_vicinal": (7, 1)}
    monkeypatch.setattr("timm.models.list_models", lambda: [*sizes, "test_vit", "attentive_probe"])
    monkeypatch.setattr(catalog, "describe", lambda name: catalog.CatalogRow(name, (64, 32), *sizes[name], None))
    rows = list(catalog.list_rows())
    assert [row.name for row in rows] == ["davit_pico_vicinal", "nat_tiny", "nat_mini", "nat_pico"]
    row = catalog.CatalogRow("net", (64, 32), 1_236_000, 2_345_600_000, 81.84)
    assert row.markdown() == "| `net` | 64x32 | 1.24 | 2.35 | 81.8 |"
    assert rows[0].markdown() == "| `davit_pico_vicinal` | 64x32 | 0.00 | 0.00 |  |"


def test_the_best_accuracy_at_the_models_own_size_is_listed(monkeypatch):
    def weights(top1, **cfg):
        return SimpleNamespace(top1=top1, cfg=cfg)

    own = (3, *catalog.describe("nat_pico").input_size)
    released = {
        **{"nat_pico.a": weights(80.0), "nat_pico.b": weights(82.0, input_size=own), "nat_pico.c": weights(81.0)},
        **{
            "nat_pico.d": weights(90.0, input_size=(3, 96, 96)),
            "nat_pico.e": weights(None),
            "nat_tiny.a": weights(95.0),
        },
    }
    monkeypatch.setattr("vicinal.checkpoints.RELEASED", released)
    assert catalog.describe("nat_pico").top1 == 82.0


# --- The report


def test_examples_take_turns_by_class():
    assert report._round_robin([2, 2, 0, 1, 0, 2]) == [2, 3, 0, 4, 1, 5]


def record(size, value):
    return AttentionRecord("", torch.zeros(1), torch.full((2, *size), float(value)))


def test_maps_are_means_by_resolution_finest_first_and_none_too_coarse():
    records = [record((8, 4), 1), record((4, 4), 5), record((8, 4), 4), record((3, 4), 9), record((4, 3), 9)]
    fine, coarse = report._by_resolution(records)
    assert (fine.shape, fine.unique().tolist()) == ((2, 8, 4), [2.5])
    assert (coarse.shape, coarse.unique().tolist()) == ((2, 4, 4), [5.0])


class Guess(nn.Module):
    """Logits that name the class by the grey of the image, wrong for some."""

    def __init__(self, wrong):
        super().__init__()
        self.wrong, self.pretrained_cfg, self.num_classes = wrong, {}, 4
        self.scale = nn.Parameter(torch.tensor(math.log(9)))

    def forward(self, x):
        grey = (x[:, 0, 0, 0] * 255).round().long()
        guess = (grey % 4 + torch.tensor([index in self.wrong for index in grey.tolist()])) % 4
        return nn.functional.one_hot(guess, 4).float() * self.scale


class Greys:
    """Image i is of grey i and of class i mod 4."""

    def __init__(self, count=60):
        self.classes, self.targets = ["zero", "one", "two", "three"], [index % 4 for index in range(count)]

    def load(self, index):
        from PIL import Image

        return Image.new("RGB", (8, 8), (index,) * 3)


@pytest.mark.parametrize(("wrong", "mistakes"), [((), []), ((13,), [13]), ((9, 22, 31), [9, 22])])
def test_examples_are_right_ones_of_every_class_and_two_mistakes(monkeypatch, wrong, mistakes):
    monkeypatch.setattr(report, "open_images", lambda data: (None, Greys()))
    data = DataConfig(img_size=8, mean=(0,) * 3, std=(1,) * 3, interpolation="bilinear", crop_pct=1.0)
    examples = report.choose_examples(Guess(wrong).eval(), TrainConfig(data=data))
    expected = [index for index in range(12) if index not in wrong][: 10 - len(mistakes)] + mistakes
    assert [int(example.pixels[0, 0, 0]) for example in examples] == expected
    for example, index in zip(examples, expected, strict=True):
        assert example.pixels.shape == (8, 8, 3)
        assert example.target == Greys().classes[index % 4]
        assert example.prediction == Greys().classes[(index + (index in wrong)) % 4]
        assert example.is_right == (index not in wrong)
        # Logits log 9, 0, 0, 0: nine of twelve.
        assert example.probability == pytest.approx(0.75, rel=1e-6)


def test_the_picture_says_the_best_epoch_and_the_time_of_all():
    from matplotlib.figure import Figure

    epochs = [
        {"epoch": epoch, "train_loss": 3.0 / epoch, "val_loss": 2.0 / epoch, "val_top1": top1, "val_images": 60}
        | {"seconds": 30.5}
        for epoch, top1 in enumerate((50.0, 90.125, 80.0), start=1)
    ]
    maps = [np.ones((4, 4), np.float32)]
    pixels = np.zeros((8, 8, 3), np.uint8)
    examples = [report.Example(pixels, "cat", name, 0.756, maps) for name in ("cat", "dog")]
    figure = Figure()
    report._draw(figure, TrainConfig(), epochs, examples)
    assert figure.get_suptitle().strip() == "nat_pico on digits: 90.12 % of 60 val images after 92 s of training"
    loss, accuracy, *grid = [axes for part in figure.subfigs for axes in part.axes]
    assert [line.get_ydata().tolist() for line in map(as_arrays, loss.lines)] == [[3.0, 1.5, 1.0], [2.0, 1.0, 2 / 3]]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training (augmented, smoothed)", "val"]
    assert accuracy.texts[0].get_text() == "best 90.12 %, epoch 2"
    curve, point = map(as_arrays, accuracy.lines)
    assert curve.get_ydata().tolist() == [50.0, 90.125, 80.0]
    assert (point.get_xdata().tolist(), point.get_ydata().tolist()) == ([2], [90.125])
    assert [axes.get_title() for axes in grid[:2]] == ["cat  76%", "dog  76%\ntrue: cat"]
    assert [axes.title.get_color() for axes in grid[:2]] == [report._GOOD, report._BAD]


def as_arrays(line):
    line.set_data(np.atleast_1d(line.get_xdata()), np.atleast_1d(line.get_ydata()))
    return line


def test_a_heat_map_covers_the_image_at_one_scale():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    heat = report._draw_attention(axes, np.zeros((8, 12, 3), np.uint8), np.ones((4, 6)))
    assert (heat.get_extent(), heat.get_clim()) == ([0, 12, 8, 0], (0, 2))


# --- Plots


def steps(count, per_epoch):
    return [
        {"event": "step", "step": step, "epoch": 1 + (step - 1) // per_epoch, "train_loss": float(step), "lr": 0.5}
        for step in range(1, count + 1)
    ]


def test_a_run_in_its_first_epoch_is_summed_up_by_its_last_update():
    assert plot.summarize("run", steps(7, 10)) == "run: update 7, training loss 7.0000"
    epochs = [{"event": "epoch", "epoch": n, "val_top1": top1} for n, top1 in enumerate((20.0, 60.125, 50.0), 1)]
    assert plot.summarize("run", epochs) == "run: 3 epochs, best val top-1 60.12 % in epoch 2"


def test_updates_are_placed_by_the_updates_of_an_epoch():
    epoch = {"event": "epoch", "epoch": 2, "step": 20, "train_loss": 7.0, "lr": 0.25}
    assert plot.points([*steps(20, 10), epoch], "lr") == ([step / 10 for step in range(1, 21)], [0.5] * 20)
    assert plot.points(steps(3, 10), "train_loss") == ([1, 2, 3], [1.0, 2.0, 3.0])
    assert plot.points([epoch], "train_loss") == ([2], [7.0])


def test_an_average_is_corrected_for_its_start():
    # Weights .25, .1875 and .140625 of the last three values, over their sum.
    expected = (0.25 * 4 + 0.1875 * 2 + 0.140625 * 1) / 0.578125
    assert plot.smooth([1.0, 2.0, 4.0], 0.75) == pytest.approx([1.0, (0.25 * 2 + 0.1875) / 0.4375, expected])
    assert plot.SMOOTHING == 0.98


def test_every_panel_shows_its_values(tmp_path, monkeypatch):
    """Long curves of the training loss are smoothed, with what they were in the background; others are as they are."""
    import matplotlib.figure

    figures = []

    class Recorded(matplotlib.figure.Figure):
        def __init__(self, *args, **options):
            figures.append(self)
            super().__init__(*args, **options)

    monkeypatch.setattr(matplotlib.figure, "Figure", Recorded)
    epochs = [
        {"event": "epoch", "epoch": n, "step": 101 * n, "val_loss": 1.0 / n, "val_top1": 10.0 * n} for n in (1, 2)
    ]
    runs = {"a": [*steps(202, 101), *epochs]}
    plot.draw_curves(runs, tmp_path / "plot.png")
    train_loss, val_loss, top1, lr = figures[0].axes
    assert [len(axes.lines) for axes in figures[0].axes] == [2, 1, 1, 1]
    noisy, smoothed = train_loss.lines
    assert list(noisy.get_ydata()) == [float(step) for step in range(1, 203)]
    assert list(smoothed.get_ydata()) == plot.smooth(list(noisy.get_ydata()), 0.98)
    assert list(smoothed.get_xdata()) == [step / 101 for step in range(1, 203)]
    assert [list(axes.lines[0].get_ydata()) for axes in (val_loss, top1)] == [[1.0, 0.5], [10.0, 20.0]]
    assert list(lr.lines[0].get_ydata()) == [0.5] * 202
    assert [axes.get_title() for axes in figures[0].axes] == [
        *("training loss", "val loss", "val top-1, %", "learning rate")
    ]


# --- Kernels

ROW = tune.Row("window_backward", 4, 64)
LAUNCH = launch.Parameters(32, 4, 1)


def resources(spilled=0, shared=1000, occupancy=0.5):
    return Resources(64, spilled, shared, 8, occupancy)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([resources(occupancy=0.5), resources(occupancy=0.25)], 1),
        ([resources(occupancy=0.25), resources(occupancy=0.5)], 0),
        ([resources(shared=101376), resources()], 0),
        ([resources(shared=101377), resources()], None),
        ([resources(), resources(spilled=4)], None),
        ([resources(), RuntimeError("out of resources")], None),
    ],
)
def test_a_candidate_is_as_good_as_its_most_demanding_case(monkeypatch, found, expected):
    """On Ada a program may use 101376 bytes of shared memory."""
    answers, recorded = iter(found), []

    def compile_launch(started, architecture):
        assert (started, architecture) == ("the backward", "ada")
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def record_case(case, head_dim, dtype, architecture):
        recorded.append((case, head_dim, dtype, architecture))
        return {"forward": "the forward", "backward": "the backward"}

    monkeypatch.setattr(tune, "cases_of", lambda kernel: ["one", "two"])
    monkeypatch.setattr(tune, "record_case", record_case)
    monkeypatch.setattr(tune, "compile_launch", compile_launch)
    # The first of equally demanding ones stands for them.
    assert tune.compile_candidate("ada", ROW, LAUNCH) == (None if expected is None else found[expected])
    assert recorded[0] == ("one", 64, torch.float32, "ada")


def test_the_time_of_a_candidate_is_that_of_all_its_cases(monkeypatch):
    monkeypatch.setattr(tune, "cases_of", lambda kernel: [1.5, 2.0])
    asked = []

    def run_case(case, head_dim, dtype, backward):
        asked.append((head_dim, dtype, backward))
        return case

    monkeypatch.setattr(tune, "run_case", run_case)
    assert tune.seconds_of(ROW, LAUNCH) == 3.5
    assert tune.seconds_of(tune.Row("window_forward", 2, 32), LAUNCH) == 3.5
    assert asked == [(64, torch.float32, True)] * 2 + [(32, torch.bfloat16, False)] * 2


def test_without_times_large_blocks_with_few_warps_win_once_a_quarter_is_resident():
    def best(*candidates):
        survivors = {launch.Parameters(*values): resources(occupancy=share) for values, share in candidates}
        return tuple(tune.choose(ROW, survivors, timed=False))

    assert best(((64, 4, 1), 0.24), ((16, 8, 2), 0.26)) == (16, 8, 2)
    assert best(((64, 4, 1), 0.25), ((16, 4, 1), 1.0)) == (64, 4, 1)
    assert best(((64, 8, 1), 0.5), ((64, 4, 2), 0.5)) == (64, 4, 2)
    assert best(((64, 4, 2), 0.5), ((64, 4, 1), 0.5)) == (64, 4, 1)


@pytest.mark.parametrize(
    ("registers", "shared", "occupancy"),
    # Registers go in eights: 65536 / (32 x 4 x 104) makes 4 programs of 4 warps; shared memory and warps make 2 and 16.
    [(100, 1024, 4 * 4 / 64), (32, 115000, 2 * 4 / 64), (16, 0, 1.0)],
    ids=["registers", "shared memory", "warps"],
)
def test_occupancy_goes_by_what_runs_out_first(monkeypatch, registers, shared, occupancy):
    triton = pytest.importorskip("triton")
    text = "wgmma.mma_async.sync wgmma.wait_group mma.sync.aligned fma.rn tcgen05.mma"
    compiled = SimpleNamespace(asm={"cubin": b"", "ptx": text}, metadata=SimpleNamespace(shared=shared))
    monkeypatch.setattr(triton, "compile", lambda *given, **options: compiled)
    monkeypatch.setattr("triton.compiler.ASTSource", lambda *given: None)
    monkeypatch.setattr(kernel_table, "_usage", lambda binary, folder: (registers, 12))
    started = SimpleNamespace(kernel=SimpleNamespace(params=[]), arguments={}, parameters=launch.Parameters(64, 4, 1))
    found = kernel_table.compile_launch(started, "hopper")
    assert found == Resources(registers, 12, shared, 3, occupancy)


# --- Checkpoints and devices


def test_classes_are_those_of_the_model_by_name():
    model = SimpleNamespace(num_classes=2, pretrained_cfg={"label_names": ["cat", "dog"]})

    def matched(*classes):
        images = SimpleNamespace(classes=classes, targets=list(range(len(classes))))
        found, missing = classify.match_classes(model, images, "run")
        return list(found.targets), missing

    assert matched("cat", "dog") == ([0, 1], [])
    assert matched("dog", "cat") == ([1, 0], [])
    assert matched("dog") == ([1], ["cat"])
    with pytest.raises(UserError, match=r"run has 2 classes, the data 1, of which it does not know 'cow'.*cat..dog"):
        matched("cow")


def test_a_path_means_itself_then_the_best_then_the_last_model(tmp_path):
    for place, note in (("last", "best is not there"), ("best", None), (".", None)):
        (tmp_path / place).mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            (tmp_path / place / name).touch()
        found, said = classify.find_model(str(tmp_path))
        assert found == tmp_path / place
        assert said is None if note is None else note in said


def test_a_gpu_is_described_by_name_capability_and_memory(monkeypatch):
    properties = SimpleNamespace(name="H100", major=9, minor=0, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert doctor.describe(torch.device("cuda", 0)) == "H100, compute capability 9.0, 80 GiB"
    assert doctor.describe(CPU) == f"{torch.get_num_threads()} threads"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert [str(device) for device in doctor.devices()] == ["cpu", "cuda:0", "cuda:1", "mps"]
