"""An exported graph in ONNX Runtime: run with the state kept in ONNX Runtime's own memory. Needs no PyTorch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from skink.errors import ExportError

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
_PAST, _PRESENT = "past_key_values.", "present."

# An input with a default: of how many last tokens logits are wanted, 0 for all.
KEPT_INPUT = "num_logits_to_keep"

State = list[onnxruntime.OrtValue]


class OrtGraph:
    """A session on `folder/model.onnx`.

    Args:
        folder: an exported folder.
        threads: of ONNX Runtime's own pool; by default one for each core.
        providers: execution providers in order of preference; by default the CPU.

    Raises:
        ExportError: EXPORT-003 where ONNX Runtime does not load the graph.
    """

    def __init__(
        self, folder: str | Path, *, threads: int | None = None, providers: Sequence[str] | None = None
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Its threads wait for more work by spinning, and would take the cores from whatever runs after a step.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        self.providers = list(providers or ["CPUExecutionProvider"])
        path = Path(folder) / MODEL_FILE
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=self.providers)
        except Exception as error:  # ONNX Runtime raises classes of its own, which share no base but this
            raise ExportError(
                "EXPORT-003",
                f"ONNX Runtime {onnxruntime.__version__} cannot load {path}.",
                why=str(error),
                fix="export again with this version of ONNX Runtime installed, or install the one it was exported for.",
            ) from error
        self.device = "cuda" if self.providers[0] == "CUDAExecutionProvider" else "cpu"
        arguments = self.session.get_inputs()
        results = self.session.get_outputs()
        self.inputs = {entry.name: entry for entry in arguments if not entry.name.startswith(_PAST)}
        self.state_inputs = [entry for entry in arguments if entry.name.startswith(_PAST)]
        self.keeps_last = KEPT_INPUT in {entry.name for entry in self.session.get_overridable_initializers()}
        self.outputs = {entry.name: entry for entry in results if not entry.name.startswith(_PRESENT)}
        produced = {entry.name for entry in results}
        self._presents = [entry.name.replace(_PAST, _PRESENT, 1) for entry in self.state_inputs]
        missing = sorted(set(self._presents) - produced)
        if missing:
            raise ExportError(
                "EXPORT-003",
                f"{path} takes state that it does not give back: {', '.join(missing)}.",
                fix="export again.",
            )

    def empty_state(self, batch: int) -> State:
        """The state before the first token: nothing on growing axes, zeros where the shape is fixed."""
        return [
            onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros(
                    [batch if dim == "batch" else dim if isinstance(dim, int) else 0 for dim in entry.shape],
                    _DTYPES[entry.type],
                )
            )
            for entry in self.state_inputs
        ]

    def run(
        self, feeds: Mapping[str, np.ndarray], state: State, *, logits_to_keep: int = 0
    ) -> tuple[dict[str, np.ndarray], State]:
        """Outputs by name and the new state, which never leaves ONNX Runtime.

        Args:
            feeds: may hold more than the graph takes.
            state: is not written to and may be used again.
            logits_to_keep: of how many last tokens logits are wanted; 0 for all. Ignored where the graph gives all.
        """
        binding = self.session.io_binding()
        sizes: dict[Any, int] = {}
        arrays = {
            name: np.ascontiguousarray(feeds[name]) for name in self.inputs
        }  # bound by address: kept till the end
        for name, entry in self.inputs.items():
            sizes.update(zip(entry.shape, arrays[name].shape, strict=True))
            binding.bind_cpu_input(name, arrays[name])
        if self.keeps_last and logits_to_keep:
            count = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(logits_to_keep, np.int64))
            binding.bind_ortvalue_input(KEPT_INPUT, count)
        if "sequence" in sizes:
            sizes["kept"] = min(logits_to_keep or sizes["sequence"], sizes["sequence"])
        for entry, value in zip(self.state_inputs, state, strict=True):
            binding.bind_ortvalue_input(entry.name, value)
        results: dict[str, np.ndarray] = {}
        for name, entry in self.outputs.items():
            shape = [sizes.get(dim, dim) for dim in entry.shape]
            if all(isinstance(size, int) for size in shape):
                # ONNX Runtime writes straight into an array of ours.
                array = results[name] = np.empty(shape, _DTYPES[entry.type])
                binding.bind_output(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)
            else:
                binding.bind_output(name, "cpu")
        for name in self._presents:
            binding.bind_output(name, self.device)
        self.session.run_with_iobinding(binding)
        produced = binding.get_outputs()
        ready = {
            name: results[name] if name in results else value.numpy() for name, value in zip(self.outputs, produced)
        }
        return ready, produced[len(self.outputs) :]
