"""CheXbert on a tiny checkpoint of the published layout, against a forward pass that shares no code with it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear

from llava_ta.chexbert import CLASSES, CheXbert, load_chexbert, read_vocabulary
from llava_ta.metrics import score
from llava_ta.ontology import CHEXPERT_14

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "mild", "left", "edema", "effusion", ".", ",", "the", "heart",
    "is", "enlarged", "lungs", "are", "clear", "small", "fracture", "##s", "opacity", "possible"]
D, LAYERS, HEADS, INNER, PLACES = 24, 3, 4, 40, 20
TEXTS = ["No edema.", "The heart is ENLARGED,\n and   possible opacitys", "", "small left effusion . " * 9, "fracture",
         "mild edema. " * 30, "zzz unknown"]


def published_layout(seed: int = 0) -> dict[str, torch.Tensor]:
    """Names and shapes as in chexbert.pth, smaller; `module.` before each, and the buffer of an older transformers."""
    shapes = {f"bert.embeddings.{name}_embeddings.weight": (size, D)
              for name, size in (("word", len(WORDS)), ("position", PLACES), ("token_type", 2))}
    norms = ["bert.embeddings.LayerNorm"]
    dense = {"bert.pooler.dense": (D, D)}
    for layer in range(LAYERS):
        at = f"bert.encoder.layer.{layer}"
        dense |= {f"{at}.attention.{name}": (D, D) for name in ("self.query", "self.key", "self.value", "output.dense")}
        dense |= {f"{at}.intermediate.dense": (INNER, D), f"{at}.output.dense": (D, INNER)}
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
    dense |= {f"linear_heads.{i}": (4 if i < 13 else 2, D) for i in range(14)}
    for name, shape in dense.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (D,), f"{name}.bias": (D,)}
    random = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=random) * 0.5 for name, shape in shapes.items()}
    state["bert.embeddings.position_ids"] = torch.arange(PLACES)[None]
    return {f"module.{name}": value for name, value in state.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint and its vocabulary."""
    path = tmp_path_factory.mktemp("chexbert")
    content = {"model_state_dict": published_layout(), "epoch": 7, "optimizer_state_dict": {"lr": 2e-5}}
    torch.save(content, path / "chexbert.pth")
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return path


@pytest.fixture(scope="module")
def labeler(folder: Path) -> CheXbert:
    """The loader under test."""
    return CheXbert(folder / "chexbert.pth", folder, batch=3, device="cpu", heads=HEADS)


def ids_of(text: str) -> list[int]:
    """Word pieces by hand: lower case, punctuation apart, `##s` for a plural, and the end cut off."""
    pieces = []
    for word in text.lower().replace(".", " . ").replace(",", " , ").split():
        found = word in WORDS
        if not found and word.endswith("s") and word[:-1] in WORDS:
            pieces += [WORDS.index(word[:-1]), WORDS.index("##s")]
        else:
            pieces.append(WORDS.index(word) if found else 1)
    return [2, *pieces[: PLACES - 2], 3]


def forward(ids: list[int]) -> list[torch.Tensor]:
    """BERT and the heads, written out for one text."""
    w = {name.removeprefix("module."): value for name, value in published_layout().items()}

    def dense(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return layer_norm(x, (D,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    x = w["bert.embeddings.word_embeddings.weight"][ids] + w["bert.embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + w["bert.embeddings.token_type_embeddings.weight"][0], "bert.embeddings.LayerNorm")  # [L, D]
    for layer in range(LAYERS):
        at = f"bert.encoder.layer.{layer}"
        q, k, v = (dense(x, f"{at}.attention.self.{name}").view(len(ids), HEADS, -1).transpose(0, 1)
                   for name in ("query", "key", "value"))
        seen = (q @ k.transpose(1, 2) / math.sqrt(D / HEADS)).softmax(dim=-1) @ v  # [heads, L, D / heads]
        seen = dense(seen.transpose(0, 1).reshape(len(ids), D), f"{at}.attention.output.dense")
        x = norm(x + seen, f"{at}.attention.output.LayerNorm")
        x = norm(x + dense(gelu(dense(x, f"{at}.intermediate.dense")), f"{at}.output.dense"), f"{at}.output.LayerNorm")
    return [dense(x[0], f"linear_heads.{i}") for i in range(14)]


def test_logits_equal_an_independent_forward_pass(labeler):
    for text in TEXTS:
        ids = ids_of(text)
        assert labeler.tokenizer(" ".join(text.split()), truncation=True, max_length=PLACES).input_ids == ids
        with torch.inference_mode():
            ours = labeler.net(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
        for one, other in zip(ours, forward(ids)):
            assert np.allclose(one[0], other, atol=1e-5)


def test_labels_follow_in_batches_and_alone(labeler):
    found = [forward(ids_of(text)) for text in TEXTS]
    expected = [{label: CLASSES[row.argmax()] for label, row in zip(CHEXPERT_14, logits)} for logits in found]
    assert labeler.label_all(TEXTS) == expected == [labeler.label(text) for text in TEXTS]
    assert len({status for row in expected for status in row.values()}) == 4, "all classes occur"


def test_it_scores_under_its_own_name(labeler):
    scored = score(TEXTS, TEXTS[::-1], labeler=labeler)
    assert 0 <= scored["CheXpert micro-F1-14 (CheXbert)"] <= 1 and "CheXpert micro-F1-14+ (CheXbert)" in scored
    assert score(TEXTS, TEXTS, labeler=labeler)["CheXpert micro-F1-14+ (CheXbert)"] == 1


@pytest.mark.parametrize(("change", "why"), [
    ({"module.linear_heads.3.bias": None}, '"linear_heads.3.bias"'),
    ({"module.bert.encoder.layer.1.output.dense.weight": None}, '"bert.encoder.layer.1.output.dense.weight"'),
    ({"module.bert.embeddings.word_embeddings.weight": None}, "absent: 'bert.embeddings.word_embeddings.weight'"),
    ({"module.bert.embeddings.other_ids": torch.zeros(1)}, '"bert.embeddings.other_ids"'),
    ({"module.linear_heads.13.weight": torch.zeros(4, D)}, "size mismatch for linear_heads.13.weight"),
])
def test_every_key_is_accounted_for(change, why, tmp_path):
    state = {name: value for name, value in {**published_layout(), **change}.items() if value is not None}
    torch.save({"model_state_dict": state}, tmp_path / "chexbert.pth")
    with pytest.raises(ValueError) as raised:
        load_chexbert(tmp_path / "chexbert.pth", HEADS)
    assert why in str(raised.value)


def test_the_buffer_of_an_older_transformers_may_be_absent(tmp_path):
    state = {name: value for name, value in published_layout().items() if "position_ids" not in name}
    torch.save({"model_state_dict": state}, tmp_path / "chexbert.pth")
    assert len(load_chexbert(tmp_path / "chexbert.pth", HEADS).linear_heads) == 14


def test_what_is_missing_is_said_with_the_way_to_it(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="chexbert.pth of StanfordAIMI/RRG_scorers"):
        CheXbert(tmp_path / "chexbert.pth", folder)
    with pytest.raises(FileNotFoundError, match="hf download bert-base-uncased vocab.txt"):
        CheXbert(folder / "chexbert.pth", tmp_path, device="cpu", heads=HEADS)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    with pytest.raises(ValueError, match=f"2 words, but the checkpoint was trained with {len(WORDS)}"):
        read_vocabulary(tmp_path, len(WORDS))


def test_a_file_with_code_in_it_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model_state_dict": {"x": Evil()}}, tmp_path / "chexbert.pth")
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        load_chexbert(tmp_path / "chexbert.pth")
    assert not (tmp_path / "ran").exists()
