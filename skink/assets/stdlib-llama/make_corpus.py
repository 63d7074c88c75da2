"""The corpus: the standard library's source of the Python that runs this; the split goes by a hash of each file's path.

Writes corpus.json {"train": [...], "valid": [...]}, tok/ (byte-level BPE, 4,096 tokens) and train.npy, valid.npy (uint16 ids, <s> text </s> per file).
Made with CPython 3.11.7: 1,385 files and 8,126,627 tokens to train on, 74 files and 528,160 tokens held out.
"""

import hashlib, json, pathlib, sysconfig
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def held_out(relative: pathlib.Path) -> bool:
    return int(hashlib.sha1(str(relative).encode()).hexdigest(), 16) % 20 == 0


def wanted(relative: pathlib.Path) -> bool:
    parts = relative.parts
    return (
        parts[0] not in ("site-packages", "__pycache__", "lib2to3")
        and not parts[0].startswith("config-")
        and "pydoc_data" not in parts
        and not ("encodings" in parts and relative.name.startswith("cp"))
        and not any("bad" in part for part in parts)
    )


root = pathlib.Path(sysconfig.get_path("stdlib"))
documents = {"train": [], "valid": []}
for path in sorted(root.rglob("*.py")):
    relative = path.relative_to(root)
    if not wanted(relative):
        continue
    try:
        text = path.read_text("utf8")
    except (OSError, UnicodeDecodeError):
        continue
    if 400 <= len(text) <= 400_000:
        documents["valid" if held_out(relative) else "train"].append(f"# file: {relative}\n{text}")
json.dump(documents, open("corpus.json", "w"))

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.train_from_iterator(
    documents["train"],
    trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    ),
)
PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
).save_pretrained("tok")
for split, texts in documents.items():
    ids = [token for encoding in tokenizer.encode_batch(texts) for token in (0, *encoding.ids, 1)]
    np.save(f"{split}.npy", np.array(ids, dtype=np.uint16))
    print(split, len(texts), "files", len(ids), "tokens")
