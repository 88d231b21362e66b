"""kept.py: answers are generated once, and taken only for what they were generated for. Seconds."""
import pytest

import evaluate
import kept
import lcdd
from carrier import load
from files import InputError, read_header, read_json
from helpers import brief
from run import load_model, reopen


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory that lcdd.py has finished."""
    run = tmp_path_factory.mktemp("kept") / "run"
    lcdd.main(brief("--out", str(run)))
    return run


def opened(run, **changed):
    """(net, origins) of a run, as evaluate.py asks for them."""
    config, chat, splits = reopen(run)
    net = load_model(chat, "cpu", config["dtype"])
    told = dict(samples=splits["test"], max_new_tokens=config["max_new_tokens"],
                max_len=config["max_len"])
    return net, kept.origins(run, net, chat, **(told | changed))


def test_they_are_what_generate_answers(trained):
    config, chat, splits = reopen(trained)
    net, origin = opened(trained)
    found = kept.read(trained, origin)
    prompts = [chat.prompt(s.prompt, config["max_len"]) for s in splits["test"]]
    sft = load(trained / "sft.safetensors", net)
    assert set(found) == set(origin) == {"base", "sft", "lcdd"}
    assert found["base"] == net.generate(prompts, config["max_new_tokens"])
    assert found["sft"] == net.generate(prompts, config["max_new_tokens"], carrier=sft)


@pytest.mark.parametrize("changed", [{"max_new_tokens": 5}, {"max_len": 40}])
def test_other_lengths_have_other_answers(trained, changed):
    assert kept.read(trained, opened(trained, **changed)[1]) == {}


def test_other_prompts_have_other_answers(trained):
    samples = reopen(trained)[2]["validation"]
    assert kept.read(trained, opened(trained, samples=samples)[1]) == {}


def test_another_carrier_has_answers_of_its_own(trained):
    file = trained / "carrier.safetensors"
    before = file.read_bytes()
    net, _ = opened(trained)
    settings = read_header(file)["settings"]
    load(file, net).with_gates(False).save(file, net, settings=settings)
    try:
        assert set(kept.read(trained, opened(trained)[1])) == {"base", "sft"}
    finally:
        file.write_bytes(before)


def test_an_evaluation_generates_none_of_them_again(trained, monkeypatch):
    asked = []
    generate = evaluate.model.Llama.generate

    def counted(net, *args, **kwargs):
        asked.append(args)
        return generate(net, *args, **kwargs)

    monkeypatch.setattr(evaluate.model.Llama, "generate", counted)
    monkeypatch.setattr(evaluate, "figure", lambda *_: None)
    evaluate.main(["--run", str(trained), "--device", "cpu"])
    assert asked == []
    first = read_json(trained / "results.json")
    (trained / kept.FILE).unlink()
    evaluate.main(["--run", str(trained), "--device", "cpu"])
    assert len(asked) == 3
    again = read_json(trained / "results.json")
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


def test_a_damaged_file_is_refused_by_name(trained):
    file = trained / kept.FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(InputError, match=f"{kept.FILE}: damaged"):
            kept.read(trained, opened(trained)[1])
    finally:
        file.write_bytes(whole)
