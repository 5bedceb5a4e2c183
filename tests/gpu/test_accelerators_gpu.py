"""A GPU that PyTorch counts is never said to be missing."""

import pytest
import torch

from esper.cli.accelerators import require_any_accelerator
from tests.unit.esper.cli.test_rank import session_with

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no CUDA device"),
]


def test_where_there_is_a_gpu_a_session_that_asks_for_some_begins():
    require_any_accelerator(session_with("1"))
