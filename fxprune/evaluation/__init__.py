"""Evaluation: cost, perplexity, zero-shot tasks, latency; the same for dense and pruned models."""

from .latency import Latency, measure_latency
from .perplexity import Perplexity, perplexity
from .result import Evaluation
from .run import evaluate
from .size import measure_cost
from .tasks import AVERAGED, TASKS, TaskScore, score_tasks
from .text import PROTOCOLS, token_stream

__all__ = [
    "AVERAGED",
    "PROTOCOLS",
    "TASKS",
    "Evaluation",
    "Latency",
    "Perplexity",
    "TaskScore",
    "evaluate",
    "measure_cost",
    "measure_latency",
    "perplexity",
    "score_tasks",
    "token_stream",
]
