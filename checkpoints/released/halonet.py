"""HaloNet and its hybrids: timm's own weights and measurements."""

from .entry import ReleasedWeights


def _halonet(repository: str, top1: float) -> ReleasedWeights:
    origin = "https://github.com/huggingface/pytorch-image-models"
    return ReleasedWeights(hf_hub_id=f"timm/{repository}", top1=top1, license="apache-2.0", origin=origin)


RELEASED: dict[str, ReleasedWeights] = {
    "halonet26t_vicinal.a1h_in1k": _halonet("halonet26t.a1h_in1k", 79.134),
    "halonet50ts_vicinal.a1h_in1k": _halonet("halonet50ts.a1h_in1k", 81.640),
    "sehalonet33ts_vicinal.ra2_in1k": _halonet("sehalonet33ts.ra2_in1k", 80.976),
    "eca_halonext26ts_vicinal.c1_in1k": _halonet("eca_halonext26ts.c1_in1k", 79.518),
    "haloregnetz_b_vicinal.ra3_in1k": _halonet("haloregnetz_b.ra3_in1k", 81.058),
    "halo2botnet50ts_256_vicinal.a1h_in1k": _halonet("halo2botnet50ts_256.a1h_in1k", 82.084),
    "lamhalobotnet50ts_256_vicinal.a1h_in1k": _halonet("lamhalobotnet50ts_256.a1h_in1k", 81.552),
}
