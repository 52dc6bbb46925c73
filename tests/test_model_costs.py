"""benchmarks/model_costs.py on tiny models: every side runs, and its shares are of what they are said to be."""

import model_costs
import pytest
import zoo


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_every_method_has_a_line(name, monkeypatch):
    monkeypatch.setattr(model_costs, "KEEP", 4)
    case = zoo.case(name)
    tiny = model_costs.Case(name, tokens=36, build=lambda: case.model, inputs=lambda: case.inputs(((0,),)))
    lines = model_costs.measure(tiny, model_costs.METHODS, runs=1)
    assert [line[1] for line in lines] == ["all tokens", *model_costs.METHODS]
    for _, _, encoder, scores, operator, share, _, of_all in lines[1:]:
        assert 0 < float(scores) < float(encoder) + 1 and float(operator) > 0 and share.endswith(" %")
        assert of_all.endswith(f"tokens {44 / 76:.3f}")  # of 40 tokens of text and 4 of 36
    assert not hasattr(case.model, "condense_handle")
