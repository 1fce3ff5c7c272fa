"""``chameleon train-predictor``: from logged requests to a predictor, with its accuracy on requests it has not seen."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from chameleon_ray.predictor.encoder import Encoder, Pooling
from chameleon_ray.predictor.errors import PredictorError
from chameleon_ray.predictor.head import LengthHead, length_loss
from chameleon_ray.predictor.lengths import HistoryPredictor, LengthFeatures, capped, length_bucket
from chameleon_ray.predictor.proxy import ProxyPredictor
from chameleon_ray.predictor.request_log import LoggedRequest, read_request_logs
from chameleon_ray.predictor.saved import Accuracy, Description, save_predictor

MIN_REQUESTS = 100
NO_LIMIT = 1 << 31
"""The engine's context window is in every line's max_tokens already."""

_EMBED_BATCH = 32
_TRAIN_BATCH = 64
_LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How to train. held_out_share: the latest requests, kept for judging."""

    buckets: int = 5
    epochs: int = 40
    seed: int = 0
    window: int = 128
    pooling: Pooling = "mean"
    held_out_share: float = 0.2

    def __post_init__(self) -> None:
        if self.buckets < 2 or self.epochs < 1 or not 0 < self.held_out_share < 1:
            raise PredictorError("buckets must be at least 2, epochs at least 1, held_out_share within 0 and 1")


def train(requests: Sequence[Path], encoder_path: Path, out: Path, options: TrainOptions) -> Description:
    """Train on the logs and save to ``out``. The same inputs and seed give the same files. Raises PredictorError."""
    logged = read_request_logs(requests)
    usable = [entry for entry in logged if entry.finish_reason in ("stop", "length") and entry.output_tokens > 0]
    if len(usable) < MIN_REQUESTS:
        raise PredictorError(
            f"{len(usable)} requests that ended by themselves or at max_tokens, of {len(logged)} logged; "
            f"training takes at least {MIN_REQUESTS}: log more traffic (replicas.request_log)"
        )
    num_held_out = max(1, round(len(usable) * options.held_out_share))
    fit, held_out = usable[:-num_held_out], usable[-num_held_out:]
    edges, tokens = make_buckets(fit, options.buckets)
    encoder = Encoder(encoder_path, options.window, options.pooling)
    _prepare(out)
    embeddings = _embed(encoder, [entry.prompt for entry in usable])
    head = fit_head(embeddings[:-num_held_out], fit, edges, options)
    fields = {
        "encoder_path": str(encoder.folder),
        "encoder_digest": encoder.digest,
        "window": options.window,
        "pooling": options.pooling,
        "bucket_edges": edges,
        "bucket_tokens": tokens,
        "trained_on": {
            "num_requests": len(fit),
            "num_held_out": num_held_out,
            "epochs": options.epochs,
            "seed": options.seed,
        },
    }
    draft = Description.model_validate({**fields, "head_digest": "", "accuracy": {}})
    proxy = ProxyPredictor(encoder, head, draft, NO_LIMIT)
    predictions = {
        "proxy": proxy.from_embeddings(embeddings[-num_held_out:], [features_of(entry) for entry in held_out]),
        "history": history_predictions(fit, held_out),
        "commonest bucket": commonest_predictions(fit, held_out, edges, tokens),
    }
    accuracy = {name: judge(found, held_out, edges).model_dump() for name, found in predictions.items()}
    return save_predictor(out, head, {**fields, "accuracy": accuracy})


def report(description: Description) -> Iterator[str]:
    """Lines that tell the accuracy, the baselines beside it."""
    trained = description.trained_on
    edges = ", ".join(map(str, description.bucket_edges))
    yield f"trained on {trained.num_requests} requests; buckets end at {edges} tokens"
    yield f"on the {trained.num_held_out} latest requests, held out:"
    yield f"{'':18}{'right bucket':>14}{'within one':>12}{'mean abs. error':>17}"
    for name, one in description.accuracy.items():
        yield (
            f"{name:18}{one.right_bucket_share:14.1%}{one.within_one_bucket_share:12.1%}"
            f"{one.mean_absolute_error_tokens:10.1f} tokens"
        )


def features_of(entry: LoggedRequest) -> LengthFeatures:
    """What was known of a logged request before it ran."""
    return LengthFeatures(entry.adapter, entry.prompt_tokens, entry.max_tokens, prompt_text=entry.prompt)


def make_buckets(entries: Sequence[LoggedRequest], num_buckets: int) -> tuple[list[int], list[int]]:
    """Inclusive upper edges (the last bucket has none) that part the outputs that ended by themselves into equal
    shares, and each bucket's median. Frequent lengths may leave fewer buckets. Raises PredictorError for fewer than 2.
    """
    lengths = np.array(sorted(entry.output_tokens for entry in entries if entry.finish_reason == "stop"))
    if len(lengths) == 0:
        raise PredictorError("no logged request ended by itself, so output lengths are unknown; raise max_tokens")
    shares = [i / num_buckets for i in range(1, num_buckets)]
    quantiles = np.quantile(lengths, shares, method="lower")
    edges = sorted({int(edge) for edge in quantiles if edge < lengths[-1]})
    if not edges:
        raise PredictorError(f"nearly all logged outputs have {lengths[-1]} tokens: there is nothing to tell apart")
    bucket = np.array([length_bucket(int(length), edges) for length in lengths])
    return edges, [int(np.median(lengths[bucket == i])) for i in range(len(edges) + 1)]


def fit_head(
    embeddings: torch.Tensor, entries: Sequence[LoggedRequest], edges: Sequence[int], options: TrainOptions
) -> LengthHead:
    """Train the head on the encoder's vectors [len(entries), dimension]; torch's global random state is left alone."""
    buckets = torch.tensor([length_bucket(entry.output_tokens, edges) for entry in entries])
    is_cut = torch.tensor([entry.finish_reason == "length" for entry in entries])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        head = LengthHead(embeddings.shape[1], len(edges) + 1)
        head.standardise(embeddings)
        optimizer = torch.optim.AdamW(head.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
        head.train()
        for _ in tqdm(range(options.epochs), desc="training", unit="epoch"):
            for batch in torch.split(torch.randperm(len(entries)), _TRAIN_BATCH):
                optimizer.zero_grad()
                length_loss(head(embeddings[batch]), buckets[batch], is_cut[batch]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return head.eval()


def history_predictions(fit: Sequence[LoggedRequest], held_out: Sequence[LoggedRequest]) -> list[int]:
    """What the history would have said: it learns online, from the held-out requests as well once they have ended."""
    history = HistoryPredictor(NO_LIMIT)
    for entry in fit:
        history.observe(features_of(entry), entry.output_tokens)
    found = []
    for entry in held_out:
        found.append(history.predict(features_of(entry)))
        history.observe(features_of(entry), entry.output_tokens)
    return found


def commonest_predictions(
    fit: Sequence[LoggedRequest], held_out: Sequence[LoggedRequest], edges: Sequence[int], tokens: Sequence[int]
) -> list[int]:
    """Always the bucket that most training requests ended in."""
    ((bucket, _),) = Counter(length_bucket(entry.output_tokens, edges) for entry in fit).most_common(1)
    return [capped(tokens[bucket], features_of(entry), NO_LIMIT) for entry in held_out]


def judge(predicted: Sequence[int], entries: Sequence[LoggedRequest], edges: Sequence[int]) -> Accuracy:
    """Predictions against what came."""
    pairs = [(tokens, entry.output_tokens) for tokens, entry in zip(predicted, entries, strict=True)]
    distances = [abs(length_bucket(tokens, edges) - length_bucket(actual, edges)) for tokens, actual in pairs]
    return Accuracy(
        right_bucket_share=sum(distance == 0 for distance in distances) / len(pairs),
        within_one_bucket_share=sum(distance <= 1 for distance in distances) / len(pairs),
        mean_absolute_error_tokens=sum(abs(tokens - actual) for tokens, actual in pairs) / len(pairs),
    )


def _embed(encoder: Encoder, prompts: Sequence[str]) -> torch.Tensor:
    """Prompts of like length go together, so that little is padding."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    vectors = torch.empty(len(prompts), encoder.dimension)
    with tqdm(total=len(prompts), desc="encoding", unit="prompt") as bar:
        for first in range(0, len(order), _EMBED_BATCH):
            batch = order[first : first + _EMBED_BATCH]
            vectors[batch] = encoder.embed([prompts[i] for i in batch])
            bar.update(len(batch))
    return vectors


def _prepare(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PredictorError(f"{out}: cannot be written: {error}") from None
