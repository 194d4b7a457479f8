"""A measure taken while training: candidates of some queries, put in order by the model as it is."""

import numpy as np
import torch

from nanocolbert.cli import InputError
from nanocolbert.maxsim import maxsim_packed
from nanocolbert.storage import runs
from nanocolbert.storage.documents import read_queries
from nanocolbert.storage.ragged import Ids, Ragged, ranges


class DevSet:
    """Reranking of given candidates, measured while training: MRR@10 by the same code as evaluate.py."""

    def __init__(self, args, model):
        self.qrels = runs.read_qrels(args.dev_qrels)
        texts = {qid: text for qid, text in read_queries(args.dev_queries).items() if qid in self.qrels}
        self.passages = Ragged(args.tokens_dir / "passages")
        pids = Ids(args.tokens_dir / "pids.npy")
        candidates = runs.read_candidates(args.dev_candidates, pids, texts)
        self.qids = [qid for qid in texts if len(candidates[qid])]
        if not self.qids:
            raise InputError(f"{args.dev_candidates}: has candidates for none of the judged queries")
        self.qrels = {qid: self.qrels[qid] for qid in self.qids}
        self.rows = [candidates[qid][: args.dev_depth] for qid in self.qids]
        self.pids = [pids.text(rows) for rows in self.rows]
        self.query_tokens = model.tokenize([texts[qid] for qid in self.qids], "query")

    @torch.inference_mode()
    def mrr(self, model) -> float:
        """MRR@10 of the candidates in the order of the model's scores; every candidate is embedded once."""
        unique, inverse = np.unique(np.concatenate(self.rows), return_inverse=True)
        embeddings, counts, _ = model.embed_passages(*self.passages.gather(unique))
        embeddings, starts = torch.from_numpy(embeddings), np.cumsum(counts) - counts
        with model.autocast():
            queries = model.embed_queries(model.frame_queries(*self.query_tokens))
        run, first = {}, 0
        for query, qid, pids in zip(queries, self.qids, self.pids, strict=True):
            rows = inverse[first : first + len(pids)]
            first += len(pids)
            packed = embeddings[torch.from_numpy(ranges(starts[rows], counts[rows]))].float()
            scores = maxsim_packed(query[None], packed, torch.from_numpy(counts[rows]))[0]
            run[qid] = dict(zip(pids, scores.tolist(), strict=True))
        return runs.measure(self.qrels, run, ["MRR@10"])["MRR@10"]
