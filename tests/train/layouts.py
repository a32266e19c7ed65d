"""500 images of digits, stored in every way that a reader takes."""

import io
import json
import tarfile
from pathlib import PurePath

from vicinal.train.data.images import load_digits

TRAIN, VAL = 500, 40


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def add_file(archive, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def digit_samples():
    """(split, class name, file name, content) in the order of the class and of the name."""
    digits = load_digits()
    found = []
    for split, first, count in (("train", 0, TRAIN), ("val", TRAIN, VAL)):
        for index in sorted(range(first, first + count), key=lambda index: (digits.targets[index], index)):
            found.append(
                (split, str(digits.targets[index]), f"{digits.targets[index]}-{index:04d}.png", png(digits.load(index)))
            )
    return found


def write_folders(root, samples):
    for split, label, name, content in samples:
        (root / split / label).mkdir(parents=True, exist_ok=True)
        (root / split / label / name).write_bytes(content)


def write_class_tars(root, samples):
    for split, label in sorted({sample[:2] for sample in samples}):
        (root / split).mkdir(exist_ok=True)
        with tarfile.open(root / split / f"{label}.tar", "w") as archive:
            for _, _, name, content in (sample for sample in samples if sample[:2] == (split, label)):
                add_file(archive, name, content)


def write_tar_of_tars(root, samples):
    write_class_tars(root, samples)
    for split in ("train", "val"):
        parts = sorted((root / split).glob("*.tar"))
        with tarfile.open(root / split / "all.tar", "w") as archive:
            for part in parts:
                archive.add(part, part.name)
                part.unlink()


def write_webdataset(root, samples, per_shard=120):
    for split in ("train", "val"):
        own = [sample for sample in samples if sample[0] == split]
        for number, start in enumerate(range(0, len(own), per_shard)):
            with tarfile.open(root / f"digits-{split}-{number:04d}.tar", "w") as archive:
                for _, label, name, content in own[start : start + per_shard]:
                    add_file(archive, f"{PurePath(name).stem}.cls", label.encode())
                    add_file(archive, name, content)


def write_webdataset_with_json(root, samples):
    for split in ("train", "val"):
        (root / split).mkdir()
        with tarfile.open(root / split / "0.tar", "w") as archive:
            for _, label, name, content in (sample for sample in samples if sample[0] == split):
                add_file(archive, name, content)
                meta = json.dumps({"label": int(label), "filename": name}).encode()
                add_file(archive, f"{PurePath(name).stem}.json", meta)


def write_parquet(root, samples):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=sorted({label for _, label, *_ in samples}))}
    )
    for split, name in (("train", "train"), ("val", "validation")):
        rows = [
            {"image": {"bytes": content, "path": file}, "label": int(label)}
            for part, label, file, content in samples
            if part == split
        ]
        for number, half in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
            part = datasets.Dataset.from_list(half, features=features)
            part.to_parquet(root / f"{name}-{number:05d}-of-00002.parquet")
