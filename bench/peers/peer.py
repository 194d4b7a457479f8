"""Another library at work in its own environment: makes checkpoints and encodes texts.

    python bench/peers/peer.py pylate jobs.json

Called by bench/parity.py and bench/bench_encode.py.

reads   jobs.json: a list of {"make": folder, "base": encoder, ...}, of {"encode": folder, "texts", "output": files} and
        of {"time": folder, "texts": file, "settings": [[how it computes, batch size], ...], "output": file}
writes  checkpoints by the library's own save function, and embeddings: .npz of values (T, D) and counts (n,), fp32, of
        queries and of passages; for "time" prints JSON: [[seconds, the tokenizer's part], ...] of the settings
"""

import json
import sys
import time

import numpy as np
import torch


def encoders(peer: str):
    """How the library makes a checkpoint and how it encodes texts with one: two functions.

    Where its speed is measured, three more: how it opens a checkpoint, encodes passages and tokenises them.
    """
    return {"sentence-transformers": sentence_transformers, "pylate": pylate}.get(peer, stanford)()


def sentence_transformers():
    """`encoders` of sentence-transformers."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.base.modules.dense import Dense
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    def make(job):
        token = {"module_input_name": "token_embeddings"}
        transformer = Transformer(
            job["base"],
            document_length=job["doc_maxlen"],
            query_expansion={"strategy": "fixed", "length": job["query_maxlen"], "attend": False},
        )
        size = transformer.get_embedding_dimension()
        identity = torch.nn.Identity()
        layers = [Dense(size, job["dim"], bias=False, activation_function=identity, **token)]
        if job.get("layers") == 2:
            layers = [
                Dense(size, 12, bias=True, activation_function=torch.nn.GELU(), use_residual=True, **token),
                Dense(12, job["dim"], bias=False, activation_function=identity, **token),
            ]
        mask = MultiVectorMask(skiplist_words=job["skiplist"])
        modules = [transformer, *layers, mask, Normalize(module_input_name="token_embeddings")]
        prompts = {"query": job["prompts"][0], "document": job["prompts"][1]}
        MultiVectorEncoder(modules=modules, prompts=prompts, device="cpu").save_pretrained(job["make"])

    def encode(folder, texts):
        model = MultiVectorEncoder(folder, device="cpu")
        queries = model.encode_query(texts["queries"], convert_to_numpy=True)
        return queries, model.encode_document(texts["passages"], convert_to_numpy=True)

    return (
        make,
        encode,
        lambda folder: MultiVectorEncoder(folder, device="cpu"),
        lambda model, texts, size: model.encode_document(texts, batch_size=size),
        lambda model, texts: model.preprocess(texts, prompt=model.prompts.get("document"), task="document"),
    )


def pylate():
    """`encoders` of PyLate."""
    from pylate import models

    def make(job):
        lengths = {"query_length": job["query_maxlen"], "document_length": job["doc_maxlen"]}
        model = models.ColBERT(job["base"], embedding_size=job["dim"], device="cpu", **lengths)
        if job.get("layers") == 2:
            size = model[1].in_features
            model[1] = models.Dense(size, 12, bias=True, activation_function=torch.nn.Tanh(), use_residual=True)
            model.append(models.Dense(12, job["dim"], bias=False))
        model._model_config = {"model_type": "ColBERT"}  # what save() begins with, unset for a new model
        model.save(job["make"])

    def encode(folder, texts):
        model = models.ColBERT(folder, device="cpu")
        queries = model.encode(texts["queries"], is_query=True, show_progress_bar=False)
        return queries, model.encode(texts["passages"], is_query=False, show_progress_bar=False)

    return (
        make,
        encode,
        lambda folder: models.ColBERT(folder, device="cpu"),
        lambda model, texts, size: model.encode(texts, batch_size=size, is_query=False, convert_to_tensor=True),
        lambda model, texts: model.tokenize(texts, is_query=False),
    )


def stanford():
    """`encoders` of Stanford's ColBERT."""
    from colbert.infra import ColBERTConfig
    from colbert.modeling.base_colbert import BaseColBERT
    from colbert.modeling.checkpoint import Checkpoint
    from colbert.modeling.colbert import ColBERT

    ColBERT.loaded_extensions = True  # its C++ is for scoring, which is not asked of it

    def make(job):
        settings = {key: job[key] for key in ("dim", "query_maxlen", "doc_maxlen")}
        model = BaseColBERT(job["base"], colbert_config=ColBERTConfig(**settings))
        if model.model.config.model_type == "modernbert":  # its projection is left as uninitialised memory
            torch.nn.init.normal_(model.linear.weight, std=0.02)
        model.save(job["make"])

    def encode(folder, texts):
        model = Checkpoint(folder, colbert_config=ColBERTConfig(), verbose=0)
        if not hasattr(model, "skiplist"):
            model.skiplist = {}  # 0.2.22 fails where punctuation is kept
        queries = model.queryFromText(texts["queries"], bsize=32)
        return list(queries.numpy()), [part.numpy() for part in model.docFromText(texts["passages"], 32, False)[0]]

    return make, encode


def time_passages(job: dict, load, encode, tokenize) -> list[list[float]]:
    """For each setting the seconds of encoding all passages, and of the tokenizer's part in it, after a warm-up."""
    with open(job["texts"]) as file:
        texts = json.load(file)["passages"]
    by_length, times = sorted(texts, key=len, reverse=True), []  # as the libraries sort them
    for way, size in job["settings"]:
        model = load(job["time"])
        if way == "bf16 weights":
            model.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "bf16 autocast"):
            encode(model, texts, size)
            started = time.perf_counter()
            parts = encode(model, texts, size)
            encoded = time.perf_counter()
        for start in range(0, len(texts), size):
            tokenize(model, by_length[start : start + size])
        times.append([encoded - started, time.perf_counter() - encoded])
    values = np.concatenate([part.float().numpy() for part in parts])  # of the last setting
    np.savez(job["output"], passages=values, passages_counts=np.array([len(part) for part in parts]))
    return times


def main(peer: str, jobs_file: str) -> None:
    make, encode, *parts = encoders(peer)
    with open(jobs_file) as file:
        jobs = json.load(file)
    for job in jobs:
        torch.manual_seed(0)
        if "make" in job:
            make(job)
            continue
        if "time" in job:
            print(json.dumps(time_passages(job, *parts)), flush=True)
            continue
        with open(job["texts"]) as file:
            texts = json.load(file)
        arrays = {}
        for kind, parts in zip(("queries", "passages"), encode(job["encode"], texts), strict=True):
            arrays[kind] = np.concatenate(parts).astype(np.float32)
            arrays[f"{kind}_counts"] = np.array([len(part) for part in parts])
        np.savez_compressed(job["output"], **arrays)
        print(peer, job["encode"], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
