"""Assembled reports: order, contradictions, accounts, and FHIR."""

import base64
import json
import random
from xml.etree import ElementTree

import pytest

from llava_ta.assemble import FHIR_NOTE, assemble, contradictions, read_claims
from llava_ta.generate import TopicFinding
from llava_ta.metrics import label_matrix
from llava_ta.ontology import ASKED, region_set

# Sentences of a topic, normal or denied first: every pair of an organ and a disease can be drawn together.
SENTENCES: dict[str, tuple[list[str], list[str]]] = {
    "organ-lungs": (["The lungs are clear.", "The lungs are normal.", "No pulmonary abnormality."],
                    ["The lungs are hyperinflated.", "There are low lung volumes."]),
    "organ-pleura": (["The pleural spaces are clear.", "The costophrenic angles are sharp."], []),
    "organ-heart": (["The heart is normal in size.", "The cardiac silhouette is unremarkable."],
                    ["The heart size is borderline."]),
    "organ-mediastinum": (["The cardiomediastinal silhouette is normal.", "The mediastinum is unremarkable."],
                          ["The aorta is tortuous.", "There is mediastinal widening."]),
    "organ-diaphragm": (["The diaphragm is normal."], ["There is elevation of the right hemidiaphragm."]),
    "organ-bones": (["The bones are intact.", "No acute bony abnormality.", "The bones are unremarkable."],
                    ["There are degenerative changes of the spine.", "There is a left rib fracture."]),
    "organ-abdomen": (["The upper abdomen is unremarkable.", "Free air is absent."],
                      ["There is free air under the right hemidiaphragm."]),
    "disease-cardiomegaly": (["Cardiomegaly is absent."], ["There is mild cardiomegaly.", "The heart is enlarged."]),
    "disease-lung opacity": (["Lung opacity is absent.", "No focal airspace disease."],
                             ["There is a hazy opacity in the right base.", "There is scarring in the left apex."]),
    "disease-lung lesion": (["Lung lesion is absent."], ["There is a calcified granuloma in the left upper lobe."]),
    "disease-edema": (["Edema is absent.", "The pulmonary vascularity is normal."],
                      ["There is mild interstitial pulmonary edema.", "There is severe edema."]),
    "disease-consolidation": (["Consolidation is absent.", "No lobar consolidation or pneumonia."],
                              ["There is consolidation in the left lower lobe."]),
    "disease-pneumothorax": (["Pneumothorax is absent.", "No right pneumothorax or large effusion."],
                             ["There is a small right apical pneumothorax.", "There is a left tension pneumothorax."]),
    "disease-pleural effusion": (["Pleural effusion is absent."],
                                 ["There is a large left pleural effusion.", "There are small bilateral effusions."]),
    "disease-pleural other": (["Pleural other is absent."], ["There is biapical pleural thickening."]),
    "disease-fracture": (["Fracture is absent.", "Acute fracture is absent."],
                         ["There is a healed right rib fracture."]),
    "special-support devices": (["Support devices are absent."],
                                ["The endotracheal tube ends in the right mainstem bronchus."]),
    "special-patient status": ([], ["The patient is rotated to the left."]),
}


def finding(topic: str, sentence: str, score: float = 0.9) -> TopicFinding:
    """Answer a topic."""
    return TopicFinding(topic, region_set(topic), score, sentence)


def drawn(seed: int) -> list[TopicFinding]:
    """Draw a report whose sentences do not know each other; some answer another topic, some compare or say nothing."""
    rng = random.Random(seed)
    every = [text for normal, abnormal in SENTENCES.values() for text in normal + abnormal]
    answers = []
    for topic, (normal, abnormal) in SENTENCES.items():
        own = rng.choice((abnormal if rng.random() < 0.45 and abnormal else normal) or abnormal)
        other = rng.choice([rng.choice(every), "Unchanged.", "", f"{own} {rng.choice(every)}"])
        answers.append(finding(topic, other if rng.random() < 0.2 else own, rng.random()))
    rng.shuffle(answers)
    return answers


REPORTS = [drawn(seed) for seed in range(200)]


def test_no_contradiction_is_left():
    raw = sum(len(contradictions(one.sentence for one in answers)) for answers in REPORTS)
    assert raw > 500, "the reports are meant to contradict themselves"
    left = [(report.findings, str(found)) for report in map(assemble, REPORTS)
            for found in contradictions([report.findings, report.impression])]
    assert not left, left[:3]


def test_no_finding_is_lost():
    for answers in REPORTS:
        report = assemble(answers)
        raw, text = label_matrix([report.raw, report.findings]).astype(bool)
        assert not (raw & ~text)[:13].any(), (report.raw, report.findings)


def test_every_statement_is_accounted_for():
    for answers in REPORTS:
        report = assemble(answers)
        assert {part.sentence for part in report.parts} == {one.sentence for one in answers}
        for part in report.parts:
            assert part.outcome in ("kept", "qualified", "merged", "dropped")
            assert bool(part.why) == (part.outcome != "kept"), part
            if part.polarity in ("present", "uncertain") and part.outcome == "kept":
                assert part.words in report.findings


def test_order_of_the_answers_does_not_change_what_is_said():
    for answers in REPORTS[:50]:
        forth, back = (assemble(order).findings for order in (answers, answers[::-1]))
        assert (label_matrix([forth]) == label_matrix([back])).all() and not contradictions([back]), (forth, back)


def test_assembling_twice_changes_nothing():
    for answers in REPORTS[:50]:
        once = assemble(answers).findings
        again = assemble([TopicFinding("", "all", 1.0, once)]).findings
        assert (label_matrix([once]) == label_matrix([again])).all(), (once, again)


def test_urgent_findings_come_first():
    report = assemble([
        finding("organ-heart", "The heart is enlarged."),
        finding("special-support devices", "The endotracheal tube ends in the right mainstem bronchus."),
        finding("organ-abdomen", "There is free air under the right hemidiaphragm."),
        finding("disease-pleural effusion", "There is a large left pleural effusion."),
        finding("disease-pneumothorax", "There is a right tension pneumothorax."),
    ])
    places = [report.findings.index(word) for word in ("tension", "free air", "endotracheal", "large left", "enlarged")]
    assert places == sorted(places)
    assert report.impression.startswith("Urgent: right tension pneumothorax; free air")


def test_a_finding_told_in_answer_to_another_topic_is_kept():
    report = assemble([finding("disease-pneumothorax", "Pneumothorax is absent."),
                       finding("organ-bones", "There is a small right pneumothorax.")])
    assert report.findings == "There is a small right pneumothorax."


def test_spread_disease_leaves_no_clear_lungs():
    report = assemble([finding("organ-lungs", "The lungs are clear."), finding("disease-edema", "There is edema.")])
    assert report.findings == "There is edema." and report.parts[0].outcome == "dropped"


def test_hedges_are_kept_and_marked():
    report = assemble([finding("disease-pneumonia", "Possible pneumonia in the left base.")])
    assert report.findings == "Possible pneumonia in the left base." and report.parts[0].polarity == "uncertain"


NONSENSE = ["!!!", "<unk> <unk>", "a" * 2000, "No no no.", "is absent.", "; ; .", "\n\n", "…"]


@pytest.mark.parametrize("sentence", NONSENSE)
def test_nonsense_does_not_break_it(sentence: str):
    report = assemble([finding("disease-edema", sentence), finding("organ-lungs", "The lungs are clear.")])
    assert "lungs are" in report.findings and len(report.parts) >= 2


def test_claims_are_read_by_words_and_not_by_topic():
    assert [claim.topic for claim in read_claims("The heart is normal in size; there is an effusion.")] == [
        "organ-heart", "disease-pleural effusion"]


# ---- FHIR R4: https://hl7.org/fhir/R4/diagnosticreport.html, observation.html, device.html

CONCEPT = {"coding", "text"}
ELEMENTS = {  # of each resource, those that we write or might
    "DiagnosticReport": {"resourceType", "id", "meta", "text", "contained", "identifier", "status", "category", "code",
                         "subject", "effectiveDateTime", "issued", "performer", "result", "conclusion",
                         "presentedForm"},
    "Observation": {"resourceType", "id", "status", "category", "code", "valueCodeableConcept", "interpretation",
                    "note", "bodySite", "device", "component"},
    "Device": {"resourceType", "id", "deviceName", "type", "version", "note"},
}
MANY = {"category", "identifier", "result", "presentedForm", "contained", "interpretation", "note", "component",
        "deviceName"}
STATUS = {"registered", "partial", "preliminary", "final", "amended", "corrected", "appended", "cancelled"}
NAME_TYPES = {"udi-label-name", "user-friendly-name", "patient-reported-name", "manufacturer-name", "model-name",
              "other"}


def check_resource(resource: dict) -> None:
    """Check a resource's elements against the standard: known, of the right number, no empty value."""
    kind = resource["resourceType"]
    assert set(resource) <= ELEMENTS[kind], set(resource) - ELEMENTS[kind]
    for name, value in resource.items():
        assert value not in ("", [], {}, None), f"{kind}.{name} is empty, which FHIR forbids"
        assert isinstance(value, list) == (name in MANY), f"{kind}.{name}"
    if kind != "Device":
        assert resource["status"] in STATUS and set(resource["code"]) <= CONCEPT
    for name in resource.get("deviceName", ()):
        assert set(name) == {"name", "type"} and name["type"] in NAME_TYPES


def check_report(resource: dict, study: str) -> None:
    """Check a DiagnosticReport and its contained resources."""
    check_resource(resource)
    assert resource["status"] == "preliminary" and not {"subject", "performer"} & set(resource)
    contained = {one["id"]: one for one in resource.get("contained", ())}
    assert len(contained) == len(resource.get("contained", ()))
    for one in contained.values():
        check_resource(one)
        assert not {"contained", "meta", "text"} & set(one), "dom-2 to dom-5: a contained resource holds none of these"
    whole = json.dumps(resource)
    for name in contained:
        assert f'"#{name}"' in whole, f"dom-3: nothing refers to {name}"
    for reference in [*resource.get("result", ()), *(one["device"] for one in contained.values() if "device" in one)]:
        assert reference["reference"].removeprefix("#") in contained
    div = ElementTree.fromstring(resource["text"]["div"])
    assert div.tag == "{http://www.w3.org/1999/xhtml}div" and "".join(div.itertext()).strip(), "txt-2: not empty"
    assert FHIR_NOTE in whole and base64.b64decode(resource["presentedForm"][0]["data"], validate=True)
    assert [one["value"] for one in resource.get("identifier", ())] == ([study] if study else [])


CASES = [*REPORTS[:60], [], [finding("organ-lungs", "")], [finding("special-patient status", "Rotation <5° & tilt.")]]


@pytest.mark.parametrize("study", ["", "study-1"])
def test_fhir_has_the_form_of_the_standard(study: str):
    for answers in CASES:
        check_report(assemble(answers, study).to_fhir(), study)


def test_the_form_check_finds_faults():
    good = assemble(REPORTS[0], "s").to_fhir()
    for spoil in ({"status": "done"}, {"result": []}, {"conclusion": ""}, {"category": good["category"][0]},
                  {"findings": "x"}, {"result": [{"reference": "#nothing"}]}):
        with pytest.raises((AssertionError, KeyError)):
            check_report({**good, **spoil}, "s")


def test_fhir_says_what_the_report_says():
    for answers in CASES:
        report = assemble(answers)
        codes = {"present": "POS", "absent": "NEG", "uncertain": "IND"}
        for one in report.to_fhir().get("contained", ()):
            if one["resourceType"] == "Observation":
                said = {part.polarity for part in report.parts
                        if part.topic.partition("-")[2] == one["code"]["text"] and part.outcome != "dropped"}
                first = next(name for name in codes if name in said)
                assert one["interpretation"][0]["coding"][0]["code"] == codes[first]


def test_fhirclient_accepts_it():
    diagnosticreport = pytest.importorskip(
        "fhirclient.models.diagnosticreport", reason="fhirclient, which checks FHIR R4, is not installed: make install")
    validation = pytest.importorskip("fhirclient.models.fhirabstractbase")
    for answers in CASES:
        resource = assemble(answers, "study-1").to_fhir()
        read = diagnosticreport.DiagnosticReport(json.loads(json.dumps(resource)), strict=True)
        assert read.as_json() == resource
    with pytest.raises(validation.FHIRValidationError):
        diagnosticreport.DiagnosticReport({**resource, "status": 3}, strict=True)


def test_every_topic_can_be_assembled():
    report = assemble([finding(topic, SENTENCES[topic][0][0]) for topic in ASKED if SENTENCES.get(topic, [[]])[0]])
    assert report.impression == "" and "dropped" not in {part.outcome for part in report.parts}
