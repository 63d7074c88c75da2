"""What a run keeps: checkpoints on the disk, and the best weights in memory."""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from skink.errors import RecoveryError
from skink.graph.windows import Windows
from skink.training.loop.checkpoint import Found, at, newest, read_tensors, write
from skink.training.loop.options import TrainOptions
from skink.training.loop.processes import Processes, local
from skink.training.loop.state import RunState


class Saved:
    """Weights and optimizer of a run, as they were.

    Args:
        folder: of the run's checkpoints; None: none are kept.
        identity: of the run.
        group: the processes.
        trained: the parameters by name.
        optimizer: over them.
    """

    def __init__(
        self,
        folder: Path | None,
        identity: str,
        group: Processes,
        trained: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.folder, self.identity, self.group = folder, identity, group
        self.trained, self.optimizer = trained, optimizer
        self.best: dict[str, Tensor] = {}

    @torch.no_grad()
    def keep_best(self) -> None:
        """The weights as they are now are the best."""
        for name, entry in self.trained.items():
            now = local(entry.detach())
            # Into what is there: a second copy would need its memory for a moment.
            self.best[name] = self.best[name].copy_(now) if name in self.best else now.clone()

    @torch.no_grad()
    def restore_best(self) -> None:
        """Give the module the best weights."""
        for name, tensor in self.best.items():
            local(self.trained[name].detach()).copy_(tensor)

    def write(self, state: RunState) -> None:
        """A checkpoint, where there is a folder for it."""
        if self.folder is None:
            return
        write(
            self.folder,
            step=state.step,
            identity=self.identity,
            state={"run": state.as_dict(), "processes": self.group.count, "sharded": self.group.sharded},
            tensors=self._tensors(),
            process=self.group.index,
            wait=self.group.wait,
        )

    def load(self) -> tuple[RunState, tuple[str, ...]]:
        """Go on from the newest checkpoint: the state it had, and notes for the user. A new state where there is none.

        Raises:
            RecoveryError: RECOVER-004 where there are checkpoints and none can be used.
        """
        found = self._find()
        if found is None:
            return RunState(), ()
        tensors = read_tensors(found.folder, self.group.index)
        if not self.group.sharded and not self.group.main:
            # Weights are in process 0's file; random numbers are everybody's own.
            first = read_tensors(found.folder, 0)
            tensors |= {name: tensor for name, tensor in first.items() if not name.startswith("random/")}
        self._take(tensors)
        notes = [f"checkpoint {entry}; went on from {found.folder.name}." for entry in found.passed_over]
        return RunState.from_dict(found.state["run"]), tuple(notes)

    def _find(self) -> Found | None:
        """Process 0 decides which checkpoint is whole, and all take that one."""
        if self.folder is None:
            return None
        found, failed = None, None
        if self.group.main:
            try:
                found = newest(self.folder, self.identity, self._usable)
            except RecoveryError as error:
                failed = error
        # 0: none; 1: none that is whole; otherwise the step before which it was written, and 2.
        said = 1 if failed else found.step + 2 if found else 0
        heard = int(self.group.sum(torch.tensor(said, device=self.group.device)))
        if heard == 1:
            raise failed or RecoveryError("RECOVER-004", f"no checkpoint in {self.folder} can be used: see process 0.")
        return found if self.group.main or not heard else at(self.folder, heard - 2)

    def _usable(self, state: dict[str, object]) -> str:
        if state["sharded"] != self.group.sharded:
            return "its weights are sharded" if state["sharded"] else "its weights are not sharded, and the run's are"
        if self.group.sharded and state["processes"] != self.group.count:
            return f"its weights are in {state['processes']} shards, and {self.group.count} processes run"
        return ""

    def _tensors(self) -> dict[str, Tensor]:
        """What this process has to save."""
        device = self.group.device
        tensors = {"random/cpu": torch.get_rng_state()}
        if device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(device)
        if self.group.sharded or self.group.main:
            for name, parameter in self.trained.items():
                tensors[f"weight/{name}"] = local(parameter.detach())
                for key, value in self.optimizer.state[parameter].items():
                    tensors[f"optimizer/{key}/{name}"] = local(value)
            tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        return tensors

    @torch.no_grad()
    def _take(self, tensors: dict[str, Tensor]) -> None:
        """Put what was saved back to its places."""
        for name, parameter in self.trained.items():
            local(parameter.detach()).copy_(tensors[f"weight/{name}"])
        for path, tensor in tensors.items():
            kind, _, rest = path.partition("/")
            if kind == "best":
                # A copy: what was read may be mapped from the file.
                self.best[rest] = tensor.to(self.group.device, copy=True)
            elif kind == "optimizer":
                key, _, name = rest.partition("/")
                parameter = self.trained[name]
                # The count of steps is one number; moments lie as their parameter does.
                value = torch.zeros_like(parameter) if key != "step" else torch.zeros((), device=self.group.device)
                local(value).copy_(tensor)
                self.optimizer.state[parameter][key] = value
        if "random/cpu" in tensors:
            torch.set_rng_state(tensors["random/cpu"])
        if "random/cuda" in tensors and self.group.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random/cuda"], self.group.device)


def run_identity(module: nn.Module, texts: list[Windows | None], options: TrainOptions) -> str:
    """What tells a run from others: a hash of its options, its texts and all weights, frozen ones too."""
    found = hashlib.sha256(json.dumps(options.as_dict(), sort_keys=True).encode())
    for windows in texts:
        for tensor in () if windows is None else (windows.tokens, windows.padding):
            found.update(repr(None if tensor is None else tensor.shape).encode())
            for part in () if tensor is None else tensor.split(4096):
                found.update(_bytes(part))
    for name, parameter in module.named_parameters():
        found.update(f"{name} {parameter.requires_grad} {tuple(parameter.shape)}".encode())
        found.update(_bytes(parameter))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    # As bytes, since NumPy has no bfloat16.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
