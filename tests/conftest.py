# SPDX-License-Identifier: BSD-3-Clause
import pytest
import torch

# Their asserts, too, are to say what was compared.
pytest.register_assert_rewrite("cuda_checks", "op_cases", "op_checks")


@pytest.fixture
def tf32():
    """Float32 products may be done in TF32."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def deterministic():
    """Torch is asked for results that are the same in every run."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
