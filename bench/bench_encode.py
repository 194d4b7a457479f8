"""Passages to embeddings: model.embed_passages against the reference's way, same weights and texts, one core.

    python bench/bench_encode.py --model experiments/squad/model

Three ways, in turn, in one process: the reference's (collection order, padded to 180, fp32), ours in fp32 (packed: what
is won by not computing padding) and ours in bf16 on top, where the CPU is faster in it. All begin after the
tokenizer, with the ids in memory, and end with fp16 embeddings in memory. `gflops` counts the multiplications that
real tokens need, so padding is no work done; `roof` is a square matmul in the same type, measured beside it. Peak
memory is that of a process of its own for each way, `working` what it takes above weights and libraries.

With --environments, sentence-transformers' MultiVectorEncoder and PyLate encode the same texts with the same weights,
each in its environment (bench/peers) and in the fastest of their settings, which is found on every fourth text. They
begin with texts: their tokenizer's time, measured apart, is taken off. Of few passages every batch but the smallest is
much padding: --n_passages 512 shows what a collection takes.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import reference
import torch
import transformers
from measure import (
    DATA,
    MINILM,
    add_machine_flags,
    hardware,
    matmul_gflops,
    spread,
    timed,
    working_memory,
    write_result,
)
from parity import call_peer, peer_versions

from model import ColBERT
from nanocolbert.compute import fast_dtype
from nanocolbert.storage.documents import read_documents
from nanocolbert.text import FRAME, MARKERS, tokenize

WAYS = ("reference", "ours_fp32", "ours")
PEERS = ("sentence-transformers", "pylate")
PEER_TYPES = ("fp32", "bf16 weights", "bf16 autocast")  # fp32 alone where bf16 is emulated, which would take hours
PEER_BATCHES = (4, 8, 16, 32)  # texts


def load_model(args) -> ColBERT:
    """A ColBERT checkpoint, or a new ColBERT on any encoder (speed does not depend on the weights)."""
    config = Path(args.model) / "config.json"
    torch.manual_seed(0)
    if config.is_file() and json.loads(config.read_text()).get("model_type") == "colbert":
        return ColBERT.from_pretrained(args.model).to(args.device).eval()
    with encoder_folder(args) as folder:
        return ColBERT.from_base(str(folder)).to(args.device).eval()


@contextlib.contextmanager
def encoder_folder(args):
    """The encoder of --model, or one of the shape of BERT-base with random weights and its tokenizer."""
    if not args.bert_base:
        yield args.model
        return
    with tempfile.TemporaryDirectory() as folder:
        transformers.BertModel(transformers.BertConfig()).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(args.model).save_pretrained(folder)
        yield folder


def load_texts(path, n: int) -> list[str]:
    """n passages spread evenly over a collection."""
    texts = [document.text for document in read_documents(path, "collection: pid, passage")]
    return [texts[i] for i in np.linspace(0, len(texts) - 1, min(n, len(texts))).astype(int)]


def prepare(args) -> tuple[dict, np.ndarray, ColBERT]:
    """The three ways as functions without arguments, tokens of each passage as framed (N,), and the model."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    model, texts = load_model(args), load_texts(args.collection, args.n_passages)
    maxlen = model.config.doc_maxlen
    padded = reference.tokenize_padded(reference.load_tokenizer(args.model), texts, MARKERS["passage"], maxlen)
    pieces = tokenize(model.tokenizer, texts, maxlen)

    def ours_fp32():
        with reference.fp32(model):
            return model.embed_passages(*pieces)

    functions = (
        lambda: reference.embed_passages(model, *padded, args.reference_batch),
        ours_fp32,
        lambda: model.embed_passages(*pieces),
    )
    ways = dict(zip(WAYS, functions, strict=True))
    if fast_dtype(args.device) == torch.float32:
        del ways["ours_fp32"]  # the same as ours
    return ways, pieces[1] + FRAME, model


def peak_memory(args, way: str) -> dict:
    """Peak memory of one way, in this (fresh) process."""
    return working_memory(prepare(args)[0][way])


def useful_gflop(model: ColBERT, lengths: np.ndarray) -> float:
    """10^9 operations that real tokens need: two a weight and token, and attention, 4 L^2 H a layer."""
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embeddings" not in n)
    config = model.encoder.config
    attention = 4 * config.num_hidden_layers * config.hidden_size * (lengths.astype(float) ** 2).sum()
    return (2 * weights * lengths.sum() + attention) / 1e9


def check_agreement(results: dict) -> float:
    """The lowest cosine between the reference's embeddings and ours; they must be as many for every passage."""
    embeddings, lengths = results["reference"]
    lowest = 1.0
    for way in list(results)[1:]:
        ours, counts, _ = results[way]
        assert counts.tolist() == lengths, f"{way} keeps other tokens than the reference"
        lowest = min(lowest, float((embeddings.float() * torch.from_numpy(ours).float()).sum(1).min()))
    return lowest


class Peer:
    """Another library with our weights in its own layout. Every run is a process of its own, with a run to warm up."""

    def __init__(self, name: str, model: ColBERT, texts: list[str], environments: Path):
        self.name, self.environments, self.times = name, environments, []
        self.folder = tempfile.TemporaryDirectory()  # as long as this object lives
        self.work = Path(self.folder.name)
        model.save_pretrained(self.work / "model", layout=name)
        types = PEER_TYPES if fast_dtype("cpu") != torch.float32 else PEER_TYPES[:1]
        settings = list(itertools.product(types, PEER_BATCHES))
        few = [total - part for total, part in self.run(texts[::4], settings)]
        self.setting = settings[np.argmin(few)]
        self.tried = [(*setting, round(seconds, 3)) for setting, seconds in zip(settings, few, strict=True)]

    def run(self, texts: list[str], settings: list[tuple]) -> list[list[float]]:
        """[seconds, the tokenizer's part] of each setting."""
        files = {"texts": str(self.work / "texts.json"), "output": str(self.work / "vectors.npz")}
        Path(files["texts"]).write_text(json.dumps({"passages": texts}))
        job = {"time": str(self.work / "model"), "settings": settings, **files}
        return json.loads(call_peer(self.environments, self.name, [job], self.work).splitlines()[-1])

    def row(self, ours: tuple) -> dict:
        """The figures; ours: what embed_passages returned, of which there must be as many for every passage."""
        embeddings, counts, _ = ours
        theirs, seconds = np.load(self.work / "vectors.npz"), spread([total - part for total, part in self.times])
        cosines = torch.cosine_similarity(torch.from_numpy(theirs["passages"]), torch.from_numpy(embeddings).float())
        assert np.array_equal(theirs["passages_counts"], counts), f"{self.name} keeps other tokens than we do"
        return {
            "way": self.name,
            "versions": peer_versions(self.environments, self.name),
            "dtype": self.setting[0],
            "batch": self.setting[1],
            "seconds": seconds,
            "passages_per_second": round(len(counts) / seconds["median"], 1),
            "tokenizer_seconds": spread([part for _, part in self.times]),
            "lowest_cosine_to_ours": round(float(cosines.min()), 4),
            "settings_on_a_fourth": self.tried,
        }


def main(args):
    machine = hardware()
    ways, lengths, model = prepare(args)
    lengths = np.minimum(lengths, model.config.doc_maxlen)
    results = {way: run() for way, run in ways.items()}  # also the warm-up
    cosine = check_agreement(results)
    padding = {way: results[way][2] for way in list(ways)[1:]}
    padding["reference"] = 1 - lengths.mean() / model.config.doc_maxlen
    seconds = {way: [] for way in ways}
    texts = load_texts(args.collection, args.n_passages)
    peers = [Peer(name, model, texts, args.environments) for name in PEERS] if args.environments else []
    for _ in range(args.repeats):
        for way in ways:
            seconds[way].append(timed(ways[way])[1])
        for peer in peers:
            peer.times += peer.run(texts, [peer.setting])
    gflop, rows = useful_gflop(model, lengths), []
    fast = fast_dtype(model.device)
    roofs = {dtype: matmul_gflops(dtype, args.device) for dtype in {torch.float32, fast}}
    context = multiprocessing.get_context("spawn")
    for way in ways:
        with context.Pool(1) as pool:
            memory = pool.apply(peak_memory, (args, way))
        time = spread(seconds[way])
        dtype = fast if way == "ours" else torch.float32
        row = {
            "way": way,
            "dtype": str(dtype).removeprefix("torch."),
            "seconds": time,
            "passages_per_second": round(len(lengths) / time["median"], 1),
            "padding": round(float(padding[way]), 4),
            "gflops": round(gflop / time["median"], 1),
            "roof_gflops": round(roofs[dtype], 1),
            **memory,
        }
        row["share_of_roof"] = round(row["gflops"] / row["roof_gflops"], 3)
        rows.append(row)
        row["speed_ratio"] = round(rows[0]["seconds"]["median"] / time["median"], 2)
        print(
            f"{way:9} {row['dtype']:8} {row['passages_per_second']:7} passages/s [{time['low']}, {time['high']}] s, "
            f"padding {row['padding']:.1%}, {row['gflops']:6} of {row['roof_gflops']} GFLOP/s "
            f"({row['share_of_roof']:.0%}), {row['peak_mb']} MB ({row['working_mb']} for the work): "
            f"{row['speed_ratio']} x"
        )
    for peer in peers:
        rows.append(row := peer.row(results.get("ours_fp32", results["ours"])))
        row["speed_ratio"] = round(rows[0]["seconds"]["median"] / row["seconds"]["median"], 2)
        print(
            f"{peer.name}, {row['dtype']}, {row['batch']} a batch: {row['passages_per_second']} passages/s, "
            f"lowest cosine to ours {row['lowest_cosine_to_ours']}: {row['speed_ratio']} x"
        )
    print(f"{len(lengths)} passages of {lengths.mean():.1f} tokens; lowest cosine to the reference's: {cosine:.4f}")
    encoder = model.encoder.config
    facts = {
        "encoder": f"{encoder.model_type}, {encoder.num_hidden_layers} layers of {encoder.hidden_size}",
        "dim": model.config.dim,
        "passages": len(lengths),
        "tokens_per_passage": round(float(lengths.mean()), 1),
    }
    write_result("encode", args, machine, **facts, lowest_cosine=round(cosine, 4), rows=rows)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", type=Path, default=DATA / "squad" / "collection.tsv", help="pid, passage")
    parser.add_argument("--model", default=MINILM, help="ColBERT folder, or an encoder's name or folder")
    parser.add_argument("--bert_base", action=argparse.BooleanOptionalAction, default=False, help="its shape instead")
    parser.add_argument("--n_passages", type=int, default=256, help="spread evenly over the collection")
    parser.add_argument("--repeats", type=int, default=5, help="alternating runs after the warm-up")
    parser.add_argument("--environments", type=Path, help="folder of the peers' virtual environments, to measure them")
    parser.add_argument("--reference_batch", type=int, default=1024, help="passages; 1024 is the reference's default")
    add_machine_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
