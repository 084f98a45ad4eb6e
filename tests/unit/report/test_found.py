"""The rows that say what was found of a model and what stays."""

from leangrid.report.found import describe_found

STRUCTURE = {
    "lists": ["model.layers"],
    "blocks": 24,
    "calls": 24,
    "kinds": [
        {"count": 18, "module": "Mixer", "groups": [["mixer.in_proj"], ["mixer.out_proj", "mlp.up_proj", "mlp.gate"]]},
        {"count": 6, "module": "Mixer", "groups": []},
    ],
    "flows": [],
    "idle": 0,
}


def test_blocks_kinds_and_what_flows() -> None:
    assert describe_found(STRUCTURE, [], None) == [
        ("blocks", "24 in model.layers"),
        ("18 Mixer", "mixer.in_proj | mixer.out_proj, mlp.{up_proj, gate}"),
        ("6 Mixer", "nothing"),
        ("between blocks", "hidden states"),
    ]


def test_a_model_that_is_not_a_chain() -> None:
    more = {"calls": 48, "idle": 3, "flows": [f"flow {number}" for number in range(6)]}
    rows = dict(describe_found(STRUCTURE | more, [], None))
    assert rows["blocks"] == "24 in model.layers, called 48 times in a pass; 3 more that text does not reach"
    assert rows["between blocks"] == "hidden states, and: flow 0; flow 1; flow 2; flow 3; and 2 more"


def test_what_stays_has_a_row_for_each_reason() -> None:
    kept = [
        {"name": "a.*.gate", "why": "routes", "count": 24},
        {"name": "lm_head", "why": "outside", "count": 1},
        *({"name": f"b{number}", "why": "routes", "count": 1} for number in range(7)),
    ]
    stays = [text for name, text in describe_found(STRUCTURE, kept, None) if name == "stays"]
    assert stays == ["a.*.gate (24), b0, b1, b2, b3, b4 and 2 more: routes", "lm_head: outside"]


def test_a_source_in_fewer_bits_comes_first() -> None:
    source = {"method": "fp8", "what": "FP8 with 128 x 128 scales", "tensors": 7, "bytes": 3_200_000_000}
    said = "3.2 GB of FP8 with 128 x 128 scales (fp8); 7 tensors are dequantized as they are read"
    assert describe_found(STRUCTURE, [], source)[0] == ("source", said)


def test_a_result_without_a_word_of_it_has_no_rows() -> None:
    assert describe_found({}, [], None) == []
