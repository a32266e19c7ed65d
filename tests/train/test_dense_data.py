"""Data of detectors and segmenters: COCO files and label maps of any origin, checked and read as they are."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vicinal.__main__ import main
from vicinal.errors import UserError
from vicinal.train.dense.coco import check_coco_images, read_coco
from vicinal.train.dense.images import read_image
from vicinal.train.dense.labels import check_label_maps, check_labels, pair_files, read_class_names, read_labels

SQUARE = [[2, 3, 12, 3, 12, 8, 2, 8]]
FILE = {
    "images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 30}],
    "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}],
    "annotations": [
        {
            "id": 1,
            "image_id": 7,
            "category_id": 9,
            "bbox": [2, 3, 10, 5],
            "area": 50,
            "iscrowd": 0,
            "segmentation": SQUARE,
        },
        {
            "id": 2,
            "image_id": 7,
            "category_id": 3,
            "bbox": [0, 0, 4, 4],
            "area": 16,
            "iscrowd": 0,
            "segmentation": SQUARE,
        },
    ],
}


def written(path: Path, change=lambda content: None) -> Path:
    content = copy.deepcopy(FILE)
    change(content)
    (path / "data.json").write_text(json.dumps(content))
    return path / "data.json"


def first(**entries):
    """A change of the first annotation; None takes an entry away."""

    def change(content):
        annotation = content["annotations"][0]
        annotation.update(entries)
        for key in [key for key, value in annotation.items() if value is None]:
            del annotation[key]

    return change


def test_categories_are_matched_by_name_whatever_their_order(tmp_path: Path):
    classes = ("bird", "dog", "cat")
    read = read_coco(written(tmp_path), classes)
    backwards = read_coco(written(tmp_path, lambda content: content["categories"].reverse()), classes)
    for coco in (read, backwards):
        # class i is category i + 1: dog is 2, cat is 3; no object of the first one is in the file
        assert [entry["category_id"] for entry in coco.annotations] == [2, 3]
        assert [(entry["id"], entry["name"]) for entry in coco.content["categories"]] == list(enumerate(classes, 1))
        assert any("no category bird" in note for note in coco.notes)


@pytest.mark.parametrize(
    ("change", "area", "note"),
    [
        (first(area=None), 50, "without area"),
        (first(area=None, segmentation=[[0, 0, 10, 0, 0, 6]]), 30, "without area"),
        (first(area=None, segmentation=None), 50, "without area"),
        (first(iscrowd=None), 50, "without iscrowd: taken as 0"),
    ],
)
def test_what_has_a_default_is_completed_and_said(change, area: float, note: str, tmp_path: Path):
    coco = read_coco(written(tmp_path, change))
    assert (coco.annotations[0]["area"], coco.annotations[0]["iscrowd"]) == (area, 0)
    assert [note in said for said in coco.notes] == [True]


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ([50, 5, 10, 10], None),
        ([5, -20, 10, 10], None),
        ([5, 5, -3, 4], None),
        ([5, 5, 0, 4], None),
        ([5, 5, 0.5, 4], None),
        ([-5, 5, 10, 10], [0, 5, 5, 10]),
        ([35, 25, 20, 20], [35, 25, 5, 5]),
        ([-0.5, 5, 40.9, 10], [-0.5, 5, 40.9, 10]),
    ],
)
def test_boxes_outside_are_left_out_or_cut_and_said(box: list, kept: list | None, tmp_path: Path):
    coco = read_coco(written(tmp_path, first(bbox=box)))
    boxes = {entry["id"]: entry["bbox"] for entry in coco.annotations}
    assert boxes.get(1) == kept
    assert boxes[2] == [0, 0, 4, 4]
    assert bool(coco.notes) == (kept != box)
    assert all("(the first is 1)" in note for note in coco.notes)


RUNS = {"size": [30, 40], "counts": [100, 50, 1050]}
# runs of 100, 50 and 1050 pixels in COCO's compressed form, written by pycocotools
COMPRESSED = {"size": [30, 40], "counts": "T3b1jP1"}


@pytest.mark.parametrize(
    ("segmentation", "kept"),
    [
        (RUNS, RUNS),
        (COMPRESSED, COMPRESSED),
        ([[1, 2, 3], *SQUARE], SQUARE),
        ([[1, 2, 3, 4]], None),
        ([["a"] * 6], None),
        ([[0, 0, 1e9, 0, 1e9, 1e9]], None),
        ({"size": [200000, 200000], "counts": [0, 40000000000]}, None),
        ({"size": [40, 30], "counts": [1200]}, None),
        ({"size": [30, 40], "counts": [5, 5]}, None),
        ({"size": [30, 40], "counts": [-5, 1205]}, None),
        ({"size": [30, 40], "counts": "zz\x7f"}, None),
        ({"size": [30, 40], "counts": "T3b1"}, None),
        ({"size": [30, 40]}, None),
        ("mask", None),
    ],
)
def test_a_broken_segmentation_never_reaches_pycocotools(segmentation, kept, tmp_path: Path):
    coco = read_coco(written(tmp_path, first(segmentation=segmentation)))
    assert {entry["id"]: entry["segmentation"] for entry in coco.annotations}.get(1) == kept
    assert any("the polygon or RLE is broken" in note for note in coco.notes) == (kept is None)
    # boxes alone: nothing of it is looked at
    alone = read_coco(written(tmp_path, first(segmentation=segmentation)), masks=False)
    assert [sorted(entry) for entry in alone.annotations] == [
        ["area", "bbox", "category_id", "id", "image_id", "iscrowd"]
    ] * 2


def test_runs_are_decoded_as_pycocotools_encodes_them(tmp_path: Path):
    from pycocotools import mask

    drawn = np.random.default_rng(0).random((30, 40)) < 0.1
    encoded = mask.encode(np.asfortranarray(drawn.astype(np.uint8)))
    segmentation = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    assert read_coco(written(tmp_path, first(segmentation=segmentation))).annotations[0]["segmentation"] == segmentation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["images"].append(content["images"][0]), "image id 7 stands there more than once"),
        (first(id=2), "annotation id 2 stands there more than once"),
        (lambda content: content["categories"][0].update(id=9), "two categories have the id 9: cat, dog"),
        (lambda content: content["categories"][0].update(name="dog"), "category name dog stands there more than once"),
        (lambda content: content["categories"][0].update(name=None), "category 3 has the name None"),
        (lambda content: content.pop("categories"), "'categories' must be a list"),
        (lambda content: content.update(annotations={}), "'annotations' must be a list"),
        (first(bbox="2 3 10 5"), "annotation 1 has the bbox '2 3 10 5'"),
        (first(bbox=[2, 3, 10]), "four numbers"),
        (first(bbox=[2, 3, float("nan"), 5]), "four numbers"),
        (first(category_id=1), "annotation 1 has the category_id 1, which no category has"),
        (first(image_id=[7]), "which no image has"),
        (first(iscrowd="no"), "iscrowd 'no'"),
        (first(area="big"), "the area 'big'"),
        (lambda content: content["images"][0].update(width="40"), "the width '40'"),
        (lambda content: content["images"][0].pop("height"), "the height None"),
        (lambda content: content["images"][0].update(file_name=5), "the file_name 5"),
    ],
)
def test_a_file_of_another_form_is_refused(change, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        read_coco(written(tmp_path, change))


def test_objects_without_masks_are_refused_under_a_config_that_learns_them(tmp_path: Path):
    from vicinal.train.dense.check import refuse_missing_masks

    refuse_missing_masks(read_coco(written(tmp_path)), "mask_rcnn_litv2_small_1x")
    coco = read_coco(written(tmp_path, first(segmentation=None)))
    with pytest.raises(UserError, match=r"1 of 2 annotations have no segmentation .*such as retinanet_litv2_small_1x"):
        refuse_missing_masks(coco, "mask_rcnn_litv2_small_1x")


def test_category_names_that_are_numbers_are_text(tmp_path: Path):
    coco = read_coco(written(tmp_path, lambda content: content["categories"][0].update(name=5)))
    assert coco.classes == ("5", "dog")
    assert any("numbers are read as text: 5" in note for note in coco.notes)


def test_a_coco_file_is_compared_with_its_images(tmp_path: Path):
    coco = read_coco(written(tmp_path))
    with pytest.raises(UserError, match=r"1 of 1 images are not in .*such as .*a\.png"):
        check_coco_images(coco, tmp_path)
    Image.new("RGB", (40, 31)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="has 40 x 31 pixels, and its annotations are for 40 x 30"):
        check_coco_images(coco, tmp_path)
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    assert check_coco_images(coco, tmp_path) == []


def turned(path: Path, orientation: int) -> None:
    """An image of 40 x 30 as it is shown, white above, stored as EXIF's orientation says."""
    shown = Image.new("RGB", (40, 30))
    shown.paste((255, 255, 255), (0, 0, 40, 15))
    undo = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[0x0112] = orientation
    (shown.transpose(undo[orientation]) if undo[orientation] is not None else shown).save(path, exif=exif)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_annotated_size_tells_the_frame_of_a_turned_image(orientation: int, tmp_path: Path):
    turned(tmp_path / "a.png", orientation)
    upright = np.asarray(read_image(tmp_path / "a.png", (40, 30)))
    assert (upright[:15] == 255).all()
    assert (upright[15:] == 0).all()
    assert check_coco_images(read_coco(written(tmp_path)), tmp_path) == []
    if orientation in (6, 8):
        stored = np.asarray(read_image(tmp_path / "a.png", (30, 40)))
        assert np.array_equal(stored, np.asarray(Image.open(tmp_path / "a.png")))
        change = written(tmp_path, lambda content: content["images"][0].update(width=30, height=40))
        assert "annotated as they are stored" in check_coco_images(read_coco(change), tmp_path)[0]
    with pytest.raises(UserError, match="has 40 x 30 pixels"):
        read_image(tmp_path / "a.png", (39, 30))


def test_pipelines_load_images_as_the_package_does(tmp_path: Path):
    from vicinal.train.dense.loading import LoadDecodedImage

    load = LoadDecodedImage()
    Image.fromarray(np.array([[0, 16448, 65535]], np.uint16)).save(tmp_path / "wide.png")
    Image.fromarray(np.array([[[9, 9, 9, 0], [255, 0, 0, 255]]], np.uint8), "RGBA").save(tmp_path / "clear.png")
    wide, clear = (load({"img_path": str(tmp_path / f"{name}.png")}) for name in ("wide", "clear"))
    assert wide["img"].tolist() == [[[0] * 3, [64] * 3, [255] * 3]]
    # white where nothing is seen, and blue comes first
    assert clear["img"].tolist() == [[[255] * 3, [0, 0, 255]]]
    assert (wide["img_shape"], wide["ori_shape"], wide["img"].dtype) == ((1, 3), (1, 3), np.uint8)
    turned(tmp_path / "a.png", 6)
    seen = load({"img_path": str(tmp_path / "a.png"), "height": 30, "width": 40})
    assert seen["ori_shape"] == (30, 40)
    assert (seen["img"][:15] == 255).all()
    assert LoadDecodedImage(to_float32=True)({"img_path": str(tmp_path / "a.png")})["img"].dtype == np.float32


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three images of three formats with their maps, and files that are neither."""
    for kind in ("images", "annotations"):
        (tmp_path / kind / "training" / "deep").mkdir(parents=True)
        (tmp_path / kind / "training" / ".DS_Store").write_bytes(b"x")
    for name in ("a.jpg", "b.webp", "deep/c.bmp"):
        Image.new("RGB", (6, 4)).save(tmp_path / "images" / "training" / name)
        labels = tmp_path / "annotations" / "training" / name
        Image.fromarray(np.tile(np.uint8([0, 1, 255]), (4, 2))).save(labels.with_suffix(".png"))
    (tmp_path / "images" / "training" / "notes.txt").write_text("x")
    (tmp_path / "classes.txt").write_text("sky\nsea\n")
    return tmp_path


def pairs(root: Path):
    return pair_files(root / "images" / "training", root / "annotations" / "training")


def test_images_of_every_format_find_their_label_maps(folders: Path):
    found = pairs(folders)
    assert [(image.name, labels.name) for image, labels in found.pairs] == [
        ("a.jpg", "a.png"),
        ("b.webp", "b.png"),
        ("c.bmp", "c.png"),
    ]
    assert any("notes.txt" in note for note in found.notes)
    (folders / "annotations" / "training" / "b.png").unlink()
    with pytest.raises(UserError, match=r"1 of 3 images .* no label map .*b\.webp"):
        pairs(folders)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (Image.fromarray(np.array([[0, 2, 255]], np.uint8)), [0, 2, 255]),
        (Image.fromarray(np.array([[0, 258, 40000]], np.uint16)), [0, 258, 40000]),
        (Image.fromarray(np.array([[0, 1, 1]], np.uint8) * 255).convert("1"), [0, 1, 1]),
        (Image.fromarray(np.array([[3, 1, 2]], np.uint8)).convert("P"), [3, 1, 2]),
    ],
)
def test_labels_are_the_integers_in_the_file(labels: Image.Image, expected: list, tmp_path: Path):
    if labels.mode == "P":
        labels.putpalette([7, 7, 7] * 256)
    labels.save(tmp_path / "map.png")
    assert read_labels(tmp_path / "map.png").tolist() == [expected]


def test_label_maps_of_colors_or_fractions_are_refused(tmp_path: Path):
    Image.new("RGB", (2, 2)).save(tmp_path / "color.png")
    Image.new("F", (2, 2)).save(tmp_path / "fractions.tif")
    for name in ("color.png", "fractions.tif"):
        with pytest.raises(UserError, match=r"integers in one channel"):
            read_labels(tmp_path / name)


def test_a_label_that_no_class_has_is_refused():
    labels = np.array([[0, 1, 2, 255]])
    assert check_labels(labels, "map.png", 3).tolist() == [[0, 1, 2, 255]]
    # as in ADE20K: 0 is ignored, and labels start at 1
    assert check_labels(labels, "map.png", 2, reduce_zero_label=True).tolist() == [[255, 0, 1, 255]]
    for wrong, classes, reduce in (([[258]], 3, False), ([[3]], 3, False), ([[-1]], 3, False), ([[3]], 2, True)):
        with pytest.raises(UserError, match=r"map\.png holds"):
            check_labels(np.array(wrong), "map.png", classes, reduce)


def test_masks_of_0_and_255_are_refused_to_learn_from(folders: Path):
    counts, notes = check_label_maps(pairs(folders).pairs, ("sky", "sea"), False, folders, True)
    assert (counts.tolist(), notes) == ([24, 24], [])
    for _, labels in pairs(folders).pairs:
        Image.fromarray(np.tile(np.uint8([0, 255, 255]), (4, 2))).save(labels)
    with pytest.raises(UserError, match=r"show sky alone.*write masks of 0 and 255 as 0 and 1"):
        check_label_maps(pairs(folders).pairs, ("sky", "sea"), False, folders, True)
    _, notes = check_label_maps(pairs(folders).pairs, ("sky", "sea"), False, folders, False)
    assert "no pixel of sea" in notes[0]
    Image.new("L", (6, 5)).save(folders / "annotations" / "training" / "a.png")
    with pytest.raises(UserError, match="has 6 x 4 pixels, and its annotations are for 6 x 5"):
        check_label_maps(pairs(folders).pairs, ("sky", "sea"), False, folders, True)


@pytest.mark.parametrize(
    ("content", "message"), [(b"a\nb\na\n", "names a twice"), (b"\n \n", "is empty"), (b"\xff\xfe\xfa", "decode")]
)
def test_a_listing_of_classes_is_checked(content: bytes, message: str, tmp_path: Path):
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_class_names(tmp_path / "classes.txt")


def test_data_check_takes_coco_files_and_label_maps(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    file = str(written(tmp_path))
    assert main(["data", "check", file, "--images", str(tmp_path), "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())[file]
    assert found == {"images": 1, "classes": {"cat": 1, "dog": 1}, "notes": [], "unreadable": []}
    written(tmp_path, first(bbox=[90, 90, 5, 5]))
    assert main(["data", "check", file, "--images", str(tmp_path)]) == 1
    assert "the box lies outside its image" in capsys.readouterr().out
    content = (tmp_path / "a.png").read_bytes()
    written(tmp_path)
    (tmp_path / "a.png").write_bytes(content[:-30])
    assert main(["data", "check", file, "--images", str(tmp_path)]) == 1
    assert "unreadable: 1" in capsys.readouterr().out
    assert main(["data", "check", "--images", str(tmp_path), file]) == 1
    assert main(["data", "check", file]) == 2
    assert "give --images" in capsys.readouterr().err
    (folders / "images" / "training" / "notes.txt").unlink()
    assert main(["data", "check", str(folders)]) == 0
    assert "sky 24, sea 24" in capsys.readouterr().out
