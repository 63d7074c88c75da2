"""The model card: what the folder is, and the lines that load it."""

from pathlib import Path

from skink.export.huggingface.config import SkinkConfig

CARD_FILE = "README.md"


def write_card(folder: Path, config: SkinkConfig) -> None:
    """Write README.md into `folder`, unless one is there."""
    path = folder / CARD_FILE
    if not path.exists():
        path.write_text(card_text(folder.resolve().name, config), encoding="utf-8")


def card_text(name: str, config: SkinkConfig) -> str:
    """The card of a model in a folder called `name`."""
    source = config.source or {}
    base = str(source.get("name") or "")
    # A hub id has one slash; anything else is a path of somebody's machine.
    on_hub = base.count("/") == 1 and not base.startswith((".", "/", "~"))
    front = ["library_name: skink", "pipeline_tag: text-generation", *([f"base_model: {base}"] if on_hub else [])]
    made_from = f"`{base}`" if on_hub else "a model"
    kind = f" ({source['class']})" if source.get("class") else ""
    return f"""---
{chr(10).join(front)}
---

# {name}

Made from {made_from}{kind} with Skink, a compiler for smaller, faster language models. What was done to it is in
`recipe.yaml`, what it cost and gained in `report.html`, where the folder holds them.

```python
import skink
from transformers import AutoTokenizer

model = skink.load("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("def main():", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

After `import skink`, `transformers.AutoModelForCausalLM.from_pretrained("{name}")` and `pipeline` load it as well.
Weights are safetensors and the graph is JSON: loading runs no pickle and no remote code.
"""
