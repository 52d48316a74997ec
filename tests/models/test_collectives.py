"""What devices send each other in one forward pass, read off the compiled program.

On n devices that share a model: two sums of the residual stream's width in each layer, one for the
embedding and one gather of the logits. Weights and caches stay where they are.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallasite.models.checkpoint import open_checkpoint
from pallasite.models.kv_cache import CacheSpec
from pallasite.models.sharding import replicated, sharding
from pallasite.pallas_kernels.paged_attention import Ragged
from pallasite.pallas_kernels.target import CPU
from tests.families import FAMILY_MODELS
from tests.family_files import write_family_hf
from tests.models.running import Program, load, mesh_of
from tests.parity.tiny_models import TINY_MODELS
from tests.tiny_checkpoints import write_hf

B = 5
T = 29
"""No weight, scale or cache has as many of anything."""

_COLLECTIVE = re.compile(
    r"= (?P<result>.+?) (?P<kind>all-reduce|all-gather|all-to-all|ragged-all-to-all"
    r"|collective-permute|collective-broadcast|reduce-scatter)(-start)?\((?P<operands>.*?)\)"
)


@dataclass(frozen=True)
class Collective:
    """One instruction of a program.

    Attributes:
        kind: "all-reduce" and so on.
        depth: the loops that it is in.
        operands, results: shapes.
        groups: ids of the devices that exchange something.
    """

    kind: str
    depth: int
    operands: tuple[tuple[int, ...], ...]
    results: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]


class Module:
    """A program's text, cut into computations."""

    def __init__(self, text: str) -> None:
        self._lines: dict[str, list[str]] = {}
        self._shapes: dict[str, tuple[tuple[int, ...], ...]] = {}
        name = ""
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                name = "ENTRY" if header[1] else header[2]
                self._lines[name] = []
            elif definition := re.match(r"\s+(?:ROOT )?%([\w.-]+) = (.*)", line):
                self._lines[name].append(line)
                # The type stands before the operation's name and its operands.
                self._shapes[definition[1]] = shapes_in(
                    re.split(r" [a-z][\w-]*\(", definition[2])[0]
                )

    @cached_property
    def depths(self) -> dict[str, int]:
        """How many loops each computation that runs is in; counted once however often called."""
        depths = {"ENTRY": 0}
        waiting = ["ENTRY"]
        while waiting:
            caller = waiting.pop()
            for line in self._lines[caller]:
                called = re.findall(r"(?:body|condition|calls|to_apply)=%([\w.-]+)", line)
                called += re.findall(
                    r"%([\w.-]+)", "".join(re.findall(r"computations=\{.*?\}", line))
                )
                for name in called:
                    depth = depths[caller] + (" while(" in line)
                    assert depths.setdefault(name, depth) == depth, name
                    waiting.append(name)
        return depths

    def collectives(self) -> list[Collective]:
        """Returns all, from the outermost loop inwards."""
        found = []
        for name, depth in self.depths.items():
            for line in self._lines[name]:
                if match := _COLLECTIVE.search(line):
                    operands = re.findall(r"%([\w.-]+)", match["operands"])
                    found.append(
                        Collective(
                            kind=match["kind"],
                            depth=depth,
                            operands=sum((self._shapes[operand] for operand in operands), ()),
                            results=shapes_in(match["result"]),
                            groups=groups_in(line),
                        )
                    )
        return sorted(found, key=lambda collective: collective.depth)


def shapes_in(text):
    """The shapes of a type, one or those of a tuple: f32[24,64]{1,0} is (24, 64)."""
    sizes = re.findall(r"\w+\[([\d,]*)\]", text)
    return tuple(tuple(int(size) for size in one.split(",") if size) for one in sizes)


def groups_in(line):
    """The groups of devices, pairs among them, written out or as the rows of a reshaped iota."""
    if written := re.search(
        r"(?:replica_groups|source_target_pairs)=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", line
    ):
        return tuple(
            tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", written[1])
        )
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    assert iota, line
    shape, reshaped = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
    order = [int(n) for n in iota[3].split(",")] if iota[3] else range(len(reshaped))
    ids = np.arange(np.prod(reshaped)).reshape(reshaped).transpose(order).reshape(shape)
    return tuple(map(tuple, ids.tolist()))


def of_no_tokens(num_tokens):
    return Ragged(
        positions=jnp.zeros(num_tokens, jnp.int32),
        kv_lens=jnp.zeros(B, jnp.int32),
        query_starts=jnp.zeros(B + 1, jnp.int32),
        page_table=jnp.zeros((B, 4), jnp.int32),
        num_requests=jnp.asarray(0, jnp.int32),
        num_decode=jnp.asarray(0, jnp.int32),
    )


def compiled(path, mesh, num_tokens=T, form="f32", cache=None, rules=()):
    """Returns a model's collectives on a mesh, and the shapes that none of them may have."""
    model = load(open_checkpoint(path), form, mesh=mesh, rules=rules)
    pages = 8 * mesh.shape["data"]
    spec = CacheSpec(partition=model.partition, target=CPU, form=cache or form, num_pages=pages)
    program = Program(model, spec, mesh)
    text = program.text(jnp.zeros(num_tokens, jnp.int32), of_no_tokens(num_tokens))
    arrays = [*jax.tree.leaves(model), *jax.tree.leaves(program.cache)]
    return Module(text).collectives(), set().union(*map(shapes_of, arrays))


def shapes_of(array):
    """The shapes of an array and of a device's part of it, whole or a layer's; 1s left out."""
    shapes = [array.shape, *(shard.data.shape for shard in array.addressable_shards)]
    return {squeezed(shape[start:]) for shape in shapes for start in (0, 1)}


def squeezed(shape):
    return tuple(size for size in shape if size != 1)


def moved(collectives, shapes):
    """The collectives that move an array of one of the shapes, in any order of its axes."""
    known = {tuple(sorted(shape)) for shape in shapes}
    return [
        collective
        for collective in collectives
        if any(
            tuple(sorted(squeezed(shape))) in known
            for shape in (*collective.operands, *collective.results)
        )
    ]


def expected(num_tokens, config, held_vocab, groups):
    """Two sums in the layers' loop, and outside it the embedding's and the logits' gather."""
    stream = ((num_tokens, config.model_width),)
    part = ((num_tokens, held_vocab // len(groups[0])),)
    return Counter(
        {
            Collective("all-reduce", 1, stream, stream, groups): 2,
            Collective("all-reduce", 0, stream, stream, groups): 1,
            Collective("all-gather", 0, part, ((num_tokens, held_vocab),), groups): 1,
        }
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The path of a tiny model with four key heads."""
    model = TINY_MODELS["no-groups"]
    return write_hf(tmp_path_factory.mktemp("model"), model.config, model.tensors())


CONFIG = TINY_MODELS["no-groups"].config
ALL_FOUR = ((0, 1, 2, 3),)
CASES = {
    "f32": {},
    "bf16": {"form": "bf16"},
    "one token a request": {"num_tokens": B},
    "int8, int8 cache": {"rules": (("", "int8"),), "cache": "int8"},
    "int4:16": {"rules": (("", "int4:16"),)},
    "w8a8:16": {"rules": (("proj", "w8a8:16"),)},
}


@pytest.mark.parametrize("case", CASES)
def test_on_four_devices_two_sums_a_layer_and_one_gather(case, tiny):
    num_tokens = CASES[case].get("num_tokens", T)
    collectives, kept = compiled(tiny, mesh_of(model=4), **CASES[case])
    assert Counter(collectives) == expected(num_tokens, CONFIG, CONFIG.vocab_size, ALL_FOUR)
    assert moved(collectives, kept) == []


def test_data_shards_send_each_other_nothing(tiny):
    collectives, kept = compiled(tiny, mesh_of(data=2, model=2))
    groups = ((0, 1), (2, 3))
    assert Counter(collectives) == expected(T, CONFIG, CONFIG.vocab_size, groups)
    assert moved(collectives, kept) == []
    for mesh in (mesh_of(), mesh_of(data=4)):
        collectives, _ = compiled(tiny, mesh)
        assert collectives == []


@pytest.mark.parametrize(
    "name", ["qwen2-windows", "qwen3-wide-heads", "gemma3-one-key-head", "phi3-window", "olmo2"]
)
def test_other_families_send_no_more(name, tmp_path):
    """But for OLMo 2, whose norms of all queries and all keys need their sums of squares."""
    config = FAMILY_MODELS[name].config
    path = write_family_hf(tmp_path / "model", FAMILY_MODELS[name])
    collectives, kept = compiled(path, mesh_of(model=4))
    counted = expected(T, config, -(-config.vocab_size // 4) * 4, ALL_FOUR)
    if config.family == "olmo2":
        squares = ((T, 1), (T, 1))  # which the compiler sends as one
        counted[Collective("all-reduce", 1, squares, squares, ALL_FOUR)] = 1
    assert Counter(collectives) == counted
    assert moved(collectives, kept) == []


def test_a_gathered_weight_would_be_seen():
    """In a loop over layers: a product whose weight is cut along its inputs, and x is not."""
    mesh = mesh_of(model=4)
    weight = jax.device_put(
        np.ones((3, 64, 48), np.float32), sharding(mesh, ("layers", None, "ffn"))
    )
    x = jax.device_put(np.ones((T, 48), np.float32), replicated(mesh))

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(None, None, "model"), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    def program(weight, x):
        def layer(index, x):
            one = jax.lax.dynamic_index_in_dim(weight, index, keepdims=False)
            whole = jax.lax.all_gather(one, "model", axis=1, tiled=True)
            return jnp.tanh((x @ whole.T)[:, :48])

        return jax.lax.fori_loop(0, 3, layer, x)

    collectives = Module(jax.jit(program).lower(weight, x).compile().as_text()).collectives()
    (gather,) = moved(collectives, shapes_of(weight))
    assert (gather.kind, gather.depth, gather.groups) == ("all-gather", 1, ALL_FOUR)


def test_a_moved_cache_and_other_kinds_would_be_seen():
    mesh = mesh_of(data=2, model=2)
    cache = jax.device_put(np.ones((4, 6, 2, 8), np.float32), sharding(mesh, ("pages", "vocab")))
    spec = PartitionSpec("data", "model")

    @partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    def program(cache):
        cache = jax.lax.ppermute(cache, "data", [(0, 1), (1, 0)]) * 2
        cache = jax.lax.all_to_all(cache, "model", 3, 3, tiled=True) * 3
        part = jax.lax.psum_scatter(cache, "data", scatter_dimension=0, tiled=True)
        return jnp.concatenate((part, part))

    collectives = Module(jax.jit(program).lower(cache).compile().as_text()).collectives()
    kinds = Counter(collective.kind for collective in collectives)
    assert kinds == {"collective-permute": 1, "all-to-all": 1, "reduce-scatter": 1}
    # An all-to-all is of halves, one for each device.
    kinds = {collective.kind for collective in moved(collectives, shapes_of(cache))}
    assert kinds == {"collective-permute", "reduce-scatter"}


def test_groups_of_devices_are_read_however_they_are_written():
    for name in ("replica_groups", "source_target_pairs"):
        assert groups_in(f"a, {name}={{{{0,2}},{{1,3}}}}, x={{4}}") == ((0, 2), (1, 3))
    assert groups_in("replica_groups=[2,2]<=[4], x") == ((0, 1), (2, 3))
    assert groups_in("replica_groups=[2,2]<=[2,2]T(1,0), x") == ((0, 2), (1, 3))
