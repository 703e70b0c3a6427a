"""A RadGraph network of the published layout, untrained and small. Runs inside an environment that has radgraph.

`tiny_radgraph.py make FOLDER MODEL DATASET` writes the network and its BERT; `... read FOLDER MODEL` reads texts from
stdin, a JSON list, and prints what the network finds in them.
"""

import json
import sys
import types
from pathlib import Path

import radgraph.radgraph as package
import torch
import transformers
from radgraph.allennlp.common import cached_transformers
from radgraph.allennlp.data import Vocabulary
from radgraph.allennlp.modules.text_field_embedders import BasicTextFieldEmbedder
from radgraph.allennlp.modules.token_embedders import PretrainedTransformerMismatchedEmbedder
from radgraph.dygie.models.dygie import DyGIE

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "1", "2", ".", ",", "no", "heart", "lungs", "effusion",
    "clear", "the", "is", "are", "normal", "left", "right", "small", "pleural", "enlarged"]
BERT = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": len(WORDS), "hidden_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 64}
MODULES = {
    "coref": {"coref_prop": 0, "max_antecedents": 10, "spans_per_word": 0.3},
    "events": {"loss_weights": {"arguments": 1, "trigger": 1}, "argument_spans_per_word": 0.8,
               "trigger_spans_per_word": 0.3},
    "ner": {},
    "relation": {"spans_per_word": 0.5},
}
LABELS = {
    "ner": ["", "OBS-DP", "OBS-DA", "ANAT-DP", "OBS-U"],
    "relation": ["", "located_at", "modify", "suggestive_of"]}


def untrained(name: str, **_: object) -> transformers.PreTrainedModel:
    """A BERT without weights, since the network's own file holds them."""
    return transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(name))


def make(folder: Path, model: str, dataset: str) -> None:
    """Write `<folder>/<model>/` and `<folder>/tiny-bert/`."""
    bert, network = folder / "tiny-bert", folder / model
    (network / "vocabulary").mkdir(parents=True)
    bert.mkdir()
    (bert / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (bert / "config.json").write_text(json.dumps(BERT))
    embedder = {"max_length": 64, "model_name": "someone/tiny-bert", "type": "pretrained_transformer_mismatched"}
    settings = {
        "feature_size": 4, "feedforward_params": {"dropout": 0.4, "hidden_dims": 8, "num_layers": 2},
        "loss_weights": {"coref": 0, "events": 0, "ner": 0.2, "relation": 1}, "max_span_width": 2, "modules": MODULES,
        "target_task": "relation"}
    names = "_span_width_embedding.weight", ".*weight"
    widths, start = ({"regexes": [[name, {"type": "xavier_normal"}]]} for name in names)
    config = {
        "dataset_reader": {"max_span_width": 2, "token_indexers": {"bert": embedder}, "type": "dygie"},
        "model": {"embedder": {"token_embedders": {"bert": embedder}}, "initializer": widths,
                  "module_initializer": start, "type": "dygie", **settings}}
    (network / "config.json").write_text(json.dumps(config))
    (network / "vocabulary" / "non_padded_namespaces.txt").write_text("*labels\n*tags\n")
    for kind, labels in LABELS.items():
        (network / "vocabulary" / f"{dataset}__{kind}_labels.txt").write_text("\n".join(labels) + "\n")
    torch.manual_seed(3)
    vocabulary = Vocabulary.from_files(str(network / "vocabulary"))
    words = BasicTextFieldEmbedder({"bert": PretrainedTransformerMismatchedEmbedder(str(bert), max_length=64)})
    torch.save(DyGIE(vocab=vocabulary, embedder=words, **settings).state_dict(), network / "weights.th")


def read(folder: Path, model: str) -> None:
    """Print the entities and relations of each text."""
    package.CACHE_DIR = str(folder)
    network = package.RadGraph(model_type=model, model_cache_dir=str(folder), cuda=-1)
    found = network(json.load(sys.stdin))
    print("\n" + json.dumps([found[str(row)] for row in range(len(found))]))


if __name__ == "__main__":
    cached_transformers.AutoModel = types.SimpleNamespace(
        from_pretrained=untrained, from_config=transformers.AutoModel.from_config)
    {"make": make, "read": read}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
