"""Weights that do not fit are refused wherever they come in; only a classifier may be new."""

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from vicinal.__main__ import main
from vicinal.checkpoints import save_model
from vicinal.errors import UserError
from vicinal.train.build import build_task
from vicinal.train.config import ModelConfig, TrainConfig
from vicinal.train.network.create import build_model
from vicinal.train.run.world import World

FAMILIES = ("nat_pico", "shvit_pico_vicinal", "davit_pico_vicinal", "test_resnet")


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A family's model of 5 classes, as a folder."""
    torch.manual_seed(1)
    model = timm.create_model(request.param, num_classes=5)
    return request.param, save_model(tmp_path_factory.mktemp(request.param) / "model", model)


def spoil(folder, target, change):
    """A copy of a saved model with other tensors."""
    shutil.copytree(folder, target)
    save_file(change(load_file(folder / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    return target


def classifier_of(model):
    return model.pretrained_cfg["classifier"]


def every_way(name, folder):
    """The three ways in which a folder gives its weights."""
    yield ModelConfig(name, weights=str(folder))
    yield ModelConfig(name, weights=str(folder / "model.safetensors"))
    yield ModelConfig(f"local-dir:{folder}", pretrained=True)


@pytest.mark.parametrize("num_classes", [5, 3])
def test_everything_but_another_classifier_is_taken_over(saved, num_classes):
    name, folder = saved
    tensors = load_file(folder / "model.safetensors")
    for config in every_way(name, folder):
        model = build_model(config, None, num_classes)
        for key, value in model.state_dict().items():
            if num_classes == 5 or not key.startswith(classifier_of(model)):
                assert torch.equal(value, tensors[key]), key
        note = getattr(model, "weights_note", None)
        assert (
            note is None
            if num_classes == 5
            else note.endswith("5 classes, and 3 in the data: the classifier is a new one")
        )


def test_weights_without_a_classifier_are_taken_over(saved, tmp_path):
    name, folder = saved
    classifier = timm.create_model(name).pretrained_cfg["classifier"]
    bare = spoil(
        folder, tmp_path / "bare", lambda t: {key: v for key, v in t.items() if not key.startswith(classifier)}
    )
    for config in every_way(name, bare):
        model = build_model(config, None, 5)
        tensors = load_file(bare / "model.safetensors")
        assert all(torch.equal(model.state_dict()[key], value) for key, value in tensors.items())
        assert model.weights_note.endswith("they have no classifier: the classifier is a new one")


SPOILT = {
    "of nothing": (lambda t: {"foo.bar": torch.zeros(2)}, "tensors missing"),
    "every second": (lambda t: dict(list(t.items())[::2]), "tensors missing"),
    "one too many": (lambda t: {**t, "foo.bar": torch.zeros(2)}, r"1 of \d+ tensors left over \(foo.bar\)"),
    "one of another shape": (
        lambda t: {**t, (key := next(key for key in t if t[key].ndim == 4)): t[key][:1].clone()},
        "1 of .* tensors of another shape",
    ),
    "half a classifier": (
        lambda t: {key: v for key, v in t.items() if not (key.endswith("bias") and v.shape == (5,))},
        "1 of .* tensors missing",
    ),
}


@pytest.mark.parametrize("num_classes", [5, 3])
@pytest.mark.parametrize("kind", SPOILT)
def test_weights_that_do_not_fit_are_refused(saved, tmp_path, kind, num_classes):
    name, folder = saved
    change, message = SPOILT[kind]
    for config in every_way(name, spoil(folder, tmp_path / "spoilt", change)):
        whose = f"--weights {config.weights}" if config.weights else f"--model {config.name}"
        with pytest.raises(UserError, match=message) as caught:
            build_model(config, None, num_classes)
        assert str(caught.value).startswith(f"{whose}: not the weights of this {name}: ")


@pytest.mark.parametrize("num_classes", [5, 3])
def test_the_weights_of_another_family_are_refused(saved, tmp_path, num_classes):
    name, _ = saved
    other = save_model(tmp_path / "other", timm.create_model("test_vit", num_classes=5))
    with pytest.raises(UserError, match=f"not the weights of this {name}"):
        build_model(ModelConfig(name, weights=str(other)), None, num_classes)


@pytest.mark.parametrize("num_classes", [1000, 3])
def test_a_training_checkpoint_of_torch_is_held_against_the_network_too(tmp_path, num_classes):
    source = timm.create_model("nat_pico", num_classes=1000)
    torch.save({"model": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "whole.pth")
    model = build_model(ModelConfig("nat_pico", weights=str(tmp_path / "whole.pth")), None, num_classes)
    assert torch.equal(
        model.stem.state_dict()[key := next(iter(model.stem.state_dict()))], source.stem.state_dict()[key]
    )
    torch.save({"model": dict(list(source.state_dict().items())[::2])}, tmp_path / "half.pth")
    with pytest.raises(UserError, match=r"--weights .*half.pth: not the weights of this nat_pico: \d+ of \d+ tensors"):
        build_model(ModelConfig("nat_pico", weights=str(tmp_path / "half.pth")), None, num_classes)


def test_a_probe_stands_on_the_weights_that_were_given(saved, tmp_path):
    name, folder = saved
    if name != "nat_pico":
        return
    tensors = load_file(folder / "model.safetensors")
    probe = build_model(ModelConfig(name, weights=str(folder), probe="attentive", probe_queries=4), None, 3)
    for key, value in probe.backbone.state_dict().items():
        assert torch.equal(value, tensors[key])
    half = spoil(folder, tmp_path / "half", lambda t: dict(list(t.items())[::2]))
    for kind in ("linear", "attentive"):
        with pytest.raises(UserError, match="not the weights of this nat_pico"):
            build_model(ModelConfig(name, weights=str(half), probe=kind, probe_queries=4), None, 3)


def test_a_teacher_brings_its_classifier(tmp_path):
    """One that was drawn would teach noise: neither another number of classes nor other names will do."""
    world = World(torch.device("cpu"))
    student = timm.create_model("shvit_pico_vicinal", num_classes=3, distilled=True)
    student.pretrained_cfg["label_names"] = ["a", "b", "c"]

    def task_with(num_classes, names):
        teacher = timm.create_model("test_resnet", num_classes=num_classes)
        teacher.pretrained_cfg.update(label_names=names, num_classes=num_classes)
        shutil.rmtree(tmp_path / "teacher", ignore_errors=True)
        folder = save_model(tmp_path / "teacher", teacher)
        config = TrainConfig(ModelConfig("shvit_pico_vicinal", teacher=f"local-dir:{folder}"))
        return build_task(student, None, config, world)

    assert task_with(3, ["a", "b", "c"]).teacher is not None
    with pytest.raises(UserError, match=r"--teacher local-dir:.*: not the weights of this test_resnet"):
        task_with(5, ["a", "b", "c", "d", "e"])
    with pytest.raises(UserError, match=r"--teacher .*: class 0 is 'b', not 'a'"):
        task_with(3, ["b", "a", "c"])


FILES = {
    "text.pth": b"hello, these are no weights\n",
    "empty.pth": b"",
    "short.safetensors": None,
    "binary.safetensors": b"\xff" * 100,
    "list.pth": [1, 2],
    "without.pth": {"epoch": 3},
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_weights_is_one_line(tmp_path, capsys, train, name):
    path, content = tmp_path / name, FILES[name]
    if content is None:
        save_file({"a": torch.zeros(1000)}, path)
        content = path.read_bytes()[:-100]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    code, folder = train("--weights", path)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert line.startswith(f"error: --weights {path}: cannot read weights from {str(path)!r}: ")
    assert not folder.exists()


@pytest.mark.parametrize("kind", ["empty folder", "nothing", "shards"])
def test_a_place_without_weights_is_one_line(tmp_path, capsys, train, kind):
    path = tmp_path / "place"
    if kind != "nothing":
        (path / "last" / "shards").mkdir(parents=True)
    if kind == "shards":
        (path / "last" / "trainer.pt").touch()
    assert train("--weights", path)[0] == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--weights {path}: " in line


ODD = {"list": "[]", "empty": "", "number": "3", "no name": "{}", "binary": None, "classes": '"num_classes": "ten"'}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("way", ["--weights", "local-dir", "--teacher", "eval"])
def test_an_odd_config_is_one_line(tmp_path, capsys, train, kind, way):
    folder = save_model(tmp_path / "saved", timm.create_model("test_vit", num_classes=10, img_size=32))
    content = ODD[kind]
    if kind == "classes":
        content = json.dumps({**json.loads((folder / "config.json").read_text()), "num_classes": "ten"})
    (folder / "config.json").write_bytes(b"\xff\xfe\x00" if content is None else content.encode())
    if way == "eval":
        code = main(["eval", str(folder), "--device", "cpu"])
    else:
        student = ("--model", "shvit_pico_vicinal", "--model-kwargs", "distilled=true", "--batch-size", 2)
        given = {"--weights": ("--weights", folder), "local-dir": ("--model", f"local-dir:{folder}", "--pretrained")}
        code = train(*given.get(way, (*student, "--teacher", f"local-dir:{folder}")))[0]
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert str(folder / "config.json") in line


def test_a_saved_model_names_no_licence(tmp_path):
    """Neither of a fresh model, nor of one that was loaded from released weights under a licence."""
    for name in ("nat_pico", "shvit_pico_vicinal", "davit_pico_vicinal", "test_vit"):
        model = timm.create_model(name, num_classes=3)
        model.pretrained_cfg["license"] = "mit"
        text = (save_model(tmp_path / name, model) / "config.json").read_text()
        assert "license" not in text
        assert model.pretrained_cfg["license"] == "mit"


@pytest.mark.parametrize("num_classes", [1000, 3, 0])
@pytest.mark.parametrize("name", ["nat_pico", "shvit_pico_vicinal", "convit_pico_vicinal", "litv2_pico"])
def test_timm_builds_no_model_of_ours_from_half_of_its_weights(tmp_path, name, num_classes):
    """In Python too, where timm is as lenient as it likes with its own."""
    tensors = timm.create_model(name).state_dict()
    for content in (
        dict(list(tensors.items())[::2]),
        {"foo.bar": torch.zeros(2)},
        {**tensors, "foo.bar": torch.zeros(2)},
    ):
        torch.save(content, tmp_path / "spoilt.pth")
        overlay = {"file": str(tmp_path / "spoilt.pth")}
        for features in ({}, {"features_only": True}):
            with pytest.raises(ValueError, match=f"not the weights of this {name}: "):
                timm.create_model(
                    name, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay, **features
                )


def test_a_saved_model_without_pretrained_is_said_to_start_anew(saved):
    _, folder = saved
    model = build_model(ModelConfig(f"local-dir:{folder}"), None, 5)
    assert model.weights_note == (
        f"--model local-dir:{folder}: starts from fresh weights; --pretrained takes those that lie there"
    )
    fresh, kept = model.state_dict(), load_file(folder / "model.safetensors")
    assert any(not torch.equal(fresh[key], kept[key]) for key in kept)
