"""The processes that train one model together: `torchrun`, `accelerate launch`, or one process alone.

Every process makes the same passes over the model and takes its share of each global batch. What a step needs of the
others is a sum: of gradients, of losses, of counts. Gradients are summed once for each step, after its last
micro-batch, so neither unequal shares nor parameters that a batch leaves unused need care; sharded ones after each
micro-batch, so that no process ever holds them whole.

Where weights are sharded (FSDP2, `torch.distributed.fsdp.fully_shard`), each `nn.Linear` and `nn.Embedding` is a unit
of its own: an emitted module is one flat function over a tree of such leaves, so there is no block whose forward a unit
could be. What the function reads by itself (norms, stacked experts, tied weights) belongs to the root unit and is whole
during a step. accelerate starts the processes and places them. Its own plugin for FSDP2 is not used: it wraps classes
of transformers' blocks or whatever is large, and on CPUs it does nothing.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from skink.settings import settings

if TYPE_CHECKING:
    from accelerate import Accelerator

Sharding = Literal["none", "full"]

# Of processes that wait for one that measures, or that has more layers to train.
_PATIENCE = timedelta(days=30)

# Numbers that are summed over the processes at once: 64 MiB.
_BUCKET = 2**24


class Processes:
    """This process among those that train.

    Attributes:
        index: 0 to count - 1.
        count: how many there are.
        device: where this one computes.
        sharded: whether weights, gradients and optimizer state are spread over the processes.
    """

    def __init__(self, accelerator: "Accelerator", device: torch.device, sharding: Sharding) -> None:
        self._accelerator = accelerator
        self.index, self.count = int(accelerator.process_index), int(accelerator.num_processes)
        self.device = device
        self.sharded = sharding == "full" and self.count > 1

    @property
    def main(self) -> bool:
        """Whether this process is the one that reports and writes."""
        return self.index == 0

    def share(self, rows: Tensor, size: int) -> list[Tensor]:
        """This process's micro-batches of a batch: every process gets as many, of which the last may be empty.

        Args:
            rows: int64[n], the windows of the global batch.
            size: most windows of a micro-batch; 0: all that this process has.
        """
        largest = -(-len(rows) // self.count)
        size = size or max(1, largest)
        mine = rows[self.index :: self.count]
        return [mine[start : start + size] for start in range(0, max(1, largest), size)]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes; the tensor itself where there is one."""
        if self.count == 1:
            return values
        total: Tensor = self._accelerator.reduce(values, "sum")
        return total

    def first(self, said: str) -> str:
        """What process 0 says."""
        from accelerate.utils import broadcast_object_list

        return str(broadcast_object_list([said])[0])

    def wait(self) -> None:
        """Go on when all processes are here."""
        self._accelerator.wait_for_everyone()

    def wait_long(self) -> None:
        """As `wait`, where others may have hours more to do than this process."""
        if self.count > 1:
            wait_patiently()

    def start(self, module: nn.Module, parameters: list[nn.Parameter]) -> None:
        """Give all processes process 0's trained parameters, and spread them where weights are sharded."""
        if not self.sharded:
            module.to(self.device)
        if self.count > 1:
            for parameter in parameters:
                first = parameter.detach().to(self.device)
                torch.distributed.broadcast(first, 0)
                parameter.data.copy_(first)
        if self.sharded:
            # One unit after the other goes to the device: the whole need not fit there.
            _shard(module, self.device, self.count)

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Let `grad` be the sum over all processes, where sharding has not seen to it."""
        if self.count == 1:
            return
        if self.sharded:
            # FSDP2 takes the mean.
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.count)
            return
        used = torch.tensor([int(parameter.grad is not None) for parameter in parameters], device=self.device)
        grads = []
        for parameter, somewhere in zip(parameters, self.sum(used).tolist(), strict=True):
            if somewhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                grads.append(parameter.grad)
        for bucket in _buckets(grads):
            total = torch.cat([grad.reshape(-1) for grad in bucket])
            torch.distributed.all_reduce(total)
            parts = total.split([grad.numel() for grad in bucket])
            torch._foreach_copy_(bucket, [part.view_as(grad) for part, grad in zip(parts, bucket, strict=True)])

    def finish(self, module: nn.Module) -> None:
        """Give the module whole weights again, and take off it what `start` put on."""
        if self.sharded:
            _unshard(module)


@contextmanager
def processes(device: torch.device, sharding: Sharding) -> Iterator[Processes]:
    """The processes that this one was started with, for what trains on the given device.

    With several processes on CUDA each takes the device that accelerate gives it.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    # accelerate remembers its first answers as long as Python runs. Where somebody has asked before, the answers are
    # theirs, and refuse to be changed. Where not, they are forgotten again: a user's own Accelerator should not end up
    # on the CPU because a model was trained there.
    made = [state for state in (PartialState, AcceleratorState, GradientState) if not state._shared_state]
    accelerator = Accelerator(cpu=device.type == "cpu" and AcceleratorState in made)
    if accelerator.num_processes > 1 and device.type != "cpu":
        device = accelerator.device
    try:
        with warnings.catch_warnings():
            # Said of linear layers with a bias, whose result is a view. Programs are functional: nothing writes to it.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            yield Processes(accelerator, device, sharding)
    finally:
        for state in made:
            state._reset_state()


def wait_patiently() -> None:
    """Go on when all processes that are connected are here. Other collectives give up after some minutes."""
    patient = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    torch.distributed.barrier(patient)
    torch.distributed.destroy_process_group(patient)


def wait_for_all(device: str = "cpu") -> None:
    """Go on when all processes that were started together are here, at once where there is one.

    Args:
        device: where they work: who meets before they train is connected for that.
    """
    if settings().processes == 1:
        return
    if not torch.distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=torch.device(device).type == "cpu")
    # The first process may measure for hours while the others wait.
    wait_patiently()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; to be called by all processes together."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, not a copy: all of it where it is not sharded."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients in groups that are large enough to be worth a message, and small enough to be copied."""
    bucket: list[Tensor] = []
    for grad in grads:
        bucket.append(grad)
        if sum(entry.numel() for entry in bucket) >= _BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _shard(module: nn.Module, device: torch.device, count: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (count,))
    for entry in module.parameters():
        # GPT-2 stores its weights transposed; shards are rows in a row.
        entry.data = entry.data.contiguous()
    owners: dict[nn.Parameter, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        owners[parameter] = owners.get(parameter, 0) + 1
    for child in module.modules():
        mine = list(child.parameters(recurse=False))
        # A weight that two layers share can belong to one unit only: the root's.
        if type(child) in (nn.Linear, nn.Embedding) and all(owners[parameter] == 1 for parameter in mine):
            fully_shard(child, mesh=mesh)
    fully_shard(module, mesh=mesh)


def _unshard(module: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    seen: dict[Tensor, nn.Parameter] = {}
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                if parameter not in seen:
                    seen[parameter] = nn.Parameter(parameter.full_tensor().detach(), parameter.requires_grad)
                child._parameters[name] = seen[parameter]
        if isinstance(child, FSDPModule):
            state = child._get_fsdp_state()
            state._pre_forward_hook_handle.remove()
            state._post_forward_hook_handle.remove()
            # fully_shard made a class FSDPLinear(FSDPModule, Linear).
            child.__class__ = type(child).__mro__[2]
