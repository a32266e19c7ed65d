import csv

from vicinal.__main__ import main


def test_bench_train_writes_both_comparisons(tmp_path, capsys):
    table = tmp_path / "train.csv"
    arguments = ("--images", "70", "--batch-size", "64", "--turns", "4", "--csv", str(table))
    assert main(["bench", "train", *arguments]) == 0
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["part"], row["implementation"]) for row in rows] == [
        *(("loop", "ours"), ("loop", "bare"), ("loader", "ours"), ("loader", "timm"))
    ]
    assert all(float(row["cpu_ms_per_image"]) > 0 for row in rows)
    # Whole batches count: five of the fifth of the digits that is trained on, and one of 70 JPEGs.
    assert [row["images"] for row in rows] == ["320 x 32 px"] * 2 + ["64 x 500x375"] * 2
    assert [float(row["throughput_ratio"]) for row in rows if row["implementation"] == "ours"] == [1.0, 1.0]
    for row in rows:
        least, most = map(float, row["by_quarters"].split(" to "))
        assert 0 < least <= most
    assert main(["bench", "train", "--images", "4"]) == 2
    assert "--images 4: must be at least --batch-size 32" in capsys.readouterr().err
    assert main(["bench", "train", "--turns", "3"]) == 2
    assert "--turns 3: must be at least 4" in capsys.readouterr().err
