import subprocess
import sys

import pytest

# Each in a process of its own: what is imported, and when, is what is tested.
_CASES = {
    "nothing is imported by registering": """
import sys
from skink.export.huggingface import register
register()
assert not {"transformers", "onnx"} & set(sys.modules), sorted(sys.modules)
""",
    "it is known to what is imported later": """
import sys
from skink.export.huggingface import register
register()
register()
assert len([finder for finder in sys.meta_path if type(finder).__name__ == "_TableFinder"]) == 1
from transformers import AutoConfig
assert AutoConfig.for_model("skink").model_type == "skink"
assert not [finder for finder in sys.meta_path if type(finder).__name__ == "_TableFinder"]
import inspect, transformers.models.auto.configuration_auto as table
assert "CONFIG_MAPPING" in inspect.getsource(table)
""",
    "it is known to what was imported before": """
from transformers import AutoConfig, AutoModelForCausalLM
from skink.export.huggingface import SkinkForCausalLM, register
register()
config = AutoConfig.for_model("skink")
assert AutoModelForCausalLM._model_mapping[type(config)] is SkinkForCausalLM
""",
}


@pytest.mark.parametrize("case", _CASES)
def test_registration(case: str) -> None:
    done = subprocess.run([sys.executable, "-c", _CASES[case]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
