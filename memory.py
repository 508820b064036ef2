"""Models that do not fit one device: parameters split over processes, activations computed twice.

`shard`. Data parallelism keeps a whole copy in every process: FP32 weights, gradients and AdamW's
two moments, 16 bytes a parameter. Here process r of N keeps the r-th N-th of the rows of each, as
DTensors (FSDP2, arXiv 2304.11277):

    forward, block by block    gather the weights, run, drop them
    backward, likewise         gather, run, drop; average the gradients over processes, keep a part
    AdamW                      each process updates its part

Weights are gathered as they are, in FP32, and each process centers and rounds its own part of the
batch. So the arithmetic is that of data parallelism, up to the order of FP32 sums. Embedding, last
norm and head are gathered from the beginning of forward to the end of backward, and what backward
needs of a block stays whole in between, rounded W too: its codes, packed along either axis, are 1
byte a parameter, unless blocks are recomputed. What runs the model or asks for its state takes part
in these exchanges: all processes must do it, or none.

`recompute`. Backward needs what forward computed. Of a block only the input is kept, and the block
runs again when backward reaches it: a third more arithmetic, and the same numbers bit for bit.

A checkpoint holds whole tensors, however many processes made it: `gather` and `local_part` are the
way into the file and out of it.
"""

import functools

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from cli import UserError


def shard(model, world):
    """Split a GPT on the CPU over the processes of a World, in place, and put this one's part on
    its device. UserError, naming the parameter, where rows do not split evenly.

    The model comes whole, so that its first weights are those of any other run, bit for bit. That
    costs memory of the host, 4 bytes a parameter and process (8 while --init is read): 129 GB for
    the 8 of one host and 4 billion parameters. The device sees one block at a time, and the host's
    copy goes with it."""
    for name, p in model.named_parameters():
        if len(p) % world.size:
            raise UserError(
                f"--shard: the {len(p)} rows of {name} do not split into {world.size} processes"
            )
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in (*model.blocks, model):  # the model's own are what the blocks have left
        fully_shard(module, mesh=mesh)


def recompute(model):
    """Make a GPT keep no activations but the inputs of its blocks, in place.

    The second run draws the rounding noise of the first, and after it the generators are put
    back, so that backward draws its own as it would have. `forward` is wrapped, not the block: the
    hooks that gather a sharded block's weights are outside, and have done so by then."""
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def gather(state, seen=None):
    """A state dict (nested dicts) with whole tensors in place of DTensors: on rank 0 in the CPU's
    memory, on other ranks None. All else stays as it is. What is one tensor under two names, as a
    tied head, is gathered once, and is one tensor again."""
    seen = {} if seen is None else seen
    if isinstance(state, dict):
        return {key: gather(value, seen) for key, value in state.items()}
    if not isinstance(state, torch.Tensor):
        return state
    if id(state) not in seen:
        tensor = state.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
            tensor = tensor.cpu() if dist.get_rank() == 0 else None
        seen[id(state)] = tensor
    return seen[id(state)]


def local_part(whole, like):
    """What this process keeps of a whole tensor, laid out as the parameter `like`. The tensor
    itself if that is no DTensor, or of another shape, which load_state_dict then names."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    mesh = like.device_mesh
    rows = whole.chunk(mesh.size())[mesh.get_local_rank()]
    rows = rows.to(like.device, copy=True)  # a view would keep the whole
    return DTensor.from_local(rows, mesh, like.placements)
