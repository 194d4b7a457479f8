"""Parity: the same checkpoint opened by us and by the library it came from, fp32, on real texts.

    python bench/parity.py --environments ../peers --model encoder_folder

reads   --environments: a folder of virtual environments named sentence-transformers, pylate and colbert-ai, made from
        bench/peers/requirements-*.txt; 500 passages and 200 queries of ../shared/data
writes  results/parity.json, and with --golden the tiny checkpoints and vectors of tests/checkpoints/test_layouts.py

For each layout a checkpoint on a real encoder (--model) and on tiny random BERT, ModernBERT and XLM-R encoders, made
by the library's own save function; for the tiny ones also with its options changed. And our own, written for each
library. Reported: the largest difference of an embedding, the share of texts with the same number of embeddings, and
the share of queries with the same ten best passages, in order, by MaxSim.
"""

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers
from measure import DATA, REPO, commit, hardware
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
)

import model as model_module
from model import ColBERT
from nanocolbert.checkpoints.layouts import name_as_before
from nanocolbert.cli import InputError, run_stage
from nanocolbert.maxsim import maxsim_packed
from nanocolbert.storage.artifact import write_json
from nanocolbert.storage.documents import read_documents, read_queries

PEERS = {"stanford": "colbert-ai", "pylate": "pylate", "sentence-transformers": "sentence-transformers"}
ENCODERS = ("bert", "modernbert", "xlm-roberta")
GOLDEN = REPO / "tests" / "golden"
IN_GOLDEN = {"stanford": ("bert", "xlm-roberta"), "pylate": ("bert", "modernbert")}
IN_GOLDEN["sentence-transformers"] = ("modernbert", "xlm-roberta")
TWO_LAYERS = (("pylate", "bert"), ("sentence-transformers", "modernbert"))  # checkpoints with several Dense
ENCODER_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
SIZES = {"dim": 8, "query_maxlen": 16, "doc_maxlen": 40}
PUNCTUATION = list('!"#$%&()*,-.:;?')

# Options that change vectors: what is written into which settings file of a checkpoint.
ST, TRANSFORMER = "config_sentence_transformers.json", "sentence_bert_config.json"
EXPANSION = {"strategy": "fixed", "attend": False, "length": 16}
VARIANTS = {
    "stanford": {
        "attend": {"artifact.metadata": {"attend_to_mask_tokens": True}},
        "punctuation": {"artifact.metadata": {"mask_punctuation": False}},
        "lengths": {"artifact.metadata": {"query_maxlen": 9, "doc_maxlen": 17}},
    },
    "pylate": {
        "attend": {ST: {"attend_to_expansion_tokens": True}},
        "no-expansion": {ST: {"do_query_expansion": False}},
        "punctuation": {ST: {"skiplist_words": []}},
        "lengths": {ST: {"query_length": 9, "document_length": 17}},
    },
    "sentence-transformers": {
        "attend": {TRANSFORMER: {"query_expansion": {**EXPANSION, "attend": True}}},
        "no-expansion": {TRANSFORMER: {"query_expansion": None, "query_length": 16}},
        "min": {TRANSFORMER: {"query_expansion": {**EXPANSION, "strategy": "min", "length": 7}, "query_length": 16}},
        "punctuation": {"MultiVectorMask/config.json": {"skiplist_words": []}},
        "lengths": {TRANSFORMER: {"query_expansion": {**EXPANSION, "length": 9}, "document_length": 17}},
        "prompts": {ST: {"prompts": {"query": "query: ", "document": "[D]passage: "}}},
        "not-normalized": {"modules.json": "without Normalize"},
    },
}

# Of the golden vectors: long, short and empty texts, punctuation, white space around, letters that are no tokens.
GOLDEN_TEXTS = {
    "queries": ["what is late interaction?", "boats", "", " how (old) is the drum, and why? " * 3, "caf\u00e9 \u65e5"],
    "passages": [
        "A boat; a drum!",
        "",
        "?!...",
        "  the late interaction of tokens, in (two) lines.  " * 4,
        "\u65e5 x-ray",
    ],
}


def patch(folder: Path, changes: dict) -> None:
    """Change settings files of a checkpoint."""
    for name, change in changes.items():
        path = next(folder.glob(f"*_{name}")) if "/" in name else folder / name
        settings = json.loads(path.read_text())
        if change == "without Normalize":
            settings = [module for module in settings if not module["type"].endswith(".Normalize")]
        else:
            settings |= change
        path.write_text(json.dumps(settings))


def make_tokenizer(kind: str, corpus: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of an encoder's kind, of a few hundred tokens."""
    markers = ["[unused0]", "[unused1]", "[Q]", "[D]"]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if kind == "xlm-roberta":
        names = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
        backend, first = Tokenizer(models.Unigram()), ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=260, special_tokens=first + markers, unk_token="<unk>", show_progress=False
        )
    elif kind == "modernbert":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=360, special_tokens=names + markers, initial_alphabet=alphabet, show_progress=False
        )
    else:
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=names + markers, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    pad, unk, cls, sep, mask = names
    ids = {token: backend.token_to_id(token) for token in (cls, sep)}
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B {sep}", special_tokens=list(ids.items())
    )
    special = {"pad_token": pad, "unk_token": unk, "cls_token": cls, "sep_token": sep, "mask_token": mask}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def make_encoder(kind: str, corpus: list[str], folder: Path) -> None:
    """A tiny random encoder with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(kind, corpus)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(tokenizer), "initializer_range": 0.2, "max_position_embeddings": 64}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    ids |= {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}
    if kind == "bert":
        encoder = BertModel(BertConfig(**sizes, pad_token_id=ids["pad_token_id"]), add_pooling_layer=False)
    elif kind == "modernbert":
        encoder = ModernBertModel(ModernBertConfig(**sizes, **ids, local_attention=32))
    else:
        ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
        encoder = XLMRobertaModel(XLMRobertaConfig(**sizes, **ids, type_vocab_size=1), add_pooling_layer=False)
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    name_as_before(folder / "tokenizer_config.json")


def real_texts(n_passages: int, n_queries: int) -> dict[str, list[str]]:
    """Passages and queries, spread evenly over MS MARCO's pools and SQuAD."""
    marco, squad = DATA / "msmarco-dl19-20", DATA / "squad"
    passages, queries = [], []
    for path, n in ((marco / "collection.tsv", n_passages * 4 // 5), (squad / "collection.tsv", n_passages // 5)):
        texts = [document.text for document in read_documents(path, "collection: pid, passage")]
        passages += [texts[i] for i in np.linspace(0, len(texts) - 1, n).astype(int)]
    for path in (marco / "queries.dl19.tsv", marco / "queries.dl20.tsv", squad / "queries.dev.tsv"):
        queries += list(read_queries(path).values())
    return {"passages": passages, "queries": queries[:n_queries]}


def prepare(args, work: Path, texts: Path, golden_texts: Path) -> tuple[dict[str, list], list[dict]]:
    """The jobs of each peer, and what is compared: the layout, the checkpoint, the texts and the peer's file."""
    corpus = json.loads(texts.read_text())["passages"][:200]
    for kind in ENCODERS:
        make_encoder(kind, corpus, work / "bases" / kind)
    (work / "bases" / "real").mkdir()
    for name in ENCODER_FILES:
        if (args.model / name).is_file():
            shutil.copyfile(args.model / name, work / "bases" / "real" / name)
    jobs, compared = {layout: [] for layout in PEERS}, []

    def compare(layout: str, name: str, folder: Path, texts: Path, **facts) -> None:
        output = work / "vectors" / f"{layout}-{name}.npz"
        jobs[layout].append({"encode": str(folder), "texts": str(texts), "output": str(output)})
        compared.append({"layout": layout, "name": name, "folder": folder, "texts": texts, "output": output, **facts})

    (work / "vectors").mkdir()
    for layout in PEERS:
        for kind in args.encoders:
            folder = work / layout / kind
            job = {"make": str(folder), "base": str(work / "bases" / kind), **SIZES, "skiplist": PUNCTUATION}
            job |= {"prompts": ["[Q] ", "[D] "], "layers": 2 if (layout, kind) in TWO_LAYERS else 1}
            if kind == "real":
                job |= {"dim": 128, "query_maxlen": 32, "doc_maxlen": 180}
            jobs[layout].append(job)
            compare(layout, kind, folder, texts)
            if kind in IN_GOLDEN[layout]:
                compare(layout, f"{kind}-golden", folder, golden_texts, golden=kind, variant="as-saved")
                for variant in VARIANTS[layout]:
                    changed = work / layout / f"{kind}-{variant}"
                    job = {"copy": str(folder), "to": str(changed), "layout": layout, "variant": variant}
                    jobs[layout].append(job)
                    compare(layout, f"{kind}-{variant}", changed, golden_texts, golden=kind, variant=variant)
    for kind in args.encoders:
        torch.manual_seed(1)
        sizes = SIZES if kind != "real" else {}
        model = ColBERT.from_base(work / "bases" / kind, **sizes).eval()
        model.save_pretrained(work / "ours" / kind)
        for layout in PEERS:
            folder = work / f"ours-{layout}" / kind
            try:
                model.save_pretrained(folder, layout=layout)
            except InputError as error:
                compared.append({"layout": layout, "name": f"ours-{kind}", "refused": str(error)})
                continue
            compare(layout, f"ours-{kind}", folder, texts)
            compared[-1]["folder"] = work / "ours" / kind  # what we open: the folder that the other was written from
    return jobs, compared


def call_peer(environments: Path, peer: str, jobs: list[dict], work: Path) -> str:
    """Run jobs of a peer in its own environment; returns what it printed."""
    script = Path(__file__).parent / "peers" / "peer.py"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    (work / "jobs.json").write_text(json.dumps(jobs))
    command = [environments / peer / "bin" / "python", script, peer, work / "jobs.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise InputError(f"{peer} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def peer_versions(environments: Path, peer: str) -> str:
    """Versions of a peer and of what it computes with."""
    listing = "import importlib.metadata as m; print(*(f'{p} {m.version(p)}' for p in %r), sep=', ')"
    command = [environments / peer / "bin" / "python", "-c", listing % [peer, "transformers", "torch"]]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def run_peer(environments: Path, layout: str, jobs: list[dict], work: Path) -> str:
    """Run a peer over its jobs, and change settings in between; returns its versions."""
    call_peer(environments, PEERS[layout], [job for job in jobs if "make" in job], work)
    for job in jobs:
        if "copy" in job:
            shutil.copytree(job["copy"], job["to"])
            patch(Path(job["to"]), VARIANTS[job["layout"]][job["variant"]])
    call_peer(environments, PEERS[layout], [job for job in jobs if "encode" in job], work)
    return peer_versions(environments, PEERS[layout])


@functools.cache
def our_vectors(folder: Path, texts: Path) -> dict[str, np.ndarray]:
    """Embeddings as the peers give them: without the rows of zeros of padded queries, fp32, in batches of 32."""
    model, texts, arrays = ColBERT.from_pretrained(folder), json.loads(texts.read_text()), {}
    with torch.inference_mode():
        for kind, frame in (("queries", model.frame_queries), ("passages", model.frame_passages)):
            parts = []
            for start in range(0, len(texts[kind]), 32):
                batch = texts[kind][start : start + 32]
                ids, mask = frame(*model.tokenize(batch, {"queries": "query", "passages": "passage"}[kind]))
                if kind == "queries":
                    vectors = model.embed_queries((ids, mask))
                    kept = vectors.any(-1)
                else:
                    vectors, kept = model.embed((ids, mask)), model.kept(ids, mask)
                parts += [row[keep].numpy() for row, keep in zip(vectors, kept, strict=True)]
            arrays[kind], arrays[f"{kind}_counts"] = np.concatenate(parts), np.array([len(part) for part in parts])
    return arrays


def ten_best(arrays: dict) -> np.ndarray:
    """The ten best passages of each query (n, 10) by MaxSim."""
    passages, counts = torch.from_numpy(arrays["passages"]), torch.from_numpy(arrays["passages_counts"])
    kept = counts > 0
    queries = torch.from_numpy(arrays["queries"]).split(arrays["queries_counts"].tolist())
    scores = torch.cat([maxsim_packed(query[None], passages, counts[kept]) for query in queries])
    return scores.topk(min(10, scores.shape[1])).indices.numpy()


def difference(ours: dict, theirs: dict) -> dict:
    """Largest difference, shares of equal counts and of equal rankings."""
    equal = np.concatenate([ours[f"{kind}_counts"] == theirs[f"{kind}_counts"] for kind in ("queries", "passages")])
    if not equal.all():
        return {"equal_counts": round(float(equal.mean()), 4)}
    largest = max(float(np.abs(ours[kind] - theirs[kind]).max()) for kind in ("queries", "passages"))
    same = (ten_best(ours) == ten_best(theirs)).all(1)
    return {"largest_difference": largest, "equal_counts": 1.0, "equal_top_10": round(float(same.mean()), 4)}


def write_golden(compared: list[dict], texts: dict) -> None:
    """The tiny checkpoints as the peers saved them, and the vectors that the peers gave."""
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for case in compared:
        if "golden" not in case:
            continue
        folder = GOLDEN / f"{case['layout']}-{case['golden']}"
        if case["variant"] == "as-saved":
            shutil.copytree(case["folder"], folder, ignore=shutil.ignore_patterns("README.md", ".gitattributes"))
        shutil.copyfile(case["output"], folder / f"{case['variant']}.npz")
    write_json(GOLDEN / "texts.json", texts)
    write_json(GOLDEN / "variants.json", VARIANTS)


def main(args):
    transformers.utils.logging.disable_progress_bar()
    if not DATA.is_dir():
        print(f"{DATA}: not here, nothing to measure")
        return None
    started, machine = time.time(), hardware()
    model_module.fast_dtype = lambda device: torch.float32
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        texts = real_texts(args.n_passages, args.n_queries)
        (work / "texts.json").write_text(json.dumps(texts))
        (work / "golden.json").write_text(json.dumps(GOLDEN_TEXTS))
        jobs, compared = prepare(args, work, work / "texts.json", work / "golden.json")
        wanted = [layout for layout in PEERS if layout in args.layouts]
        versions = {layout: run_peer(args.environments, layout, jobs[layout], work) for layout in wanted}
        rows = []
        for case in compared:
            if case["layout"] not in wanted:
                continue
            row = {"layout": case["layout"], "checkpoint": case["name"]}
            if "refused" in case:
                row["refused"] = case["refused"]
            else:
                row |= difference(our_vectors(case["folder"], case["texts"]), dict(np.load(case["output"])))
            rows.append(row)
            print(json.dumps(row), flush=True)
        if args.golden:
            write_golden(compared, GOLDEN_TEXTS)
        facts = {"passages": len(texts["passages"]), "queries": len(texts["queries"]), "peers": versions}
        result = {**commit(), "hardware": machine, "seconds": round(time.time() - started), **facts, "rows": rows}
        write_json(args.output, result)
    return {"output": str(args.output), "checkpoints": len(rows)}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True, help="folder of the peers' virtual environments")
    parser.add_argument("--model", type=Path, required=True, help="folder of a real encoder, e.g. MiniLM")
    parser.add_argument("--layouts", nargs="+", choices=list(PEERS), default=list(PEERS), help="default: all")
    encoders = (*ENCODERS, "real")
    parser.add_argument("--encoders", nargs="+", choices=encoders, default=list(encoders), help="default: all")
    parser.add_argument("--n_passages", type=int, default=500)
    parser.add_argument("--n_queries", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--golden", action="store_true", help="also write tests/golden")
    parser.add_argument("--output", type=Path, default=REPO / "results" / "parity.json")
    return parser.parse_args()


if __name__ == "__main__":
    run_stage(main, parse_args())
