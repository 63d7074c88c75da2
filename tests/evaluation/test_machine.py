import dataclasses
import json
import os
import platform
import subprocess
import sys
from importlib import metadata

import torch

from skink.evaluation import Machine, machine, peak_memory


def test_machine_names_what_ran():
    found = machine()
    assert found.torch == torch.__version__
    assert found.python == f"{platform.python_implementation()} {platform.python_version()}"
    assert found.transformers == metadata.version("transformers")
    assert 1 <= found.cores <= os.cpu_count()
    assert 1 <= found.processors <= os.cpu_count()
    assert found.memory > 2**28
    assert found.processor
    assert bool(found.gpu) == torch.cuda.is_available()
    assert json.loads(json.dumps(dataclasses.asdict(found)))["torch"] == torch.__version__


def test_threads_are_those_of_now():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert machine().threads == 1
    finally:
        torch.set_num_threads(before)


def test_machine_is_printed_in_one_line_without_what_is_not_there():
    found = Machine(
        processor="Fast 9000",
        cores=8,
        processors=16,
        threads=4,
        memory=32 * 2**30,
        system="Linux 6.1",
        python="CPython 3.11.7",
        torch="2.13.0",
        transformers="",
        gpu="",
        skink="0.1.0",
    )
    assert (
        str(found)
        == "Fast 9000, 8 cores (16 usable), 4 threads; 32 GiB; Linux 6.1; CPython 3.11.7, PyTorch 2.13.0, Skink 0.1.0"
    )
    assert "; 32 GiB; Large GPU; Linux" in str(dataclasses.replace(found, gpu="Large GPU"))


def test_peak_memory_stays_after_memory_is_given_back():
    code = (
        "import sys\n"
        "from skink.evaluation import peak_memory\n"
        "before = peak_memory()\n"
        "block = b'x' * 2**28\n"
        "del block\n"
        "sys.stdout.write(str(peak_memory() - before))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.8 * 2**28 < int(result.stdout) < 1.5 * 2**28
    assert peak_memory() > 2**24
