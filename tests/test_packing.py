"""Packing is the same function as one sequence per topic, for any tree, any model of the family, and less work."""

import statistics
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from llava_ta.core import LoraSettings, load_profile
from llava_ta.decoding import Choice, decode_prompts
from llava_ta.mask_speed import threads
from llava_ta.model import (
    LlavaConfig,
    LlavaTA,
    VisionTower,
    add_lora,
    last_hidden,
    set_trainable,
    small_llama,
    train_tokenizer,
)
from llava_ta.packing import (
    Batch,
    Piece,
    Sample,
    batch_losses,
    build_tree,
    collate,
    compare_packing,
    lay_out,
    make_sample,
    pack,
    peak_bytes,
    write_row,
)
from llava_ta.tree_attention import ATTENTION, Tree, Watch, _flex_attention, _TreeAttention, tree_arguments

SIZES = dict(
    vocab_size=90, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=96, max_position_embeddings=512,
)
FAMILY = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
ANSWERS = ("The heart is large.", "Edema is absent.", "A small effusion is present on the left.", "Clear.")
IMAGE_TOKENS = 9


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Let every test begin with the same random numbers."""
    torch.manual_seed(0)


def random_pieces(
    chance: np.random.Generator,
) -> list[Piece]:  # depth first; leaves are learned
    """Draw a tree of random depth, width and lengths."""
    pieces: list[Piece] = []

    def grow(parent: int, depth: int) -> None:
        ids = chance.integers(90, size=chance.integers(1, 40)).tolist()
        children = int(chance.integers(1, 4)) if depth < 4 and (depth < 2 or chance.random() < 0.6) else 0
        pieces.append(Piece(ids, parent, -1 if children else len(pieces)))
        here = len(pieces) - 1
        for _ in range(children):
            grow(here, depth + 1)

    grow(-1, 0)
    return pieces


def chain(
    pieces: Sequence[Piece],
    leaf: int,  # index of a piece
) -> list[Piece]:  # the path to it
    """Cut one sample out of a tree."""
    path = [leaf]
    while pieces[path[-1]].parent >= 0:
        path.append(pieces[path[-1]].parent)
    return [Piece(pieces[n].ids, place - 1, pieces[n].sample) for place, n in enumerate(reversed(path))]


def losses(
    lm: PreTrainedModel,
    batch: Batch,
) -> torch.Tensor:  # float [K]
    """Score the targets of a batch without images."""
    embedded = lm.get_input_embeddings()(batch.ids)
    hidden = last_hidden(lm, embedded, batch.positions, batch.tree)[0, batch.where]
    return F.cross_entropy(lm.lm_head(hidden), batch.targets, reduction="none")


def gradients(
    module: torch.nn.Module,
    loss: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Differentiate a loss by all weights that learn."""
    wanted = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {name: grad for name, grad in zip(wanted, found, strict=True) if grad is not None}


def assert_same(
    mine: tuple[torch.Tensor, dict],  # losses in the order of the samples, gradients
    theirs: tuple[torch.Tensor, dict],
) -> None:
    """Hold losses and gradients to the promised accuracy."""
    assert abs(mine[0].double().mean() - theirs[0].double().mean()) < 1e-6
    assert mine[1].keys() == theirs[1].keys() and len(mine[1]) > 1
    for name, other in theirs[1].items():
        assert (mine[1][name] - other).norm() <= 1e-5 * other.norm(), name


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_trees(kind: str, seed: int):
    lm = AutoModelForCausalLM.from_config(FAMILY[kind](**SIZES), attn_implementation=ATTENTION)
    trees = [random_pieces(np.random.default_rng([seed, number])) for number in range(3)]
    packed = losses(lm, collate([lay_out(tree) for tree in trees]))
    lm.set_attn_implementation("sdpa")
    leaves = [(tree, leaf) for tree in trees for leaf, piece in enumerate(tree) if piece.sample >= 0]
    alone = []
    for tree, leaf in leaves:
        row = collate([lay_out(chain(tree, leaf))])
        row.tree = row.positions = None
        alone.append(losses(lm, row))
    assert_same((packed, gradients(lm, packed.mean())), (torch.cat(alone), gradients(lm, torch.cat(alone).mean())))
    assert (packed - torch.cat(alone)).abs().max() < 1e-5


def llava(
    mode: str = "anatomy",
    **changes: object,  # of the configuration
) -> LlavaTA:
    """Build a tiny model."""
    profile = load_profile("tiny")
    tokenizer = train_tokenizer(list(ANSWERS) * 9, 400)
    config = LlavaConfig(mode, "v1", "paper", 0.0, "offline", "squash", profile.tower.model_dump(), **changes)
    return LlavaTA(config, VisionTower(profile.tower), small_llama(profile.lm, len(tokenizer)), tokenizer)


def studies(
    mode: str,
) -> list[list[Sample]]:
    """Write a few studies whose region sets take turns."""
    if mode == "narrative":
        return [[make_sample("narrative", " ".join(ANSWERS[:n]))] for n in (1, 4, 2)]
    asked = [("organ-heart", "heart"), ("disease-edema", "lungs"), ("disease-cardiomegaly", "heart"),
             ("special-support devices", "all")]
    every = [make_sample(mode, said, topic, regions) for said, (topic, regions) in zip(ANSWERS, asked, strict=True)]
    return [every, every[1:2], every[:3]]


def features(
    model: LlavaTA,
    batch: Batch,
    different: str = "",  # an image that is another than usual
) -> torch.Tensor:  # [M, N, D]
    """Make up a feature for each image of a batch: by its name, so that it is the same wherever it is seen."""
    def draw(name: str) -> torch.Tensor:
        made = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * (name == different))
        return torch.randn(IMAGE_TOKENS, model.projector[0].in_features, generator=made)

    return torch.stack([draw(name) for _, name in batch.images])


@pytest.mark.parametrize("mode", ["narrative", "topic", "anatomy"])
@pytest.mark.parametrize("tune", ["full", "lora", "projector"])
def test_modes(mode: str, tune: str):
    model = llava(mode)
    if tune == "lora":
        add_lora(model, LoraSettings(rank=4, alpha=8, dropout=0.0))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    set_trainable(model, tune)
    taught = studies(mode)
    batch = pack(model, taught, IMAGE_TOKENS)
    packed = batch_losses(model, batch, features(model, batch))
    mine = gradients(model, packed.mean())
    alone = []
    for study, samples in enumerate(taught):
        for number, sample in enumerate(samples):
            one = pack(model, [[sample]], IMAGE_TOKENS)
            alone.append(model(one.ids, one.shown(features(model, one)), one.where, one.targets))
            here = (batch.owners == torch.tensor([study, number])).all(1)
            assert torch.allclose(packed[here], alone[-1], atol=1e-5)
    assert_same((packed, mine), (torch.cat(alone), gradients(model, torch.cat(alone).mean())))


def logits(
    model: LlavaTA,
    samples: Sequence[Sample],
    different: str = "",  # an image that is another than usual
) -> tuple[torch.Tensor, Batch]:  # [T, V]
    """Compute every logit of a study's row."""
    batch = pack(model, [samples], IMAGE_TOKENS)
    with torch.no_grad():
        images = batch.shown(features(model, batch, different))
        hidden = model.hidden_states(batch.ids, images, batch.positions, batch.tree)
        return model.llama.lm_head(hidden)[0], batch


def test_a_branch_tells_its_siblings_nothing():
    model = llava().eval()
    [samples, *_] = studies("anatomy")
    changed = [Sample(samples[0].path, "The large is heart."), *samples[1:]]  # as many tokens
    (before, batch), (after, same) = logits(model, samples), logits(model, changed)
    [start, *_] = different = (batch.ids[0] != same.ids[0]).nonzero()[:, 0].tolist()
    inside = torch.arange(len(before))
    inside = (inside >= start) & (inside < batch.tree.ends[start])
    assert different and inside.sum() < 20 and not torch.equal(before[inside], after[inside])
    assert torch.equal(before[~inside], after[~inside])  # to the last bit
    longer = [Sample(samples[0].path, samples[0].answer * 3), *samples[1:]]
    other, row = logits(model, longer)
    more = len(other) - len(before)
    assert more > 0
    assert torch.allclose(before[:start], other[:start], atol=1e-5)
    assert torch.allclose(before[batch.tree.ends[start]:], other[batch.tree.ends[start] + more:], atol=1e-5)


def test_a_region_set_tells_the_others_nothing():
    model = llava().eval()
    [samples, *_] = studies("anatomy")
    (before, batch), (after, _) = logits(model, samples), logits(model, samples, different="heart")
    row = write_row(model, build_tree(samples), IMAGE_TOKENS)
    image = row.images.index("heart")
    start = (batch.ids[0] < 0).nonzero()[image * IMAGE_TOKENS, 0]
    inside = torch.arange(len(before))
    inside = (inside >= start) & (inside < batch.tree.ends[start])
    assert IMAGE_TOKENS < inside.sum() < len(before) // 2
    assert (before[inside] != after[inside]).any(1).all() and torch.equal(before[~inside], after[~inside])


def test_pruned_answers_are_scored_as_they_are_generated():
    model = llava().eval()
    kept = {"heart": [2, 3, 7], "lungs": [0]}
    prompts = [Sample(sample.path, "") for sample in studies("anatomy")[0][:2]]
    rows = [write_row(model, build_tree([prompt]), IMAGE_TOKENS, kept=kept) for prompt in prompts]
    assert rows[0].positions != list(range(len(rows[0].ids)))
    batch = collate(rows)
    images = batch.shown(features(model, batch))
    with torch.no_grad():
        found = decode_prompts(model.llama, model.embed(batch.ids, images), batch, Choice(6), None)
    for number, row in enumerate(rows):
        said = found[number].ids
        behind = row.positions[-1] + 1
        whole = torch.tensor([row.ids + said]), torch.tensor([row.positions + list(range(behind, behind + len(said)))])
        own = collate([row])
        with torch.no_grad():
            hidden = model.hidden_states(
                whole[0], own.shown(features(model, own)), whole[1], Tree([whole[0].numel()] * whole[0].numel()))
            again = model.llama.lm_head(hidden)[0, len(row.ids) - 1:-1].log_softmax(-1)
        assert torch.allclose(again[range(6), said], torch.tensor(found[number].logs), atol=1e-4)


def test_checkpointing_changes_nothing():
    model = llava()
    batch = pack(model, studies("anatomy"), IMAGE_TOKENS)
    images = features(model, batch)
    set_trainable(model, "full")
    plain = batch_losses(model, batch, images)
    mine = gradients(model, plain.mean())
    model.llama.gradient_checkpointing_enable()
    again = batch_losses(model.train(), batch, images)
    assert_same((plain, mine), (again, gradients(model, again.mean())))


def test_half_precision_runs():
    lm = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation=ATTENTION)
    batch = collate([lay_out(random_pieces(np.random.default_rng(0)))])
    exact = losses(lm, batch)
    half = losses(lm.to(torch.bfloat16), batch)
    half.mean().backward()
    assert abs(half.float().mean() - exact.mean()) < 0.05 and half.dtype == torch.bfloat16
    assert all(weight.grad.isfinite().all() for weight in lm.parameters())


def test_memory_grows_with_the_row_and_not_with_its_square():
    one = lay_out(random_pieces(np.random.default_rng(1)))
    peaks = {}
    for number in (10, 40):
        tree = collate([one] * number).tree
        inputs = [torch.randn(1, 2, len(tree), 8, requires_grad=True) for _ in range(3)]
        step = lambda tree=tree, inputs=inputs: _TreeAttention.apply(*inputs, tree, 0.3).sum().backward()  # noqa: E731
        step()
        peaks[number] = peak_bytes(step, torch.device("cpu"))
    assert len(tree) > 4000 and peaks[40] < len(tree) ** 2 / 2  # half a byte for each pair
    assert peaks[40] < 5 * peaks[10]


def test_watched_weights_are_those_of_the_plain_implementation():
    lm = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation=ATTENTION).eval()
    tree = random_pieces(np.random.default_rng(2))
    batch = collate([lay_out(tree)])
    leaf = len(tree) - 1
    watch = Watch(batch.tree, [batch.ids.numel() - 1])
    with torch.no_grad():
        lm(batch.ids, position_ids=batch.positions, use_cache=False, **tree_arguments(batch.tree, watch))
        lm.set_attn_implementation("eager")
        ids = torch.tensor([[token for piece in chain(tree, leaf) for token in piece.ids]])
        theirs = torch.stack([layer[0, :, -1] for layer in lm(ids, output_attentions=True).attentions])
    assert torch.allclose(watch.weights[:, :, 0], theirs, atol=1e-5)


@pytest.mark.parametrize("change", [dict(sliding_window=8), dict(attention_dropout=0.1)])
def test_what_a_tree_cannot_do_is_refused(change: dict):
    lm = AutoModelForCausalLM.from_config(MistralConfig(**SIZES, **change), attn_implementation=ATTENTION).train()
    batch = collate([lay_out(random_pieces(np.random.default_rng(0)))])
    with pytest.raises(ValueError, match="a tree knows no"):
        losses(lm, batch)


def test_a_comparison_leaves_the_model_as_it_was():
    lm = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    former, before = lm.config._attn_implementation, {n: w.clone() for n, w in lm.named_parameters()}
    result = compare_packing(lm, topics=4, region_sets=2, image_tokens=16, text_tokens=8, repeats=1)
    assert set(result) == {"loss_diff", "grad_rel", "token_ratio", "time_ratio", "memory_ratio", "gemm_share",
                           "seconds", "seconds_alone"}
    assert result["seconds_alone"] / result["seconds"] == pytest.approx(result["time_ratio"])
    assert result["loss_diff"] < 1e-6 and result["grad_rel"] < 1e-5
    assert result["token_ratio"] == pytest.approx(4 * (8 + 16 * 2 + 8) / (8 + 16 * 3 + 4 * 8))
    assert lm.config._attn_implementation == former and all(w.grad is None for w in lm.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in lm.named_parameters())


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Compute on two cores for the time of a test."""
    with threads(2):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("layers, sizes", [(8, (12, 6, 64)), (8, (20, 7, 196)), (2, (10, 5, 1369))])
def test_packing_pays(layers: int, sizes: tuple[int, int, int], two_threads: None):
    settings = load_profile("tiny").lm.model_copy(
        update={"hidden": 512, "intermediate": 1408, "layers": layers, "heads": 8})
    lm = small_llama(settings, 2000)
    runs = [compare_packing(lm, *sizes, text_tokens=24, repeats=5) for _ in range(3)]
    middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    print(sizes, middle, [round(run["time_ratio"], 2) for run in runs])
    assert middle["loss_diff"] < 1e-6 and middle["grad_rel"] < 1e-5
    assert middle["time_ratio"] >= middle["token_ratio"]
    assert middle["memory_ratio"] > 1 and middle["gemm_share"] >= 0.65


@pytest.mark.gpu
def test_flex_attention_on_a_gpu():
    trees = [random_pieces(np.random.default_rng(number)) for number in range(3)]
    tree = collate([lay_out(one) for one in trees]).tree
    inputs = [torch.randn(1, 4, len(tree), 32, requires_grad=True) for _ in range(3)]
    cpu = _TreeAttention.apply(*inputs, tree, 0.2)
    gpu = _flex_attention(*(tensor.cuda() for tensor in inputs), tree, 0.2)
    assert torch.allclose(gpu.cpu(), cpu, atol=1e-3)
    told = torch.randn_like(cpu)
    pairs = zip(torch.autograd.grad(gpu, inputs, told.cuda()), torch.autograd.grad(cpu, inputs, told), strict=True)
    assert all(torch.allclose(mine, other, atol=1e-2) for mine, other in pairs)
