"""The interpreter of every Triton version, as strict about masks as that of 3.9."""

from typing import Any

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder


@pytest.fixture(autouse=True)
def masks_are_boolean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, position in (("create_masked_load", 1), ("create_masked_store", 2)):
        access = getattr(InterpreterBuilder, name)

        def checked(self: Any, *arguments: Any, access: Any = access, position: int = position) -> Any:
            assert arguments[position].data.dtype == np.bool_, "a mask made from a scalar comparison"
            return access(self, *arguments)

        monkeypatch.setattr(InterpreterBuilder, name, checked)
