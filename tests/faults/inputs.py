"""Bad inputs and flags: a row each. Add one where its stage is: the stage's output, what it is called, the flags that
are appended to the stage's command, words of which the message must have one, and what is done to the files before."""

import gzip
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .harms import (
    both,
    checkpoints,
    edit,
    first,
    last,
    link,
    passages_of,
    place,
    recode,
    swap_words,
    weights,
    without,
    without_mask,
    write,
)
from .kinds import TRAINED, Case, Outcome, unclear
from .server import ROOT
from .world import STAGES, World, differences, is_clear, snapshot


@dataclass(frozen=True)
class Bad:
    """expect: "clear"; "same": it is no fault; "either": done or refused; "device": done, and nothing else changes.

    there: the stage's output is there already. drop: a flag of the command that is left out.
    """

    stage: str
    name: str
    flags: str = ""
    words: str = ""
    setup: Callable[[Path], object] = lambda folder: None
    expect: str = "clear"
    there: bool = False
    drop: str = ""

    def __call__(self, world: World) -> Outcome:
        stage = STAGES[self.stage]
        command = re.sub(rf" {self.drop}( [^-]\S*)?", "", stage.command) if self.drop else stage.command
        with world.copy(stage, self.there) as folder:
            self.setup(folder)
            before = snapshot(folder)
            done = world.run(f"{command} {self.flags}".rstrip(), folder, quick=True)
            after = snapshot(folder)
            if done.code == 0 and self.expect == "clear":
                return "silent", f"accepted\n{done}"
            if done.code != 0 and (self.expect in ("same", "device") or not is_clear(done, *self.words.split())):
                return unclear(done)
            if done.code == 0 and self.expect != "device":  # what it was to write may differ
                for names in (before, after):
                    for name in [name for name in names if re.match(f"out/{self.stage}(/|$)|elsewhere(/|$)", name)]:
                        del names[name]
            if lost := differences(before, {name: value for name, value in after.items() if name in before}):
                return "silent", f"{lost}\n{done}"
            after = {name: value for name, value in after.items() if name != "out"}
            if new := differences({name: value for name, value in before.items() if name in after}, after):
                return unclear(done, f"left behind {new}")
            if done.code == 0 and self.expect == "same":
                wrong = differences(world.wanted[self.stage], followed(folder / "out", self.stage))
                return ("silent", f"{wrong}\n{done}") if wrong else ("same", "")
            return ("clear" if done.code else "same"), ""


def followed(out: Path, name: str) -> dict[str, str]:
    """As snapshot(out), but what the link out/`name` leads to in place of it."""
    found = snapshot(out)
    if (out / name).is_symlink():
        target = Path(os.path.realpath(out / name))
        del found[name]
        all_there = snapshot(target.parent)
        found |= {
            name + path[len(target.name) :]: all_there[path] for path in all_there if path.split("/")[0] == target.name
        }
    return found


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 440473133\n"
NO_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")

# --------------------------------------------------------------------------------------------------------------- rows


def text_rows(stage: str, name: str, header: str, row: str, n_columns: int) -> list[Bad]:
    """What can be wrong with a file of (id, text), or of ids."""
    fields = [f"x{i}" for i in range(n_columns)]
    bad = {
        "UTF-16": recode(name, "utf-16"),
        "UTF-16 without a mark": recode(name, "utf-16-le"),
        "a blank line": first(name, "\n"),
        "a column too many": first(name, "\t".join([*fields, "more"]) + "\n"),
        "a column too few": first(name, "\t".join(fields[1:]) + "\n"),
        "an id that is not UTF-8": first(name, b"\xff" + row.encode() + b"\n"),
        "a text that is not UTF-8": first(name, row.encode() + b"\xe9\n"),
        "an id with NUL": first(name, f"a\0{row}\n"),
        "an id with a control character": first(name, f"a\x07{row}\n"),
        "an id with a space": first(name, f"a b{row}\n"),
        "no id": first(name, row[row.index("\t") :] + "\n"),
        "an id of 300 bytes": first(name, f"{'x' * 300}{row}\n"),
        "an id twice": both(first(name, row + "\n"), last(name, row + "\n")),
        "an empty file": write(name, ""),
        "gzip, by another name": write(name, gzip.compress(f"{row}\n".encode())),
        "zeros": write(name, bytes(1000)),
    }
    word = name.split(".")[0]  # an empty file may show by what is missing in it
    rows = [Bad(stage, f"{name}: {what}", words=f"{word} {name}", setup=setup) for what, setup in bad.items()]
    rows.append(Bad(stage, f"{name}: a byte-order mark", setup=first(name, b"\xef\xbb\xbf"), expect="same"))
    rows.append(Bad(stage, f"{name}: a header line", words=name, setup=first(name, header + "\n"), expect="same"))
    rows.append(Bad(stage, f"{name}: a header without texts", words=name, setup=first(name, f"{header[:3]}\tx\n")))
    return rows


def document_rows(stage: str, flag: str) -> list[Bad]:
    """What can be wrong with documents in JSON, CSV or parquet, and with the flags that say how to read them."""
    bad = {
        "cut short.jsonl": '{"id": "p1", "text": "a"}\n{"id": "p2", "te',
        "a list.json": '[{"id": "p1", "text": "a"}]\n',
        "no object.jsonl": '"p1"\n',
        "no ids.jsonl": '{"title": "p1", "text": "a"}\n',
        "no texts.jsonl": '{"id": "p1", "title": "a"}\n',
        "a text of null.jsonl": '{"id": "p1", "text": null}\n',
        "an id of 1.5.jsonl": '{"id": 1.5, "text": "a"}\n',
        "an id twice.jsonl": '{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}\n',
        "NaN.jsonl": '{"id": "p1", "text": "a", "x": NaN}\n',
        "half a surrogate.jsonl": '{"id": "p1", "text": "a\\ud800"}\n',
        "nested.jsonl": "[" * 100_000 + "\n",
        "nothing.jsonl": "\n",
        "zeros.jsonl": "\0" * 1000,
        "a quote.csv": 'id,text\np1,"a\np2,b\n',
        "a column too few.csv": "id,text\np1\n",
        "no header.csv": "p1,a,b\n",
        "zeros.csv": "\0" * 1000,
        "nothing.parquet": "",
        "text.parquet": "id,text\n",
    }
    named = {name: name.replace(" ", "_") for name in bad}
    rows = [
        Bad(stage, f"{flag} {name}", f"{flag} {named[name]}", named[name], write(named[name], text))
        for name, text in bad.items()
    ]
    rows += [
        Bad(stage, f"{flag}: {flags}", flags, flags.split()[0])
        for flags in ("--overlap 3", "--passage_words 3 --overlap 3", "--id_field key", "--text_field body")
    ]
    return rows


def path_rows(stage: str, flag: str, kind: str, wrong: tuple[str, ...] = ()) -> list[Bad]:
    """A flag that names an input: nothing, a folder for a file, a file for a folder, another kind of folder."""
    other = "encoder" if kind == "file" else "queries.tsv"
    return [Bad(stage, f"{flag} {path}", f"{flag} {path}", path) for path in ("nowhere", other, *wrong)]


def number_rows() -> list[Bad]:
    """Every flag that takes a number, as the scripts' text has it: negative, zero where it must be above, no number."""
    rows, seen = [], set()
    for stage in STAGES.values():
        source = (ROOT / stage.script).read_text()
        for flag, kind in re.findall(r'add_argument\(\s*"(--\w+)",(?:(?!add_argument)[\s\S])*?\btype=(\w+)', source):
            if kind in ("Path", "str", "word") or (stage.script, flag) in seen:
                continue
            seen.add((stage.script, flag))
            values = ["-1", "nan", "inf", "many", "1e99"] + ["0"] * (kind in ("positive", "positive_float", "maxlen"))
            values += ["1.5"] if kind in ("positive", "count", "maxlen", "seed", "int") else []
            values = [value for value in values if "float" not in kind or value != "1e99"]
            rows += [Bad(stage.output, f"{flag}={value}", f"{flag}={value}", flag) for value in values]
    return rows


def output_rows(stage, inputs: list[str]) -> list[Bad]:
    """What can be wrong with the place that a stage is to write to; it must be seen before work begins."""
    out, is_file = stage.output, "." in stage.output
    flag = "--output" if is_file else "--output_dir"
    at = lambda name, path, **more: Bad(out, f"{flag}: {name}", f"{flag} {path}", **more)  # noqa: E731
    rows = [at(f"its input {path}", path, words=f"{path} {flag}") for path in inputs]
    rows += [
        at("below a file", f"queries.tsv/{out}", words="queries.tsv"),
        at("all there is", ".", words=f". {flag}"),
        at("a dangling link", f"out/{out}", setup=link(f"out/{out}", "../elsewhere"), expect="either"),
        at("below a folder that is not there", f"out/{out}", setup=without("out"), expect="either"),
    ]
    victim = "file" if is_file else "folder"
    planted = link(f"out/{out}.partial", "../victim", victim)
    rows.append(at("a link planted at .partial", f"out/{out}", setup=planted, words=out, expect="either"))
    linked = link(f"out/{out}", "../elsewhere", victim)
    rows.append(at(f"a link to a {victim}", f"out/{out}", setup=linked, expect="same"))
    if is_file:
        rows += [
            at("a file of an input", f"{path}/meta.json", words=f"{path} {flag}") for path in inputs if "." not in path
        ]
        rows += [at("a folder", f"out/{out}", words=out, setup=lambda folder: (folder / "out" / out).mkdir())]
        if os.geteuid() == 0:  # as /dev/null; it must be one afterwards
            device = lambda folder: os.mknod(folder / "out" / out, 0o20666, os.makedev(1, 3))  # noqa: E731
            rows.append(at("a device", f"out/{out}", setup=device, expect="device"))
        return rows
    mine = both(lambda folder: (folder / "out" / out).mkdir(exist_ok=True), write(f"out/{out}/mine", "mine"))
    lenient = "either" if out in TRAINED else "clear"
    rows += [
        at("a file", f"out/{out}", words=out, setup=write(f"out/{out}", "mine")),
        at("a folder of something else", f"out/{out}", words=out, setup=mine, expect=lenient),
        at("its own, with another's file in it", f"out/{out}", words=out, setup=mine, there=True),
        at(
            "another kind of artifact",
            f"out/{out}",
            words=out,
            setup=place(f"out/{out}", "codes" if out == "tokens" else "tokens"),
        ),
    ]
    return rows


def rows() -> list[Bad]:
    tokens, model, embed, run, measures = "tokens", "model", "embeddings", "codes.run", "measures.json"
    config, encoder, lfs = "model/config.json", "encoder/config.json", write("model/model.safetensors", POINTER)
    found = [
        # tsv2mmap
        *text_rows(tokens, "collection.tsv", "pid\tpassage", "new\ta text", 2),
        *text_rows(tokens, "queries.tsv", "qid\tquery", "new\ta text", 2),
        *document_rows(tokens, "--collection"),
        *path_rows(tokens, "--collection", "file"),
        *path_rows(tokens, "--queries", "file"),
        *path_rows(tokens, "--triples", "file"),
        *path_rows(tokens, "--tokenizer", "folder", ("tokens",)),
        Bad(tokens, "nothing to do", drop="--(?:collection|triples)", words="--collection"),
        Bad(tokens, "triples of ids without queries", drop="--queries", words="triples.tsv"),
        Bad(tokens, "unknown qid", words="triples.tsv:1", setup=first("triples.tsv", "q99\tp10\tp11\n")),
        Bad(tokens, "unknown pid", words="triples.tsv:1", setup=first("triples.tsv", "q1\tp10\tp99\n")),
        Bad(tokens, "unknown pid far down", words="triples.tsv:65", setup=last("triples.tsv", "q1\tp99\tp10\n")),
        Bad(tokens, "triples of two columns", words="triples.tsv:1", setup=write("triples.tsv", "q1\tp10\n")),
        Bad(tokens, "triples, one of two", words="triples.tsv:65", setup=last("triples.tsv", "q1\tp10\n")),
        Bad(tokens, "triples with a header", words="triples.tsv:1", setup=first("triples.tsv", "qid\tpos\tneg\n")),
        Bad(tokens, "triples in UTF-16", words="triples.tsv", setup=recode("triples.tsv", "utf-16")),
        Bad(tokens, "no triples", words="triples.tsv", setup=write("triples.tsv", "")),
        Bad(
            tokens,
            "text triples, not UTF-8",
            "--triples_format text --triples bad.tsv",
            "bad.tsv",
            setup=write("bad.tsv", b"a b\tc\xff\td\n"),
        ),
        Bad(tokens, "--triples_format", "--triples_format words", "--triples_format"),
        Bad(tokens, "tokenizer without mask token", words="encoder", setup=without_mask),
        Bad(
            tokens, "folder without tokenizer", words="encoder", setup=without(*(f"encoder/{n}" for n in NO_TOKENIZER))
        ),
        Bad(tokens, "broken tokenizer.json", words="encoder", setup=write("encoder/tokenizer.json", "{}")),
        Bad("unzipped", "not gzip", words="zipped.tsv.gz", setup=write("zipped.tsv.gz", "p1\ta\n")),
        Bad(
            "unzipped",
            "gzip of UTF-16",
            words="zipped.tsv.gz",
            setup=write("zipped.tsv.gz", gzip.compress("p\ta\n".encode("utf-16"))),
        ),
        # train
        *path_rows(model, "--tokens_dir", "folder", ("model", "codes", "encoder", "unzipped")),
        *path_rows(model, "--base_model", "folder", ("tokens",)),
        Bad(model, "--batch_size not divided", "--batch_size 8 --gradient_accumulation_steps 3", "--batch_size"),
        Bad(model, "--dropout 2", "--dropout 2", "--dropout"),
        Bad(model, "--schedule", "--schedule cosine", "--schedule"),
        Bad(model, "--mixed_precision", "--mixed_precision fp8", "--mixed_precision"),
        Bad(model, "more directions than there are", "--dim 64 --projection principal", "--dim"),
        Bad(model, "dev set in part", "--dev_queries queries.tsv", "--dev_qrels"),
        Bad(
            model,
            "dev qrels of other queries",
            "--dev_queries queries.tsv --dev_qrels qrels.tsv --dev_candidates candidates.tsv",
            "qrels.tsv candidates.tsv queries.tsv",
            write("qrels.tsv", "q77\t0\tp1\t1\n"),
        ),
        Bad(
            model,
            "dev candidates unknown",
            "--dev_queries queries.tsv --dev_qrels qrels.tsv --dev_candidates candidates.tsv",
            "candidates.tsv:1",
            first("candidates.tsv", "q1\tp99\n"),
        ),
        Bad(model, "finished already", words="out/model", there=True),
        Bad(model, "checkpoints, without --resume", "--no-resume", "out/model", checkpoints),
        Bad(model, "checkpoints of another run", "--lr 1e-3", "out/model", checkpoints),
        Bad(model, "base model without weights", words="encoder", setup=without("encoder/model.safetensors")),
        Bad(model, "base model: git-lfs pointer", words="encoder", setup=write("encoder/model.safetensors", POINTER)),
        Bad(model, "base model without config", words="encoder", setup=without(encoder)),
        Bad(model, "base model: config is no JSON", words="encoder", setup=write(encoder, "{")),
        Bad(
            model,
            "base model: auto_map",
            words="encoder",
            setup=edit(encoder, auto_map={"AutoModel": "x.Y"}, model_type="mine"),
        ),
        Bad(model, "base model: no model_type", words="encoder", setup=edit(encoder, model_type=None)),
        Bad(model, "base model: other sizes", words="encoder", setup=edit(encoder, hidden_size=48)),
        Bad(model, "base model: NaN", words="encoder", setup=weights("encoder/model.safetensors", value=np.nan)),
        Bad(model, "tokens of another tokenizer", words="encoder tokens", setup=swap_words("encoder")),
        # doc2embedding
        *path_rows(embed, "--tokens_dir", "folder", ("model", "codes", "encoder")),
        *path_rows(embed, "--model", "folder", ("tokens", "encoder", "embeddings")),
        Bad(embed, "tokens without a collection", words="tokens", setup=edit("tokens/meta.json", counts={"pids": 0})),
        Bad(embed, "another --part_size over it", "--part_size 5", "out/embeddings", there=True),
        Bad(embed, "--bits over it", "--bits 2", "out/embeddings", there=True),
        Bad(embed, "--bits 3", "--bits 3", "--bits"),
        Bad(embed, "--nlist without --bits", "--nlist 8", "--nlist"),
        Bad("bits", "--nlist beyond all", "--nlist 100000", "nlist 100000"),
        Bad(embed, "tokens of another tokenizer", words="model tokens", setup=swap_words("model")),
        Bad(embed, "model without tokenizer", words="model", setup=without(*(f"model/{n}" for n in NO_TOKENIZER))),
        Bad(embed, "model without weights", words="model", setup=without("model/model.safetensors")),
        Bad(embed, "model: git-lfs pointer", words="model", setup=lfs),
        Bad(embed, "model: NaN", words="model", setup=weights("model/model.safetensors", value=np.nan)),
        Bad(embed, "model: infinite", words="model", setup=weights("model/model.safetensors", value=np.inf)),
        # build_index
        *path_rows("codes", "--embedding_dir", "folder", ("tokens", "model", "vectors")),
        Bad("codes", "unfinished embeddings", words="embeddings", setup=without("embeddings/meta.json")),
        Bad("codes", "--nlist beyond all", "--nlist 100000", "nlist 100000"),
        Bad("codes", "--sample 1", "--sample 1", "--sample", expect="either"),
        Bad("codes", "--bits 3", "--bits 3", "--bits"),
        Bad("codes", "--m of the other method", "--m 8", "--m"),
        Bad("codes", "--method", "--method flat", "--method"),
        Bad("ivfpq", "--keep_vectors of the other method", "--keep_vectors", "--keep_vectors"),
        Bad("ivfpq", "--m 5", "--m 5", "--m"),
        Bad("ivfpq", "--nbits 30", "--nbits 30", "--nbits"),
        Bad("ivfpq", "--nlist beyond all", "--nlist 100000", "--nlist"),
        Bad("ivfpq", "--sample 1", "--sample 1", "--sample", expect="either"),
        Bad("collected", "--bits 4", "--bits 4", "--bits"),
        Bad("collected", "--nlist", "--nlist 4", "--nlist"),
        Bad("collected", "--keep_vectors", "--keep_vectors", "bits"),
        Bad("collected", "as IVFPQ", "--method ivfpq", "bits"),
        Bad("codes", "a passage of 1,100 tokens", words="embeddings --doc_maxlen", setup=passages_of(1100, *[20] * 50)),
        Bad(
            "codes",
            "passages without embeddings",
            words="embeddings",
            setup=passages_of(0, *[20] * 50, 0),
            expect="either",
        ),
        Bad(
            "ivfpq",
            "passages without embeddings",
            words="embeddings",
            setup=passages_of(0, *[20] * 50, 0),
            expect="either",
        ),
        Bad("codes", "no passages at all", words="embeddings", setup=passages_of()),
        Bad("ivfpq", "no passages at all", words="embeddings", setup=passages_of()),
        Bad("codes", "one passage", words="embeddings --nlist", setup=passages_of(3)),
        # retrieve
        *text_rows(run, "queries.tsv", "qid\tquery", "new\ta text", 2),
        *path_rows(run, "--index_dir", "folder", ("tokens", "model", "bits")),
        *path_rows(run, "--model", "folder", ("tokens", "encoder", "codes")),
        *path_rows(run, "--queries", "file"),
        *path_rows(run, "--candidates", "file"),
        Bad(run, "--tag of two words", "--tag 'my run'", "--tag"),
        Bad(run, "--tag of nothing", "--tag ''", "--tag"),
        Bad(run, "--tag with a line end", "--tag 'a\nb'", "--tag"),
        Bad(run, "--format", "--format csv", "--format"),
        Bad(run, "--quality", "--quality superb", "--quality"),
        Bad(run, "--exact without vectors", "--exact", "codes", expect="either"),
        Bad(run, "--candidates without vectors", "--candidates candidates.tsv", "codes", expect="either"),
        Bad(run, "--exact and --candidates", "--exact --candidates candidates.tsv", "--exact --candidates"),
        Bad(run, "--faiss_depth of IVFPQ", "--faiss_depth 8", "faiss_depth"),
        Bad("ivfpq.run", "--n_fine of codes", "--n_fine 8", "n_fine"),
        Bad("ivfpq.run", "--quality of codes", "--quality best", "quality"),
        Bad("ivfpq.run", "without faiss.index", words="ivfpq", setup=without("ivfpq/faiss.index")),
        Bad("ivfpq.run", "embeddings without an index", "--index_dir embeddings", "embeddings"),
        Bad(run, "unfinished index", words="codes", setup=without("codes/meta.json")),
        Bad(run, "index without state.json", words="codes", setup=without("codes/state.json")),
        Bad(run, "model of another index", words="model", setup=weights("model/model.safetensors", value=0.5)),
        Bad(run, "model without tokenizer", words="model", setup=without(*(f"model/{n}" for n in NO_TOKENIZER))),
        Bad(run, "model: another tokenizer", words="model", setup=swap_words("model"), expect="clear"),
        Bad(run, "model: git-lfs pointer", words="model", setup=lfs),
        Bad(run, "model: unknown key", words="model", setup=edit(config, colour="red"), expect="either"),
        Bad(run, "model: missing keys", words="model", setup=edit(config, dim=None, encoder=None)),
        Bad(run, "model: auto_map", words="model", setup=edit(config, auto_map={"AutoModel": "x.Y"}), expect="either"),
        Bad(run, "model: config is a list", words="model", setup=write(config, "[]")),
        Bad("reranked.run", "unknown pid", words="candidates.tsv:1", setup=first("candidates.tsv", "q1\tp99\n")),
        Bad("reranked.run", "one column", words="candidates.tsv:1", setup=first("candidates.tsv", "q1\n")),
        Bad("reranked.run", "empty candidates", words="candidates.tsv", setup=write("candidates.tsv", "")),
        Bad("reranked.run", "UTF-16", words="candidates.tsv", setup=recode("candidates.tsv", "utf-16")),
        Bad("reranked.run", "of other queries", words="candidates.tsv", setup=write("candidates.tsv", "q77\tp1\n")),
        # evaluate
        *path_rows(measures, "--qrels", "file"),
        *path_rows(measures, "--run", "file"),
        *path_rows(measures, "--compare", "file"),
        Bad(measures, "--measures nonsense", "--measures nonsense", "nonsense"),
        Bad(measures, "--measures of nothing", "--measures ''", "measure"),
        Bad(measures, "qrels for a run", "--run qrels.tsv", "qrels.tsv"),
        Bad(measures, "run for qrels", "--qrels codes.run", "codes.run"),
        Bad(measures, "qrels of other queries", words="codes.run", setup=write("qrels.tsv", "q77\t0\tp1\t1\n")),
        Bad(measures, "empty qrels", words="qrels.tsv", setup=write("qrels.tsv", "")),
        Bad(measures, "empty run", words="codes.run", setup=write("codes.run", "")),
        Bad(
            measures,
            "judged twice",
            words="qrels.tsv",
            setup=both(first("qrels.tsv", "q1 0 p1 1\n"), last("qrels.tsv", "q1 0 p1 0\n")),
        ),
        Bad(measures, "relevance in words", words="qrels.tsv:1", setup=first("qrels.tsv", "q1 0 p1 yes\n")),
        Bad(
            measures,
            "qrels with a header",
            setup=first("qrels.tsv", "query-id\titeration\tcorpus-id\tscore\n"),
            expect="same",
        ),
        Bad(
            measures,
            "qrels with a header of three columns",
            words="qrels.tsv:2",
            setup=first("qrels.tsv", "query-id\tcorpus-id\tscore\n"),
        ),
        Bad(measures, "qrels in UTF-16", words="qrels.tsv:1", setup=recode("qrels.tsv", "utf-16")),
        Bad(measures, "run in UTF-16", words="codes.run:1", setup=recode("codes.run", "utf-16")),
        Bad(measures, "run with a byte-order mark", setup=first("codes.run", b"\xef\xbb\xbf"), expect="same"),
        Bad(
            measures, "a passage twice", words="codes.run", setup=write("codes.run", "q1 Q0 p1 1 3 a\nq1 Q0 p1 2 2 a\n")
        ),
        Bad(measures, "a rank twice", words="codes.run", setup=write("codes.run", "q1 Q0 p1 1 3 a\nq1 Q0 p2 1 2 a\n")),
        Bad(
            measures,
            "scores that rise",
            words="codes.run",
            setup=write("codes.run", "q1 Q0 p1 1 3 a\nq1 Q0 p2 2 4 a\n"),
        ),
        Bad(measures, "a score of NaN", words="codes.run:1", setup=write("codes.run", "q1 Q0 p1 1 nan a\n")),
        # update_index
        *path_rows("added", "--model", "folder", ("tokens", "encoder", "codes")),
        *path_rows("added", "--add", "file"),
        *path_rows("added", "--index_dir", "folder", ("ivfpq", "tokens", "embeddings")),
        *path_rows("deleted", "--delete", "file"),
        *text_rows("added", "more.tsv", "pid\tpassage", "new\ta text", 2),
        Bad("added", "a passage that is there", words="p10", setup=last("more.tsv", "p10\ta text\n")),
        Bad("added", "without --model", drop="--model", expect="same"),
        Bad("added", "two changes", "--delete pids.txt", "--delete"),
        Bad("added", "model of another index", words="model", setup=weights("model/model.safetensors", value=0.5)),
        Bad("deleted", "an unknown id", words="p99", setup=last("pids.txt", "p99\n")),
        Bad("deleted", "a blank line", words="pids.txt:1", setup=first("pids.txt", "\n")),
        Bad("deleted", "no ids", words="pids.txt", setup=write("pids.txt", ""), expect="either"),
        Bad("deleted", "ids that are not UTF-8", words="pids.txt", setup=first("pids.txt", b"\xff\n")),
        Bad("deleted", "ids in UTF-16", words="pids.txt", setup=recode("pids.txt", "utf-16")),
        Bad("deleted", "a byte-order mark", setup=first("pids.txt", b"\xef\xbb\xbf"), expect="same"),
        Bad("compacted", "an index of IVFPQ", "--index_dir ivfpq", "ivfpq"),
        # layouts
        *path_rows("pylate", "--model", "folder", ("tokens", "encoder", "codes")),
        Bad("pylate", "--layout", "--layout mine", "--layout"),
        Bad("pylate", "--revision of a folder", "--revision v2", "model"),
        Bad("pylate", "a .dnn that is none", "--model x.dnn", "x.dnn", write("x.dnn", "nothing")),
        Bad("pylate", "model: git-lfs pointer", words="model", setup=lfs),
        Bad("pylate", "model: unknown activation", words="model", setup=edit(config, dense=[{"activation": "Mine"}])),
    ]
    inputs = {
        "tokens": ["collection.tsv", "queries.tsv", "triples.tsv", "encoder"],
        "model": ["tokens", "encoder"],
        "embeddings": ["tokens", "model"],
        "bits": ["tokens", "model"],
        "codes": ["embeddings"],
        "ivfpq": ["embeddings"],
        "collected": ["bits"],
        "pylate": ["model"],
        "codes.run": ["queries.tsv", "codes", "model"],
        "reranked.run": ["candidates.tsv"],
        "measures.json": ["qrels.tsv", "codes.run"],
    }
    for output, paths in inputs.items():
        found += output_rows(STAGES[output], paths)
    return found + number_rows()


def cases_of(rows: list[Bad]) -> list[Case]:
    return [Case("input", f"{STAGES[row.stage].script} {row.stage}: {row.name}", row) for row in rows]
