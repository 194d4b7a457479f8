"""The card of a model folder, and the way to the hub."""

import json
import tempfile
from pathlib import Path

CARD = """---
{front}
---
# {title}

A ColBERT model: a text is a set of token embeddings of {dim} dimensions, a query and a passage meet in
score(q, d) = sum over query tokens of the best passage token. Queries of {up_to}{query_maxlen} tokens,
passages of up to {doc_maxlen}. Trained with nanoColBERT.

## Use
```python
{usage}
```

## Training
| | |
|---|---|
{rows}
"""
USAGE = {
    "nanocolbert": "from model import ColBERT\n\n"
    'model = ColBERT.from_pretrained("{name}")\nmodel.score(queries, passages)',
    "stanford": 'from colbert.modeling.checkpoint import Checkpoint\n\nmodel = Checkpoint("{name}", colbert_config)',
    "pylate": 'from pylate import models\n\nmodel = models.ColBERT("{name}")\nmodel.encode(queries, is_query=True)',
    "sentence-transformers": "from sentence_transformers import MultiVectorEncoder\n\n"
    'model = MultiVectorEncoder("{name}")\nmodel.encode_query(queries)',
}
LIBRARIES = {"stanford": "RAGatouille", "pylate": "PyLate", "sentence-transformers": "sentence-transformers"}


def write_card(path, layout: str, model, name: str = "model") -> None:
    """README.md of a model folder: how to open it, and what meta.json says of its data, steps and metrics."""
    meta = model.meta or {}
    arguments = meta.get("args", {})
    base = meta.get("base_model")
    base = base if base and not Path(base).exists() and not Path(base).is_absolute() else None
    front = {"pipeline_tag": "sentence-similarity", "tags": ["ColBERT", "late-interaction"], "base_model": base}
    front["library_name"] = LIBRARIES.get(layout)
    facts = {
        "base model": base,
        "data": "/".join(Path(arguments["tokens_dir"]).parts[-2:]) if "tokens_dir" in arguments else None,
        "fingerprint of the data": meta.get("tokens_fingerprint"),
        "steps": meta.get("steps"),
        "triples a step": arguments.get("batch_size"),
        "learning rate": arguments.get("lr"),
        "loss of the last 100 steps": meta.get("loss_of_last_100_steps"),
        "MRR@10 on the dev candidates": meta.get("best_dev_mrr@10"),
        "seconds": meta.get("train_seconds"),
        "versions": ", ".join(f"{key} {value}" for key, value in meta.get("versions", {}).items()) or None,
    }
    rows = [f"| {key} | {value} |" for key, value in facts.items() if value is not None]
    card = CARD.format(
        front="\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items() if value is not None),
        title=name,
        dim=model.config.dim,
        up_to="" if model.config.expand_queries_to is None else "up to ",  # filled with [MASK], or not
        query_maxlen=model.config.query_maxlen,
        doc_maxlen=model.config.doc_maxlen,
        usage=USAGE[layout].format(name=name),
        rows="\n".join(rows) or "| | nothing is known of it |",
    )
    (Path(path) / "README.md").write_text(card)


def push_to_hub(model, repo_id: str, layout: str, **kwargs) -> str:
    """What ColBERT.push_to_hub does."""
    from huggingface_hub import HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, layout=layout)
        write_card(folder, layout, model, repo_id)
        address = api.create_repo(repo_id, exist_ok=True, **kwargs)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload ColBERT model")
    return str(address)
