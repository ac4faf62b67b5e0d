import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> int:
    """Fresh random inputs each run; a failing test shows the seed to repeat it with torch.manual_seed."""
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    print(f"seed {seed}")
    return seed
