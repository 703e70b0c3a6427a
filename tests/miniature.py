"""Small things in the layouts of large ones: a MIMIC-CXR-JPG tree, LLaVA-Rad's lists, and the published weights."""

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image

from llava_ta.core import LLAVA_RAD_LISTS, LanguageSettings, TowerSettings
from llava_ta.model import VisionTower, prompt_pieces, small_llama, train_tokenizer


class Film(NamedTuple):
    """A row of PhysioNet's lists."""

    dicom: str  # identifier of the film
    subject: str  # eight digits
    study: str  # eight digits
    view: str  # PA, AP, LATERAL, ...
    split: str  # train, validate or test

    @property
    def folder(self) -> str:
        """The folder of the study, as PhysioNet and LLaVA-Rad name it below `files` and `mimic`."""
        return f"p{self.subject[:2]}/p{self.subject}/s{self.study}"


def grey_film(path: Path, grey: int = 128) -> Path:
    """Write a small film, 60 pixels high and 48 wide: one grey, and a brighter band at the top."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((60, 48), grey, np.uint8)
    pixels[:6] += 20
    Image.fromarray(pixels).save(path)
    return path


def mimic_tree(
    folder: Path,  # does not exist yet
    films: Sequence[Film],  # of all lists
    reports: Mapping[str, str],  # study -> text
    write_film: Callable[[Path], object] = grey_film,  # writes the film of a path
    zipped: bool = False,  # whether the reports stay in their archive
) -> Path:  # the folder
    """Write films, lists and reports as PhysioNet has them."""
    table = pd.DataFrame(films)
    table.columns = ["dicom_id", "subject_id", "study_id", "ViewPosition", "split"]
    folder.mkdir(parents=True)
    more = {"PerformedProcedureStepDescription": "CHEST (PA AND LAT)", "Rows": 3056, "Columns": 2544}
    table.drop(columns="split").assign(**more).to_csv(folder / "mimic-cxr-2.0.0-metadata.csv.gz", index=False)
    table[["dicom_id", "study_id", "subject_id", "split"]].to_csv(folder / "mimic-cxr-2.0.0-split.csv.gz", index=False)
    labels = {"subject_id": [films[0].subject], "study_id": [films[0].study], "Pleural Effusion": ["1.0"],
              "Edema": [""]}
    pd.DataFrame(labels).to_csv(folder / "mimic-cxr-2.0.0-chexpert.csv.gz", index=False)
    for film in films:
        write_film(folder / "files" / film.folder / f"{film.dicom}.jpg")
    texts = {f"files/{film.folder}.txt": reports[film.study] for film in films}
    if zipped:
        with zipfile.ZipFile(folder / "mimic-cxr-reports.zip", "w") as packed:
            for name, text in texts.items():
                packed.writestr(name, text)
    else:
        for name, text in texts.items():
            (folder / name).write_text(text)
    return folder


def annotation(film: Film, method: str, said: str | None, **more) -> dict:
    """An entry as LLaVA-Rad's JSON lists have it."""
    turns = [{"from": "human", "value": "<image>\nProvide a description of the findings in the radiology image."},
             {"from": "gpt", "value": said}]
    return {"id": f"{film.subject}_{film.study}", "image": f"mimic/{film.folder}/{film.dicom}.jpg", "view": film.view,
            "generate_method": method, "reason": None, "conversations": turns, **more}


def write_lists(
    folder: Path,  # of the tree, or one of its own
    lists: Mapping[str, list[dict]],  # train, dev and test -> entries
) -> Path:  # the folder
    """Write LLaVA-Rad's annotation files."""
    folder.mkdir(exist_ok=True)
    for split, entries in lists.items():
        (folder / LLAVA_RAD_LISTS[split]).write_text(json.dumps(entries))
    return folder


# ---- weights


def tower_file(
    path: Path,  # a .pt file
    settings: TowerSettings,  # architecture and sizes
) -> Path:  # the same
    """Write random weights as open_clip wrote BiomedCLIP-CXR: the trunk below `module.visual.`, and a text part."""
    trunk = VisionTower(settings).trunk.state_dict()
    state = {f"module.visual.trunk.{name}": weight for name, weight in trunk.items()}
    torch.save({"epoch": 10, "state_dict": state | {"module.text.proj": torch.zeros(1)}}, path)
    return path


def llama_folder(
    folder: Path,  # does not exist yet
    settings: LanguageSettings,  # sizes
    texts: Sequence[str],  # that the tokenizer learns
    says: str,  # a sentence without a token that occurs twice
) -> Path:  # the same
    """Write a random Llama with its tokenizer, in bfloat16, as Vicuna is published.

    Its head is wired so that a token of the sentence follows the one before it, and the first one the prompt."""
    tokenizer = train_tokenizer([*texts, *[says] * 100], settings.vocab)
    model = small_llama(settings, len(tokenizer))
    prompt = tokenizer.encode(prompt_pieces("topic")[-1], add_special_tokens=False)
    chain = [prompt[-1], *tokenizer.encode(says, add_special_tokens=False), tokenizer.eos_token_id]
    assert len(set(chain)) == len(chain), tokenizer.convert_ids_to_tokens(chain)
    words = model.model.embed_tokens.weight.data.normal_()  # far larger than what the layers add to it
    model.lm_head.weight.data[chain[1:]] += words[chain[:-1]]
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def cxas_file(
    path: Path,  # a .pth file
    net: torch.nn.Module,  # torchxrayvision's class
) -> Path:  # the same
    """Write the weights of CXAS's network as its authors did."""
    state = {f"module.{name.removeprefix('backbone.') if name.startswith('backbone.backbone.') else name}": weight
             for name, weight in net.state_dict().items()}
    torch.save({"epoch": 110, "model": state}, path)
    return path
