"""Real studies: miniature trees in the layouts of their collections, through the adapters and the data step."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from llava_ta import reproduce
from llava_ta.core import LLAVA_RAD_LISTS, Run, Settings, load_profile, outside_inputs, path_digest, preflight
from llava_ta.data import FilmStore, make_data
from llava_ta.sources import (
    FOLDER_COLUMNS,
    folder_studies,
    llava_rad_studies,
    mimic_studies,
    openi_films,
    openi_reports,
    read_source,
)
from llava_ta.studies import FITTED, SCHEMA, is_credentialed, load_studies
from miniature import Film, annotation, grey_film, mimic_tree, write_lists
from repository import ROOT

REAL_OPENI = os.environ.get("LLAVA_TA_OPENI_DIR", "")


def made(
    folder: Path,  # of the source
    out: Path,  # where the step writes
    overrides: str,  # of the profile openi
) -> tuple[dict, pd.DataFrame, FilmStore, list[str]]:  # record, table, films, news
    """Run the data step alone."""
    profile = load_profile("openi", f"data.dir={folder}, data.size=32, {overrides}")
    news: list[str] = []
    run = Run(Settings(profile=profile, run="test"), say=news.append)
    out.mkdir(parents=True, exist_ok=True)
    record = make_data(run, out)
    return record, load_studies(out), FilmStore(out), news


# ---- MIMIC-CXR-JPG 2.1.0

FILMS = [Film(*row) for row in (
    ("080c419e-808129b2-76150ad3-619f74eb-30505d38", "19000001", "59000001", "PA", "train"),
    ("120b572f-07846870-6fee21f0-0aeb1db3-968ed359", "19000001", "59000001", "LATERAL", "train"),
    ("2de7a17a-69398fba-facd6a86-c8d28c3e-29b8f66b", "19000001", "59000002", "AP", "train"),
    ("352df0b6-db72630d-53a13e3d-b226de51-f3dec2db", "19000001", "59000002", "AP", "train"),
    ("4abca3b3-38d43b59-c827d9df-d110b74e-0dc4343b", "19000002", "59000003", "", "validate"),
    ("54d9dbf2-2fa80a66-782a2cbf-257344ef-8cf31d6e", "19000002", "59000004", "AP", "validate"),
    ("68b65972-4cc4cfd6-0f8dce72-232ec5d8-5d6cf5f2", "19000003", "59000005", "PA", "test"),
)]
REPORTS = {
    "59000001": "                     FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n\n INDICATION:  ___F with "
                "cough\n\n FINDINGS: \n \n A small left effusion is seen. \n \n IMPRESSION: \n \n Small effusion.\n",
    "59000002": " FINAL REPORT\n HISTORY:  Cough.\n\n One film.  The heart is large.\n\n IMPRESSION:  Large heart.",
    "59000003": "FINDINGS: Clear.",
    "59000004": "                                 FINAL REPORT\n AP CHEST\n\n IMPRESSION:  No change.",
    "59000005": "WET READ: ___ 10:00 AM\n  Wrong.\n ______\n      FINAL REPORT\n FINDINGS AND IMPRESSION: Clear lungs.",
}


def small_mimic(folder: Path, zipped: bool = False) -> Path:
    """Write the films above with their reports."""
    return mimic_tree(folder, FILMS, REPORTS, zipped=zipped)


@pytest.mark.parametrize("zipped", [False, True])
def test_mimic_from_physionets_files(tmp_path: Path, zipped: bool):
    tree = small_mimic(tmp_path / "mimic", zipped)
    overrides = "data.source=mimic, data.resize=shortest, data.films=all"
    record, table, store, _ = made(tree, tmp_path / "out", overrides)
    assert table["study"].tolist() == ["s59000001", "s59000002", "s59000002-2", "s59000004", "s59000005"]
    assert table["split"].tolist() == ["train", "train", "train", "valid", "val"]
    assert table["view"].tolist() == ["PA", "AP", "AP", "AP", "PA"] and len(store) == 5
    assert table["findings"].tolist() == [
        "A small left effusion is seen.", *["One film. The heart is large."] * 2, "No change.", "Clear lungs."]
    assert table["section"].tolist() == ["findings", "text", "text", "impression", "findings"]
    assert table["indication"][0] == "___F with cough" and list(table["labels"][0]) == ["Pleural Effusion=1"]
    assert table[["height", "width", "resize"]].drop_duplicates().to_numpy().tolist() == [[60, 48, "shortest"]]
    assert is_credentialed(table) and record["notes"] == {"films that are neither AP nor PA": 2}
    one, said = mimic_studies(tree)
    assert len(one) == 4 and said["further films of a study"] == 1


def test_mimic_names_what_is_wrong(tmp_path: Path):
    tree = small_mimic(tmp_path / "mimic")
    (tree / "files/p19/p19000003/s59000005.txt").unlink()
    with pytest.raises(FileNotFoundError, match="s59000005.txt does not exist"):
        mimic_studies(tree)
    lists = tree / "mimic-cxr-2.0.0-split.csv.gz"
    table = pd.read_csv(lists, dtype=str)
    for broken, expected in {
        f"row 8, column dicom_id: '{FILMS[0][0]}' occurs twice": pd.concat([table, table[:1]]),
        "column split is missing": table.drop(columns="split"),
        f"column split: film {FILMS[0][0]} has no split": table[1:],
    }.items():
        expected.to_csv(lists, index=False)
        with pytest.raises(ValueError, match=re.escape(f"{lists}: {broken}")):
            mimic_studies(tree)
    lists.write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="split.csv.gz cannot be read"):
        mimic_studies(tree)


# ---- LLaVA-Rad's annotations


def llava_rad_lists(folder: Path) -> Path:
    """Write the three lists."""
    lists = {
        "train": [annotation(FILMS[0], "rule-based", "An effusion.", reason="cough\n for weeks"),
                  annotation(FILMS[1], "rule-based", "Lateral."), annotation(FILMS[2], "gpt4", "Large heart."),
                  annotation(FILMS[2], "rule-based", "Large."), annotation(FILMS[3], "gpt4", "Large.")],
        "dev": [annotation(FILMS[5], "gpt4", "Clear."), annotation(FILMS[5], "rule-based", None)],
        "test": [annotation(FILMS[6], "rule-based", "Clear lungs.", split="test"),
                 annotation(FILMS[6], "gpt4", "Lungs are clear.")],
    }
    return write_lists(folder, lists)


@pytest.mark.parametrize("test_set, val, first", [("rule-based", "Clear lungs.", "Large."),
                                                  ("gpt4", "Lungs are clear.", "Large heart.")])
def test_both_test_sets_of_llava_rad(tmp_path: Path, test_set: str, val: str, first: str):
    tree, lists = small_mimic(tmp_path / "mimic"), llava_rad_lists(tmp_path / "lists")
    overrides = f"data.source=mimic, data.test_set={test_set}, data.annotations={lists}, data.films=all"
    _, table, store, _ = made(tree, tmp_path / "out", overrides)
    assert table.query("split == 'val'")["findings"].tolist() == [val] and len(store) == 5
    assert table.set_index("study")["findings"]["s59000002"] == first, "the method of the test set is kept"
    assert table.set_index("study")["indication"]["s59000001"] == "cough for weeks"
    assert set(table["film"]) <= {str(path.relative_to(tree)) for path in tree.rglob("*.jpg")}
    assert len(llava_rad_studies(tree, lists, test_set, films="one")[0]) == 4


def test_a_film_in_two_lists_of_llava_rad(tmp_path: Path):
    tree, lists = small_mimic(tmp_path / "mimic"), llava_rad_lists(tmp_path / "lists")
    path = lists / LLAVA_RAD_LISTS["test"]
    entries = json.loads(path.read_text())
    path.write_text(json.dumps([*entries, annotation(FILMS[0], "rule-based", "An effusion.")]))
    with pytest.raises(ValueError) as refused:
        llava_rad_studies(tree, lists)
    name = f"files/p19/p19000001/s59000001/{FILMS[0][0]}.jpg"
    assert str(refused.value).startswith(f"{path}: entry 3: film {name} has split val")
    assert str(refused.value).endswith(f"but train in {lists / LLAVA_RAD_LISTS['train']}: entry 1")


def test_paper_and_llava_rad_name_their_test_sets(tmp_path: Path):
    for name, test_set in {"paper": "gpt4", "llava-rad": "rule-based"}.items():
        data = load_profile(name).data
        assert (data.test_set, data.resize, data.films, data.size) == (test_set, "shortest", "all", 518)
    tree, lists = small_mimic(tmp_path / "mimic"), llava_rad_lists(tmp_path / "lists")
    profile = load_profile("paper", f"data.dir={tree}")
    assert [path for key, path, _ in preflight(profile).absent if key == "data.annotations"] == [
        str(tree / LLAVA_RAD_LISTS[split]) for split in ("train", "test")]
    with pytest.raises(FileNotFoundError, match="chat_train"):
        read_source(profile.data)
    assert len(read_source(load_profile("paper", f"data.dir={tree}, data.annotations={lists}").data)[0]) == 5


@pytest.mark.parametrize("profile", ["paper", "openi"])
@pytest.mark.parametrize("place", ["", "nowhere", "empty"])
def test_preflight_and_the_step_lack_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str, place: str
):
    for source in ("OPENI", "MIMIC", "FOLDER"):
        monkeypatch.delenv(f"LLAVA_TA_{source}_DIR", raising=False)
    (tmp_path / "empty").mkdir()
    for more in ("", "data.source=folder", "data.source=mimic, data.test_set=official, data.credentialed=true"):
        overrides = f"data.dir={tmp_path / place}" if place else "data.dir=''"
        loaded = load_profile(profile, f"{overrides}, {more}" if more else overrides)
        listed = [(key, path) for key, path, _ in preflight(loaded).absent if key.startswith("data.")]
        if (profile, place, more) == ("openi", "empty", ""):
            assert not listed
            continue
        with pytest.raises(FileNotFoundError) as refused:
            read_source(loaded.data)
        assert listed and str(refused.value).count(" = ") == len(listed)
        assert all(f"{key} = {path or '(not set)'} (" in str(refused.value) for key, path in listed)


# ---- Open-i

XML = """<?xml version="1.0" encoding="utf-8"?>
<eCitation><uId id="CXR{number}"/><ccLicense>byncnd</ccLicense><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON"/><AbstractText Label="INDICATION">Cough</AbstractText>
<AbstractText Label="FINDINGS">Made up for study {number}.</AbstractText><AbstractText Label="IMPRESSION"/>
</Abstract></Article></MedlineCitation><MeSH><major>normal</major></MeSH><parentImage id="{image}"/></eCitation>"""


def test_open_i_as_the_archives_unpack(tmp_path: Path):
    manifest = pd.read_csv(ROOT / "data_manifests" / "openi.csv", dtype=str, keep_default_na=False)
    reports = tmp_path / "openi" / "NLMCXR_reports" / "ecgen-radiology"
    reports.mkdir(parents=True)
    for row in manifest.itertuples():
        (reports / f"{row.report}.xml").write_text(XML.format(number=row.report, image=row.image))
    chosen = manifest[manifest["split"] == "val"].head(3), manifest[manifest["split"] == ""].head(20)
    for row in pd.concat(chosen).itertuples():
        grey_film(tmp_path / "openi" / "NLMCXR_png" / f"{row.image}.png")
    grey_film(tmp_path / "openi" / "NLMCXR_png" / "CXR1_1_IM-0001-3001.png")  # a lateral film of the archive
    record, table, store, _ = made(tmp_path / "openi", tmp_path / "out", "data.source=openi")
    assert len(table) == len(store) == 23 and (table["film"].str.split("/").str[0] == "NLMCXR_png").all()
    assert (table["findings"] == "Made up for study " + table["study"].str[3:] + ".").all()
    assert record["val"] == 3 and record["notes"] == {"studies without a film": len(manifest) - 23}
    assert not is_credentialed(table) and set(table["indication"]) == {"Cough"}


def test_open_i_by_index(tmp_path: Path):
    folder = tmp_path / "openi"
    rows = [("1", "frontal\\1.jpg", "True"), ("1", "frontal\\1b.jpg", "False"), ("4", "frontal\\4.jpg", "True"),
            ("5", "frontal\\5.jpg", "True")]
    for _, name, _ in rows:
        grey_film(folder / name.replace("\\", "/"))
    pd.DataFrame(rows, columns=["uid", "file", "primary_frontal"]).to_csv(
        folder / "index.csv", index=False, encoding="utf-8-sig")
    _, table, store, _ = made(folder, tmp_path / "out", "data.source=openi")
    assert table["study"].tolist() == ["CXR1", "CXR4", "CXR5"] and len(store) == 3
    assert table["film"].tolist() == ["frontal/1.jpg", "frontal/4.jpg", "frontal/5.jpg"]


@pytest.mark.skipif(not REAL_OPENI, reason="REAL FILMS NOT TESTED: set LLAVA_TA_OPENI_DIR to a folder of Open-i")
def test_every_real_film_of_open_i_joins_its_report():
    folder = Path(REAL_OPENI)
    table, left_out = openi_films(folder)
    assert all((folder / name).is_file() for name in table["film"])
    counts = {"studies": len(table), **table["split"].value_counts().to_dict(), **left_out}
    if (folder / "index.csv").is_file():
        index = pd.read_csv(folder / "index.csv", dtype=str)
        owner = {image: row.study for row in openi_reports().itertuples() for image in row.images}
        joined = index["xml_image_id"].map(owner) == "CXR" + index["uid"]
        counts |= {"frontals": len(index), "joined by image id": int(joined.sum())}
        assert joined.all() and table["study"].isin("CXR" + index["uid"]).all()
    print(counts)


# ---- a folder of one's own


def own_folder(folder: Path, number: int, broken: int = 0) -> Path:
    """Write films of known grey and their table; every thirtieth or so is broken, in one of three ways."""
    lines = ["film,patient,findings"]
    bad = set(np.linspace(5, number - 5, broken).astype(int).tolist()) if broken else set()
    for i in range(number):
        path = grey_film(folder / f"p{i // 2}" / f"{i:04d}.png", i % 200 + 30)
        lines.append(f"p{i // 2}/{i:04d}.png,{i // 2},Clear lungs.")
        if i in bad:
            content = [b"", b"not a film", path.read_bytes()[:40]][i % 3]
            path.write_bytes(content)
    (folder / "studies.csv").write_text("\n".join(lines))
    return folder


def test_a_thousand_films_with_thirty_bad_ones(tmp_path: Path):
    folder = own_folder(tmp_path / "own", 1000, broken=30)
    record, table, store, news = made(folder, tmp_path / "out", "data.source=folder")
    refused = pd.read_parquet(tmp_path / "out" / "refused.parquet")
    assert len(table) == len(store) == record["studies"] == 970 and len(refused) == record["refused"] == 30
    assert "30 of 1,000 films cannot be used" in news[-1] and "970 are stored" in news[-1]
    assert list(refused.columns) == ["study", "film", "reason"] and refused["reason"].str.len().gt(5).all()
    assert not refused["reason"].str.contains(str(tmp_path), regex=False).any(), "a path of this machine in a table"
    assert not set(table["study"]) & set(refused["study"]) and table["row"].tolist() == list(range(970))
    assert (table.groupby("patient")["split"].nunique() == 1).all()
    assert sum(record[split] for split in ("train", "valid", "val")) == 970
    for row, name in zip(table["row"], table["film"], strict=True):
        assert abs(store[row][16, 16] * 255 - (int(name[-8:-4]) % 200 + 30)) < 1, f"row {row} holds another film"


def test_too_many_bad_films_stop_the_step(tmp_path: Path):
    folder = own_folder(tmp_path / "own", 100, broken=8)
    said = r"6 of 100 films \(after \d+\) cannot be used: .*max_refused=0.05 allows"
    with pytest.raises(ValueError, match=said) as told:
        made(folder, tmp_path / "out", "data.source=folder")
    listed = pd.read_parquet(tmp_path / "out" / "refused.parquet")
    assert str(told.value).endswith(f"all are in {tmp_path / 'out' / 'refused.parquet'}") and len(listed) == 6
    assert ", ".join(listed["film"]) in str(told.value) and len(str(told.value).splitlines()) == 1
    many = own_folder(tmp_path / "many", 300, broken=40)
    with pytest.raises(ValueError, match="16 of 300 films") as told:
        made(many, tmp_path / "many_out", "data.source=folder")
    listed = pd.read_parquet(tmp_path / "many_out" / "refused.parquet")
    assert [name in str(told.value) for name in listed["film"]] == [True] * 10 + [False] * 6
    assert len(made(folder, tmp_path / "more", "data.source=folder, data.max_refused=0.1")[1]) == 92


def test_a_split_that_loses_its_last_film(tmp_path: Path):
    folder = tmp_path / "own"
    lines = ["film,split,findings"]
    for i in range(40):
        grey_film(folder / f"{i}.png")
        lines.append(f"{i}.png,{'val' if i == 7 else 'train'},Clear.")
    (folder / "7.png").write_bytes(b"")
    (folder / "studies.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="no film of split val is left"):
        made(folder, tmp_path / "out", "data.source=folder")


def test_films_without_reports_and_texts_that_stay(tmp_path: Path):
    folder = tmp_path / "own"
    for name in ("a", "b", "c", "d"):
        grey_film(folder / f"{name}.png")
    (folder / "studies.csv").write_text(
        "film;split;report\na.png;train;FINDINGS: Clear. IMPRESSION: Normal.\nb.png;train;The lungs are clear today.\n"
        "c.png;test;FINDINGS: Clear.\nd.png;;\n", encoding="utf-8-sig")
    record, table, store, _ = made(folder, tmp_path / "out", "data.source=folder, data.resize=pad")
    assert table.set_index("study")["split"].to_dict() | {"a": 0, "b": 0} == {"a": 0, "b": 0, "c": "val", "d": "new"}
    assert table["section"].tolist() == ["findings", "text", "findings", "none"] and record["new"] == 1
    assert is_credentialed(table) and len(store) == 4
    table, _ = folder_studies(folder / "studies.csv", credentialed=False)
    assert not is_credentialed(table)
    with pytest.raises(ValueError, match="data.credentialed: the texts of MIMIC-CXR are always"):
        load_profile("paper", "data.credentialed=false")


def test_a_patient_may_have_films_without_a_report(tmp_path: Path):
    folder = own_folder(tmp_path / "own", 20)
    lines = (folder / "studies.csv").read_text().splitlines()
    lines[2::2] = [line.replace("Clear lungs.", "N/A") for line in lines[2::2]]  # the second film of each patient
    (folder / "studies.csv").write_text("\n".join(lines))
    record, table, _, news = made(folder, tmp_path / "out", "data.source=folder")
    assert record["new"] == 10 and record["train"] + record["valid"] + record["val"] == 10 and record["valid"] == 1
    assert set(table.loc[table["split"] == "new", "study"].str[-1]) == set("13579")
    assert "10 films without a report" in news[0] and "10 cells that say NaN, None or the like" in news[0]


def test_no_message_prints_a_report(tmp_path: Path):
    folder = own_folder(tmp_path / "own", 4)
    secret = "Jane Nobody has a large heart"
    for content in (f"a.png,7,{secret}\nb.png,8,Clear.", f"film,report\na.png,{secret}\n", f"film;a\n{secret};;\n"):
        (folder / "studies.csv").write_text(content)
        with pytest.raises(ValueError) as refused:
            folder_studies(folder / "studies.csv")
        assert str(refused.value).startswith(str(folder / "studies.csv")) and "Jane" not in str(refused.value)


@pytest.mark.parametrize("credentialed, terms", [
    ("true", "This page holds credentialed reports: it must not leave this machine."),
    ("false", "This page is under the licence of your table (not stated); share it on those terms alone.")])
def test_the_page_of_ones_own_films_says_what_may_be_done_with_it(tmp_path: Path, credentialed: str, terms: str):
    wanted = f"data.source=folder, data.credentialed={credentialed}"
    made(own_folder(tmp_path / "own", 20), tmp_path / "data", wanted)
    run = Run(Settings(profile=load_profile("openi", wanted), run="test"))
    run.path = lambda step: tmp_path / step
    head = reproduce._head(run, {"studies": 1})
    assert terms in head and "real films of your own folder with their reports" in head


def test_an_edited_table_makes_the_artefact_stale(tmp_path: Path):
    folder = own_folder(tmp_path / "own", 4)
    profile = load_profile("openi", f"data.source=folder, data.dir={folder}")
    before = [path_digest(path) for path in outside_inputs("data", profile)]
    table = folder / "studies.csv"
    table.write_text(table.read_text().replace("Clear lungs.", "Large heart.", 1))  # of the same length
    path_digest.cache_clear()
    assert before != [path_digest(path) for path in outside_inputs("data", profile)]


def dicom(path: Path, view: str, **fields: str) -> None:
    """Write a small DICOM film with a patient's data in its header."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = pydicom.dataset.Dataset()
    data.file_meta, data.SOPClassUID, data.SOPInstanceUID = meta, meta.MediaStorageSOPClassUID, generate_uid()
    data.Modality, data.ViewPosition, data.Rows, data.Columns = "DX", view, 40, 40
    data.SamplesPerPixel, data.PixelRepresentation, data.PhotometricInterpretation = 1, 0, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    for name, value in fields.items():
        setattr(data, name, value)
    data.PixelData = np.arange(1600, dtype=np.uint16).tobytes()
    data.save_as(path, enforce_file_format=True)


def test_no_identifier_of_a_header_gets_out_and_lateral_films_are_refused(tmp_path: Path):
    folder = tmp_path / "own"
    who = {"PatientName": "Nobody^Jane", "PatientID": "MRN-4711", "PatientBirthDate": "19010203",
           "AccessionNumber": "ACC-4712", "ReferringPhysicianName": "Doctor^No"}
    folder.mkdir()
    for i in range(40):
        dicom(folder / f"{i}.dcm", "LL" if i == 3 else "PA", **who)
    (folder / "studies.csv").write_text("film,findings\n" + "".join(f"{i}.dcm,Clear.\n" for i in range(40)))
    record, table, _, news = made(folder, tmp_path / "out", "data.source=folder")
    refused = pd.read_parquet(tmp_path / "out" / "refused.parquet")
    assert len(table) == 39 and refused["study"].tolist() == ["3"] and "lateral view" in refused["reason"][0]
    told = [json.dumps(record), *news, table.to_csv(), refused.to_csv()]
    told += [path.read_bytes().decode("latin-1") for path in (tmp_path / "out").iterdir()]
    assert not [value for value in who.values() for text in told if value in text]


# ---- what is documented


def test_the_readme_prints_the_schema():
    text = (ROOT / "data_manifests" / "README.md").read_text(encoding="utf-8")
    for name, meaning in [*SCHEMA.items(), *FITTED.items(), *FOLDER_COLUMNS.items()]:
        assert f"| `{name}` | {meaning} |" in text, f"data_manifests/README.md lacks the column {name}: {meaning}"
