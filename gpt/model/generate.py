"""Text generation: one token at a time, with a cache of keys and values.

# V vocabulary
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from gpt.model.attention import Documents
from gpt.model.gpt import GPT, Cache


@dataclass(frozen=True)
class Sampler:
    """Draws the next token from softmax(scores / temperature), limited to the likeliest tokens.

    Temperature 0 takes the likeliest token. top_k keeps that many of them. Then top_p (nucleus sampling,
    Holtzman et al. 2020, arXiv:1904.09751) keeps the fewest tokens that reach this probability together.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None

    def draw(self, scores_v: Tensor, generator: torch.Generator) -> int:
        """One id from the scores (logits) fp32 [V]. Raises ConfigError for scores that are not finite."""
        if not scores_v.isfinite().all():
            raise ConfigError("the model's scores are not finite, so it can generate nothing.")
        cooled_v = scores_v / self.temperature if self.temperature else scores_v
        if self.temperature == 0 or not cooled_v.isfinite().all():  # so cold that only the likeliest is left
            return int(scores_v.argmax())
        p_v, ids_v = cooled_v.softmax(-1).sort(descending=True, stable=True)
        if self.top_k is not None:
            p_v = p_v[: self.top_k] / p_v[: self.top_k].sum()
        if self.top_p is not None:
            before_v = p_v.cumsum(-1) - p_v  # the token that crosses top_p stays
            p_v = p_v.where(before_v < self.top_p, 0.0)
        return int(ids_v[torch.multinomial(p_v, 1, generator=generator)])


@torch.no_grad()
def generate(
    gpt: GPT, prompt: list[int], *, max_tokens: int, sampler: Sampler, seed: int, ends: Collection[int] = ()
) -> Iterator[int]:
    """Yield at most `max_tokens` ids after `prompt`, one by one, until one of `ends` is drawn.

    When the context is full, generation continues from the last half of it alone. Raises ConfigError for an
    empty prompt, because the first token must follow one, and for ids that the model does not have.
    """
    if not prompt:
        raise ConfigError("the prompt is empty; give at least one token to continue from.")
    if max(prompt) >= gpt.model.vocabulary:
        raise ConfigError(
            f"the tokenizer gives the prompt the id {max(prompt)}, but the model has only "
            f"{gpt.model.vocabulary} ids: the tokenizer belongs to another model."
        )
    context = gpt.model.context
    generator = torch.Generator().manual_seed(seed)
    tokens, cache = list(prompt), Cache(gpt)
    unread = tokens[-context:]
    for _ in range(max_tokens):
        if cache.length + len(unread) > context:
            cache, unread = Cache(gpt), tokens[-max(1, context // 2) :]
        token = sampler.draw(_last_scores(gpt, unread, cache), generator)
        if token in ends:
            return
        tokens.append(token)
        unread = [token]
        yield token


def stream(ids: Iterator[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Yield the text of `ids` in parts, each as soon as the bytes of its characters are complete."""
    # The ids before are decoded too, because some tokenizers drop the space before a text's first word.
    before: list[int] = []
    held: list[int] = []
    for id in ids:
        held.append(id)
        text = decode([*before, *held])
        if not text.endswith("\ufffd"):
            yield text[len(decode(before)) :]
            before, held = held, []
    if held:
        yield decode([*before, *held])[len(decode(before)) :]


def _last_scores(gpt: GPT, tokens: list[int], cache: Cache) -> Tensor:
    row = torch.tensor([tokens], device=gpt.embedding.weight.device)
    documents = Documents.from_ends(np.array([len(tokens)], dtype=np.int32), row.device)
    hidden_btd = gpt.hidden(row, documents, cache)
    scores_bv: Tensor = gpt.head(hidden_btd[:, -1])
    return scores_bv[0].float().cpu()
