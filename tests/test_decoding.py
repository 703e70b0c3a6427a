"""Decoding from shared prompts gives what transformers' own `generate` gives, prompt by prompt."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from llava_ta.decoding import Choice, TreeCache, compare_generation, decode_prompts, random_prompts
from llava_ta.model import last_hidden
from llava_ta.packing import Row, collate, embed_random
from llava_ta.tree_attention import ATTENTION

VOCAB, EOS = 80, 5
SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             initializer_range=0.25, attn_implementation=ATTENTION)


def llama(seed: int, **sizes: int) -> LlamaForCausalLM:
    """A model with random weights whose answers differ from prompt to prompt."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES | sizes)).eval()


@torch.inference_mode()
def alone(lm: LlamaForCausalLM, row: Row, images: torch.Tensor, tokens: int, **more: int) -> list[int]:
    """Ask `generate` one prompt."""
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=EOS, pad_token_id=0, **more)
    prompt = embed_random(lm, torch.tensor([row.ids]), images)
    return lm.generate(inputs_embeds=prompt, generation_config=config)[0].tolist()


@torch.inference_mode()
def margin(lm: LlamaForCausalLM, row: Row, images: torch.Tensor, words: list[int]) -> float:
    """By how much the likeliest word after some is likelier than the next."""
    prompt = embed_random(lm, torch.tensor([row.ids]), images)
    told = lm.get_input_embeddings()(torch.tensor([words], dtype=torch.long))
    best = lm(inputs_embeds=torch.cat([prompt, told], 1), logits_to_keep=1).logits.flatten().topk(2).values
    return float(best[0] - best[1])


def draw_batch(chance: np.random.Generator, hidden: int):
    """Some studies of different sizes with their images."""
    studies, images = [], []
    tokens = int(chance.integers(1, 9))
    for _ in range(int(chance.integers(1, 5))):
        topics = int(chance.integers(1, 9))
        sets = int(chance.integers(1, topics + 1))
        texts = chance.integers(1, 12, size=topics + 1).tolist()
        studies.append(random_prompts(topics, sets, tokens, texts, VOCAB, chance))
        images.append(torch.from_numpy(chance.standard_normal((sets + 1, tokens, hidden))).float())
    return studies, images


def test_five_hundred_prompts_get_the_same_words():
    """Greedy, fp32: equal, or at the first difference the reference's two best logits lie within 1e-4."""
    chance, cases, parted, ended = np.random.default_rng(0), 0, 0, 0
    models = [llama(1), llama(2, num_key_value_heads=2), llama(3, num_key_value_heads=1, num_hidden_layers=3)]
    while cases < 500:
        lm, (studies, images) = models[cases % 3], draw_batch(chance, 32)
        batch, tokens = collate([study.row for study in studies]), int(chance.integers(1, 25))
        said = decode_prompts(lm, embed_random(lm, batch.ids, torch.cat(images)), batch, Choice(tokens), EOS)
        asked = [(row, image[names]) for study, image in zip(studies, images)
                 for row, names in zip(study.singles, study.shown)]
        assert len(said) == len(asked)
        for found, (row, shown) in zip(said, asked):
            reference = alone(lm, row, shown, tokens)
            if found.ids != reference:
                same = next(n for n, (a, b) in enumerate(zip(found.ids, reference)) if a != b)
                assert margin(lm, row, shown, reference[:same]) < 1e-4
                parted += 1
            ended += reference[-1] == EOS
        cases += len(said)
    assert parted <= 2 and ended > 20, (parted, ended)


@pytest.mark.parametrize("beams", [2, 3, 5])
def test_beams_are_those_of_transformers(beams: int):
    chance, lm, same, cases = np.random.default_rng(beams), llama(4, num_key_value_heads=2), 0, 0
    while cases < 40:
        studies, images = draw_batch(chance, 32)
        batch = collate([study.row for study in studies])
        embedded = embed_random(lm, batch.ids, torch.cat(images))
        said = decode_prompts(lm, embedded, batch, Choice(10, beams=beams), EOS)
        asked = [(row, image[names]) for study, image in zip(studies, images)
                 for row, names in zip(study.singles, study.shown)]
        same += sum(found.ids == alone(lm, row, shown, 10, num_beams=beams)
                    for found, (row, shown) in zip(said, asked))
        cases += len(said)
    assert same >= cases - 1, f"{same} of {cases}"


def test_scores_are_the_probabilities_of_the_words():
    """The score of a sentence is what one forward pass over prompt and sentence says, also of a sliced-down batch."""
    chance, lm = np.random.default_rng(7), llama(5)
    studies, images = draw_batch(chance, 32)
    batch = collate([study.row for study in studies])
    said = decode_prompts(lm, embed_random(lm, batch.ids, torch.cat(images)), batch, Choice(9), EOS)
    asked = [(row, image[names]) for study, image in zip(studies, images)
             for row, names in zip(study.singles, study.shown)]
    for found, (row, shown) in zip(said, asked):
        prompt = embed_random(lm, torch.tensor([row.ids]), shown)
        words = lm.get_input_embeddings()(torch.tensor([found.ids]))
        with torch.inference_mode():
            logs = lm(inputs_embeds=torch.cat([prompt, words], 1)).logits[0].log_softmax(-1)
        places = range(len(row.ids) - 1, len(row.ids) - 1 + len(found.ids))
        wanted = logs[list(places), found.ids].mean().exp().item()
        assert found.score == pytest.approx(wanted, abs=1e-5)


def test_a_study_that_has_ended_gives_its_room_back():
    chance, lm = np.random.default_rng(8), llama(6)
    studies = [random_prompts(2, 1, 4, [3, 3, 3], VOCAB, chance) for _ in range(4)]
    batch = collate([study.row for study in studies])
    cache = TreeCache(batch)
    with torch.inference_mode():
        embedded = embed_random(lm, batch.ids, torch.randn(8, 4, 32))
        last_hidden(lm, embedded, batch.positions, batch.tree, cache=cache)
        assert [kept.shape[0] for kept in cache.layers[0]] == [4, 4]
        cache.choose(torch.tensor([0, 1, 2, 7]))
        assert cache.layers[0][0].shape[0] == 4  # three studies are left
        cache.choose(torch.tensor([0, 3]))
        assert cache.layers[0][0].shape[0] == 2 and cache.study.tolist() == [0, 1]
        assert cache.advance(lm, torch.tensor([1, 2])).shape == (2, VOCAB)


def test_any_llama_family_model_is_compared():
    torch.manual_seed(0)
    mistral = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None))
    tuned = get_peft_model(llama(9), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for model in (mistral, tuned):
        found = compare_generation(model, topics=5, region_sets=3, image_tokens=20, new_tokens=6, repeats=1)
        assert found["tokens_equal"]
        assert found["token_ratio"] > 1.5 and found["memory_ratio"] > 1
    assert mistral.training and mistral.config._attn_implementation == ATTENTION


@pytest.mark.slow
def test_shared_prompts_are_cheaper():
    """At the size of the published geometry scaled down: see `05g_decoding` for what the ratios are."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=2000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8)
    found = compare_generation(LlamaForCausalLM(LlamaConfig(**sizes)))
    assert found["tokens_equal"] and found["memory_ratio"] > 1
    assert found["ratio_batched"] >= 2.5 and found["ratio_single"] >= 5
    assert found["ratio_prefill"] >= 0.95 * found["token_ratio"]
