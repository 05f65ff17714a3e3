"""No number without its source."""

import json

import jinja2
import pytest

from modeling_llava.records.figures import add_source, build_environment, read_results, refuse_loose_figures

RUN = {"seed": 0, "commit": "0123abc", "command": "llava eval", "results": []}
RESULT = {"benchmark": "POPE", "dataset": "lmms-lab/POPE", "split": "test", "metric": "f1", "value": 0.859, "n": 9000}


@pytest.mark.parametrize("expression", ["value", "value | figure('.2f')", "1 + 1", "names | length", "sourced * 2"])
def test_a_template_prints_no_bare_number(expression):
    template = build_environment().from_string("{{ " + expression + " }}")
    with pytest.raises(ValueError, match="got the number .* without its source"):
        template.render(value=0.9, names=["a"], sourced=add_source(0.5, "results/pope.json"))


def test_a_template_prints_numbers_of_files():
    template = build_environment().from_string("{{ a }} {{ b | figure(',') }} {{ c | figure('.1%') }} {{ yes }}")
    values = add_source({"a": 0.859, "b": 9000, "c": 0.5, "yes": True}, "results/pope.json")
    assert template.render(**values) == "0.859 9,000 50.0% True"
    assert values["a"].source == "results/pope.json"


def test_a_name_that_is_not_given_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        build_environment().from_string("{{ value }}").render()


def write_results(folder, content) -> None:
    (folder / "results").mkdir()
    (folder / "results" / "pope.json").write_text(json.dumps(content))


def test_results_know_how_to_repeat_them(tmp_path):
    write_results(tmp_path, RUN | {"results": [RESULT]})
    (result,) = read_results(tmp_path)
    assert (result.value, result.n, result.seed, result.commit) == (0.859, 9000, 0, "0123abc")
    assert result.value.source == result.n.source == "results/pope.json"


@pytest.mark.parametrize("missing", ["seed", "commit", "command", "results"])
def test_a_run_that_lacks_something_is_refused(tmp_path, missing):
    write_results(tmp_path, {name: value for name, value in RUN.items() if name != missing})
    with pytest.raises(ValueError, match="pope.json; expected one object with command, commit, results, seed"):
        read_results(tmp_path)


def test_a_result_without_n_is_refused(tmp_path):
    write_results(tmp_path, RUN | {"results": [{name: value for name, value in RESULT.items() if name != "n"}]})
    with pytest.raises(ValueError, match="got a result in .*pope.json"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "right in 94% of cases",
        "an accuracy of 0.94",
        "about 94,5 %",
        "F1 is .86",
        "POPE 85.9 and MME 1510",
        "It scores 1510.7.",
        "94 of 100 answers",
        "94 out of the 100",
        "94 percent are right",
        "right in 94 per cent",
    ],
)
def test_figures_in_texts_are_refused(text):
    with pytest.raises(ValueError, match="got the figure .* in summary; expected figures in files of results/"):
        refuse_loose_figures(text, "summary")


@pytest.mark.parametrize(
    "text",
    [
        "LLaVA v1.5 7B",
        "558000 pairs",
        "CC BY-NC 4.0",
        "two layers",
        "v0.1.0",
        "10.5 million",
        "torch 2.13.0",
        "arXiv 2310.03744",
        "a model of 13.5B",
        "2014 to 2015",
    ],
)
def test_other_numbers_in_texts_stay(text):
    refuse_loose_figures(text, "summary")
