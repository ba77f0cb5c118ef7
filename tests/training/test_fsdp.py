"""Two processes with fully sharded weights train through the soft mask as one process does."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import unique_hf
from unique_hf.probe import measure

pytest.importorskip("trl")

from tests.training.tiny import make_model

STEPS = 3


def rows(count):
    return torch.randint(1, 4096, (count, 48), generator=torch.Generator().manual_seed(9))


def train(model, batch, share):
    """Losses of a few steps of SGD; `share` of the mean over all processes is this process's."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(STEPS):
        # another budget and temperature every step, and a dense one, as the callback does it
        unique_hf.configure(model, budget=16 + 4 * step, temperature=2.0 / (step + 1), soft_mask=step != 1)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach() * share)
    return torch.stack(losses)


def worker(rank, port, file):
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        model = make_model()
        mesh = dist.init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        unique_hf.report(model, reset=True)
        losses = train(model, rows(4)[2 * rank : 2 * rank + 2], 0.5)
        dist.all_reduce(losses)
        soft_rows = unique_hf.report(model).soft_rows
        measured = measure(model, {"input_ids": rows(2)})
        weight = model.model.layers[0].self_attn.q_proj.weight.full_tensor()
        if rank == 0:
            found = {"losses": losses, "weight": weight.detach(), "soft_rows": soft_rows, "measured": measured}
            torch.save(found, file)
    finally:
        dist.destroy_process_group()


def test_two_sharded_processes_train_as_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(port, tmp_path / "found.pt"), nprocs=2)
    found = torch.load(tmp_path / "found.pt")
    model = make_model()
    assert found["losses"].tolist() == pytest.approx(train(model, rows(4), 1.0).tolist(), abs=1e-5)
    assert found["measured"] == pytest.approx(measure(model, {"input_ids": rows(2)}), abs=1e-4)
    weight = model.model.layers[0].self_attn.q_proj.weight.detach()
    assert (found["weight"] - weight).abs().max() < 1e-5
    assert (weight - make_model().model.layers[0].self_attn.q_proj.weight).abs().max() > 1e-4, "nothing was learnt"
    assert found["soft_rows"] == 2 * 2 * 2 * 48  # two soft steps, two layers, two rows of 48
