"""Engines that keep a part of each parameter in every process: refused by name; what they leave whole is penalised."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.functional import cross_entropy

from ewc_fast import EWCLoss

LAMBDA, LR = 30.0, 0.1


def penalty(model: nn.Module) -> EWCLoss:
    """One whose anchor lies off the weights."""
    ewc = EWCLoss(model, LAMBDA)
    ewc.consolidate(
        fisher={n: 0.1 * torch.rand_like(p) for n, p in model.named_parameters()},
        anchor={n: p.detach() + 0.05 * torch.randn_like(p) for n, p in model.named_parameters()},
    )
    return ewc


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def refused(rank: int, store: str, found: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    with Path(f"{found}.{rank}").open("w") as file:
        for use_orig_params in (True, False):
            model = small_model()
            ewc = penalty(model)
            sharded = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
            optimizer = torch.optim.SGD(sharded.parameters(), LR)
            acts = (ewc, partial(ewc.attach, optimizer), partial(EWCLoss, sharded), partial(EWCLoss, model))
            for act in acts:
                try:
                    act()
                except ValueError as error:
                    file.write(f"{'is sharded (by FullyShardedDataParallel)' in str(error)}\n")
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_fully_sharded_data_parallel(tmp_path: Path) -> None:
    multiprocessing.spawn(refused, (str(tmp_path / "store"), str(tmp_path / "found")), nprocs=2)
    assert [(tmp_path / f"found.{rank}").read_text() for rank in range(2)] == ["True\n" * 8] * 2


# A process of its own: the engine keeps state in modules.
DEEPSPEED = """
    import sys, torch, deepspeed
    from tests.integrations.test_sharding import LR, penalty, small_model
    from torch.nn.functional import cross_entropy

    stage, how, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    deepspeed.init_distributed(dist_backend="gloo")
    model = small_model()
    ewc, optimizer = penalty(model), torch.optim.SGD(model.parameters(), LR)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    said = ""
    try:
        if how == "attached":
            ewc.attach(optimizer)
        for x, y in torch.load(path):
            loss = cross_entropy(engine(x), y)
            engine.backward(loss + ewc() if how == "in the loss" else loss)
            engine.step()
    except (TypeError, ValueError) as error:
        said = str(error)
    torch.save((said, None if stage == 3 else [p.detach().clone() for p in model.parameters()]), path)
"""


@pytest.mark.parametrize(
    ("stage", "how", "said"),
    [
        (0, "in the loss", ""),
        (0, "attached", ""),
        (1, "in the loss", ""),
        (1, "attached", "is the model's: build it from the parameters of the model as it is now"),
        (2, "in the loss", ""),
        (2, "attached", "is the model's: build it from the parameters of the model as it is now"),
        (3, "in the loss", "is sharded (by DeepSpeed ZeRO-3)"),
        (3, "attached", "is sharded (by DeepSpeed ZeRO-3)"),
    ],
)
def test_deepspeed(stage: int, how: str, said: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="pip install --no-build-isolation deepspeed")
    model = small_model()
    ewc, batches = penalty(model), [(torch.randn(4, 8), torch.randint(3, (4,))) for _ in range(5)]
    torch.save(batches, tmp_path / "file")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = dict(os.environ, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=port)
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DEEPSPEED), str(stage), how, str(tmp_path / "file")],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    heard, weights = torch.load(tmp_path / "file")
    assert (said in heard) if said else not heard, heard
    if said:
        return
    for p, q in zip(plain_loop(model, ewc, batches).parameters(), weights, strict=True):
        torch.testing.assert_close(q, p.detach(), rtol=1e-5, atol=1e-6)


def plain_loop(model: nn.Module, ewc: EWCLoss, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """SGD on the penalised loss, by its formula."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    for x, y in batches:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        for n, p in model.named_parameters():
            loss = loss + LAMBDA / 2 * (ewc.fisher[n] * (p - ewc.anchor[n]) ** 2).sum()
        loss.backward()
        optimizer.step()
    return model
