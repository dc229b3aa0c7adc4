"""Text generation, against transformers' generate, its logits processors, and a plain loop."""

from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import TopKLogitsWarper, TopPLogitsWarper

from data_pipeline.errors import ConfigError
from data_pipeline.tokenizer.encoding import load_encoding
from gpt.model.generate import Sampler, generate, stream
from tests.unit.gpt.model.support import GPT2, build, random_tokens, rows, twin_of

GREEDY = Sampler(temperature=0.0)


@pytest.mark.parametrize(
    "fields", [{"n_kv_heads": 2}, {"window": 5}, {"qk_norm": True, "d_head": 20}, {"bias": True}, GPT2]
)
def test_greedy_generation_equals_transformers_generate(fields: dict[str, object]) -> None:
    gpt = build(context=40, **fields).eval()
    theirs = twin_of(gpt)
    for seed in range(2):
        prompt = random_tokens(1, 7, seed=seed)
        ours = list(generate(gpt, prompt[0].tolist(), max_tokens=30, sampler=GREEDY, seed=0))
        expected = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=None,
        )
        assert ours == expected[0, 7:].tolist()


def test_a_full_context_continues_from_its_last_half() -> None:
    gpt = build(context=8, **GPT2).eval()
    prompt = random_tokens(1, 5)[0].tolist()
    drawn = list(generate(gpt, prompt, max_tokens=12, sampler=GREEDY, seed=0))
    tokens, start = list(prompt), 0
    for _ in range(12):
        if len(tokens) - start > 8:
            start = len(tokens) - 4
        window = torch.tensor([tokens[start:]])
        tokens.append(int(gpt.logits(window, rows(window))[0, -1].argmax()))
    assert drawn == tokens[5:]


def test_generation_stops_at_end_of_text_and_a_long_prompt_keeps_its_last_tokens() -> None:
    gpt = build(context=8).eval()
    prompt = random_tokens(1, 30)[0].tolist()
    drawn = list(generate(gpt, prompt, max_tokens=6, sampler=GREEDY, seed=0))
    assert drawn == list(generate(gpt, prompt[-8:], max_tokens=6, sampler=GREEDY, seed=0))
    first = drawn.index(drawn[3])
    assert list(generate(gpt, prompt, max_tokens=6, sampler=GREEDY, seed=0, ends={drawn[3]})) == drawn[:first]
    with pytest.raises(ConfigError, match="the prompt is empty"):
        next(generate(gpt, [], max_tokens=6, sampler=GREEDY, seed=0))


def test_the_seed_determines_the_text() -> None:
    gpt = build().eval()
    texts = [
        list(generate(gpt, [1, 2], max_tokens=20, sampler=Sampler(1.0), seed=seed)) for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, None), (5, None), (1, None), (None, 0.5), (None, 1e-9), (8, 0.6)]
)
def test_tokens_are_drawn_with_the_probabilities_of_transformers_warpers(
    top_k: int | None, top_p: float | None
) -> None:
    scores = torch.randn(30, generator=torch.Generator().manual_seed(2)) * 2
    warped = scores[None] / 0.7
    if top_k is not None:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p is not None:
        warped = TopPLogitsWarper(top_p)(None, warped)
    expected = warped[0].softmax(-1)
    generator = torch.Generator().manual_seed(1)
    sampler = Sampler(0.7, top_k, top_p)
    counts = Counter(sampler.draw(scores, generator) for _ in range(4000))
    assert set(counts) <= set(expected.nonzero().flatten().tolist())
    found = torch.tensor([counts[i] / 4000 for i in range(30)])
    assert (found - expected).abs().max() < 0.035  # 4 standard deviations of the likeliest


def test_streamed_parts_are_whole_characters_and_add_up_to_the_text() -> None:
    encoding = load_encoding("outlast-4k")
    text = "naïve 日本 👩‍👩‍👧 end"
    ids = encoding.encode(text).tolist()
    parts = list(stream(iter(ids), encoding.decode))
    assert "".join(parts) == text
    assert len(parts) > 5 and not any("\ufffd" in part for part in parts)
    assert list(stream(iter(ids[:-4]), encoding.decode))  # an incomplete last character is shown, too


def test_streaming_keeps_the_spaces_between_words_of_a_sentencepiece_tokenizer() -> None:
    words = ["▁In", "▁the", "▁begin", "ning", ",", "▁God"]
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}))
    tokenizer.decoder = decoders.Metaspace()
    assert list(stream(iter(range(6)), tokenizer.decode)) == ["In", " the", " begin", "ning", ",", " God"]


@pytest.mark.parametrize("temperature", [1e-10, 1e-40, 5e-324])
def test_near_zero_temperature_takes_the_likeliest_token(temperature: float) -> None:
    scores = torch.tensor([-3.0, 2.0, 1.5, 2.5])
    assert Sampler(temperature).draw(scores, torch.Generator().manual_seed(0)) == 3


def test_scores_and_prompts_that_no_model_gives_are_refused() -> None:
    with pytest.raises(ConfigError, match="scores are not finite"):
        Sampler().draw(torch.tensor([0.0, float("nan")]), torch.Generator())
    gpt = build().eval()
    with pytest.raises(ConfigError, match="the id 101, but the model has only 101 ids"):
        next(generate(gpt, [1, 101], max_tokens=1, sampler=GREEDY, seed=0))
