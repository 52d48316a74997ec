"""LoRA adapters in the one program: each row has its own, and the tokens are a merged model's."""

from dataclasses import replace

import numpy as np
import pytest

from pallasite.engine import ConfigError, ErrorCode, RequestError
from pallasite.models.sharding import MeshShape
from tests.engine.harness import MAIN, greedy, held_open, lively_tensors, random_prompt, tokens
from tests.peft_adapters import Peft
from tests.tiny_checkpoints import TINY, write_hf

ROOMY = replace(MAIN, max_adapters=3, max_adapter_rank=8)

ADAPTERS = {
    "all": Peft(tensors=lively_tensors(), rank=4, seed=1),
    "attention": Peft(tensors=lively_tensors(), rank=8, targets=("q_proj", "v_proj"), seed=2),
    "down": Peft(
        tensors=lively_tensors(),
        rank=2,
        targets=("down_proj", "o_proj"),
        seed=3,
        settings={"use_rslora": True},
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {name: peft.write(folder / name) for name, peft in ADAPTERS.items()}


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(7)
    return [random_prompt(rng, n) for n in (5, 40, 90, 17)]


@pytest.fixture(scope="module")
def expected(engines, prompts, tmp_path_factory):
    """The answers of models with each adapter merged into the weights, and of the base."""
    answers = {}
    for name in ("", *ADAPTERS):
        tensors = ADAPTERS[name].merged() if name else lively_tensors()
        folder = write_hf(tmp_path_factory.mktemp("merged") / "m", TINY, tensors)
        with engines.fresh(MAIN, folder) as engine:
            answers[name] = tokens(engine.generate([ask(p) for p in prompts]))
    assert len({tuple(map(tuple, answer)) for answer in answers.values()}) == len(answers)
    return answers


def ask(prompt, adapter=""):
    return replace(greedy(prompt, max_tokens=16, ignore_eos=True), adapter=adapter)


def long(prompt, adapter=""):
    return replace(greedy(prompt, max_tokens=200, ignore_eos=True), adapter=adapter)


@pytest.mark.parametrize(
    "mesh",
    [MeshShape(), MeshShape(model=4), MeshShape(data=2), MeshShape(data=2, model=2)],
    ids=str,
)
def test_many_adapters_in_one_batch_give_the_merged_models_tokens(
    engines, folders, prompts, expected, mesh, monkeypatch
):
    with engines.fresh(replace(ROOMY, mesh=mesh)) as engine:
        before = tokens(engine.generate([ask(p) for p in prompts]))
        for name, folder in folders.items():
            engine.load_adapter(name, folder)
        assert engine.adapter_names() == list(folders)
        pairs = [(prompt, name) for prompt in prompts for name in ("", *folders)]
        answers = tokens(engine.generate([ask(*pair) for pair in pairs]))
        for name in expected:
            own = [a for a, pair in zip(answers, pairs, strict=True) if pair[1] == name]
            assert own == expected[name], name
        assert before == expected[""]
        assert engine.metrics.compilations == 0
        assert engine.metrics.misses == 0


def test_a_slot_serves_one_adapter_after_another(engines, folders, prompts, expected):
    with engines.fresh(replace(ROOMY, max_adapters=1)) as engine:
        for name in (*folders, *folders):
            engine.load_adapter(name, folders[name])
            assert tokens(engine.generate([ask(p, name) for p in prompts])) == expected[name]
            engine.unload_adapter(name)
            with pytest.raises(RequestError, match="not loaded; loaded are: none") as caught:
                engine.submit(ask(prompts[0], name))
            assert (caught.value.code, caught.value.field) == (ErrorCode.NOT_FOUND, "adapter")
            assert tokens(engine.generate([ask(p) for p in prompts])) == expected[""]
        assert engine.metrics.compilations == 0


@pytest.mark.parametrize("mesh", [MeshShape(), MeshShape(data=2)], ids=str)
def test_adapters_come_and_go_while_requests_of_others_are_open(
    engines, folders, prompts, expected, mesh, monkeypatch
):
    with engines.fresh(replace(ROOMY, mesh=mesh)) as engine:
        engine.load_adapter("all", folders["all"])
        engine.load_adapter("spare", folders["down"])  # one slot of three is left
        requests = [long(prompt, name) for prompt in prompts[:2] for name in ("all", "")]
        alone = tokens(engine.generate(requests))
        with held_open(engine, monkeypatch, 200):
            streams = [iter(engine.submit(request)) for request in requests]
            firsts = [next(stream).token_ids for stream in streams]
            engine.unload_adapter("all")
            for name in ("down", "attention"):
                engine.load_adapter(name, folders[name])
                assert tokens(engine.generate([ask(prompts[0], name)])) == expected[name][:1]
                with pytest.raises(RequestError, match="all 3 slots are in use"):
                    engine.load_adapter("all", folders["all"])
                engine.unload_adapter(name)
            assert engine.current_load().num_running == 4
        rests = [sum((event.token_ids for event in stream), ()) for stream in streams]
        assert [first + rest for first, rest in zip(firsts, rests, strict=True)] == alone
        assert engine.metrics.compilations == 0


def test_a_slot_in_use_is_not_given_away(engines, folders, prompts, expected):
    with engines.fresh(replace(ROOMY, max_adapters=1)) as engine:
        engine.load_adapter("all", folders["all"])
        stream = engine.prefill(ask(prompts[1], "all"), 60.0)
        [event] = list(stream)
        assert event.token_ids == expected["all"][1][:1]
        engine.unload_adapter("all")
        with pytest.raises(RequestError, match="all 1 slots are in use") as caught:
            engine.load_adapter("down", folders["down"])
        assert caught.value.code is ErrorCode.RESOURCE_EXHAUSTED
        handle = stream.handle
        events = list(engine.decode(handle.handle_id, handle.epoch, "", None))
        assert sum((e.token_ids for e in events), ()) == expected["all"][1][1:]
        engine.load_adapter("down", folders["down"])
        assert tokens(engine.generate([ask(prompts[0], "down")])) == expected["down"][:1]


def test_seeds_and_siblings_go_with_adapters(engines, folders, prompts):
    with engines.fresh(ROOMY) as engine:
        engine.load_adapter("all", folders["all"])
        request = ask(prompts[2], "all")
        request = replace(request, params=replace(request.params, temperature=0.9, n=3, seed=11))
        alone = tokens(engine.generate([request]))
        crowd = [ask(p) for p in prompts]
        assert tokens(engine.generate([*crowd, request, *crowd]))[4:7] == alone
        assert len(set(alone)) == 3


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        ({"rank": 9}, "adapter of rank 9; at most 8 is allowed"),
        ({"settings": {"r": 5}}, "r=5 this model needs"),
        ({"settings": {"peft_type": "LOHA"}}, "peft_type='LOHA'.*only 'LORA'"),
        ({"settings": {"use_dora": True}}, "use_dora=True"),
        ({"settings": {"bias": "all"}}, "bias='all'"),
        ({"settings": {"modules_to_save": ["lm_head"]}}, "modules_to_save"),
        (
            {"tensors": {"model.layers.0.self_attn.q_proj.weight": np.ones((32, 64))}},
            "another base",
        ),
        (
            {"tensors": {"model.layers.9.self_attn.q_proj.weight": np.ones((64, 64))}},
            "of its 2 layers",
        ),
        (
            {"targets": ("w1",), "tensors": {"model.layers.0.mlp.w1.weight": np.ones((64, 64))}},
            "may change k_proj, o_proj, q_proj, v_proj, down_proj, gate_proj, up_proj",
        ),
        (
            {"tensors": {"model.language_model.layers.0.mlp.up_proj.weight": np.ones((8, 8))}},
            "with a vision part",
        ),
        ({"targets": ()}, "without tensors"),
        ({"settings": {"lora_alpha": 1e41}}, "alpha scales beyond the floats"),
        ({"settings": {"lora_alpha": 1e308}}, "alpha scales beyond the floats"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    engines, prompts, expected, tmp_path, peft, message
):
    folder = Peft(**{"tensors": lively_tensors(), **peft}).write(tmp_path)
    engine = engines.get(ROOMY)
    with pytest.raises(ConfigError, match=message):
        engine.load_adapter("odd", folder)
    assert engine.adapter_names() == []
    assert tokens(engine.generate([ask(prompts[0])])) == expected[""][:1]


def test_a_name_is_one_adapters_and_an_engine_without_room_says_so(engines, folders):
    with engines.fresh(ROOMY) as engine:
        engine.load_adapter("all", folders["all"])
        for name, message in (("all", "is loaded"), ("", "1 to 128"), ("a\n", "1 to 128")):
            with pytest.raises(RequestError, match=message):
                engine.load_adapter(name, folders["down"])
        for name in ("b", ""):
            with pytest.raises(RequestError, match=f"'{name}', which is not loaded; .*are: all"):
                engine.unload_adapter(name)
    with pytest.raises(RequestError, match="start it with --max-adapters N") as caught:
        engines.get(MAIN).load_adapter("all", folders["all"])
    assert (caught.value.code, caught.value.field) == (ErrorCode.FAILED_PRECONDITION, "")


def test_where_there_is_no_room_no_file_is_read(engines, folders):
    with engines.fresh(replace(ROOMY, max_adapters=1)) as engine:
        engine.load_adapter("all", folders["all"])
        with pytest.raises(RequestError, match="all 1 slots are in use") as caught:
            engine.load_adapter("down", folders["down"] / "missing")
        assert caught.value.code is ErrorCode.RESOURCE_EXHAUSTED
    with pytest.raises(RequestError, match="without room for any"):
        engines.get(MAIN).load_adapter("all", folders["all"] / "missing")
