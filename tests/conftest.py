# SPDX-License-Identifier: BSD-3-Clause
import pytest

# Their asserts, too, are to say what was compared.
pytest.register_assert_rewrite("op_cases", "op_checks")
