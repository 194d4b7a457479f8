"""The tables of docs/benchmarks.md and docs/checkpoints.md, made from the recorded results: python bench/tables.py

reads   results/bench/*.jsonl, results/parity.json
writes  docs/*.md: what stands between `<!-- table NAME -->` and `<!-- end -->`, where NAME is one of TABLES; the rest
        of a page is written by hand

A table shows the last recorded run of its kind. tests/test_docs.py says when a page is out of date.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "results", ROOT / "docs"
BLOCK = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
ZEN3 = "family 25, model 1"  # the CPU without bf16; what names no family is from the EPYC with AVX-512 bf16

NAMES = {  # what people call a system; {} is its bytes a token
    "ours-1": "ours, 1 bit, {} B/token",
    "ours-2": "ours, 2 bits, {} B/token",
    "ours-4": "ours, 4 bits, {} B/token",
    "ours-8": "ours, 8 bits, {} B/token",
    "ours-2-vectors": "ours, 2 bits + vectors, {} B/token",
    "ivfpq": "FAISS IVFPQ + exact, {} B/token",
    "exact": "exact, every passage, {} B/token",
    "plaid-2": "PLAID, 2 bits, {} B/token",
    "fast-plaid-4": "fast-plaid, 4 bits, {} B/token",
    "warp-4": "WARP, 4 bits, {} B/token",
}
PAIRS = (  # another engine and its setting, ours and its setting
    ("plaid-2", "default", "ours-1", "fast"),
    ("plaid-2", "default", "ours-2", "fast"),
    ("fast-plaid-4", "default", "ours-4", "default"),
    ("ivfpq", "nprobe 8, depth 128, rerank 400", "ours-2-vectors", "default"),
    ("ivfpq", "nprobe 8, depth 256, rerank 1000", "ours-2-vectors", "nprobe 48, n_coarse 6400"),
)
SIMPLE = ("fast", "default", "best")  # settings of ours that the large table shows


def name_of(row: dict) -> str:
    """The name that people know a search system by, and its bytes a token."""
    return NAMES[row["system"]].format(f"{row['bytes_per_token']:.0f}")


# ------------------------------------------------------------------------------------------------------------ results


def lines(name: str) -> list[dict]:
    """All recorded runs of a benchmark, the oldest first."""
    return [json.loads(line) for line in (RESULTS / "bench" / f"{name}.jsonl").read_text().splitlines()]


def last(name: str, chosen=lambda line: True) -> dict:
    """The last recorded run of a benchmark that is chosen."""
    return [line for line in lines(name) if chosen(line)][-1]


def by_way(line: dict) -> dict[str, dict]:
    return {row["way"]: row for row in line["rows"]}


def on(line: dict, device: str = "cpu", zen3: bool = False) -> bool:
    """Whether a line was measured on this device, and on which of the two CPUs."""
    return line["args"].get("device", "cpu") == device and (ZEN3 in line["hardware"]["cpu"]) == zen3


def is_msmarco(line: dict) -> bool:
    return line["tokens_per_passage"] < 100  # SQuAD's paragraphs have 137


# -------------------------------------------------------------------------------------------------------------- tables


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def seconds(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def times(ratio: float) -> str:
    return f"{ratio:.1f} ×"


def reference() -> str:
    """Each stage beside the reference's way, on the CPU with AVX-512 bf16."""
    rows, found = [], last("tokenize")["rows"]
    for row in found[:0:-1]:
        rows.append(
            [
                f"tokenise {row['triples']:,} text triples of SQuAD, each passage {row['passage_repeats']:g} times",
                f"{found[0]['triples_per_second']:,} triples/s, {found[0]['bytes_per_triple']:.0f} bytes each",
                f"{row['triples_per_second']:,} triples/s, {row['bytes_per_triple']:.0f} bytes",
                f"{times(row['speed_ratio'])}, {row['size_ratio']:.1f} × smaller",
            ]
        )
    rows += embedding_rows(last("encode", lambda line: on(line) and is_msmarco(line)), "MS MARCO passages")
    rows += embedding_rows(last("encode", lambda line: on(line) and not is_msmarco(line)), "SQuAD paragraphs")
    rows += [training_row(last("train", on))]
    found = last("maxsim", on)["rows"]
    for what, text in (("scoring", "MaxSim of 1,000 passages with a query"), ("training", "MaxSim in training")):
        first, *_, ours = [row for row in found if row["what"] == what]
        ms = [f"{row['ms']['median']:.1f} ms" for row in (first, ours)]
        rows.append([text, *ms, times(ours["speed_ratio"])])
    found = by_way(last("retrieve"))
    ms = [f"{found[way]['mean_ms']:,.0f} ms a query" for way in ("reference", "ours")]
    rows.append(["search SQuAD, IVFPQ, nprobe 32, recall@10 1.0 for both", *ms, times(found["ours"]["speed_ratio"])])
    return table(["what", "the reference's way", "ours", "ratio"], rows)


def embedding_rows(line: dict, what: str) -> list[list]:
    found, rows = by_way(line), []
    ours = found.pop("ours")
    for way, row in found.items():
        if way == "ours_fp32":
            continue
        peer = ""
        if way != "reference":
            version = row["versions"].split(",")[0].replace("pylate", "PyLate")
            peer = f"{version}, {row['dtype']}, {row['batch']} a batch: "
        padding = f", {row['padding']:.0%} padding" if "padding" in row else ""
        rows.append(
            [
                f"embed {line['passages']} {what}, one core",
                f"{peer}{row['passages_per_second']} passages/s{padding}",
                f"{ours['passages_per_second']} passages/s",
                times(ours["passages_per_second"] / row["passages_per_second"]),
            ]
        )
    return rows


def training_row(line: dict) -> list:
    found, args = by_way(line), line["args"]
    model = "BERT-base's shape" if args["bert_base"] else "MiniLM"
    where = "GPU" if args["device"] == "cuda" else "one core"
    cells = [
        f"{seconds(found[way]['seconds']['median'])} s, {found[way]['peak_mb']:,} MB" for way in ("reference", "ours")
    ]
    what = f"a training step of {args['batch_size']} triples, {model}, MS MARCO text, {where}"
    return [what, *cells, times(found["ours"]["speed_ratio"])]


def zen3() -> str:
    """Embedding and training on the CPU without bf16."""
    rows = embedding_rows(last("encode", lambda line: on(line, zen3=True)), "MS MARCO passages")
    rows += [training_row(last("train", lambda line: on(line, zen3=True) and len(line["rows"]) > 1))]
    return table(["what", "beside", "ours", "ratio"], rows)


def gpu() -> str:
    """A training step and MaxSim on the H200."""
    chosen = [line for line in lines("train") if line["args"].get("device") == "cuda"]
    rows = [training_row(line) for line in chosen if len(line["rows"]) > 1]
    for line in chosen:
        if len(line["rows"]) == 1:
            row = line["rows"][0]
            rate = f"{row['gflops'] / 1000:.0f} TFLOP/s, {row['share_of_roof']:.0%} of a 2048³ product"
            what = f"a training step of {line['args']['batch_size']} triples, BERT-base's shape, MS MARCO text, GPU"
            rows.append([what, "–", f"{row['seconds']['median']:.3f} s, {row['peak_mb']:,} MB, {rate}", "–"])
    found = last("maxsim", lambda line: line["args"].get("device") == "cuda")["rows"]
    for what, text in (("scoring", "MaxSim of 10,000 passages with a query"), ("training", "MaxSim in training")):
        first, *_, ours = [row for row in found if row["what"] == what]
        rows.append([text, *(f"{row['ms']['median']:.2f} ms" for row in (first, ours)), times(ours["speed_ratio"])])
    return table(["what", "the reference's way", "ours", "ratio"], rows)


def search() -> str:
    """Every search engine on all of SQuAD's paragraphs."""
    return engines(last("search", lambda line: line["passages"] == 20958 and len(line["args"]["systems"]) > 2))


def beside() -> str:
    """Pairs of the large table: another engine, and ours where it finds about as much, or more."""
    line = last("search", lambda line: line["passages"] == 20958 and len(line["args"]["systems"]) > 2)
    found = {(row["system"], row["setting"]): row for row in line["rows"]}
    rows = []
    for other, setting, ours, our_setting in PAIRS:
        pair = found[other, setting], found[ours, our_setting]
        names = [f"{name_of(row)}, {row['setting']}" for row in pair]
        recalls = [f"{row['recall_at_10']:.3f}" for row in pair]
        ms = [f"{row['ms_at_10']:.1f}" for row in pair]
        build = [f"{row['build_seconds']:,.0f}" for row in pair]
        ratio = times(pair[0]["ms_at_10"] / pair[1]["ms_at_10"])
        rows.append([*names, *(" → ".join(values) for values in (recalls, ms)), ratio, " → ".join(build)])
    return table(["engine", "ours", "recall@10", "ms a query", "faster", "build, s"], rows)


def untrained() -> str:
    """The same with a projection that was not trained, on the first 4,000 paragraphs."""
    return engines(last("search", lambda line: line["passages"] == 4000))


def engines(line: dict) -> str:
    """A row for each setting of each system; ours with its three qualities, and one setting between them."""
    rows, before = [], None
    for row in line["rows"]:
        is_ours = row["system"].startswith("ours")
        if is_ours and row["setting"] not in SIMPLE and row["system"] != "ours-2-vectors":
            continue
        facts = ["", "", ""]
        if row["system"] != before:
            build = f"{row['build_seconds']:,.0f} s, {row['build_peak_mb']:,} MB" if row["build_seconds"] else "–"
            facts = [name_of(row), build, f"{row['open_ms']:.1f}"]
        before = row["system"]
        rows.append([facts[0], row["setting"], *facts[1:], *(at(row, k) for k in (10, 100))])
    k = [f"k = {k}: ms (p95), recall" for k in (10, 100)]
    return table(["engine", "setting", "build", "open, ms", *k], rows)


def at(row: dict, k: int) -> str:
    ms, p95 = (f"{row[key]:.1f}" for key in (f"ms_at_{k}", f"p95_ms_at_{k}"))
    return f"{ms} ({p95}), {row[f'recall_at_{k}']:.3f}"


def growth() -> str:
    """The compressed index as the collection grows."""
    chosen = {
        line["passages"]: line for line in lines("search") if line["args"]["systems"] == ["ours-2", "ours-2-vectors"]
    }
    rows = []
    for passages, line in sorted(chosen.items()):
        for system in ("ours-2", "ours-2-vectors"):
            found = {row["setting"]: row for row in line["rows"] if row["system"] == system}
            what = [f"{passages:,}, {line['tokens'] / 1e6:.1f} M", name_of(found["default"]).replace("ours, ", "")]
            rows.append(what + [f"{row['ms_at_10']:.1f}, {row['recall_at_10']:.3f}" for row in found.values()])
    return table(["passages, tokens", "index", *(f"{setting}: ms, recall@10" for setting in found)], rows)


def memory() -> str:
    """Peak memory of the stages by passages."""
    found = {(row["passages"], row["stage"]): row["private_mb"] for line in lines("stages") for row in line["rows"]}
    stages = list(dict.fromkeys(stage for _, stage in found))
    sizes = sorted({passages for passages, _ in found})
    return table(["passages", *stages], [[f"{n:,}", *(f"{found[n, stage]:,} MB" for stage in stages)] for n in sizes])


def quality() -> str:
    """Training by the fast path beside the padded one."""
    names = {"padded": "padded to 180, fp32", "fast": "as train.py computes"}
    latest = {line["args"].get("recipe", "squad"): line for line in lines("quality")}
    rows = []
    for recipe, line in latest.items():
        p = {row["seed"]: f"{row['p']:.2f}" for row in line["differences"]}
        what = f"{recipe}, {line['args']['max_steps']} steps of {line['args']['batch_size']}"
        for row in line["rows"]:
            mark = p[row["seed"]] if row["way"] == "fast" else ""
            found = f"{row['mrr_at_10']:.4f}", mark, f"{row['seconds']:,.0f}"
            rows.append([what, row["seed"], names[row["way"]], *found])
    return table(["recipe", "seed", "way", "MRR@10", "p of the difference", "seconds"], rows)


def parity() -> str:
    """The same checkpoint by us and by its own library."""
    line = json.loads((RESULTS / "parity.json").read_text())
    found = {(row["layout"], row["checkpoint"]): row for row in line["rows"]}
    titles = {"stanford": "Stanford", "pylate": "PyLate", "sentence-transformers": "sentence-transformers"}
    rows = []
    for layout, title in titles.items():
        theirs, ours = found[layout, "real"], found[layout, "ours-real"]
        both = [f"{row['largest_difference']:.1e}".replace("e-0", "e-") for row in (theirs, ours)]
        equal = [f"{min(row[key] for row in (theirs, ours)):.0%}" for key in ("equal_counts", "equal_top_10")]
        rows.append([f"{title} ({line['peers'][layout].split(',')[0]})", *both, *equal])
    head = ["MiniLM as", "largest difference, saved by the library", "saved by us, opened by it"]
    return table([*head, "equal numbers of embeddings", "equal top 10"], rows)


def documents() -> str:
    """From a file of documents to the first hit."""
    line = last("documents")
    spent, disk = line["seconds"], line["disk_mb"]
    return table(
        ["step", "seconds", "MB on disk"],
        [
            [f"the file, {line['passages']:,} passages", "", line["file_mb"]],
            ["tokens and texts", spent["tokens"], disk["tokens"]],
            ["embeddings", spent["embeddings"], disk["embeddings"]],
            ["index", spent["index"], disk["index"]],
            ["the first search in a new Python, its imports and the model included", spent["first_search"], ""],
            ["in all, each file counted once", line["seconds_to_first_hit"], disk["in_all"]],
            ["index.sh again, where all is done", line["again_seconds"], ""],
        ],
    )


def serve() -> str:
    """The server under load."""
    line = last("serve")
    return table(
        ["clients", "changes meanwhile", "searches a second", "ms: p50, p95, p99", "searches a batch", "failed, wrong"],
        [
            [
                row["clients"],
                row["changes"],
                row["searches_per_s"],
                ", ".join(f"{row[f'p{share}_ms']:.0f}" for share in (50, 95, 99)),
                row["mean_batch"],
                f"{row['failed']}, {row['wrong']}",
            ]
            for row in line["rows"]
        ],
    )


def recipes() -> str:
    """results/quality/: a row for each way of training, the mean of its seeds on each collection."""
    found = [json.loads(path.read_text()) for path in sorted((RESULTS / "quality").glob("*.json"))]
    names = list(dict.fromkeys(name for result in found for name in result["collections"]))
    measures = {name: result["collections"][name]["measure"] for result in found for name in result["collections"]}
    rows = []
    for result in sorted(found, key=lambda result: ("changes" in result, result["name"])):
        cells = [recipe_cell(result["collections"].get(name)) for name in names]
        seconds = [training["processor_seconds"] for training in result["training"]]
        memory = [training["private_mb"] for training in result["training"]]
        cost = [f"{sum(seconds) / len(seconds) / 60:.0f} min, {max(memory):,} MB" if any(seconds) else ""]
        rows.append([result["name"], *cells, *cost])
    return table(
        ["", *(f"{name}, {measures[name]}" for name in names), "processor time and memory of a training"], rows
    )


def pooling() -> str:
    """nDCG@10 and bytes of pooled passages, by models that were trained for it and not."""
    line = last("pooling")
    bits = list(dict.fromkeys(row["bits"] for row in line["rows"]))
    groups = {}
    for row in line["rows"]:
        groups.setdefault((row["factor"], row["trained_for"]), {})[row["bits"]] = row
    rows = []
    for (factor, trained_for), found in sorted(groups.items()):
        cells = [f"{found[n]['ndcg_at_10']:.4f} · {found[n]['bytes_per_passage'] / 1024:,.1f}" for n in bits]
        of = f"factor {trained_for}" if trained_for > 1 else "no pooling"
        rows.append([factor, of, next(iter(found.values()))["vectors_per_passage"], *cells])
    titles = ("vectors" if n == 16 else f"{n} bit{'s' * (n > 1)}" for n in bits)
    return table(["factor", "trained for", "vectors a passage", *titles], rows)


def recipe_cell(found: dict | None) -> str:
    """The mean of the seeds, how far apart they are, and marks of paired tests (p < 0.05) against the baselines."""
    if found is None:
        return ""
    seeds = found["seeds"]
    marks = "".join(
        mark if found[method]["difference"] > 0 else mark.lower()
        for method, mark in (("bm25", "B"), ("mean_pool", "M"))
        if found.get(method, {}).get("p", 1) < 0.05
    )
    spread = f" ± {(max(seeds) - min(seeds)) / 2:.4f}" if len(seeds) > 1 else ""
    return f"{sum(seeds) / len(seeds):.4f}{spread}" + (f" {marks}" if marks else "")


TABLES = {
    function.__name__: function
    for function in (
        reference,
        zen3,
        gpu,
        search,
        beside,
        untrained,
        growth,
        memory,
        documents,
        serve,
        quality,
        parity,
        recipes,
        pooling,
    )
}


def rewritten(page: str) -> str:
    """A page with its tables made anew. Raises KeyError for a name that is none of TABLES."""
    return BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", page)


def main(args) -> int:
    stale = 0
    for path in sorted(DOCS.glob("*.md")):
        before = path.read_text()
        after = rewritten(before)
        if after != before:
            stale += 1
            print(f"{path.relative_to(ROOT)}: {'out of date' if args.check else 'written'}")
            if not args.check:
                path.write_text(after)
    return 1 if args.check and stale else 0


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction
    parser.add_argument(
        "--check", action=switch, default=False, help="write nothing; exit code 1 where a page is stale"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse_args()))
