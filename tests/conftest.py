"""What the tests share: a tiny encoder, toy data, and one run of the pipeline over them (tokens, model, embeddings)."""

import contextlib
import importlib
import io
import os
import random
import string
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = map(str, (ROOT, ROOT / "scripts", ROOT / "tests" / "index"))  # tests share makers of input
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "OMP_NUM_THREADS": "1",  # tiny tensors: more threads only wait for each other
    "TOKENIZERS_PARALLELISM": "false",
}
if not any("test_gpu.py" in argument for argument in sys.argv):  # it runs by itself (scripts/test.sh)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # models load onto a GPU by default

TOPICS = ["apple", "boat", "cloud", "drum", "eagle", "flute", "grape", "house"]
FILLERS = ["the", "a", "of", "in", "and", "with", "near", "old", "new", "blue", "find", "is"]
PASSAGES_PER_TOPIC = 5
TRAIN_STEPS = 8


def run_stage_cli(script, *arguments, **options) -> subprocess.CompletedProcess:
    """Run a script of the repository as a user would."""
    command = [sys.executable, *map(str, (script, *arguments))]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)


def launch_command(n_processes: int, script, *arguments, **settings) -> list[str]:
    """`accelerate launch` of a script, which wants no GPU to be seen to talk by gloo (see `without_gpus`).

    --multi_gpu is what makes several processes: `accelerate launch --cpu --num_processes 2` starts one. settings: more
    flags of the launcher, as of several machines.
    """
    settings = {"num_machines": 1, "main_process_port": 0, "mixed_precision": "no", "dynamo_backend": "no"} | settings
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", n_processes, *flags)
    return [sys.executable, *map(str, (*launcher, script, *arguments))]


def without_gpus() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def launch_cli(n_processes: int, script, *arguments, **settings) -> subprocess.CompletedProcess:
    """Run a script under `accelerate launch`."""
    return run_stage_cli(*launch_command(n_processes, script, *arguments, **settings)[1:], env=without_gpus())


def threads_for_workers(n: int, context, initializer, settings) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, initializer=initializer, initargs=settings)


def call_stage(script, *arguments) -> subprocess.CompletedProcess:
    """As `run_stage_cli` but in this process, without the seconds that importing torch takes.

    tsv2mmap's workers become threads, accelerate forgets what the last call set up.
    """
    from accelerate.state import AcceleratorState, GradientState

    stage = importlib.import_module(script.removesuffix(".py"))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    command = [script, *map(str, arguments)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", command),
        mock.patch.object(stage, "ProcessPoolExecutor", threads_for_workers, create=True),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            stage.run_stage(stage.main, stage.parse_args())
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def succeed(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done


def pytest_configure(config):
    config.addinivalue_line(
        "filterwarnings", "ignore:The given NumPy array is not writable"
    )  # as nanocolbert/index does


@pytest.fixture(scope="session")
def encoder_dir(tmp_path_factory) -> Path:
    """A tiny random BERT with a WordPiece tokenizer that can spell anything in ASCII."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    letters = [*string.ascii_lowercase, *string.digits]
    pieces = [*letters, *("##" + letter for letter in letters), *string.punctuation, "##s", "##ing"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TOPICS, *FILLERS, *dict.fromkeys(pieces)]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)))
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), initializer_range=0.1, **size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def colbert(encoder_dir):
    """A new ColBERT on the tiny encoder."""
    import torch

    from model import ColBERT

    torch.manual_seed(1)
    return ColBERT.from_base(encoder_dir, dim=16).eval()


@pytest.fixture
def fp32(monkeypatch):
    """Compute in fp32 even where the CPU has bf16, so that small differences are mistakes."""
    import torch

    monkeypatch.setattr("nanocolbert.compute.fast_dtype", lambda device: torch.float32)


@pytest.fixture(scope="session")
def toy_dir(tmp_path_factory) -> Path:
    """A collection in which a query's word names its passages: collection, queries, triples of ids and of texts,
    qrels.tsv and candidates.tsv (every passage for every query)."""
    folder, rng = tmp_path_factory.mktemp("toy"), random.Random(0)

    def sentence(topic: str, n_words: int) -> str:
        words = [topic if i % 3 == 0 else rng.choice(FILLERS) for i in range(n_words)]
        return " ".join(words) + rng.choice([".", "?!", ", and so on", ""])

    n_passages = len(TOPICS) * PASSAGES_PER_TOPIC
    passages = {f"p{i}": sentence(TOPICS[i % len(TOPICS)], rng.randrange(3, 25)) for i in range(n_passages)}
    queries = {f"q{i}": sentence(TOPICS[i % len(TOPICS)], rng.randrange(2, 6)) for i in range(2 * len(TOPICS))}
    passages["p8"], passages["p9"] = "", " ".join(["house"] * 600)  # an id each, whatever the text
    triples = []
    for _ in range(64):
        query = rng.randrange(len(queries))
        positive = query % len(TOPICS) + len(TOPICS) * rng.randrange(2, PASSAGES_PER_TOPIC)
        negative = rng.choice([i for i in range(10, n_passages) if (i - query) % len(TOPICS)])
        triples.append((f"q{query}", f"p{positive}", f"p{negative}"))

    def write(name: str, rows) -> None:
        (folder / name).write_text("".join("\t".join(row) + "\n" for row in rows))

    write("collection.tsv", passages.items())
    write("queries.tsv", queries.items())
    write("triples.tsv", triples)
    write("triples.text.tsv", [(queries[q], passages[p], passages[n]) for q, p, n in triples])
    write("qrels.tsv", [(q, "0", f"p{(int(q[1:]) % len(TOPICS)) + 2 * len(TOPICS)}", "1") for q in queries])
    write("candidates.tsv", [(q, p) for q in queries for p in passages])
    return folder


def toy_inputs(toy_dir: Path) -> list:
    names = ("collection", "queries", "triples")
    return [part for name in names for part in (f"--{name}", toy_dir / f"{name}.tsv")]


@pytest.fixture(scope="session")
def tokens_dir(tmp_path_factory, encoder_dir, toy_dir) -> Path:
    """tsv2mmap.py over the toy data, by one worker."""
    folder = tmp_path_factory.mktemp("tokens") / "tokens"
    arguments = (*toy_inputs(toy_dir), "--tokenizer", encoder_dir, "--output_dir", folder, "--workers", 1)
    succeed(run_stage_cli("tsv2mmap.py", *arguments))
    return folder


@pytest.fixture(scope="session")
def train_arguments(tokens_dir, encoder_dir) -> list:
    """A short training without dropout, in fp32, so that small differences are mistakes: 8 triples, file order."""
    settings = {"--dim": 16, "--batch_size": 8, "--max_steps": TRAIN_STEPS, "--lr": 2e-3, "--dropout": 0.0}
    settings |= {"--mixed_precision": "no"}
    settings |= {"--tokens_dir": tokens_dir, "--base_model": encoder_dir, "--wandb_mode": "disabled"}
    return ["--cpu", *(part for setting in settings.items() for part in setting)]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, train_arguments) -> Path:
    """train.py over the tokens, by one process."""
    folder = tmp_path_factory.mktemp("model") / "model"
    succeed(run_stage_cli("train.py", *train_arguments, "--output_dir", folder))
    return folder


@pytest.fixture(scope="session")
def embedding_arguments(tokens_dir, model_dir) -> list:
    return ["--cpu", "--tokens_dir", tokens_dir, "--model", model_dir, "--part_size", 9]


@pytest.fixture(scope="session")
def embedding_dir(tmp_path_factory, embedding_arguments) -> Path:
    """doc2embedding.py with that model, by one process."""
    folder = tmp_path_factory.mktemp("embeddings") / "embeddings"
    succeed(run_stage_cli("doc2embedding.py", *embedding_arguments, "--output_dir", folder))
    return folder


@pytest.fixture(scope="session")
def index_arguments(embedding_dir) -> list:
    return ["--method", "ivfpq", "--embedding_dir", embedding_dir, "--nlist", 4, "--m", 8, "--nbits", 6]


@pytest.fixture(scope="session")
def index_dir(tmp_path_factory, index_arguments) -> Path:
    """build_index.py over these embeddings."""
    folder = tmp_path_factory.mktemp("index") / "index"
    succeed(call_stage("build_index.py", *index_arguments, "--output_dir", folder))
    return folder


@pytest.fixture(scope="session")
def codes_dir(tmp_path_factory, embedding_dir) -> Path:
    """build_index.py over these embeddings: a compressed index."""
    folder = tmp_path_factory.mktemp("codes") / "index"
    flags = ["--embedding_dir", embedding_dir, "--nlist", 4, "--bits", 4]
    succeed(call_stage("build_index.py", *flags, "--output_dir", folder))
    return folder


@pytest.fixture(scope="session")
def search_arguments(index_dir, model_dir, toy_dir) -> list:
    return ["--cpu", "--model", model_dir, "--index_dir", index_dir, "--queries", toy_dir / "queries.tsv", "--k", 15]


# In place of a stage: knows its flags, and writes what it was given; as measures, what was asked for.
STAND_IN = """
import json, pathlib, sys
words = sys.argv[1:]
flags = {word: words[i + 1 : i + 2] for i, word in enumerate(words) if word.startswith("--")}
unknown = [flag for flag in flags if f'"{flag}"' not in pathlib.Path(REAL).read_text()]
if unknown:
    sys.exit(f"{REAL}: error: no flag {unknown[0]}")
output = pathlib.Path((flags.get("--output_dir") or flags["--output"])[0])
if "--output_dir" in flags:
    output.mkdir(parents=True)
    output = output / "meta.json"
measures = words[words.index("--measures") + 1 :] if "--measures" in flags else []
output.write_text(json.dumps({"kind": "model", "fingerprint": words, **dict.fromkeys(measures, 0.5)}))
"""


@pytest.fixture
def repository(tmp_path) -> Path:
    """A place with this repository's drivers, stages that only write down their arguments, and no experiments/."""
    folder = tmp_path / "repository"
    (folder / "scripts").mkdir(parents=True)
    for path in (ROOT / "configs", ROOT / "nanocolbert", *(ROOT / "scripts").iterdir()):
        (folder / path.relative_to(ROOT)).symlink_to(path)
    for path in (*ROOT.glob("*.py"), ROOT / "scripts/import.py", ROOT / "scripts/baselines.py"):
        (folder / path.relative_to(ROOT)).unlink(missing_ok=True)
        (folder / path.relative_to(ROOT)).write_text(STAND_IN.replace("REAL", repr(str(path))))
    return folder


@pytest.fixture(scope="session")
def codec():
    """A Codec of 4 bits for the passages of tests/index/made.py; not to be changed."""
    from made import NLIST, make_passages

    from nanocolbert.index.codec import Codec

    return Codec.train(*make_passages(300, 1), 4, NLIST, seed=0)
