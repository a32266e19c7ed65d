"""The Triton kernels, compiled ahead of time for GPUs that need not be there: what they take of a multiprocessor."""

import pytest
import torch

from vicinal.eval.bench.kernel_table import (
    ARCHITECTURES,
    CASES,
    DTYPES,
    HEAD_DIMS,
    Case,
    compile_launch,
    main,
    record_case,
)
from vicinal.kernels import launch
from vicinal.kernels.triton_common import padded_channels

LIGHT_KERNELS = {
    "neighborhood_attention": {"column_table", "gather_bias"},
    "halo_attention": {"backward_key"},
    "routed_attention": {"invert"},
    "window_attention": {"bias", "sum_by_offset"},
}
"""Kernels without matrix products."""
EXACT_IN_PARTS = {("aggregated_attention", "backward_key")}
"""Kernels that use tensor cores for float32 too, on parts of a number that are exact in bfloat16."""
WIDE = (128, 160)
"""Head dimensions of the table's two widest columns."""


def has_entry(operator: str, architecture: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the launch table has an entry: none where a kernel would spill registers or want too much memory."""
    if dtype == torch.float32 and operator in ("halo", "aggregated"):
        return head_dim <= 64
    return (operator, architecture, head_dim) != ("aggregated", "ada", 160)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def check(case: Case, head_dim: int, dtype: torch.dtype, architecture: str) -> None:
    for name, started in record_case(case, head_dim, dtype, architecture).items():
        found = compile_launch(started, architecture)
        report = f"{case.operator} {name} head_dim={head_dim} {dtype} {started.parameters}: {found}"
        assert found.spilled == 0, report
        assert found.shared <= ARCHITECTURES[architecture].shared, report
        assert found.occupancy > 0, report
        # float32 products are exact, which tensor cores are not.
        exact = dtype == torch.float32 and (case.operator, name) not in EXACT_IN_PARTS
        uses_tensor_cores = not exact and name not in LIGHT_KERNELS.get(case.operator, ())
        assert (found.tensor_core_instructions > 0) == uses_tensor_cores, report


def describe(case: Case) -> str:
    return f"{case.operator}-{case.window}-rank{case.rank}"


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_hopper(case: Case) -> None:
    check(case, 32, torch.bfloat16, "hopper")


def test_hopper_in_float32() -> None:
    check(Case("window_attention", 7), 32, torch.float32, "hopper")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_halo_of_few_keys(head_dim: int) -> None:
    """The backward goes through the window twice."""
    check(Case("halo_attention", 4), head_dim, torch.bfloat16, "hopper")


def test_allowed_tf32_uses_tensor_cores() -> None:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        started = record_case(Case("window_attention", 4), 32, torch.float32, "hopper")["forward_whole"]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    assert compile_launch(started, "hopper").tensor_core_instructions > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=describe)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, *WIDE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_dtype(architecture: str, case: Case, head_dim: int, dtype: torch.dtype) -> None:
    if has_entry(case.operator.removesuffix("_attention"), architecture, dtype, head_dim):
        check(case, head_dim, dtype, architecture)
    else:
        with pytest.raises(KeyError):
            check(case, head_dim, dtype, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_takes_too_much_memory_is_left_to_tiled(architecture: str, dtype: torch.dtype) -> None:
    operators = ("window", "neighborhood", "halo", "aggregated", "routed")
    with launch.record(architecture):
        for head_dim in (24, *HEAD_DIMS, *WIDE):
            tokens = torch.empty(1, 1, 1, 1, head_dim, dtype=dtype)
            for name in operators:
                covered = launch.covers(name, tokens, padded_channels(head_dim))
                assert covered == has_entry(name, architecture, dtype, head_dim), (name, head_dim)


def test_a_spill_is_found() -> None:
    """A block of 64 queries, their halo and 64 channels are more than the 255 registers that a thread can have."""
    with launch.replace({"halo_backward_query": launch.Parameters(64, 4, 2)}):
        started = record_case(Case("halo_attention", 8), 64, torch.bfloat16, "ampere")["backward_query"]
    assert compile_launch(started, "ampere").spilled > 0


@pytest.mark.parametrize("architecture", ["ampere", "ada", "blackwell"])
def test_other_architectures_compile_within_their_memory(architecture: str) -> None:
    for name, started in record_case(Case("window_attention", 4), 32, torch.bfloat16, architecture).items():
        found = compile_launch(started, architecture)
        assert found.shared <= ARCHITECTURES[architecture].shared, (name, found)
        assert found.tensor_core_instructions > 0 or name in LIGHT_KERNELS["window_attention"], (name, found)


def test_the_table_refuses_an_unknown_architecture() -> None:
    with pytest.raises(SystemExit, match=r"usage: .* FILE"):
        main(["table.md", "volta"])
