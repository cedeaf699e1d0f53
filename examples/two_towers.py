"""Train AlexNet in two towers, one process each, and compare the loss with one process.

    torchrun --nproc-per-node 2 examples/two_towers.py            # two GPUs where there are two, else the CPU
    torchrun --nproc-per-node 4 examples/two_towers.py --plan hybrid --steps 5

Each rank keeps half of the filters and neurons, as in Krizhevsky et al. 2012, and the ranks exchange activations at
conv3 and in the fully-connected layers. Together they compute what one process computes, dropout masks included.
"""

from __future__ import annotations

import argparse
import copy
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from alexnet_kernels import AlexNet, optim, parallel


def start() -> torch.device:
    """Join the process group that torchrun prepared; this rank's device."""
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("start this script with torchrun --nproc-per-node 2")
    local_rank, processes = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.device_count() >= processes:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        return device
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    dist.init_process_group("gloo")
    return torch.device("cpu")


def train_step(model: nn.Module, optimizer: optim.SGD, images: Tensor, labels: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)  # dropout's, the same on every rank
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=parallel.PLANS, default="towers")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="images of a step, of all processes together")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images, pixels")
    parser.add_argument("--width", type=float, default=0.25, help="factor on the filters and neurons")
    args = parser.parse_args()
    device = start()

    torch.manual_seed(0)  # every rank begins with the same weights and images
    alone = AlexNet(num_classes=10, width=args.width).to(device, memory_format=torch.channels_last)
    for layer in alone.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)  # moves the loss in a few steps, as the paper's values don't
    images, labels = torch.randn(args.batch, 3, args.size, args.size), torch.randint(0, 10, (args.batch,))
    images, labels = images.to(device, memory_format=torch.channels_last), labels.to(device)

    mesh = init_device_mesh(device.type, (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tower"))
    towers = parallel.parallelize(copy.deepcopy(alone), mesh, args.plan)
    index, parts = towers.parallelism.rows  # which part of the batch this rank is given
    own_images, own_labels = images.chunk(parts)[index], labels.chunk(parts)[index]
    # Optimizers come after parallelize, which replaces the parameters.
    optimizers = [optim.SGD(model.parameters(), lr=1e-3) for model in (alone, towers)]

    for step in range(args.steps):
        expected = train_step(alone, optimizers[0], images, labels, seed=step)
        actual = train_step(towers, optimizers[1], own_images, own_labels, seed=step)
        # Each rank has the mean over its own images: average over all ranks.
        dist.all_reduce(actual)
        actual /= dist.get_world_size()
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {float(actual):.6f}, one process {float(expected):.6f}", flush=True)
    held = sum(parameter.to_local().numel() for parameter in towers.parameters())
    if dist.get_rank() == 0:
        print(f"a rank holds {held:,} of {sum(p.numel() for p in alone.parameters()):,} parameters", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
