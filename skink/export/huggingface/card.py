"""The model card: what the folder is, and the lines that load it."""

from pathlib import Path

from skink.export.huggingface.config import SkinkConfig
from skink.export.huggingface.forms import DECODER, Form, named_form
from skink.export.huggingface.sentences import MODULES_FILE

CARD_FILE = "README.md"


def write_card(folder: Path, config: SkinkConfig) -> None:
    """Write README.md into `folder`, unless one is there."""
    path = folder / CARD_FILE
    if not path.exists():
        sentences = (folder / MODULES_FILE).exists()
        path.write_text(card_text(folder.resolve().name, config, sentences=sentences), encoding="utf-8")


def card_text(name: str, config: SkinkConfig, *, sentences: bool = False) -> str:
    """The card of a model in a folder called `name`.

    Args:
        name: of the folder.
        config: the model's.
        sentences: whether sentence-transformers can load the folder.
    """
    form = named_form(config) or DECODER
    source = config.source or {}
    base = str(source.get("name") or "")
    # A hub id has one slash; anything else is a path of somebody's machine.
    on_hub = base.count("/") == 1 and not base.startswith((".", "/", "~"))
    task = "sentence-similarity" if sentences else form.task
    front = ["library_name: skink", f"pipeline_tag: {task}", *([f"base_model: {base}"] if on_hub else [])]
    made_from = f"`{base}`" if on_hub else "a model"
    kind = f" ({source['class']})" if source.get("class") else ""
    return f"""---
{chr(10).join(front)}
---

# {name}

Made from {made_from}{kind} with Skink, a compiler for smaller, faster language models. What was done to it is in
`recipe.yaml`, what it cost and gained in `report.html`, where the folder holds them.

```python
{_use(name, form, sentences=sentences)}
```

After `import skink`, `transformers.{form.auto}.from_pretrained("{name}")` and `pipeline` load it as well.
Weights are safetensors and the graph is JSON: loading runs no pickle and no remote code.
"""


def _use(name: str, form: Form, *, sentences: bool) -> str:
    """Lines of Python that load the model and run it once."""
    if sentences:
        return f"""import skink
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
print(model.encode(["One sentence.", "Another."]).shape)"""
    begin = f"""import skink
from transformers import AutoTokenizer

model = skink.load("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
"""
    if not form.encodes:
        return (
            begin
            + """inputs = tokenizer("def main():", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"""
        )
    return (
        begin
        + f"""inputs = tokenizer(["One sentence.", "Another."], padding=True, return_tensors="pt")
print(model(**inputs).{form.model_class.outputs[0]}.shape)"""
    )
