"""answered.py: answers are generated once, and taken only for what they were generated for. Seconds."""
import shutil

import pytest
import torch

import evaluate
import export
import answered
import lcdd
from carrier import load
from files import InputError, load_tensors, read_header, read_json, save_tensors, write_json
from helpers import brief, jsonl
from run import load_model, other_tests, reopen


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
    return net, answered.origins(run, net, chat, **(told | changed))


def test_they_are_what_generate_answers(trained):
    config, chat, splits = reopen(trained)
    net, origin = opened(trained)
    found = answered.read(trained, origin)
    prompts = [chat.prompt(s.prompt, config["max_len"]) for s in splits["test"]]
    sft = load(trained / "sft.safetensors", net)
    assert set(found) == set(origin) == {"base", "sft", "lcdd"}
    assert found["base"] == net.generate(prompts, config["max_new_tokens"])
    assert found["sft"] == net.generate(prompts, config["max_new_tokens"], carrier=sft)


@pytest.mark.parametrize("changed", [{"max_new_tokens": 5}, {"max_len": 40}])
def test_other_lengths_have_other_answers(trained, changed):
    assert answered.read(trained, opened(trained, **changed)[1]) == {}


def test_other_prompts_have_other_answers(trained):
    samples = reopen(trained)[2]["validation"]
    assert answered.read(trained, opened(trained, samples=samples)[1]) == {}


@pytest.mark.parametrize("change", [lambda net: setattr(net, "stop", {5}), lambda net: net.bfloat16()])
def test_another_end_and_other_numbers_have_other_answers(trained, change):
    config, chat, splits = reopen(trained)
    net = load_model(chat, "cpu", config["dtype"])
    change(net)
    origin = answered.origins(
        trained, net, chat, splits["test"], config["max_new_tokens"], config["max_len"])
    assert answered.read(trained, origin) == {}


def test_another_carrier_has_answers_of_its_own(trained):
    file = trained / "carrier.safetensors"
    before = file.read_bytes()
    net, _ = opened(trained)
    settings = read_header(file)["settings"]
    load(file, net).with_gates(False).save(file, net, settings=settings)
    try:
        assert set(answered.read(trained, opened(trained)[1])) == {"base", "sft"}
    finally:
        file.write_bytes(before)


def test_an_evaluation_generates_none_of_them_again(trained, monkeypatch, undrawn):
    asked = []
    generate = evaluate.model.Llama.generate

    def counted(net, *args, **kwargs):
        asked.append(args)
        return generate(net, *args, **kwargs)

    monkeypatch.setattr(evaluate.model.Llama, "generate", counted)
    evaluate.main(["--run", str(trained), "--device", "cpu"])
    assert asked == []
    first = read_json(trained / "results.json")
    (trained / answered.FILE).unlink()
    evaluate.main(["--run", str(trained), "--device", "cpu"])
    assert len(asked) == 3
    again = read_json(trained / "results.json")
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


def computed(monkeypatch, run, *more):
    """Forward passes of an evaluation by the names of their weights, and its results."""
    asked = []
    hidden = evaluate.model.Llama.hidden

    def counted(net, ids, carrier=None, *args, **kwargs):
        asked.append("base" if carrier is None else "row")
        return hidden(net, ids, carrier, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.model.Llama, "hidden", counted)
        evaluate.main(["--run", str(run), "--device", "cpu", *more])
    return asked, {**read_json(run / "results.json"), "seconds": 0}


def test_hidden_states_are_made_once_a_run(trained, monkeypatch, undrawn):
    """A second evaluation teacher-forces nothing again and finds the same; without the end, anew."""
    (trained / answered.STATES).unlink(missing_ok=True)
    first, results = computed(monkeypatch, trained)
    second, again = computed(monkeypatch, trained)
    assert again == results
    # what is left: whether the base and the gates shut are one
    assert len(first) - len(second) == 2 * 3
    assert computed(monkeypatch, trained, "--no-eos")[0] == first
    assert computed(monkeypatch, trained)[0] == first


def test_states_of_another_shape_are_made_anew(trained, monkeypatch, undrawn):
    _, results = computed(monkeypatch, trained)
    tensors, header = load_tensors(trained / answered.STATES)
    spoilt = {name: h[:-1] for name, h in tensors.items()}
    save_tensors(trained / answered.STATES, spoilt, **header)
    assert computed(monkeypatch, trained)[1] == results


def test_states_of_other_answers_are_not_taken(trained, monkeypatch, undrawn):
    first, _ = computed(monkeypatch, trained)
    net, origin = opened(trained)
    assert answered.read_states(trained, origin, True)
    assert answered.read_states(trained, origin | {"sft": "another"}, True) == {}
    assert answered.read_states(trained, origin, False) == {}


def test_every_batch_has_states_of_its_own(trained):
    """Batches of one prompt each, all as long as the others: kept states are those of the batch."""
    net, _ = opened(trained)
    prompts, answers = [[1, 5, 9], [1, 7, 2], [1, 3, 4]], [[6, 8], [9, 9], [2, 5]]
    kept = evaluate.States(keep=["base"])
    made, first, again = [], [], []
    for losses, states in ((made, None), (first, kept), (again, kept)):
        base = {"base": (None, None)}
        for _, token, logp in evaluate.log_probabilities(net, prompts, answers, base, 1, states=states):
            losses += logp["base"].gather(1, token[:, None]).flatten().tolist()
    assert made == first == again
    assert len(kept.found) == 3


def test_several_processes_keep_no_states(trained, tmp_path, monkeypatch):
    """Each has those of its own share, which are none for one process or for another number."""
    answered.write_states(tmp_path, {"x": torch.ones(2, 3)}, {"base": "o"}, True)
    assert answered.read_states(tmp_path, {"base": "o"}, True).keys() == {"x"}
    monkeypatch.setattr(answered, "world", lambda: 2)
    assert answered.read_states(tmp_path, {"base": "o"}, True) == {}
    (tmp_path / answered.STATES).unlink()
    answered.write_states(tmp_path, {"x": torch.ones(2, 3)}, {"base": "o"}, True)
    assert not (tmp_path / answered.STATES).exists()


def test_other_test_prompts_have_a_table_of_their_own(trained, tmp_path, capsys, undrawn):
    evaluate.main(["--run", str(trained), "--device", "cpu"])
    kept = {f: (trained / f).read_bytes() for f in (answered.FILE, "results.json", "results.md")}
    splits = reopen(trained)[2]
    known, new = splits["train"][0].prompt, ["Say hello .", "Tell me what is blue ."]
    other = tmp_path / "other.jsonl"
    jsonl(other, [{"prompt": p} for p in [known, *new]])
    capsys.readouterr()
    evaluate.main(["--run", str(trained), "--device", "cpu", "--test", str(other)])
    said = capsys.readouterr()
    assert "1 of 3 prompts are known to the run: left out" in said.err
    assert "2 held-out prompts of other.jsonl" in said.out
    assert read_json(trained / "results-other.json")["prompts"] == 2
    assert kept == {f: (trained / f).read_bytes() for f in kept}


def test_other_test_prompts_are_no_more_than_the_runs(trained, tmp_path):
    config, chat, splits = reopen(trained)
    many = tmp_path / "many.jsonl"
    jsonl(many, [{"prompt": f"Say the word {i} ."} for i in range(config["n_test"] + 3)])
    assert len(other_tests(many, config, chat, splits)) == config["n_test"]


def test_test_prompts_that_the_run_knows_are_refused(trained, tmp_path):
    known = tmp_path / "known.jsonl"
    jsonl(known, [{"prompt": s.prompt} for s in reopen(trained)[2]["validation"]])
    with pytest.raises(InputError, match="trained or chosen on every prompt of it"):
        evaluate.main(["--run", str(trained), "--device", "cpu", "--test", str(known)])
    with pytest.raises(InputError, match="--test names prompts to measure on"):
        evaluate.main(["--run", str(trained), "--test", str(known), "--ask", "hello"])


def test_without_sft_the_rest_is_measured(trained, tmp_path, capsys, undrawn):
    """A carrier that travels alone, as the ones in carriers/ do: no data are needed to ask it."""
    evaluate.main(["--run", str(trained), "--device", "cpu"])
    whole = read_json(trained / "results.json")
    run = tmp_path / "alone"
    shutil.copytree(trained, run)
    (run / "sft.safetensors").unlink()
    evaluate.main(["--run", str(run), "--device", "cpu"])
    said = capsys.readouterr()
    assert "holds no sft.safetensors, and SFT is left out" in said.err
    found = read_json(run / "results.json")
    assert set(found["rates"]) == {"base", "lcdd", "shut"}
    assert found["loss_own"] == {k: v for k, v in whole["loss_own"].items() if k != "sft"}
    assert "kl" not in found

    config = read_json(run / "config.json") | {"data": "not_here.json"}
    write_json(run / "config.json", config)
    evaluate.main(["--run", str(run), "--device", "cpu", "--ask", "What is two plus two ?"])
    assert "Base" in capsys.readouterr().out


def test_exported_without_sft_it_answers(trained, tmp_path, capsys):
    """export.py --as run: no path of this machine, no data, and the answers of the run itself."""
    asked = ["--device", "cpu", "--ask", "What is two plus two ?"]
    export.main(["--run", str(trained), "--to", str(tmp_path), "--as", "run"])
    travels = tmp_path / "run"
    assert not (travels / "sft.safetensors").exists()
    for name in ("config.json", "results.json"):
        texts = [v for v in read_json(travels / name).values() if isinstance(v, str)]
        assert not [text for text in texts if text.startswith("/")]
    capsys.readouterr()
    answers = []
    for run in (trained, travels):
        evaluate.main(["--run", str(run), *asked])
        lines = capsys.readouterr().out.splitlines()
        answers.append([line for line in lines if line.strip().startswith(("Base", "LCDD"))])
    assert answers[0] == answers[1]
    assert len(answers[0]) == 2
    with pytest.raises(InputError, match="other.safetensors: no such trigger"):
        export.main(["--run", str(trained), "--to", str(tmp_path), "--as", "run", "--trigger", "other"])
    with pytest.raises(InputError, match="--as run is for the LCDD carrier"):
        export.main(["--run", str(trained), "--to", str(tmp_path), "--as", "run", "--which", "sft"])


@pytest.mark.parametrize("name", (answered.FILE, answered.STATES))
def test_a_damaged_file_is_refused_by_name(trained, name, undrawn):
    evaluate.main(["--run", str(trained), "--device", "cpu"])
    file = trained / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(InputError, match=f"{name}: damaged"):
            evaluate.main(["--run", str(trained), "--device", "cpu"])
    finally:
        file.write_bytes(whole)
