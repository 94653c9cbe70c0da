"""Upstream's recorded numbers: every case, in float32 and float64, on every backend that runs here.

``pytest tests/test_golden.py --golden DIR`` runs the cases of another folder of the same format.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastflow.testing.golden import Case, compare, compute

GOLDEN = Path(__file__).parent / "golden"
# In Triton's interpreter each of these takes a minute or more; the others go through every op and module.
SLOW = ("full_", "flow_", "cfm_", "loss_")
EXPECTED = ("out.", "gin.", "gmid.", "gp.", "gnorm.norm", "gnorm.dot", "gnorm.err32", "gsub.norm", "f32err.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--golden") or GOLDEN)
        paths = sorted(folder.glob("*.npz"))
        if not paths:
            raise pytest.UsageError(f"--golden: no .npz case in {folder}")
        metafunc.parametrize("path", paths, ids=[path.stem for path in paths])


def failures(case: Case, results: dict) -> list:
    comparisons = compare(case, results)
    assert comparisons, "nothing was compared"
    return [comparison for comparison in comparisons if not comparison.passed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_case_agrees_with_upstream(path: Path, dtype: torch.dtype, backend: str, modules_on) -> None:
    case = Case(path, dtype)
    if case.config.get("train_mode") and backend != "reference":
        pytest.skip("recorded dropout masks belong to the reference path")
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("attention on triton has no float64")
    if case.name.startswith(SLOW) and backend == "triton" and not torch.cuda.is_available():
        pytest.skip("not run: full size, whole flows and solvers on triton: this machine has no GPU")
    if case.name.startswith("full_") and backend != "reference" and dtype == torch.float64:
        pytest.skip("full size in float64 is a minute on two cores: the reference alone is compared")
    with modules_on(backend):
        assert not failures(case, compute(case))


SMALL = [
    "cfm_v2_full",
    "enc_v1",
    "est_v3_stream",
    "flow_v1_infer_noprompt",
    "flow_v1_train",
    "lr_infer",
    "parts_dit",
    "parts_grid",
    "parts_masks",
]


@pytest.mark.parametrize("name", SMALL)
def test_corrupting_any_recorded_array_fails(name: str) -> None:
    case = Case(GOLDEN / f"{name}.npz")
    results = compute(case)
    assert not failures(case, results)
    for key in [key for key in case.arrays if key.startswith(EXPECTED)]:
        right = case.arrays[key]
        wrong = right.copy().reshape(-1)
        # The first element is never padding; a tenth of the largest value is far above every tolerance.
        if key.startswith("f32err."):
            wrong[0] = max(0.1 * float(np.abs(case.arrays[key.removeprefix("f32err.")]).max()), 1.0)
        elif wrong.dtype == bool:
            wrong[0] ^= True
        elif wrong.dtype.kind == "f":
            wrong[0] += max(0.1 * float(np.abs(wrong).max()), 1.0)
        else:
            wrong[0] += 1
        case.arrays[key] = wrong.reshape(right.shape)
        assert failures(case, results), f"a wrong {key} was not noticed"
        case.arrays[key] = right


@pytest.mark.parametrize("name", ["in.x", "in.mu", "in.t", "in.spks", "in.cond", "in.cot"])
def test_corrupting_an_input_fails(name: str) -> None:
    case = Case(GOLDEN / "est_v2_stream.npz")
    case.arrays[name] = case.arrays[name] * 1.01
    assert failures(case, compute(case))


def test_a_missing_result_fails() -> None:
    case = Case(GOLDEN / "lr_train.npz")
    results = compute(case)
    del results["gin.x"]
    with pytest.raises(KeyError, match=r"gin\.x"):
        compare(case, results)


def test_a_result_that_is_not_finite_fails() -> None:
    case = Case(GOLDEN / "est_v3_full.npz")
    results = compute(case)
    results["out.y"] = results["out.y"].detach().clone()
    results["out.y"][-1, :, -1] = float("nan")  # padding that nothing reads
    assert failures(case, results)


def test_draws_in_another_order_fail() -> None:
    case = Case(GOLDEN / "loss_v2_full.npz")
    case.arrays["in.t"], case.arrays["in.noise"] = case.arrays["in.noise"], case.arrays["in.t"]
    with pytest.raises(AssertionError, match="drew"):
        compute(case)


def test_another_folder_can_be_checked(tmp_path: Path) -> None:
    for name in ("weights.py", "parts_time.npz"):
        shutil.copy(GOLDEN / name, tmp_path / name)
    case = Case(tmp_path / "parts_time.npz")
    assert not failures(case, compute(case))
